"""Model bundles: a folder with `model.safetensors`, `config.json`, `tokenizer.json` and `card.json`.

`card.json` holds the SHA-256 of the other three, which is checked at every load. The bundle's digest is the
SHA-256 over their names and SHA-256s, so equal digests mean equal results.

Keys of `model.safetensors`: `clap.<key of Clap>` for the query towers, `audio_branch.*` and
`decoder_model.*` for the separator. An `audio_branch` tensor that equals the tower's is left out, and both
models then share its memory.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import torch
from filelock import FileLock
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.overrides import TorchFunctionMode

from clapsep.clap import Clap
from clapsep.config import ModelConfig
from clapsep.device import find_device
from clapsep.model import ClapSep
from clapsep.query import QueryEncoder
from clapsep.retry import describe, redact, retrying

logger = logging.getLogger(__name__)

MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
CARD_FILE = "card.json"
HASHED_FILES = (MODEL_FILE, CONFIG_FILE, TOKENIZER_FILE)
TOWER_PREFIX = "clap."
CACHE_VARIABLE = "CLAPSEP_CACHE"


class BundleError(RuntimeError):
    """A bundle that cannot be loaded; one line that names the file and the fix."""

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


@dataclass(eq=False)
class Bundle:
    """A loaded model, ready for inference (float32, evaluation mode, no gradients).

    Attributes:
        model: the separator.
        clap: the query towers; shares memory with `model` wherever their weights are equal.
        tokenizer: of the text tower.
        config: sizes and numerics of both models.
        card: name, licence, sources, training data, vocabulary, parity report, and the files' SHA-256.
        digest: hexadecimal SHA-256 over model, config and tokenizer.
        size: bytes of the four files.
        device: where the weights are.
        allow_unfamiliar: whether `queries` embeds words that the model never learned.
    """

    model: ClapSep
    clap: Clap
    tokenizer: Tokenizer
    config: ModelConfig
    card: dict[str, Any]
    digest: str
    size: int
    device: torch.device
    allow_unfamiliar: bool = field(default=False)

    @cached_property
    def queries(self) -> QueryEncoder:
        """Embeds queries with this bundle's towers; one cache per bundle."""
        return QueryEncoder(
            self.clap,
            self.tokenizer,
            self.config,
            vocabulary=self.card.get("vocabulary") or (),
            allow_unfamiliar=self.allow_unfamiliar,
        )


class VerifiedBundle(NamedTuple):
    """A bundle whose files are what its card says: where they lie on this machine, and what they describe."""

    folder: Path
    digest: str
    config: ModelConfig
    card: dict[str, Any]


def load(
    uri: str | None = None, device: str | torch.device = "cpu", *, allow_unfamiliar: bool = False
) -> Bundle:
    """Load and verify a bundle.

    Args:
        uri: folder, local or any fsspec URI; None is the embedded default. A remote bundle is first copied
            to `$CLAPSEP_CACHE` (default `~/.cache/clapsep`), under its digest, once per machine.
        device: where the weights go.
        allow_unfamiliar: accept query words that the model never learned.

    Raises:
        BundleError: a file is missing, unreadable or not the one that the card describes.
        DeviceError: the device is not there.
    """
    device = find_device(device)
    folder, digest, config, card = verify(uri)
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    # Half-precision storage is upcast once, before sharing, so that both models still share memory.
    tensors = {
        key: tensor.float() if tensor.is_floating_point() else tensor
        for key, tensor in load_file(folder / MODEL_FILE, device=str(device)).items()
    }
    towers = {
        key.removeprefix(TOWER_PREFIX): value
        for key, value in tensors.items()
        if key.startswith(TOWER_PREFIX)
    }
    with SkipInitialisation():
        model, clap = ClapSep(config), Clap(config)
    separator = {key: tensors.get(key, towers.get(key)) for key in model.state_dict()}
    _assign(clap, towers, folder)
    _assign(model, {key: value for key, value in separator.items() if value is not None}, folder)
    for module in (model, clap):
        module.to(device).eval().requires_grad_(False)
    size = sum((folder / name).stat().st_size for name in (*HASHED_FILES, CARD_FILE))
    return Bundle(model, clap, tokenizer, config, card, digest, size, device, allow_unfamiliar)


def verify(uri: str | None = None) -> VerifiedBundle:
    """Check a bundle's files without loading its weights; a remote bundle is fetched as `load` does.

    Raises BundleError.
    """
    folder, card = _local_folder(uri)
    digest = _verify(folder, card)
    try:
        config = ModelConfig.from_dict(json.loads((folder / CONFIG_FILE).read_text()))
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"{folder / CONFIG_FILE}: not a configuration this version knows ({error!r}); "
            "use the clapsep version that wrote the bundle, or convert it again"
        ) from error
    return VerifiedBundle(folder, digest, config, card)


