"""Commands that print tables of ratios: `python -m benchmarks.model`, `python -m benchmarks.startup`."""
