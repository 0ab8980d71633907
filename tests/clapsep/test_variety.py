"""What the default's training data is made richer by: rooms, speaking voices, more instruments."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from clapsep.training import soundfont, vocabulary, voices
from clapsep.training.corpus import Clip, Corpus
from clapsep.training.data import NONE, Augmentation, Sampler
from tests.clapsep.training_runs import tiny_mini

FLITE = shutil.which(os.environ.get("FLITE", "flite"))
RATE = 32_000


def impulses():
    """Clips of a click every second, after its first half."""
    samples = np.zeros(2 * 8 * RATE, np.int16)
    samples[RATE // 2 :: RATE] = 20_000
    clips = [Clip(str(i), "drums", "train", "s", str(i), 16_000, i * 8 * RATE, 8 * RATE) for i in range(2)]
    return Corpus(tuple(clips), samples)


def test_in_a_room_a_sound_goes_on_and_dies_away():
    corpus = impulses()
    frames = tiny_mini().window_samples
    plain = Sampler(corpus, "train", ("drums",), frames, 0, NONE)
    rooms = Augmentation(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, reverb=1.0)
    in_a_room = Sampler(corpus, "train", ("drums",), frames, 0, rooms)
    dry, wet = plain.windows(list(corpus.clips)), in_a_room.windows(list(corpus.clips))
    for before, after in zip(dry, wet, strict=True):
        click = int(before.abs().argmax())
        assert int(after.abs().argmax()) == click or after[click].abs() > 0.1 * after.abs().max()
        energy = after[click + 1 : click + 30_000].square().split(6_000)
        assert float(before[click + 200 : click + 30_000].square().sum()) < 1e-3 * float(energy[0].sum())
        assert float(energy[0].sum()) > 2 * float(energy[-1].sum()) > 0


def test_some_sides_stay_dry():
    corpus = impulses()
    frames = tiny_mini().window_samples
    half = Augmentation(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, reverb=0.5)
    windows = Sampler(corpus, "train", ("drums",), frames, 0, half).windows(16 * list(corpus.clips))
    clicks = windows.abs().argmax(-1)
    after = torch.stack([window[at + 200 : at + 2_000] for window, at in zip(windows, clicks, strict=True)])
    dry = int((after.square().mean(-1) < 1e-8 * windows.square().amax(-1)).sum())
    assert 8 <= dry <= 24


def tones(members, bandwidth=16_000):
    """A clip of a tone of its own for each (corpus class, group)."""
    length = 8 * RATE
    frequencies = 400.0 * np.arange(1, len(members) + 1)
    samples = np.sin(2 * np.pi * frequencies[:, None] / RATE * np.arange(length)) * 16_000
    clips = [
        Clip(f"{400 * (number + 1)}", member, "train", "s", group, bandwidth, number * length, length)
        for number, (member, group) in enumerate(members)
    ]
    return Corpus(tuple(clips), samples.astype(np.int16).ravel())


def heard(side: torch.Tensor) -> dict[int, float]:
    """The tones of `tones` in a side: their frequencies, Hz, and levels relative to the loudest, dB."""
    spectrum = torch.fft.rfft(side * torch.hann_window(len(side))).abs()
    step = 400 * len(side) / RATE
    peaks = {
        400 * n: float(spectrum[int((n - 0.4) * step) : int((n + 0.4) * step)].max()) for n in range(1, 8)
    }
    loudest = max(peaks.values())
    levels = {name: 20 * np.log10(max(peak, 1e-9) / loudest) for name, peak in peaks.items()}
    return {name: level for name, level in levels.items() if level > -40}


LAYERED = Augmentation(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, layered=1.0)


def test_a_layered_side_is_of_one_corpus_class_and_shares_no_group_with_the_other():
    corpus = tones(
        [
            ("drums", "one"),  # 400 Hz
            ("drums", "two"),
            ("drums", "of both"),  # 1200 Hz: never beside birds of its group
            ("birds", "of both"),
            ("birds", "three"),
            ("dog", "alone"),  # 2400 Hz: no other dog
        ]
    )
    draws = Sampler(corpus, "train", ("drums", "birds", "dog"), tiny_mini().window_samples, 0, LAYERED)
    drums, birds, dog = corpus.clips[0], corpus.clips[3], corpus.clips[5]
    batch = draws.mixtures(16, 8 * [(drums, birds), (drums, dog)])
    for number, (target, mixture) in enumerate(zip(batch.target, batch.mixture, strict=True)):
        sides = heard(target), heard(mixture - target)
        if number % 2 == 0:
            # The third drums are of the birds' group.
            assert [set(side) for side in sides] == [{400, 800}, {1600, 2000}]
        else:
            assert set(sides[0]) <= {400, 800, 1200}
            assert len(sides[0]) == 2
            assert set(sides[1]) == {2400}
        assert all(-10.5 < level < 0.5 for side in sides for level in side.values())
        assert max(sides[0], key=sides[0].get) == 400


def test_the_second_recordings_of_two_sides_share_no_group():
    corpus = tones([("drums", "one"), ("drums", "of both"), ("birds", "two"), ("birds", "of both")])
    draws = Sampler(corpus, "train", ("drums", "birds"), tiny_mini().window_samples, 0, LAYERED)
    batch = draws.mixtures(4, 4 * [(corpus.clips[0], corpus.clips[2])])
    for target, mixture in zip(batch.target, batch.mixture, strict=True):
        assert set(heard(target)) == {400, 800}
        assert set(heard(mixture - target)) == {1200}


def test_without_layers_draws_are_as_before():
    """`evaluate` draws the test's windows with `NONE`: its table must not depend on what training adds."""
    corpus = tones([("drums", "one"), ("drums", "two"), ("birds", "three")])
    frames = tiny_mini().window_samples
    draws = Sampler(corpus, "train", ("drums", "birds"), frames, 7, NONE)
    draws.mixtures(3, 3 * [(corpus.clips[0], corpus.clips[2])])
    other = Sampler(corpus, "train", ("drums", "birds"), frames, 7, NONE)
    for clip in 3 * [corpus.clips[0]] + 3 * [corpus.clips[2]]:
        other.window(clip)
    assert draws.random.getstate() == other.random.getstate()


