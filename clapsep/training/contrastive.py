"""`pretrain --manifest`: two CLAP towers from nothing, on the recordings and texts of a manifest.

The result is a bundle whose separator has learned nothing yet: what `fit --init` begins with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import lightning
import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clapsep import bundle
from clapsep.clap import Clap
from clapsep.config import BASE, MINI, ModelConfig
from clapsep.htsat import initialise
from clapsep.model import ClapSep
from clapsep.query import QueryEncoder
from clapsep.training.default import take_encoder
from clapsep.training.loop import make_trainer
from clapsep.training.losses import contrastive_loss
from clapsep.training.manifest_data import check_texts
from clapsep.training.pretrain import TowerTraining
from clapsep.training.recordings import Clean, clean_recordings, measured, read_rows, window
from clapsep.training.tokens import SPECIAL, build_tokenizer, tokens

SIZES = {config.name: config for config in (MINI, BASE)}


SPREAD_STEPS = 100
TEXT_SHARE = 0.1
"""Of the learning rate: the text tower has learned its texts before audio is heard."""


class CaptionedWindows(Dataset):
    """(windows (N, samples), texts, matches (N, N)) of every step, by its number."""

    def __init__(
        self, recordings: Sequence[Clean], config: ModelConfig, batch: int, seed: Sequence[int]
    ) -> None:
        self.recordings, self.config, self.batch, self.seed = recordings, config, batch, seed

    def __getitem__(self, step: int) -> tuple[Tensor, list[str], Tensor]:
        rng = np.random.default_rng([*self.seed, step])
        drawn = [self.recordings[rng.integers(len(self.recordings))] for _ in range(self.batch)]
        samples, rate = self.config.window_samples, self.config.sample_rate
        windows = np.stack([window(clean, samples, rate, rng) for clean in drawn])
        texts = [clean.texts[rng.integers(len(clean.texts))] for clean in drawn]
        return torch.from_numpy(windows), texts, matches(drawn, texts)


def matches(recordings: Sequence[Clean], texts: Sequence[str]) -> Tensor:
    """(N, N): 1 where text j is one of recording i's."""
    return torch.tensor([[float(text in clean.texts) for text in texts] for clean in recordings])


def spread(
    clap: Clap, tokenizer: Tokenizer, draw: Callable[[], tuple[list[str], list[str], Tensor]], steps: int
) -> None:
    """Train the text tower alone on what `draw` returns: texts, texts, and (N, N) how alike they are.

    A fresh text tower gives every text nearly one embedding (cosine 0.99), from which the audio tower
    learns nothing for a thousand steps; fifty of these steps, each a few milliseconds, spread them.
    """
    parameters = [*clap.text_branch.parameters(), *clap.text_projection.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-3)
    for _ in range(steps):
        *texts, alike = draw()
        left, right = (clap.embed_text(*tokens(tokenizer, side)) for side in texts)
        optimizer.zero_grad()
        contrastive_loss(left, right, alike, torch.tensor(10.0)).backward()
        optimizer.step()


def pretrain(
    manifest: str,
    out: Path,
    *,
    size: str = "mini",
    steps: int = 700,
    batch: int = 24,
    learning_rate: float = 1e-3,
    processes: int = 1,
    device: str = "cpu",
    seed: int = 1,
    config: ModelConfig | None = None,
) -> str:
    """Train towers for `steps` steps of `processes * batch` windows, by symmetric InfoNCE.

    The tokenizer knows the words of the manifest's texts and no others.

    Args:
        manifest: clean recordings with texts, as `fit` takes them.
        out: folder that the bundle is written to.
        size: name of a preset.
        steps: optimiser steps; a run that is interrupted begins anew.
        batch: windows per process and step.
        learning_rate: of AdamW, at the height of its cycle.
        processes: one for each device.
        device: where.
        seed: of all that is drawn.
        config: sizes, in place of a preset's.

    Returns the bundle's digest. Raises TrainingDataError for rows, recordings or texts that cannot be used.
    """
    lightning.seed_everything(seed, verbose=False)
    rows, digest = read_rows(manifest)
    recordings = measured(clean_recordings(rows))
    texts = sorted({text for clean in recordings for text in clean.texts})
    words = sorted({word for text in texts for word in re.findall(r"[^\W_]+", text.lower())})
    config = config or SIZES[size]
    config = replace(config, text=replace(config.text, vocabulary=len(words) + len(SPECIAL)))
    tokenizer = build_tokenizer(words, config.text.max_tokens)
    module = TowerTraining(Clap(config), tokenizer, steps, learning_rate, TEXT_SHARE)
    check_texts(QueryEncoder(module.clap, tokenizer, config), recordings)

    rng = np.random.default_rng([seed, 0])

    def draw() -> tuple[list[str], list[str], Tensor]:
        drawn = [recordings[index] for index in rng.integers(len(recordings), size=batch)]
        left, right = ([clean.texts[rng.integers(len(clean.texts))] for clean in drawn] for _ in range(2))
        return left, right, matches(drawn, right)

    spread(module.clap, tokenizer, draw, SPREAD_STEPS)
    trainer = make_trainer(
        out, steps, processes, device=device, clip=1.0, report_every=20, enable_checkpointing=False
    )
    windows = CaptionedWindows(recordings, config, batch, [seed, 1, trainer.global_rank])
    trainer.fit(module, DataLoader(windows, batch_size=None, sampler=range(steps)))
    trainer.strategy.barrier()
    if not trainer.is_global_zero:
        return ""
    clap = module.clap.cpu().eval()
    model = ClapSep(config)
    take_encoder(model, clap)
    model.decoder_model.apply(initialise)
    card = {
        "name": "towers without a separator",
        "licence": "not stated; the training recordings keep their own",
        "vocabulary": words,
        "training": {
            "manifest": {"uri": manifest, "digest": digest},
            "recordings": len(recordings),
            "texts": len(texts),
            "steps": steps,
            "batch": batch * processes,
            "learning_rate": learning_rate,
            "seed": seed,
            "separator": "untrained",
        },
    }
    return bundle.save(str(out), model, clap, tokenizer, card)
