"""`fit`: CLAPSep's recipe on a manifest, from a bundle's or LAION-CLAP's towers to a bundle of one's own.

As published (arXiv 2402.17455 and its authors' code): the encoder is CLAP's with LoRA, its other weights and
its statistics stay; the decoder begins from scratch, with their initialisation and stochastic depth.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from tokenizers import Tokenizer
from torch import Tensor

from clapsep import bundle
from clapsep.clap import Clap
from clapsep.config import BASE, ModelConfig
from clapsep.convert import clap_tensors, clapsep_tensors, read_checkpoint, read_tokenizer
from clapsep.device import find_device
from clapsep.htsat import initialise
from clapsep.model import ClapSep
from clapsep.query import QueryEncoder
from clapsep.training.default import take_encoder
from clapsep.training.fit import LAST, SeparatorTraining, run, weights
from clapsep.training.loop import Precision
from clapsep.training.lora import RANK, add_lora
from clapsep.training.manifest_data import ManifestData, Mixing
from clapsep.training.recordings import clean_recordings, read_rows

SETTINGS = "run.json"
BUNDLE = "bundle"
MAY_CHANGE = frozenset({"epochs"})
DROP_PATH = 0.1
"""Stochastic depth of the decoder's deepest block; falls to 0 at the shallowest (published)."""
SPEC_NORM_MOMENTUM = 0.01
"""Of the batch norm over the mixture's magnitudes (published)."""


class TrainingError(ValueError):
    """A run that cannot be started or packed; one line that names the setting and the fix."""


@dataclass
class Start:
    """What training begins with: the frozen towers, and a separator without LoRA."""

    clap: Clap
    model: ClapSep
    tokenizer: Tokenizer
    card: dict[str, Any]
    digest: str


