"""Recordings rendered from a General MIDI sound bank: random melodies and drum patterns, seeded.

One bank is one source: banks used to train are never used to test. Needs `tinysoundfont`, which
`make train-mini` installs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

SAMPLE_RATE = 32000
DRUM_CHANNEL = 9

PROGRAMS: tuple[tuple[str, int, int, int], ...] = (
    # corpus class, General MIDI program (from 0), lowest and highest MIDI note of the melodies
    ("piano", 0, 36, 88),
    ("piano", 1, 36, 88),
    ("piano", 3, 36, 84),
    ("guitar_nylon", 24, 40, 76),
    ("guitar_acoustic", 25, 40, 79),
    ("harp", 46, 36, 88),
    ("glockenspiel", 9, 72, 100),
    ("music_box", 10, 60, 96),
    ("vibraphone", 11, 53, 89),
    ("bell", 14, 55, 84),
    ("violin", 40, 55, 91),
    ("violin", 41, 48, 79),
    ("cello", 42, 36, 72),
    ("contrabass", 43, 28, 55),
    ("trumpet", 56, 54, 82),
    ("trombone", 57, 40, 72),
    ("tuba", 58, 28, 55),
    ("french_horn", 60, 41, 74),
    ("saxophone", 64, 56, 84),
    ("saxophone", 65, 49, 80),
    ("saxophone", 66, 44, 76),
    ("oboe", 68, 58, 88),
    ("bassoon", 70, 34, 70),
    ("clarinet", 71, 50, 86),
    ("flute", 73, 60, 94),
    ("organ", 16, 36, 84),
    ("organ", 19, 36, 84),
    ("harmonium", 21, 48, 84),
)
MORE_PROGRAMS: tuple[tuple[str, int, int, int], ...] = (
    ("piano", 2, 36, 88),
    ("glockenspiel", 8, 60, 96),
    ("organ", 17, 36, 84),
    ("organ", 18, 36, 84),
    ("organ", 20, 48, 84),
    ("harmonium", 22, 60, 88),
    ("harmonium", 23, 48, 84),
    ("guitar_acoustic", 26, 40, 79),
    ("violin", 44, 48, 88),
    ("violin", 48, 40, 88),
    ("violin", 49, 40, 88),
    ("trumpet", 59, 54, 82),
    ("trumpet", 61, 48, 79),
    ("saxophone", 67, 36, 69),
    ("oboe", 69, 52, 81),
    ("flute", 72, 74, 100),
    ("flute", 74, 60, 91),
    ("flute", 75, 60, 91),
    ("violin", 110, 55, 91),
    ("oboe", 111, 58, 84),
    ("bell", 112, 60, 96),
)
"""Relatives of the instruments above, for training alone: ensembles, muted and folk instruments."""
DRUM_KITS = (0, 8, 16, 24, 25, 32, 40)
CHORDAL = frozenset({"piano", "guitar_nylon", "guitar_acoustic", "harp", "organ", "harmonium"})
SCALE = (0, 2, 4, 5, 7, 9, 11)
TIMEKEEPERS = (42, 42, 42, 46, 51)
TOMS = (41, 43, 45, 47, 48, 50)


def render(
    bank: Path,
    clips_per_program: int,
    seconds: float,
    seed: int,
    programs: Sequence[tuple[str, int, int, int]] = PROGRAMS,
) -> Iterator[tuple[str, int, np.ndarray]]:
    """(corpus class, program, mono float32 at 32 kHz) for each of `programs` and drum kits that the bank has.

    A drum kit's program is reported as 1000 + kit. Silent renders are left out. Raises FileNotFoundError
    when `bank` is not a file, ImportError (with the fix) without tinysoundfont.
    """
    try:
        import tinysoundfont
    except ImportError as error:
        fix = "rendering a sound bank needs it: pip install --no-deps tinysoundfont"
        raise ImportError(f"tinysoundfont is missing; {fix}") from error
    if not bank.is_file():
        raise FileNotFoundError(f"{bank} is not a sound bank file")
    synth = tinysoundfont.Synth(samplerate=SAMPLE_RATE)
    font = synth.sfload(str(bank))
    rng = np.random.default_rng(seed)
    for name, program, low, high in programs:
        for _ in range(clips_per_program):
            synth.program_select(0, font, 0, program)
            events = _melody(rng, seconds, low, high, name in CHORDAL)
            yield from _audible(name, program, _play(synth, 0, events, seconds))
    kits = {}
    for kit in DRUM_KITS:
        kits.setdefault(synth.sfpreset_name(font, 128, kit), kit)
    kits.pop(None, None)
    for kit in kits.values():
        for _ in range(clips_per_program * 3):
            synth.program_select(DRUM_CHANNEL, font, 128, kit, True)
            yield from _audible("drums", 1000 + kit, _play(synth, DRUM_CHANNEL, _beat(rng, seconds), seconds))


def _audible(name: str, program: int, audio: np.ndarray) -> Iterator[tuple[str, int, np.ndarray]]:
    peak = float(np.abs(audio).max())
    if peak > 1e-3:
        yield name, program, audio * np.float32(0.5 / peak)


def _melody(rng: np.random.Generator, seconds: float, low: int, high: int, chordal: bool):
    """(time, note, velocity or 0 for the release) triples, in order."""
    events = []
    key, centre = rng.integers(0, 12), rng.integers(low + 4, max(low + 5, high - 4))
    allowed = [n for n in range(low, high + 1) if (n - key) % 12 in SCALE and abs(n - centre) <= 12]
    beat = 60.0 / rng.uniform(55, 150)
    time = 0.0
    while time < seconds:
        length = beat * float(rng.choice([0.5, 1, 1, 2, 3]))
        count = int(rng.integers(2, 5)) if chordal and rng.random() < 0.4 else 1
        velocity = int(rng.integers(55, 122))
        if rng.random() > 0.08:
            for note in rng.choice(allowed, size=min(count, len(allowed)), replace=False):
                held = length * rng.uniform(0.6, 1.1 if count == 1 else 1.6)
                events += [(time, int(note), velocity), (time + held, int(note), 0)]
        time += length
    return sorted(events)


def _beat(rng: np.random.Generator, seconds: float):
    step = 60.0 / rng.uniform(70, 150) / 4
    timekeeper = int(rng.choice(TIMEKEEPERS))
    kick, snare, density = rng.random(16) < 0.3, rng.random(16) < 0.12, rng.uniform(0.3, 1.0)
    kick[0] = snare[4] = snare[12] = True
    events = []
    for index in range(int(seconds / step)):
        place, time = index % 16, index * step
        hits = []
        if place % 2 == 0 and rng.random() < density:
            hits.append(timekeeper)
        if kick[place]:
            hits.append(int(rng.choice([35, 36])))
        if snare[place]:
            hits.append(int(rng.choice([38, 40])))
        if rng.random() < 0.05:
            hits.append(int(rng.choice(TOMS)))
        if place == 0 and rng.random() < 0.2:
            hits.append(49)
        for note in set(hits):
            events += [(time, note, int(rng.integers(60, 122))), (time + step * 0.9, note, 0)]
    return sorted(events)


def _play(synth, channel: int, events, seconds: float) -> np.ndarray:
    synth.sounds_off(channel)
    parts, position = [], 0
    for time, note, velocity in events:
        until = min(int(time * SAMPLE_RATE), int(seconds * SAMPLE_RATE))
        if until > position:
            parts.append(np.array(synth.generate(until - position), copy=True))
            position = until
        if velocity:
            synth.noteon(channel, note, velocity)
        else:
            synth.noteoff(channel, note)
    rest = int(seconds * SAMPLE_RATE) - position
    if rest > 0:
        parts.append(np.array(synth.generate(rest), copy=True))
    audio = np.concatenate([np.frombuffer(part, np.float32).reshape(-1, 2) for part in parts])
    return audio.mean(axis=1)
