"""The window engine: any recording through a model that hears one short window at a time, in constant memory.

`jobs` says what goes in and what comes out, `windows` cuts a recording and joins its stem, `scheduler` runs
many recordings through the model at once, `separator` is the Python API for one waveform.
"""

from clapsep.engine.jobs import Job, Result, Sink, Stats, WindowModel
from clapsep.engine.scheduler import Engine
from clapsep.engine.separator import Separation, Separator

__all__ = ["Engine", "Job", "Result", "Separation", "Separator", "Sink", "Stats", "WindowModel"]
