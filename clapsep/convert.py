"""Published checkpoints to bundles. The only module that unpickles, and that touches laion-clap.

Two files make a CLAPSep model: the LAION-CLAP checkpoint `music_audioset_epoch_15_esc_90.14.pt` (query towers
and the encoder's weights) and CLAPSep's `best_model.ckpt` (decoder, and LoRA with its own biases for the
encoder's attention). LoRA (arXiv 2106.09685) is merged: W + B @ A * alpha / rank with alpha = 1.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
import types
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor

from clapsep import bundle
from clapsep.clap import Clap
from clapsep.config import BASE, ModelConfig
from clapsep.model import ClapSep

CLAP_SHA256 = "fae3e9c087f2909c28a09dc31c8dfcdacbc42ba44c70e972b58c1bd1caf6dedd"
CLAPSEP_SHA256 = "6fcc8dbcd7174af86266cf16b4105eced0802352762f81dbfefdce29af3dba04"
LICENCE = (
    "not stated by the authors of the published weights; supplied by the user, not to be redistributed "
    "without their permission"
)
LORA_ALPHA = 1.0
VERIFY_TOLERANCE = 1e-5
SPECIAL_TOKENS = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
LISTED_KEYS = 8

TOWERS = ("audio_branch.", "text_branch.", "text_projection.", "audio_projection.")
# Constructed from the configuration, counted during training, or not used for a query.
DERIVED = ("relative_position_index", "attn_mask", "num_batches_tracked", "position_ids")
UNUSED_TOWERS = (
    "audio_branch.spectrogram_extractor.",
    "audio_branch.logmel_extractor.",
    "audio_branch.tscam_conv.",
    "audio_branch.head.",
)


class ConvertError(ValueError):
    """Files that do not make a model; the message lists the keys at fault and the fix."""


def convert(
    clap_file: str,
    clapsep_file: str,
    tokenizer: str,
    out: str,
    *,
    name: str = "clapsep-base",
    config: ModelConfig = BASE,
    verify: bool = False,
    dtype: torch.dtype | None = None,
) -> str:
    """Write a bundle from the two published files and return its digest.

    Args:
        clap_file: LAION-CLAP checkpoint, local path.
        clapsep_file: CLAPSep checkpoint, local path; a superset (a whole Lightning dump) will do.
        tokenizer: RoBERTa's `tokenizer.json`, or a folder with it or with `vocab.json` and `merges.txt`.
        out: the bundle's folder, local or any fsspec URI.
        name: goes into the card.
        config: sizes that the files must have.
        verify: run laion-clap's own towers beside ours and write the largest difference into the card
            (needs the extra `laion`).
        dtype: storage type of the weights; None keeps float32.

    Raises:
        ConvertError: a file is missing, not a checkpoint, or of another architecture; the towers differ.
    """
    text = read_tokenizer(tokenizer, config)
    towers, towers_ignored = clap_tensors(read_checkpoint(clap_file), config, clap_file)
    separator, separator_ignored = clapsep_tensors(
        read_checkpoint(clapsep_file), towers, config, clapsep_file
    )
    with bundle.SkipInitialisation():
        clap, model = Clap(config), ClapSep(config)
    # The batch norms' counters are the only entries that no file needs to bring.
    clap.load_state_dict({**clap.state_dict(), **towers}, assign=True)
    model.load_state_dict({**model.state_dict(), **separator}, assign=True)
    for module in (clap, model):
        module.eval().requires_grad_(False)
    card: dict[str, Any] = {
        "name": name,
        "licence": LICENCE,
        "sources": [
            _source("LAION-CLAP", clap_file, CLAP_SHA256, towers_ignored),
            _source("CLAPSep", clapsep_file, CLAPSEP_SHA256, separator_ignored),
        ],
        "lora": "merged into audio_branch; the query tower clap.audio_branch is the checkpoint's own",
    }
    if verify:
        card["parity"] = compare_with_laion(clap, model)
        worst = max(card["parity"]["relative_difference"].values())
        if not worst <= VERIFY_TOLERANCE:
            raise ConvertError(f"laion-clap's towers differ from ours: {card['parity']}; nothing was written")
    return bundle.save(out, model, clap, text, card, dtype)


def read_checkpoint(path: str) -> dict[str, Tensor]:
    """Tensors of a torch checkpoint by key, without running code from it."""
    if not Path(path).is_file():
        raise ConvertError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals(_numpy_scalars()):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ConvertError(f"{path}: not a checkpoint that loads without running code ({first})") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise ConvertError(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors")
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    return {key.removeprefix("module."): value for key, value in tensors.items()}


def clap_tensors(
    tensors: Mapping[str, Tensor], config: ModelConfig, source: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights of `Clap` from a LAION-CLAP checkpoint, and the keys that are of no use here."""
    expected = {key: tuple(value.shape) for key, value in _shapes(Clap, config).items() if not _derived(key)}
    relevant = {
        key: value
        for key, value in tensors.items()
        if key.startswith(TOWERS) and not key.startswith(UNUSED_TOWERS) and not _derived(key)
    }
    hint = "; this is a CLAPSep file: were the two files swapped?" if _is_clapsep(tensors) else ""
    _check(source, "a LAION-CLAP checkpoint (HTSAT-base, RoBERTa-base)", expected, relevant, hint)
    ignored = sorted(key for key in tensors if key not in expected)
    return {key: relevant[key].float() for key in expected}, ignored


