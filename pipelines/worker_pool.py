"""`python -m pipelines.worker_pool --service_port=50000`: Beam's worker pool, from this environment.

For `--environment_type=EXTERNAL`: a job service asks it for Python workers, and it starts them here. Beam's
own entry point starts whatever `python` is first on PATH.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

from apache_beam.runners.worker import worker_pool_main

from pipelines.options import UsageError


def own_python_first() -> None:
    """Let the processes that Beam starts as plain `python` be this environment's. Raises UsageError.

    Another one, without Beam, would die at once, and the job would wait for it for ever.
    """
    own = Path(sys.executable)
    if not (own.parent / "python").exists() or not own.samefile(own.parent / "python"):
        raise UsageError(
            f"{own}: has no `python` beside it that is the same, and Beam starts its workers by that name; "
            "run from a virtual environment"
        )
    os.environ["PATH"] = os.pathsep.join([str(own.parent), os.environ.get("PATH", "")])


def main() -> int:
    """Serve until SIGTERM or SIGINT, which end the workers, too."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        own_python_first()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # Beam ends its workers at a regular exit only.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    worker_pool_main.main(sys.argv[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