def save(
    folder: str,
    model: ClapSep,
    clap: Clap,
    tokenizer: Tokenizer,
    card: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> str:
    """Write a bundle and return its digest. The same models give the same bytes.

    Args:
        folder: where to; local or any fsspec URI. The card is written last.
        model: separator, LoRA merged.
        clap: query towers.
        tokenizer: of the text tower.
        card: everything `card.json` is to hold but the files' SHA-256.
        dtype: storage type of the weights, e.g. torch.float16; None keeps each tensor's own.

    Raises:
        BundleError: the folder cannot be written.
    """

    def stored(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().cpu()
        return (tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor).contiguous()

    tensors = {TOWER_PREFIX + key: stored(value) for key, value in clap.state_dict().items()}
    for key, value in model.state_dict().items():
        value = stored(value)
        tower = tensors.get(TOWER_PREFIX + key)
        if tower is None or not torch.equal(tower, value):
            tensors[key] = value
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch)
        save_file(tensors, written / MODEL_FILE)
        (written / CONFIG_FILE).write_text(_json(model.config.to_dict()))
        (written / TOKENIZER_FILE).write_text(tokenizer.to_str(pretty=True) + "\n")
        hashes = {name: _sha256(written / name) for name in HASHED_FILES}
        (written / CARD_FILE).write_text(_json({**card, "sha256": hashes}))
        try:
            filesystem, root = fsspec.core.url_to_fs(str(folder).rstrip("/"))
            retrying(filesystem.makedirs, root, exist_ok=True)
            for name in (*HASHED_FILES, CARD_FILE):
                retrying(filesystem.put_file, str(written / name), f"{root}/{name}")
        except Exception as error:
            # Drivers raise their clients' own errors.
            problem = f"cannot be written ({describe(error)}); choose another folder"
            raise BundleError(f"{folder}: {problem}") from error
    return _digest(hashes)


def info(bundle: Bundle) -> str:
    """What the bundle is, as lines of text: name, digest, sizes, parameters, licence, vocabulary, parity."""
    card = bundle.card
    config = bundle.config
    shared = {value.data_ptr() for value in bundle.clap.parameters()}
    separator = sum(value.numel() for value in bundle.model.parameters())
    towers = sum(value.numel() for value in bundle.clap.parameters())
    own = sum(value.numel() for value in bundle.model.parameters() if value.data_ptr() not in shared)
    vocabulary = card.get("vocabulary")
    lines = {
        "name": card.get("name", "unnamed"),
        "digest": bundle.digest,
        "size": f"{bundle.size / 1e6:.1f} MB",
        "parameters": f"{(towers + own) / 1e6:.1f} M (separator {separator / 1e6:.1f} M, "
        f"query towers {towers / 1e6:.1f} M, {(separator - own) / 1e6:.1f} M shared)",
        "audio": f"{config.sample_rate} Hz, windows of {config.window_seconds:g} s",
        "licence": card.get("licence", "not stated"),
        "queries": ", ".join(vocabulary) if vocabulary else "any English text, any recording",
    }
    text = "\n".join(f"{name:<12}{value}" for name, value in lines.items())
    rest = {key: value for key, value in card.items() if key not in (*lines, "vocabulary", "sha256")}
    return text + "".join(
        f"\n{key}: {json.dumps(value, indent=2, ensure_ascii=False)}" for key, value in rest.items()
    )


class SkipInitialisation(TorchFunctionMode):
    """Leaves new parameters uninitialised: every one is replaced by the file's."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _assign(module: torch.nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    try:
        module.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise BundleError(
            f"{folder / MODEL_FILE}: weights and {CONFIG_FILE} do not fit together "
            f"({' '.join(str(error).split())}); write the bundle again"
        ) from error


def _local_folder(uri: str | None) -> tuple[Path, dict[str, Any]]:
    if uri is None:
        uri = str(importlib.resources.files("clapsep") / "bundles" / "mini")
    uri = str(uri)
    try:
        filesystem, root = fsspec.core.url_to_fs(uri.rstrip("/"))
        written = retrying(filesystem.cat_file, f"{root}/{CARD_FILE}")
        card = json.loads(written)
        expected = {name: card["sha256"][name] for name in HASHED_FILES}
    except Exception as error:
        problem = f"no readable {CARD_FILE} ({describe(error)})"
        raise BundleError(f"{uri}: {problem}; a bundle is a folder that `clapsep convert` wrote") from error
    if isinstance(filesystem, LocalFileSystem):
        return Path(root), card
    cache = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "clapsep")
    folder = cache / _digest(expected)
    if not folder.exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            # The lock of a killed process is free at once. Its file stays: others may be waiting for it.
            with FileLock(cache / f".{folder.name}.lock"):
                if not folder.exists():
                    _fetch(filesystem, root, folder, written, where=uri)
        except FileNotFoundError as error:
            raise BundleError(f"{uri}: {error}; copy the whole bundle there") from error
        except BundleError:
            raise
        except Exception as error:
            problem = f"cannot be fetched to {cache} ({describe(error)})"
            raise BundleError(
                f"{uri}: {problem}; run again, or set {CACHE_VARIABLE} to another folder"
            ) from error
    return folder, card


def _fetch(filesystem: Any, root: str, folder: Path, card: bytes, where: str) -> None:
    """Copy the bundle of this card to `folder`, which appears whole or not at all; for who has its lock."""
    partial = folder.with_name(f".{folder.name}.partial")
    # What a killed process left.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        logger.info("fetching %s to %s", redact(where), folder)
        for name in HASHED_FILES:
            retrying(filesystem.get_file, f"{root}/{name}", str(partial / name))
        (partial / CARD_FILE).write_bytes(card)
        _verify(partial, json.loads(card), where)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _verify(folder: Path, card: Mapping[str, Any], where: str | None = None) -> str:
    found = {}
    for name in HASHED_FILES:
        expected = card["sha256"][name]
        path = folder / name
        if not path.exists():
            raise BundleError(f"{where or folder}: {name} is missing; copy the whole bundle there")
        found[name] = _sha256(path)
        if found[name] != expected:
            raise BundleError(
                f"{where or folder}: {name} is damaged or was changed (SHA-256 {found[name]}, "
                f"the card says {expected}); delete this copy of the bundle and fetch or convert it again"
            )
    return _digest(found)


def _digest(hashes: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(f"{name} {hashes[name]}\n" for name in HASHED_FILES).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