def clapsep_tensors(
    tensors: Mapping[str, Tensor], towers: Mapping[str, Tensor], config: ModelConfig, source: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights of `ClapSep`, LoRA merged into `towers`' encoder, and the keys that are of no use here."""
    if any("phase_net." in key for key in tensors):
        raise ConvertError(
            f"{source}: has a phase branch (phase_net.*), which the published checkpoints do not; "
            "only models that keep the mixture's phase are supported"
        )
    shapes = {key: tuple(value.shape) for key, value in _shapes(ClapSep, config).items() if not _derived(key)}
    expected = {key: shape for key, shape in shapes.items() if key.startswith("decoder_model.")}
    rank = next((value.shape[0] for key, value in tensors.items() if key.endswith(".lora_A")), 0)
    tuned = [
        key.removesuffix(".weight")
        for key in shapes
        if key.startswith("audio_branch.") and key.endswith((".attn.qkv.weight", ".attn.proj.weight"))
    ]
    for layer in tuned:
        outputs, inputs = shapes[f"{layer}.weight"]
        expected[f"{layer}.lora_A"] = (rank, inputs)
        expected[f"{layer}.lora_B"] = (outputs, rank)
        expected[f"{layer}.bias"] = (outputs,)
    relevant = {
        key: value
        for key, value in tensors.items()
        if key in expected or ((key.startswith("decoder_model.") or ".lora_" in key) and not _derived(key))
    }
    hint = "; this is a LAION-CLAP file: were the two files swapped?" if "logit_scale_a" in tensors else ""
    _check(source, "a CLAPSep checkpoint", expected, relevant, hint)
    merged = {key: towers[key] for key in shapes if key.startswith("audio_branch.")}
    merged |= {key: relevant[key].float() for key in shapes if key in relevant}
    for layer in tuned:
        update = relevant[f"{layer}.lora_B"].float() @ relevant[f"{layer}.lora_A"].float()
        merged[f"{layer}.weight"] = towers[f"{layer}.weight"] + update * (LORA_ALPHA / rank)
    ignored = sorted(key for key in tensors if key not in expected)
    return merged, ignored


def read_tokenizer(path: str, config: ModelConfig) -> Tokenizer:
    """RoBERTa's byte-level BPE with `<s> … </s>` around the text."""
    folder = Path(path)
    file = folder / "tokenizer.json" if folder.is_dir() else folder
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    try:
        if file.is_file():
            tokenizer = Tokenizer.from_file(str(file))
        elif vocab.is_file() and merges.is_file():
            tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
        else:
            raise FileNotFoundError(
                "no tokenizer.json, nor vocab.json and merges.txt; they are RoBERTa's and come with the "
                "model `roberta-base`: download these files from where it is published, or on a machine that "
                "has transformers run AutoTokenizer.from_pretrained('roberta-base').save_pretrained(FOLDER)"
            )
    except Exception as error:
        # tokenizers raises bare Exception for a file it cannot parse.
        raise ConvertError(f"{path}: no tokenizer here: {error}") from error
    if not file.is_file():
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    marks = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    highest = max(tokenizer.get_vocab().values())
    ids = tokenizer.encode("a").ids
    if marks != SPECIAL_TOKENS or highest >= config.text.vocabulary or (ids[0], ids[-1]) != (0, 2):
        raise ConvertError(
            f"{path}: not RoBERTa's tokenizer: special tokens {marks}, highest id {highest}, "
            f"'a' becomes {ids}; expected {SPECIAL_TOKENS}, ids below {config.text.vocabulary}, "
            "and 0 … 2 around the text"
        )
    return tokenizer


def laion_modules() -> types.ModuleType:
    """laion-clap's `clap_module.htsat`, imported without its package, which downloads at import."""
    spec = importlib.util.find_spec("laion_clap")
    if spec is None or not spec.submodule_search_locations:
        raise ConvertError("laion-clap is not installed: pip install 'clapsep-beam[laion]'")
    folder = str(next(iter(spec.submodule_search_locations)))
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("clap_module.htsat")
    finally:
        sys.path.remove(folder)


def laion_encoder(branch: Mapping[str, Tensor], config: ModelConfig) -> torch.nn.Module:
    """laion-clap's own HTSAT with the weights of one of our encoders; its classification head is random."""
    encoder = config.encoder
    audio = types.SimpleNamespace(
        sample_rate=encoder.spectrogram.sample_rate,
        window_size=encoder.spectrogram.n_fft,
        hop_size=encoder.spectrogram.hop,
        mel_bins=encoder.mel_bins,
        fmin=encoder.f_min,
        fmax=encoder.f_max,
    )
    module = laion_modules().HTSAT_Swin_Transformer(
        spec_size=encoder.spec_size,
        patch_size=encoder.patch,
        patch_stride=(encoder.patch, encoder.patch),
        embed_dim=encoder.embed,
        depths=list(encoder.depths),
        num_heads=list(encoder.heads),
        window_size=encoder.window,
        config=audio,
    )
    module.load_state_dict(branch, strict=False)
    return module.eval()


def roberta_encoder(branch: Mapping[str, Tensor], config: ModelConfig) -> torch.nn.Module:
    """The RoBERTa of transformers, laion-clap's text tower, with our text encoder's weights."""
    transformers = importlib.import_module("transformers")
    text = config.text
    module = transformers.RobertaModel(
        transformers.RobertaConfig(
            vocab_size=text.vocabulary,
            hidden_size=text.width,
            num_hidden_layers=text.layers,
            num_attention_heads=text.heads,
            intermediate_size=text.feed_forward,
            max_position_embeddings=text.positions,
            type_vocab_size=1,
            layer_norm_eps=text.norm_eps,
            pad_token_id=text.pad_id,
        )
    )
    module.load_state_dict(branch, strict=False)
    return module.eval()


@torch.no_grad()
def compare_with_laion(clap: Clap, model: ClapSep) -> dict[str, Any]:
    """Relative L2 differences between our towers and laion-clap's own, on noise and random token ids."""
    config = clap.config
    generator = torch.Generator().manual_seed(0)
    seconds = config.window_seconds
    sample_rate = config.encoder.spectrogram.sample_rate
    waveform = 0.1 * torch.randn(1, round(seconds * sample_rate), generator=generator)
    ids = torch.randint(4, config.text.vocabulary, (2, 12), generator=generator)
    ids[:, 0], ids[:, -1] = SPECIAL_TOKENS["<s>"], SPECIAL_TOKENS["</s>"]
    mask = torch.ones_like(ids)

    audio = laion_encoder(clap.audio_branch.state_dict(), config)({"waveform": waveform})["embedding"]
    audio = torch.nn.functional.normalize(clap.audio_projection(audio), dim=-1)
    pooled = roberta_encoder(clap.text_branch.state_dict(), config)(ids, mask).pooler_output
    text = torch.nn.functional.normalize(clap.text_projection(pooled), dim=-1)

    separator = laion_encoder(model.audio_branch.state_dict(), config)
    theirs: list[Tensor] = []
    separator.patch_embed.register_forward_hook(lambda *call: theirs.append(call[2]))
    for layer in separator.layers:
        layer.register_forward_hook(lambda *call: theirs.append(call[2][0]))
    # CLAPSep pads the power spectrogram with silence, where laion-clap stretches the image.
    frames = config.encoder.frames
    separator.spectrogram_extractor.register_forward_hook(
        lambda *call: torch.nn.functional.pad(call[2], (0, 0, 0, frames - call[2].shape[2]))
    )
    mixture = 0.1 * torch.randn(1, config.window_samples, generator=generator)
    ours = model.features(mixture).encoder
    separator({"waveform": model.resampler(mixture)})
    return {
        "against": f"laion-clap {importlib.metadata.version('laion-clap')}, "
        f"transformers {importlib.metadata.version('transformers')}",
        "relative_difference": {
            "text_embedding": relative_difference(clap.embed_text(ids, mask), text),
            "audio_embedding": relative_difference(clap.embed_audio(waveform), audio),
            "encoder_features": max(
                relative_difference(feature, other) for feature, other in zip(ours, theirs, strict=True)
            ),
        },
    }


def relative_difference(value: Tensor, reference: Tensor) -> float:
    """L2 norm of the difference over the L2 norm of the reference."""
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def _numpy_scalars() -> list[Any]:
    # The published file holds numpy scalars beside its tensors (epoch, metrics), under numpy 1's names.
    scalar = np.float64(0).__reduce__()[0]
    kinds = (np.float16, np.float32, np.float64, np.int32, np.int64, np.uint8, np.bool_)
    return [
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        *(type(np.dtype(kind)) for kind in kinds),
    ]


def _shapes(module: type[torch.nn.Module], config: ModelConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return module(config).state_dict()


def _derived(key: str) -> bool:
    return key.endswith(DERIVED)


def _is_clapsep(tensors: Mapping[str, Tensor]) -> bool:
    return any(key.startswith("decoder_model.") for key in tensors)


def _check(
    source: str,
    kind: str,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, Tensor],
    hint: str,
) -> None:
    misshapen = [
        f"{key} {tuple(found[key].shape)} instead of {shape}"
        for key, shape in expected.items()
        if key in found and tuple(found[key].shape) != shape
    ]
    faults = {
        "missing": [key for key in expected if key not in found],
        "unexpected": [key for key in found if key not in expected],
        "misshapen": misshapen,
    }
    if any(faults.values()):
        lists = "".join(
            f"\n  {fault} ({len(keys)}): {_short(keys)}" for fault, keys in faults.items() if keys
        )
        raise ConvertError(f"{source}: not {kind}{hint}{lists}")


def _short(keys: list[str]) -> str:
    more = f", … and {len(keys) - LISTED_KEYS} more" if len(keys) > LISTED_KEYS else ""
    return ", ".join(keys[:LISTED_KEYS]) + more


def _source(kind: str, path: str, published: str, ignored: list[str]) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "kind": kind,
        "file": Path(path).name,
        "sha256": digest,
        "is_published_file": digest == published,
        "unused_tensors": len(ignored),
    }
