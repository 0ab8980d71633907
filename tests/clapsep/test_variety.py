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
