"""The prepared corpus: every usable recording, decoded once to 32 kHz mono int16 in one memory-mapped file.

`prepare` reads a folder that holds `train_corpus/` and `sample_corpus/` (each with its ATTRIBUTION.csv)
and sound banks, and writes `samples.i16` and `clips.csv` into a cache folder outside the repository.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import soundfile
import soxr

from clapsep.training import packages, soundfont, sources, vocabulary, voices
from clapsep.training.split import NEAR_DUPLICATES, Split, source_name, splits

SAMPLE_RATE = 32000
RENDER_SECONDS = 8.0
TRAIN_RENDER_SEED = 1737
TEST_RENDER_SEED = 2325
RAIN_UNDER_THUNDER = ("with rain", "rain with")


@dataclass(frozen=True)
class Clip:
    """One recording: where its samples lie (`offset`, `frames`, in samples) and what it is.

    `bandwidth_hz` is half of the rate that the recording was made at, at most 16 kHz: nothing is above it.
    """

    name: str
    member: str
    split: Split
    source: str
    group: str
    bandwidth_hz: int
    offset: int
    frames: int

    @property
    def coarse(self) -> str:
        """The coarse class of the clip."""
        return vocabulary.COARSE_OF[self.member]


@dataclass(frozen=True)
class Corpus:
    """All clips and the samples they point into (int16, full scale 32767)."""

    clips: tuple[Clip, ...]
    samples: np.ndarray

    def audio(self, clip: Clip, start: int = 0, frames: int | None = None) -> np.ndarray:
        """float32 samples of a clip in -1..1."""
        stop = clip.frames if frames is None else min(clip.frames, start + frames)
        return self.samples[clip.offset + start : clip.offset + stop].astype(np.float32) / 32767.0

    def of(self, split: Split, names: Sequence[str] = tuple(vocabulary.BY_NAME)) -> dict[str, list[Clip]]:
        """Coarse class -> its clips in `split`, for the coarse classes `names` that have any."""
        found: dict[str, list[Clip]] = {name: [] for name in names}
        for clip in self.clips:
            if clip.split == split and clip.coarse in found:
                found[clip.coarse].append(clip)
        return {name: clips for name, clips in found.items() if clips}


def load(cache: Path) -> Corpus:
    """The corpus that `prepare` left in `cache`. Raises FileNotFoundError naming the command to run."""
    if not (cache / "clips.csv").is_file():
        raise FileNotFoundError(f"{cache} holds no corpus: run `python -m clapsep.training prepare` first")
    types = {field.name: int if field.type == "int" else str for field in fields(Clip)}
    with (cache / "clips.csv").open(newline="") as file:
        clips = tuple(Clip(**{k: types[k](v) for k, v in row.items()}) for row in csv.DictReader(file))
    return Corpus(clips, np.memmap(cache / "samples.i16", np.int16, mode="r"))


def prepare(
    folder: Path,
    cache: Path,
    train_banks: Sequence[Path],
    test_banks: Sequence[Path],
    synthesiser: Path | None = None,
    unpacked: Path | None = None,
) -> Corpus:
    """Decode everything under `folder` and render the banks into `cache`; returns the corpus.

    `synthesiser` is the program `flite`, whose voices join the training split. `unpacked` is a folder of
    unpacked packages, whose recordings join the validation split (`packages`).

    Raises ValueError for a recording that is not the one of the committed tables (`sources`, `packages`).
    """
    cache.mkdir(parents=True, exist_ok=True)
    rows = [*_large_corpus(folder / "train_corpus"), *_sample_corpus(folder / "sample_corpus")]
    rows = [row for row in rows if row[3] not in NEAR_DUPLICATES]
    known = sources.check(folder, [row[0] for row in rows])
    print(f"{known} of {len(rows)} recordings are those of the committed table", flush=True)
    if unpacked is not None:
        rows += packages.rows(unpacked)
    split_by_group = splits((row[2], row[3]) for row in rows)
    clips: list[Clip] = []
    offset = 0
    with (cache / "samples.i16").open("wb") as out:

        def add(
            name: str, member: str, split: Split, source: str, group: str, band: int, audio: np.ndarray
        ) -> None:
            nonlocal offset
            np.clip(np.round(audio * 32767.0), -32768, 32767).astype(np.int16).tofile(out)
            clips.append(Clip(name, member, split, source, group, band, offset, len(audio)))
            offset += len(audio)

        for path, member, source, group, band in rows:
            audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
            audio = soxr.resample(audio.mean(axis=1), rate, SAMPLE_RATE, "HQ")
            name = str(path.relative_to(folder if path.is_relative_to(folder) else unpacked))
            add(name, member, split_by_group[group], source, group, min(band, SAMPLE_RATE // 2), audio)
        train_programs = (*soundfont.PROGRAMS, *soundfont.MORE_PROGRAMS)
        for split, banks, programs, clips_per_program, seed in (
            ("train", train_banks, train_programs, 12, TRAIN_RENDER_SEED),
            ("test", test_banks, soundfont.PROGRAMS, 2, TEST_RENDER_SEED),
        ):
            for bank in banks:
                rendered = soundfont.render(bank, clips_per_program, RENDER_SECONDS, seed, programs)
                for index, (member, program, audio) in enumerate(rendered):
                    group = f"{bank.stem}-{program}"
                    add(f"{bank.stem}/{index:04d}", member, split, bank.stem, group, SAMPLE_RATE // 2, audio)
        if synthesiser is not None:
            for index, (member, group, audio) in enumerate(voices.render(synthesiser, TRAIN_RENDER_SEED)):
                name = f"{voices.SOURCE}/{index:04d}"
                add(name, member, "train", voices.SOURCE, group, voices.BANDWIDTH_HZ, audio)
    with (cache / "clips.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Clip)])
        writer.writeheader()
        writer.writerows(asdict(clip) for clip in clips)
    return load(cache)


def _attribution(folder: Path) -> Iterator[dict[str, str]]:
    with (folder / "ATTRIBUTION.csv").open(newline="") as file:
        yield from csv.DictReader(file)


def _large_corpus(folder: Path) -> Iterator[tuple[Path, str, str, str, int]]:
    for row in _attribution(folder):
        member = row["class"]
        if member not in vocabulary.COARSE_OF:
            continue
        if member == "thunder" and any(phrase in row["caption"] for phrase in RAIN_UNDER_THUNDER):
            continue
        band = int(float(row["orig_rate"])) // 2
        yield folder / row["file"], member, source_name(row["source"]), row["source_group"], band


def _sample_corpus(folder: Path) -> Iterator[tuple[Path, str, str, str, int]]:
    for row in _attribution(folder):
        if row["class"] not in vocabulary.SAMPLE_CLASSES:
            continue
        path = folder / row["file"]
        band = 4000 if row["package"].startswith("asterisk") else soundfile.info(path).samplerate // 2
        program = row["caption"].split("program ")[-1].split(",")[0]
        rendered = "General MIDI" in row["caption"]
        group = f"{row['package']}-{program}" if rendered else f"{row['package']}:{row['path']}"
        yield path, vocabulary.SAMPLE_CLASSES[row["class"]], row["package"], group, band
