import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from clapsep.audio import AudioError, Recording
from clapsep.mixing import Mixture, interference_gain

AUDIO = Path(__file__).parents[2] / "manifests" / "audio"
SPEECH = str(AUDIO / "woman_speaking.flac")
DRUMS = str(AUDIO / "drums_2.flac")
STEREO_48K = str(AUDIO / "speech_and_violin_48k_stereo.flac")


def decibels(signal, noise):
    return 10 * np.log10(np.square(signal, dtype=np.float64).sum() / np.square(noise, dtype=np.float64).sum())


def read(source):
    with source:
        mixture, target = (np.concatenate(blocks) for blocks in zip(*source.blocks(), strict=True))
    return mixture, target


@given(st.integers(0, 2**32 - 1), st.floats(-30, 30), st.floats(1e-3, 1e3))
@settings(max_examples=50, deadline=None)
def test_gain_reaches_the_ratio(seed, snr_db, level):
    rng = np.random.default_rng(seed)
    target, interference = rng.standard_normal((2, 2, 500)) * np.array([1.0, level])[:, None, None]
    gain = interference_gain(np.square(target).sum(), np.square(interference).sum(), snr_db)
    assert decibels(target, gain * interference) == pytest.approx(snr_db, abs=1e-9)


@pytest.mark.parametrize("energies", [(0.0, 1.0), (1.0, 0.0), (float("nan"), 1.0)])
def test_no_gain_for_silence(energies):
    with pytest.raises(ValueError, match="silent"):
        interference_gain(*energies, 0.0)


@pytest.mark.parametrize("snr_db", [-7.5, 0.0, 20.0])
@pytest.mark.parametrize(
    ("target", "interference"),
    [(SPEECH, DRUMS), (DRUMS, SPEECH), (SPEECH, STEREO_48K), (STEREO_48K, SPEECH)],
    ids=["looped", "cut", "resampled to 16 kHz mono", "resampled to 48 kHz stereo"],
)
def test_files_reach_the_ratio_in_the_targets_format(target, interference, snr_db):
    wanted, rate = soundfile.read(target, dtype="float32", always_2d=True)
    source = Mixture(target, interference, snr_db)
    mixture, clean = read(source)
    assert (source.sample_rate, source.frames, source.channels) == (rate, *wanted.shape)
    np.testing.assert_array_equal(clean, wanted)
    assert decibels(clean, mixture - clean) == pytest.approx(snr_db, abs=1e-3)


def test_interference_repeats_from_its_beginning():
    mixture, clean = read(Mixture(SPEECH, DRUMS))
    drums = soundfile.read(DRUMS, dtype="float32", always_2d=True)[0]
    added = mixture - clean
    gain = np.abs(added[: len(drums)]).max() / np.abs(drums).max()
    rest = added[len(drums) :]
    np.testing.assert_allclose(rest, gain * drums[: len(rest)], atol=1e-5)


def test_interference_of_a_few_samples_is_opened_once_for_all_its_repetitions(tmp_path, monkeypatch):
    click = str(tmp_path / "click.wav")
    soundfile.write(click, np.float32([0.5, -0.25, 0.125]), 16000, "FLOAT")
    opened = []
    enter = Recording.__enter__
    monkeypatch.setattr(Recording, "__enter__", lambda self: opened.append(self.uri) or enter(self))
    mixture, clean = read(Mixture(STEREO_48K, click))
    assert opened.count(click) == 2, "once for the energies, once for the blocks"
    mixture, clean = read(Mixture(SPEECH, click))
    added = (mixture - clean)[:, 0]
    np.testing.assert_allclose(added, np.resize([0.5, -0.25, 0.125], len(added)) * added[0] / 0.5, atol=1e-5)


def test_segment_of_the_target():
    whole = soundfile.read(SPEECH, dtype="float32", always_2d=True)[0]
    mixture, clean = read(Mixture(SPEECH, DRUMS, 3.0, start=1.0, duration=2.0))
    np.testing.assert_array_equal(clean, whole[16000:48000])
    assert decibels(clean, mixture - clean) == pytest.approx(3.0, abs=1e-3)


def test_same_bytes_twice():
    np.testing.assert_array_equal(*(read(Mixture(SPEECH, STEREO_48K))[0] for _ in range(2)))


def test_silent_interference_is_named(tmp_path):
    silent = tmp_path / "silent.wav"
    soundfile.write(silent, np.zeros(16000), 16000)
    with pytest.raises(AudioError, match=r"silent\.wav.*silent"), Mixture(SPEECH, str(silent)):
        pass


def test_missing_interference_is_named(tmp_path):
    shutil.copy(SPEECH, tmp_path / "target.flac")
    with pytest.raises(AudioError, match=r"gone\.flac"):
        Mixture(str(tmp_path / "target.flac"), str(tmp_path / "gone.flac")).__enter__()
