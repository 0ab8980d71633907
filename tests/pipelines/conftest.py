from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from clapsep import bundle, storage
from clapsep.clap import Clap
from clapsep.config import DecoderConfig, EncoderConfig, ModelConfig, TextConfig
from clapsep.model import ClapSep
from pipelines import separate
from pipelines.commits import read_committed

RECORDINGS = Path(__file__).parents[2] / "manifests" / "audio"
WORDS = ["<s>", "<pad>", "</s>", "<unk>", "dog", "rain", "bell"]
CONFIG = ModelConfig(
    name="random",
    window_seconds=2.5,
    joint=16,
    encoder=EncoderConfig(spec_size=128, embed=16, depths=(1, 1, 1, 1), heads=(1, 2, 4, 8)),
    text=TextConfig(vocabulary=len(WORDS), width=16, layers=1, heads=2, feed_forward=32),
    decoder=DecoderConfig(masker_width=32, masker_layers=1, masker_heads=4),
)


def write_bundle(folder: Path, seed: int) -> str:
    """A bundle of the real architecture, small, with random weights: it separates nothing, but quickly."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    card = {"name": f"random-{seed}", "vocabulary": WORDS[4:]}
    bundle.save(str(folder), ClapSep(CONFIG), Clap(CONFIG), tokenizer, card)
    return str(folder)


@pytest.fixture(scope="session")
def random_bundle(tmp_path_factory) -> str:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "random", seed=1)


@pytest.fixture(scope="session")
def audio(tmp_path_factory) -> Path:
    """A folder of real recordings, cut short, and of files that are none."""
    folder = tmp_path_factory.mktemp("audio")
    for name, source, seconds in (
        ("room", "woman_speaking", 3.0),
        ("dog", "drums", 3.0),
        ("short", "bells", 0.4),
    ):
        samples, rate = soundfile.read(RECORDINGS / f"{source}.flac", dtype="float32")
        soundfile.write(folder / f"{name}.wav", samples[: round(seconds * rate)], rate, "PCM_16")
    stereo, rate = soundfile.read(RECORDINGS / "speech_and_violin_48k_stereo.flac", frames=4 * 48000)
    soundfile.write(folder / "street.flac", stereo, rate)
    broken, rate = soundfile.read(folder / "dog.wav", dtype="float32")
    broken[20000] = np.nan
    soundfile.write(folder / "nan.wav", broken, rate, "FLOAT")
    (folder / "text.wav").write_text("this is no audio\n" * 100)
    (folder / "empty.wav").write_bytes(b"")
    return folder


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(manifest: str | Path, output: str | Path, bundle_uri: str, *flags: str) -> int:
    """The exit code of `python -m pipelines.separate`, in this process."""
    # A given batch size: finding one calls the model.
    given = ["--manifest", str(manifest), "--output", str(output), "--model", bundle_uri]
    return separate.main([*given, "--batch-windows", "8", *flags])


def rows_by_id(table: pa.Table) -> dict[str, dict]:
    return {row["id"]: row for row in table.to_pylist()}


def tables(output: str | Path) -> tuple[dict[str, dict], dict[str, dict]]:
    """The committed (metrics, errors), by id."""
    metrics, errors = read_committed(str(output))
    return rows_by_id(metrics), rows_by_id(errors)


# What depends on where the files lie, or on when.
PLACES = frozenset(
    {
        *("manifest", "mixture", "target", "interference", "positive_audio", "negative_audio"),
        *("stem", "shard", "key", "row_digest", "wall_seconds"),
    }
)


def assert_equals_local(output: str, local: Path, but: frozenset[str] = frozenset()) -> None:
    """The metrics and stems of `output` are those of the local run, without the rows `but`."""
    expected, _ = tables(local)
    found, _ = tables(output)
    assert found.keys() == expected.keys() - but
    for name, row in found.items():
        assert {**row, **dict.fromkeys(PLACES)} == {**expected[name], **dict.fromkeys(PLACES)}
        stem = storage.read_bytes(storage.join(output, row["stem"]))
        assert stem == (local / expected[name]["stem"]).read_bytes(), name


def on_disk(output: str | Path) -> tuple[list[str], list[str]]:
    """Ids in all files of the (metrics, errors) tables, sorted, as any program sees them."""
    return tuple(
        sorted(
            row["id"]
            for path in Path(output, kind).glob("*.parquet")
            for row in pq.read_table(path).to_pylist()
        )
        for kind in ("metrics", "errors")
    )


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def model_calls(monkeypatch) -> list[int]:
    """Grows by the batch size with every call of the mixture encoder."""
    calls: list[int] = []
    original = ClapSep.encode

    def counted(self, mixture):
        calls.append(len(mixture))
        return original(self, mixture)

    monkeypatch.setattr(ClapSep, "encode", counted)
    return calls
