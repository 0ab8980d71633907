from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from clapsep import bundle, convert, retry
from clapsep.bundle import Bundle
from tests.clapsep.checkpoints import write_clap, write_clapsep, write_tokenizer
from tests.faulty_store import FaultyStore
from tests.golden import TINY
from tests.object_store import GcsStore, ObjectStore, S3Store

# Before gcsfs is imported: against an emulator its probes of zonal buckets take minutes.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"


@pytest.fixture(scope="session")
def published_tiny(tmp_path_factory) -> Path:
    """A folder with `clap.pt`, `clapsep.ckpt` and `tokenizer/`, tiny size."""
    folder = tmp_path_factory.mktemp("published_tiny")
    write_clap(folder / "clap.pt", "tiny")
    write_clapsep(folder / "clapsep.ckpt", "tiny")
    write_tokenizer(folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def tiny_folder(published_tiny, tmp_path_factory) -> Path:
    """The bundle that these files convert to."""
    folder = tmp_path_factory.mktemp("tiny") / "bundle"
    files = (str(published_tiny / name) for name in ("clap.pt", "clapsep.ckpt", "tokenizer"))
    convert.convert(*files, str(folder), name="tiny", config=TINY)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder) -> Bundle:
    return bundle.load(str(tiny_folder))


@pytest.fixture(scope="session")
def word_tokenizer() -> Tokenizer:
    """Whole words only, like the embedded default's: everything else is `<unk>`."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "dog", "rain"]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries follow each other at once."""
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.0)


@pytest.fixture
def faulty_store() -> Iterator[type[FaultyStore]]:
    """`faulty://`, empty."""
    fsspec.register_implementation("faulty", FaultyStore, clobber=True)
    FaultyStore.reset()
    yield FaultyStore
    FaultyStore.reset()


@pytest.fixture(scope="session")
def gcs_store() -> Iterator[GcsStore]:
    with GcsStore() as store:
        yield store


@pytest.fixture(scope="session")
def s3_store() -> Iterator[S3Store]:
    with S3Store() as store:
        yield store


@pytest.fixture(scope="session", params=["gcs_store", "s3_store"], ids=["gs", "s3"])
def object_store(request: pytest.FixtureRequest) -> ObjectStore:
    """Each kind of store in turn."""
    return request.getfixturevalue(request.param)
