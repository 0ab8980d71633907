"""The `clapsep` command, with a bundle of regenerated weights at the tiny size."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from clapsep import Query, Separator, bundle, cli, convert
from clapsep.audio import AudioError
from tests.clapsep.recordings import CLIPS
from tests.golden import TINY

RATE = 22050
QUERY = ["--positive", "a dog barking", "--negative", "traffic noise"]


@pytest.fixture
def street(tmp_path: Path) -> Path:
    path = tmp_path / "street.wav"
    samples = np.random.default_rng(3).standard_normal((RATE * 2 + 17, 2)) * 0.1
    soundfile.write(path, samples.astype(np.float32), RATE, subtype="FLOAT")
    return path


def test_separate_writes_stem_and_residual_that_sum_to_the_mixture(
    street: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = street.parent / "out"
    arguments = ["separate", str(street), *QUERY, "--model", str(tiny_folder), "--output", str(folder)]
    assert cli.main([*arguments, "--residual"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["street.residual.flac", "street.stem.flac"]
    mixture, _ = soundfile.read(street, dtype="float32")
    stem, rate = soundfile.read(folder / "street.stem.flac", dtype="float32")
    residual, _ = soundfile.read(folder / "street.residual.flac", dtype="float32")
    assert (rate, stem.shape) == (RATE, mixture.shape)
    assert np.abs(stem).max() > 1e-3
    # Each file is rounded to 24 bits.
    np.testing.assert_allclose(stem + residual, mixture, rtol=0, atol=2.0**-22)
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0].startswith(f"{folder}/street.stem.flac  2 channels, 22050 Hz, 2.001 s")
    assert "x real time" in printed.err
    assert "embedded" not in printed.err


def test_separate_equals_the_python_api(street: Path, tiny_folder: Path) -> None:
    output = street.parent / "voice.wav"
    arguments = ["separate", str(street), *QUERY, "--model", str(tiny_folder), "--output", str(output)]
    assert cli.main(arguments) == 0
    assert not (street.parent / "voice.residual.wav").exists()
    mixture, _ = soundfile.read(street, dtype="float32")
    written, _ = soundfile.read(output, dtype="float32")
    separator = Separator.load(str(tiny_folder))
    separation = separator.separate(mixture.T, RATE, positive="a dog barking", negative=["traffic noise"])
    np.testing.assert_array_equal(written, separation.stem.T)
    np.testing.assert_allclose(separation.stem + separation.residual, mixture.T, rtol=0, atol=1e-6)
    other = separator.separate(mixture.T, RATE, positive="traffic noise", negative="a dog barking")
    assert np.abs(other.stem - separation.stem).max() > 1e-3
    mono = separator.separate(mixture[:, 0], RATE, positive="a dog barking", negative="traffic noise")
    np.testing.assert_allclose(mono.stem, separation.stem[0], rtol=0, atol=1e-6)


def test_audio_queries_and_hop_reach_the_model(street: Path, tiny_folder: Path) -> None:
    def stem(*arguments: str) -> np.ndarray:
        output = street.parent / "stem.wav"
        common = ["--model", str(tiny_folder), "--output", str(output)]
        assert cli.main(["separate", str(street), *common, *arguments]) == 0
        return soundfile.read(output, dtype="float32")[0]

    separator = Separator.load(str(tiny_folder), hop_seconds=10.0)
    mixture, _ = soundfile.read(street, dtype="float32")
    expected = separator.separate(mixture.T, RATE, positive_audio=[str(street)], negative=["piano"])
    by_audio = stem("--positive-audio", str(street), "--negative", "piano", "--hop", "10")
    np.testing.assert_array_equal(by_audio, expected.stem.T)
    assert np.abs(by_audio - stem("--positive", "piano")).max() > 1e-3


def test_without_a_model_the_embedded_one_is_used_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = str(CLIPS / "speech_and_violin_48k_stereo.flac")
    arguments = ["--positive", "a woman speaking", "--negative", "violin", "--output", str(tmp_path)]
    assert cli.main(["separate", clip, *arguments]) == 0
    embedded = bundle.load()
    name, digest = embedded.card["name"], embedded.digest[:12]
    assert f"using the embedded default {name!r} ({digest})" in capsys.readouterr().err
    mixture, rate = soundfile.read(clip)
    stem, stem_rate = soundfile.read(tmp_path / "speech_and_violin_48k_stereo.stem.flac")
    assert (stem.shape, stem_rate) == (mixture.shape, rate)
    # The woman speaks, and the violin does not stay.
    assert 0.05 < np.abs(stem).mean() / np.abs(mixture).mean() < 0.95


def test_clipping_is_said(street: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loud = street.parent / "loud.wav"
    mixture, _ = soundfile.read(street, dtype="float32")
    soundfile.write(loud, mixture * 40, RATE, subtype="FLOAT")
    arguments = ["separate", str(loud), *QUERY, "--model", str(tiny_folder)]
    assert cli.main([*arguments, "--output", str(street.parent)]) == 0
    assert "loud.stem.flac lay beyond full scale and were clipped" in capsys.readouterr().err
    assert cli.main([*arguments, "--output", str(street.parent / "loud.stem.w64")]) == 0
    assert "clipped" not in capsys.readouterr().err


def test_mistakes_are_one_line_with_exit_code_2_and_write_nothing(
    street: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(tiny_folder)]
    text = street.parent / "notes.wav"
    text.write_text("not audio")
    damaged = street.parent / "damaged"
    shutil.copytree(tiny_folder, damaged)
    with (damaged / "config.json").open("a") as file:
        file.write(" ")
    before = sorted(street.parent.rglob("*"))
    cases = [
        ([str(street.parent / "nowhere.wav"), *QUERY, *model], "does not exist"),
        ([str(text), *QUERY, *model], "not audio"),
        ([str(street), *model], "query is empty"),
        ([str(street), "--positive", "dog " * 100, *model], "tokens"),
        ([str(street), "--positive-audio", str(text), *model], "not audio"),
        ([str(street), *QUERY, "--model", str(street.parent)], "bundle"),
        ([str(street), *QUERY, "--model", str(damaged)], "config.json"),
        ([str(street), *QUERY, *model, "--hop", "11"], "--hop 11"),
        ([str(street), *QUERY, *model, "--device", "abacus"], "--device abacus"),
        ([str(street), *QUERY, *model, "--output", str(street)], "overwritten"),
        ([str(street), *QUERY, *model, "--output", str(street.parent / "stem.mp3")], ".flac"),
        ([str(street), *QUERY, *model, "--output", str(street / "x")], "cannot be written"),
    ]
    for arguments, message in cases:
        if "--output" not in arguments:
            arguments = [*arguments, "--output", str(street.parent / "out")]
        assert cli.main(["separate", *arguments]) == 2, arguments
        printed = capsys.readouterr()
        assert printed.out == ""
        assert len(printed.err.splitlines()) == 1, printed.err
        assert printed.err.startswith("clapsep: error: ")
        assert message in printed.err
    assert sorted(street.parent.rglob("*")) == before


def test_separator_refuses_what_is_not_a_waveform(tiny_folder: Path) -> None:
    separator = Separator.load(str(tiny_folder))
    with pytest.raises(ValueError, match="int16"):
        separator.separate(np.zeros((2, 100), np.int16), RATE, positive="dog")
    with pytest.raises(ValueError, match=r"\(1, 1, 5\)"):
        separator.separate(np.zeros((1, 1, 5), np.float32), RATE, positive="dog")
    with pytest.raises(AudioError, match="at least one sample"):
        separator.separate(np.zeros((1, 0), np.float32), RATE, positive="dog")
    with pytest.raises(AudioError, match="sample 3 of the waveform is NaN"):
        separator.separate(np.array([0, 0, 0, np.nan], np.float32), RATE, positive="dog")
    with pytest.raises(ValueError, match="query is empty"):
        separator.separate(np.zeros((1, 10), np.float32), RATE)


@pytest.mark.parametrize(
    ("source", "output", "stem", "residual"),
    [
        ("a/street.mp3", ".", "street.stem.flac", "street.residual.flac"),
        ("gs://b/street.wav", "s3://c/d/", "s3://c/d/street.stem.flac", "s3://c/d/street.residual.flac"),
        ("a.b.wav", "out", "out/a.b.stem.flac", "out/a.b.residual.flac"),
        ("street.wav", "x/dog.WAV", "x/dog.WAV", "x/dog.residual.WAV"),
        ("street.wav", "x/v1.0", "x/v1.0/street.stem.flac", "x/v1.0/street.residual.flac"),
    ],
)
def test_output_names(source: str, output: str, stem: str, residual: str) -> None:
    assert cli.stem_paths(source, output) == (stem, residual)


def test_convert_then_info(
    published_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    files = {"clap": "clap.pt", "clapsep": "clapsep.ckpt", "tokenizer": "tokenizer"}
    arguments = ["convert", *(f"--{name}={published_tiny / file}" for name, file in files.items())]
    arguments += [f"--out={out}", "--name=small", "--half"]
    # The command converts the published size only, and these files are not of it.
    assert cli.main(arguments) == 2
    assert "misshapen" in capsys.readouterr().err
    assert not out.exists()
    monkeypatch.setattr(convert, "convert", functools.partial(convert.convert, config=TINY))
    assert cli.main(arguments) == 0
    digest = bundle.load(str(out)).digest
    assert capsys.readouterr().out == f"{out}  {digest}\n"
    assert (out / "model.safetensors").stat().st_size < 2.2 * sum(
        parameter.numel() for parameter in bundle.load(str(out)).model.parameters()
    ) + 2.2 * sum(parameter.numel() for parameter in bundle.load(str(out)).clap.parameters())
    assert cli.main(["info", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "small" in printed
    assert digest in printed


def test_package_and_help_load_without_torch() -> None:
    code = "import sys, clapsep, clapsep.cli; assert 'torch' not in sys.modules; print(clapsep.__version__)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout == "0.1.0\n"
    module = [sys.executable, "-m", "clapsep"]
    helped = subprocess.run([*module, "separate", "--help"], capture_output=True, text=True, check=True)
    assert "--positive TEXT" in helped.stdout
    bad = subprocess.run([*module, "separate", "nowhere.wav"], capture_output=True, text=True)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "clapsep: error: 'nowhere.wav' does not exist; check the URI\n"


def test_lazy_exports() -> None:
    assert Query("dog").positive_text == ("dog",)
    with pytest.raises(ImportError, match="nothing"):
        from clapsep import nothing  # noqa: F401
