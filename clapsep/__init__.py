"""CLAPSep: separate a sound described by text or by example from any recording.

``Separator`` and ``Query`` load on first use, so that importing the package costs no torch.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["Query", "Separator", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Separator":
        from clapsep.engine import Separator

        return Separator
    if name == "Query":
        from clapsep.query import Query

        return Query
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