def test_what_is_played_slower_lowers_the_bandwidth_of_both_sides():
    slow = Augmentation(0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0)
    corpus = tones([("drums", "one"), ("birds", "two")], bandwidth=8000)
    draws = Sampler(corpus, "train", ("drums", "birds"), tiny_mini().window_samples, 0, slow)
    seen = []
    draws._filtered = lambda audio, cutoffs: seen.append(cutoffs) or audio
    batch = draws.mixtures(8, 8 * [corpus.clips])
    cutoffs, others = seen[0].chunk(2)
    assert torch.equal(cutoffs, others)
    for cutoff, target, mixture in zip(cutoffs, batch.target, batch.mixture, strict=True):
        rates = []
        for side, frequency in ((target, 400), (mixture - target, 800)):
            spectrum = torch.fft.rfft(side * torch.hann_window(len(side))).abs()
            rates.append(float(spectrum.argmax()) * RATE / len(side) / frequency)
        assert float(cutoff) == pytest.approx(8000 * min(rates), rel=0.01)


def test_training_hears_more_programs_than_the_test():
    tested = {program for _, program, _, _ in soundfont.PROGRAMS}
    more = [program for _, program, _, _ in soundfont.MORE_PROGRAMS]
    assert len(set(more)) == len(more)
    assert not tested & set(more)
    assert {name for name, *_ in soundfont.MORE_PROGRAMS} <= set(vocabulary.COARSE_OF)


@pytest.mark.skipif(FLITE is None, reason="needs the program flite (Debian; FLITE names another place)")
def test_voices_speak_at_several_pitches(monkeypatch):
    monkeypatch.setattr(voices, "CLIPS", 1)
    spoken = list(voices.render(Path(FLITE), seed=3))
    assert len(spoken) == len(voices.VOICES) * len(voices.PITCHES)
    assert {vocabulary.COARSE_OF[member] for member, _, _ in spoken} == {"speech"}
    for _, _, audio in spoken:
        assert 2 * RATE < len(audio) < 60 * RATE
        assert np.abs(audio).max() == pytest.approx(0.5)
        spectrum = torch.fft.rfft(torch.from_numpy(audio)).abs().square()
        edge = int(len(spectrum) * 1.25 * voices.BANDWIDTH_HZ / (RATE / 2))
        assert spectrum[edge:].sum() < 1e-4 * spectrum.sum()
    again = [audio for _, _, audio in voices.render(Path(FLITE), seed=3)]
    assert all(np.array_equal(one, other) for (_, _, one), other in zip(spoken, again, strict=True))
