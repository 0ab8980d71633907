"""The window engine: any recording through a model that hears one short window at a time, in constant memory.

`jobs` says what goes in and what comes out, `windows` cuts a recording and joins its stems, `batches` brings
windows to the model, `scheduler` moves many recordings through decoding, model and encoding at once, `memory`
finds the batch size, `separator` is the Python API for one waveform.
"""

from clapsep.engine.jobs import Job, Request, Result, Sink, Stats, WindowModel
from clapsep.engine.memory import fitting_batch
from clapsep.engine.scheduler import Engine, Run
from clapsep.engine.separator import Separation, Separator

__all__ = [
    "Engine",
    "Job",
    "Request",
    "Result",
    "Run",
    "Separation",
    "Separator",
    "Sink",
    "Stats",
    "WindowModel",
    "fitting_batch",
]
