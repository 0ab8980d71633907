"""Peak memory against the length of a recording: 48 kHz stereo FLAC in, FLAC stem out.

`python -m benchmarks.memory [--minutes 1 10 60 180] [--model none]`. Every length runs in a process of its
own, through the engine with the settings of a pipeline run (metrics, files and all); the figure is the
highest resident set of that process. `--model none` has a model that keeps everything in place of the
embedded default: quick, and it shows the same queues filled faster.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
from torch import Tensor

from clapsep import bundle
from clapsep.audio import Recording
from clapsep.engine import Engine, Job, Request
from clapsep.query import Query
from pipelines.options import Plan, Settings
from pipelines.rows import parse_row
from pipelines.stems import StemSink
from pipelines.tables import Shard

CLIP = Path(__file__).parents[1] / "manifests" / "audio" / "speech_and_violin_48k_stereo.flac"
MINUTES = (1.0, 10.0, 60.0, 180.0)


class Identity:
    """A window model that keeps everything."""

    sample_rate = 32_000
    window = 320_000

    def encode(self, mixture: Tensor) -> Tensor:
        """(B, window), as it is."""
        return mixture

    def decode(self, encoded: Tensor, index: Tensor, condition: Tensor) -> Tensor:
        """(N, window), the mixtures numbered by `index`."""
        return encoded[index]


def write_recording(path: Path, minutes: float) -> None:
    """A FLAC file of that length, made of a real recording at levels that fall and rise again."""
    clip, rate = soundfile.read(CLIP, dtype="float32", always_2d=True)
    with soundfile.SoundFile(path, "w", rate, clip.shape[1], "PCM_16") as file:
        remaining = round(minutes * 60 * rate)
        for i in range(sys.maxsize):
            if remaining <= 0:
                return
            level = np.float32(0.3 + 0.7 * abs(np.sin(i)))
            file.write(clip[:remaining] * level)
            remaining -= len(clip)


def separate(recording: Path, output: Path, model: str) -> dict[str, float]:
    """Separate in this process; its peak resident set in bytes, seconds taken, seconds of audio."""
    loaded = bundle.load(None)
    condition = loaded.queries.conditions([Query(["a person speaking"])])[0]
    engine = Engine(Identity() if model == "none" else loaded.model)
    plan = Plan(str(output), 1, Settings(), None, loaded.digest)
    row = parse_row({"id": "long", "mixture": str(recording), "positive_text": "a"}, manifest="m", number=1)
    shard = Shard(str(output), 0, 1)
    request = Request(
        "long", condition, lambda source: StemSink(row, plan, shard, source), lambda: Recording(recording)
    )
    began = time.monotonic()
    (result,) = engine.run([Job(lambda: Recording(recording), (request,))])
    if result.error is not None:
        raise result.error
    return {
        "peak": _peak(),
        "seconds": time.monotonic() - began,
        "audio": result.value["duration_s"],
    }


def _peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not say what the process's peak was")


def measure(minutes: float, model: str) -> dict[str, float]:
    """`separate` in a process of its own, on a recording made for it."""
    with tempfile.TemporaryDirectory() as folder:
        recording = Path(folder) / "recording.flac"
        write_recording(recording, minutes)
        command = [sys.executable, "-m", "benchmarks.memory", "--child", str(recording), folder, model]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, nargs="+", default=MINUTES)
    parser.add_argument("--model", choices=("default", "none"), default="default")
    parser.add_argument("--child", nargs=3, metavar=("RECORDING", "OUTPUT", "MODEL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        recording, output, model = arguments.child
        print(json.dumps(separate(Path(recording), Path(output), model)))
        return
    print(f"48 kHz stereo, model: {arguments.model}")
    print(f"{'audio':>10}{'peak RSS':>12}{'above the first':>18}{'x real time':>13}")
    first = None
    for minutes in arguments.minutes:
        found = measure(minutes, arguments.model)
        first = found["peak"] if first is None else first
        print(
            f"{minutes:>6g} min{found['peak'] / 1e6:>9.0f} MB{(found['peak'] - first) / 1e6:>15.0f} MB"
            f"{found['audio'] / found['seconds']:>13.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
