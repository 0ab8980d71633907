"""Speech of the synthesiser flite (CMU, BSD-like licence): its voices, each also higher and lower.

The words are those that the default is asked by, in random order: what is said does not matter.
"""

from __future__ import annotations

import random
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr

from clapsep.training import vocabulary

SOURCE = "flite"
SAMPLE_RATE = 32000
BANDWIDTH_HZ = 8000

VOICES = {"awb": "speech_male", "rms": "speech_male", "kal16": "speech_male", "slt": "speech_female"}
PITCHES = (0.84, 0.92, 1.0, 1.09, 1.19)
CLIPS = 2
"""For each voice and pitch."""


def render(flite: Path, seed: int) -> Iterator[tuple[str, str, np.ndarray]]:
    """(corpus class, source group, mono float32 at 32 kHz), several seconds each.

    Raises subprocess.CalledProcessError, FileNotFoundError where `flite` does not run.
    """
    choose = random.Random(seed)
    wordings = [text for texts in vocabulary.all_wordings().values() for text in texts]
    words = sorted({word for text in wordings for word in text.split()})
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "speech.wav"
        for voice, member in VOICES.items():
            for pitch in PITCHES:
                for _ in range(CLIPS):
                    sentences = (" ".join(choose.choices(words, k=choose.randint(3, 9))) for _ in range(4))
                    stretch = f"duration_stretch={choose.uniform(0.8, 1.3):.2f}"
                    command = [
                        flite,
                        "-voice",
                        voice,
                        "--setf",
                        stretch,
                        "-t",
                        ". ".join(sentences),
                        "-o",
                        out,
                    ]
                    subprocess.run(command, check=True, capture_output=True)
                    audio, rate = soundfile.read(out, dtype="float32")
                    # Played faster, a voice is higher and its mouth is smaller: another speaker.
                    spoken = soxr.resample(audio, rate * pitch, SAMPLE_RATE, "HQ")
                    yield member, f"{SOURCE}-{voice}", np.float32(0.5) * spoken / np.abs(spoken).max()
