"""Training of the embedded default model: data, losses, contrastive pre-training, separation, measurement.

Run as `python -m clapsep.training COMMAND`; needs the extra `train`.
"""