def load_start(
    init: str, tokenizer: str | None, *, keep_separator: bool, seed: int, config: ModelConfig = BASE
) -> Start:
    """Load a bundle, or LAION-CLAP's checkpoint.

    Args:
        init: a bundle's folder or URI, or LAION-CLAP's file (.pt).
        tokenizer: RoBERTa's, with LAION-CLAP's file.
        keep_separator: go on from the bundle's encoder and decoder, not from its towers alone.
        seed: of the new decoder's weights.
        config: sizes of LAION-CLAP's file.

    Raises TrainingError, ConvertError or BundleError.
    """
    torch.manual_seed(seed)
    if not Path(init).is_file():
        loaded = bundle.load(init)
        # A new decoder is trained as published, which asks once.
        sizes = loaded.config if keep_separator else replace(loaded.config, symmetric=False)
        start = Start(loaded.clap, ClapSep(sizes), loaded.tokenizer, loaded.card, loaded.digest)
        start.clap.requires_grad_(False)
        if keep_separator:
            start.model.load_state_dict(loaded.model.state_dict())
    else:
        if tokenizer is None:
            raise TrainingError(
                f"--init {init}: is LAION-CLAP's file; pass --tokenizer, a folder with RoBERTa's"
            )
        if keep_separator:
            raise TrainingError(f"--keep-separator: {init} holds none; leave it out, or begin with a bundle")
        text = read_tokenizer(tokenizer, config)
        towers, _ = clap_tensors(read_checkpoint(init), config, init)
        clap = Clap(config)
        clap.load_state_dict({**clap.state_dict(), **towers})
        with open(init, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        start = Start(clap.eval().requires_grad_(False), ClapSep(config), text, {}, digest)
    if not keep_separator:
        take_encoder(start.model, start.clap)
        # All of the published decoder is initialised like its Swin blocks.
        start.model.decoder_model.apply(initialise)
    return start


def adapt(model: ClapSep, rank: int) -> None:
    """Make a separator trainable as published: LoRA in the encoder, the whole decoder, nothing else."""
    add_lora(model.audio_branch, rank)
    decoder = model.decoder_model
    decoder.spec_norm.momentum = SPEC_NORM_MOMENTUM
    for stage, rate in zip(decoder.layers, np.linspace(DROP_PATH, 0.0, len(decoder.layers)), strict=True):
        for block in stage.blocks:
            block.drop_path = float(rate)


def fit(
    manifest: str,
    validation: str,
    init: str,
    out: Path,
    *,
    tokenizer: str | None = None,
    keep_separator: bool = False,
    epochs: int = 150,
    epoch_steps: int | None = None,
    batch: int = 16,
    learning_rate: float = 1e-4,
    rank: int = RANK,
    snr_db: tuple[float, float] = (0.0, 0.0),
    ema: float | None = None,
    seed: int = 1,
    device: str = "cpu",
    devices: int = 1,
    precision: Precision | None = None,
    workers: int = 0,
    config: ModelConfig = BASE,
) -> str:
    """Fine-tune, and write the bundle of the best validation to `out/bundle`; returns its digest.

    A run that is in `out` already goes on where its last checkpoint stands.

    Args:
        manifest: clean recordings to mix (`training.recordings`); a file, a folder or a glob, at any URI.
        validation: mixtures, or clean recordings that are mixed with each other.
        init: as `load_start` takes it.
        tokenizer: as `load_start` takes it.
        keep_separator: as `load_start` takes it.
        out: folder of checkpoints, curves and the bundle.
        epochs: validations; the learning rate falls when several in a row bring nothing.
        epoch_steps: optimiser steps between them; default: one pass over the recordings.
        batch: mixtures per device and step.
        learning_rate: of AdamW.
        rank: of LoRA.
        snr_db: range of the mixtures' SNR, drawn evenly.
        ema: decay of averaged weights; None: no averaging.
        seed: of all that is drawn.
        device: where.
        devices: how many processes, one for each device.
        precision: default: bf16 on a GPU, fp32 on the CPU.
        workers: processes per device that read recordings ahead.
        config: as `load_start` takes it.

    Raises:
        TrainingDataError: rows, recordings or texts that cannot be used; all of them are listed.
        TrainingError: `out` holds a run of other settings.
        DeviceError: the device is not there.
    """
    find_device(device)
    lightning.seed_everything(seed, verbose=False)
    (training, digest), (held_out, held_out_digest) = read_rows(manifest), read_rows(validation)
    start = load_start(init, tokenizer, keep_separator=keep_separator, seed=seed, config=config)
    precision = precision or ("fp32" if device == "cpu" else "bf16")
    per_step = batch * devices
    epoch_steps = epoch_steps or -(-len(clean_recordings(training)) // per_step)
    settings = {
        "manifest": {"uri": manifest, "digest": digest},
        "validation": {"uri": validation, "digest": held_out_digest},
        "init": {"uri": init, "digest": start.digest, "tokenizer": tokenizer},
        "keep_separator": keep_separator,
        "epochs": epochs,
        "epoch_steps": epoch_steps,
        "batch": batch,
        "devices": devices,
        "precision": precision,
        "learning_rate": learning_rate,
        "lora_rank": rank,
        "snr_db": list(snr_db),
        "ema": ema,
        "seed": seed,
    }
    resumed = (out / LAST).exists()
    if resumed:
        check_settings(json.loads((out / SETTINGS).read_text()), settings, out)
    data = ManifestData(
        training,
        held_out,
        QueryEncoder(
            start.clap,
            start.tokenizer,
            start.clap.config,
            vocabulary=start.card.get("vocabulary") or (),
        ),
        Mixing(seed, batch, snr_db),
        steps=epochs * epoch_steps,
        steps_per_validation=epoch_steps,
        workers=workers,
        # What was decoded to its end when the run began is not decoded again.
        decode=not resumed,
    )
    out.mkdir(parents=True, exist_ok=True)
    rank_zero_only((out / SETTINGS).write_text)(_json(settings))
    rank_zero_only(print)(
        f"{len(data.recordings)} clean recordings, {len(data.held_out)} mixtures for validation; "
        f"{epochs} x {epoch_steps} steps of {per_step} mixtures",
        flush=True,
    )
    adapt(start.model, rank)
    module = SeparatorTraining(start.model, learning_rate, labels=data.labels, seed=seed)
    best = run(module, data, out, processes=devices, device=device, precision=precision, ema=ema)
    return pack(out, best, str(out / BUNDLE), config=config) if module.global_rank == 0 else ""


def check_settings(earlier: Mapping[str, Any], now: Mapping[str, Any], out: Path) -> None:
    """Raises TrainingError where a run in `out` has other settings than what it is to go on with."""
    changed = [
        f"{name} {earlier.get(name)!r}, now {now[name]!r}"
        for name in now
        if name not in MAY_CHANGE and earlier.get(name) != now[name]
    ]
    if changed:
        raise TrainingError(f"{out} holds a run of other settings ({'; '.join(changed)}); use another --out")


def pack(
    out: Path, checkpoint: Path, folder: str | None, published: Path | None = None, config: ModelConfig = BASE
) -> str:
    """Write the weights of a checkpoint of the run in `out`; returns the bundle's digest.

    Args:
        out: folder of the run.
        checkpoint: `best.ckpt` or `last.ckpt` of it.
        folder: where the bundle goes; local or any URI; None: nowhere.
        published: folder for `clap.pt` and `clapsep.ckpt`, which `clapsep convert` reads.
        config: sizes of LAION-CLAP's file, where the run began with one.

    Raises TrainingError where what the run began with has changed, or has no published layout.
    """
    if not (out / SETTINGS).exists() or not checkpoint.exists():
        raise TrainingError(
            f"{checkpoint}: no checkpoint of a run; give the --out of a fit that has validated"
        )
    settings = json.loads((out / SETTINGS).read_text())
    init = settings["init"]
    start = load_start(
        init["uri"],
        init["tokenizer"],
        keep_separator=settings["keep_separator"],
        seed=settings["seed"],
        config=config,
    )
    if start.digest != init["digest"]:
        raise TrainingError(
            f"{init['uri']}: is not what the run began with any more; bring {init['digest']} back"
        )
    adapt(start.model, settings["lora_rank"])
    # All else is what it was; averaging has rounded the checkpoint's copy of it.
    trained = weights(checkpoint)
    trained = {key: trained[key] for key in published_tensors(start.model) if key in trained}
    start.model.load_state_dict({**start.model.state_dict(), **trained})
    file_b = published_tensors(start.model)
    encoder = {
        key: value for key, value in start.model.state_dict().items() if key.startswith("audio_branch.")
    }
    if published is not None:
        if start.model.config.symmetric:
            raise TrainingError(
                "the separator asks both ways (`symmetric` in its config.json), which the published layout "
                "cannot say; write a bundle, or fit without --keep-separator"
            )
        write_published(start.clap, encoder, file_b, published)
    if folder is None:
        return ""
    sizes = start.model.config
    merged, _ = clapsep_tensors(file_b, encoder, sizes, str(checkpoint))
    model = ClapSep(sizes)
    model.load_state_dict({**model.state_dict(), **merged})
    return bundle.save(folder, model, start.clap, start.tokenizer, _card(start, settings, checkpoint))


def published_tensors(model: ClapSep) -> dict[str, Tensor]:
    """What the published training saves of an adapted separator, in the layout of `best_model.ckpt`."""
    tuned = (".lora_A", ".lora_B", ".attn.qkv.bias", ".attn.proj.bias")
    state = {
        key: value
        for key, value in model.state_dict().items()
        if key.startswith("decoder_model.") or key.endswith(tuned)
    }
    tables = {key: value for key, value in model.named_buffers() if key.endswith("relative_position_index")}
    state |= {key: value for key, value in tables.items() if key.startswith("decoder_model.")}
    return {key: value.detach().cpu().contiguous() for key, value in state.items()}


def write_published(
    clap: Clap, encoder: Mapping[str, Tensor], file_b: Mapping[str, Tensor], folder: Path
) -> None:
    """Write `clap.pt` (LAION-CLAP's layout, what queries need of it) and `clapsep.ckpt` (CLAPSep's).

    Raises TrainingError for an encoder that is not CLAP's but for LoRA and biases.
    """
    towers = clap.state_dict()
    foreign = [
        key
        for key, value in encoder.items()
        if key in towers and key not in file_b and not torch.equal(value, towers[key])
    ]
    if foreign:
        raise TrainingError(
            f"the encoder is not CLAP's with LoRA ({foreign[0]} differs: --keep-separator merged an earlier "
            "training into it); the published layout cannot hold that, write a bundle"
        )
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"module.{key}": value.cpu() for key, value in towers.items()}
    torch.save({"epoch": 0, "state_dict": state}, folder / "clap.pt")
    torch.save(dict(file_b), folder / "clapsep.ckpt")


def _card(start: Start, settings: Mapping[str, Any], checkpoint: Path) -> dict[str, Any]:
    step = torch.load(checkpoint, map_location="cpu", weights_only=False)["global_step"]
    licence = start.card.get("licence", "as its authors say, or do not say")
    card: dict[str, Any] = {
        "name": f"{start.card.get('name', 'laion-clap')}, fine-tuned",
        "licence": f"not stated; of {settings['init']['uri']}, which it began with: {licence}",
        "training": {**settings, "step": step},
    }
    if "vocabulary" in start.card:
        card["vocabulary"] = start.card["vocabulary"]
    return card


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
