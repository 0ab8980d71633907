"""``python -m clapsep`` is the ``clapsep`` command."""

from __future__ import annotations

import sys

from clapsep.cli import main

sys.exit(main())
