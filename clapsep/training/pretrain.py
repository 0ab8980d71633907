"""Contrastive pre-training of the two small CLAP towers on the training split."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from clapsep.clap import Clap
from clapsep.config import ModelConfig
from clapsep.spectral import Resampler
from clapsep.training import vocabulary
from clapsep.training.corpus import SAMPLE_RATE, Corpus
from clapsep.training.data import NONE, Sampler
from clapsep.training.loop import make_trainer
from clapsep.training.losses import contrastive_loss
from clapsep.training.queries import embed_windows, phrase
from clapsep.training.tokens import tokens

TOWERS = "towers.safetensors"
FIRST_TEMPERATURE = 0.1
BACKGROUND_SHARE = 0.5
SPREAD_STEPS = 100


class ClipBatches(IterableDataset):
    """(windows, texts, matches) batches without end; half of the windows have another one behind them."""

    def __init__(self, sampler: Sampler, batch: int, seed: int) -> None:
        self.sampler = sampler
        self.batch = batch
        self.random = random.Random(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, list[str], Tensor]]:
        while True:
            clips = [self.sampler.clip(self.random.choice(self.sampler.names)) for _ in range(self.batch)]
            windows = self.sampler.windows(clips)
            covered = int(BACKGROUND_SHARE * self.batch)
            quieter = torch.tensor([[self.random.uniform(3, 25)] for _ in range(covered)])
            # A neighbour in the batch serves as the background, whatever its class.
            windows[:covered] += 10 ** (-quieter / 20) * windows[:covered].roll(1, 0)
            members = [clip.member for clip in clips]
            texts = [phrase(member, self.random) for member in members]
            yield windows, texts, matches(members, texts)


def matches(members: list[str], texts: list[str]) -> Tensor:
    """(N, N): 1 where text j is true of a recording of corpus class i."""
    true = [set(vocabulary.wordings(member)) for member in members]
    plain = [_wording(text) for text in texts]
    return torch.tensor([[float(text in wordings) for text in plain] for wordings in true])


def _wording(text: str) -> str:
    text = text.removeprefix("the ") if text.startswith("the sound of ") else text
    return text.removeprefix("sound of ").removesuffix(" sounds").removesuffix(" sound")


def spread_texts(clap: Clap, tokenizer: Tokenizer, names: tuple[str, ...], steps: int, seed: int) -> None:
    """Draw phrases of one recording together and all others apart, without audio.

    A fresh text tower gives every text nearly one embedding (cosine 0.99), from which the audio tower
    learns nothing for a thousand steps; fifty of these steps, each a few milliseconds, spread them.
    """
    choose = random.Random(seed)

    def draw() -> tuple[list[str], list[str], Tensor]:
        members = [choose.choice(list(vocabulary.BY_NAME[name].members)) for name in names * 4]
        coarse = [vocabulary.COARSE_OF[member] for member in members]
        alike = torch.tensor(
            [
                [0.5 * (one == other) + 0.5 * (c == d) for other, d in zip(members, coarse, strict=True)]
                for one, c in zip(members, coarse, strict=True)
            ]
        )
        left, right = ([phrase(member, choose) for member in members] for _ in range(2))
        return left, right, alike

    spread(clap, tokenizer, draw, steps)


def spread(
    clap: Clap, tokenizer: Tokenizer, draw: Callable[[], tuple[list[str], list[str], Tensor]], steps: int
) -> None:
    """Train the text tower alone on what `draw` returns: texts, texts, and (N, N) how alike they are."""
    parameters = [*clap.text_branch.parameters(), *clap.text_projection.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-3)
    for _ in range(steps):
        *texts, alike = draw()
        left, right = (clap.embed_text(*tokens(tokenizer, side)) for side in texts)
        optimizer.zero_grad()
        contrastive_loss(left, right, alike, torch.tensor(10.0)).backward()
        optimizer.step()


class TowerTraining(lightning.LightningModule):
    """Symmetric InfoNCE between windows and texts."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, steps: int, learning_rate: float) -> None:
        super().__init__()
        self.clap = Clap(config)
        self.tokenizer = tokenizer
        self.resampler = Resampler(SAMPLE_RATE, config.encoder.spectrogram.sample_rate)
        self.log_scale = torch.nn.Parameter(torch.tensor(math.log(1 / FIRST_TEMPERATURE)))
        self.steps = steps
        self.learning_rate = learning_rate

    def training_step(self, batch: tuple[Tensor, list[str], Tensor], index: int) -> Tensor:
        windows, texts, positives = batch
        audio = embed_windows(self.clap, windows, self.resampler).float()
        ids = (part.to(self.device) for part in tokens(self.tokenizer, texts))
        text = self.clap.embed_text(*ids).float()
        with torch.autocast(self.device.type, enabled=False):
            loss = contrastive_loss(audio, text, positives, self.log_scale.exp().clamp(max=100.0))
        return loss

    def configure_optimizers(self):
        audio = [*self.clap.audio_branch.parameters(), *self.clap.audio_projection.parameters()]
        text = [*self.clap.text_branch.parameters(), *self.clap.text_projection.parameters()]
        rates = [self.learning_rate, 0.1 * self.learning_rate, self.learning_rate]
        groups = [{"params": audio}, {"params": text}, {"params": [self.log_scale]}]
        optimizer = torch.optim.AdamW(groups, self.learning_rate, weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, rates, self.steps, pct_start=0.1, div_factor=10, final_div_factor=50
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def retrieval_accuracy(clap: Clap, tokenizer: Tokenizer, sampler: Sampler, count: int) -> float:
    """Share of `count` single windows whose nearest class, by its mean text embedding, is their own."""
    clap.eval()
    resampler = Resampler(SAMPLE_RATE, clap.config.encoder.spectrogram.sample_rate)
    names = [sampler.random.choice(sampler.names) for _ in range(count)]
    with torch.no_grad():
        texts = torch.stack(
            [
                clap.embed_text(*tokens(tokenizer, vocabulary.BY_NAME[name].wordings)).mean(0)
                for name in sampler.names
            ]
        )
        nearest = []
        for start in range(0, count, 32):
            windows = sampler.windows([sampler.clip(name) for name in names[start : start + 32]])
            nearest += (embed_windows(clap, windows, resampler) @ texts.T).argmax(1).tolist()
    return sum(sampler.names[i] == name for i, name in zip(nearest, names, strict=True)) / count


def pretrain(
    corpus: Corpus,
    config: ModelConfig,
    tokenizer: Tokenizer,
    names: tuple[str, ...],
    folder: Path,
    *,
    steps: int,
    batch: int = 24,
    learning_rate: float = 1e-3,
    processes: int = 2,
    seed: int = 1,
) -> Path:
    """Train for `steps` steps of `processes * batch` clips; returns `folder/towers.safetensors`."""
    lightning.seed_everything(seed, verbose=False)
    module = TowerTraining(config, tokenizer, steps, learning_rate)
    spread_texts(module.clap, tokenizer, names, SPREAD_STEPS, seed)
    trainer = make_trainer(folder, steps, processes, clip=1.0, report_every=20, enable_checkpointing=False)
    rank_seed = seed + 1000 * trainer.global_rank
    sampler = Sampler(corpus, "train", names, config.window_samples, rank_seed)
    trainer.fit(module, DataLoader(ClipBatches(sampler, batch, rank_seed), batch_size=None))
    path = folder / TOWERS
    if trainer.is_global_zero:
        held_out = Sampler(corpus, "validation", names, config.window_samples, 7, NONE)
        accuracy = retrieval_accuracy(module.clap, tokenizer, held_out, 480)
        print(f"held-out retrieval accuracy {accuracy:.3f} of {len(held_out.names)} classes", flush=True)
        save_file(module.clap.state_dict(), path)
    trainer.strategy.barrier()
    return path
