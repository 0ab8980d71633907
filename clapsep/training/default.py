"""Training of the embedded default: the published recipe with departures that two CPU cores ask for.

The encoder is trained whole instead of through LoRA (its discrimination is the bottleneck of a small model),
the first steps fit the ratio mask, which leaves the constant mask at once, and the schedule is one cycle.
"""

from __future__ import annotations

import random
from pathlib import Path

import lightning
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.data import Dataset

from clapsep.bundle import Bundle
from clapsep.clap import Clap
from clapsep.decoder import Film
from clapsep.model import ClapSep
from clapsep.training.conditions import condition, kept_sides
from clapsep.training.corpus import Corpus
from clapsep.training.data import NONE, Sampler
from clapsep.training.fit import Batch, Data, SeparatorTraining, run
from clapsep.training.loop import fastest_precision
from clapsep.training.pretrain import rotation
from clapsep.training.queries import QueryBank

SEPARATOR = "separator.safetensors"
VALIDATION_MIXTURES = 340
VALIDATION_BATCH = 20
EMA_DECAY = 0.998

ABSENT = 0.5
"""Share of the second queries that ask for a class which is not in the mixture."""

ABSENT_ALONE = 0.8
"""Share of those that name nothing else."""

TEXT_ALONE = 0.6
"""Share of the steps whose queries are texts; in the others they are interpolated with audio."""

ONE_SIDED = 0.2
"""Share of the first queries with the positive side only, and share with the negative side only."""

DROP_PATH = 0.1
"""Of the encoder's last block, rising from 0: probability that training passes over what a block adds."""

MASKED = 0.3
"""Share of the queries whose mask is estimated in training (`training.bands`)."""

FILM_SPREAD = 0.7
"""Standard deviation of the FiLM weights at the start: a condition has unit norm, so this moves each gain
by about as much, where torch's default (1/16) would leave the query without a voice."""


def take_encoder(model: ClapSep, clap: Clap) -> None:
    """Give the separator a copy of the audio tower's encoder."""
    branch = clap.audio_branch.state_dict()
    model.audio_branch.load_state_dict({k: v for k, v in branch.items() if not k.startswith("norm.")})


def initialise(model: ClapSep, clap: Clap) -> None:
    """Take the encoder from the pre-trained tower and give every FiLM a gain of one plus the query's.

    The encoder gets stochastic depth: of few recordings it otherwise learns each.
    """
    take_encoder(model, clap)
    blocks = [block for stage in model.audio_branch.layers for block in stage.blocks]
    for block, rate in zip(blocks, np.linspace(0.0, DROP_PATH, len(blocks)), strict=True):
        block.drop_path = float(rate)
    for module in model.modules():
        if isinstance(module, Film):
            for linear, bias in ((module.gamma, 1.0), (module.beta, 0.0)):
                nn.init.normal_(linear.weight, std=FILM_SPREAD)
                nn.init.constant_(linear.bias, bias)


@torch.no_grad()
def adopt(model: ClapSep, clap: Clap, tokenizer: Tokenizer, earlier: Bundle) -> None:
    """Begin with the separator of an earlier bundle, whose queries lie in another joint space."""
    model.load_state_dict(earlier.model.state_dict())
    turn = rotation(clap, tokenizer, earlier)
    for module in model.modules():
        if isinstance(module, Film):
            for linear in (module.gamma, module.beta):
                sides = linear.weight.chunk(2, dim=1)
                linear.weight.copy_(torch.cat([side @ turn.T for side in sides], dim=1))


class MixtureBatches(Dataset):
    """The batch of each step, by its number: two queries for each mixture.

    The first names both sides more often than one. The second names one side, or, for a share `ABSENT`, asks
    for what is not there. The model is symmetric, so what asks for one side teaches it the other.
    """

    def __init__(self, sampler: Sampler, queries: QueryBank, batch: int, seed: int) -> None:
        self.sampler = sampler
        self.queries = queries
        self.batch = batch
        self.seed = seed

    def __getitem__(self, step: int) -> Batch:
        draws = random.Random(f"{self.seed}:{step}")
        self.sampler.random.seed(draws.random())
        self.sampler.rng = np.random.default_rng([self.seed, step])
        self.queries.random.seed(draws.random())
        drawn = self.sampler.mixtures(self.batch)
        # A text that only ever came with audio was worth 1 dB less alone, on the recordings trained on.
        share = 1.0 if draws.random() < TEXT_ALONE else draws.random()
        pairs = 2 * list(zip(drawn.targets, drawn.interferences, strict=True))
        first, second = torch.tensor([draws.random() for _ in pairs]).split(self.batch)
        kept = torch.cat([kept_sides(first, ONE_SIDED, ONE_SIDED), kept_sides(second, 0.5, 0.5)])
        target = drawn.target.repeat(2, 1)
        absent = torch.zeros(len(pairs), dtype=torch.bool)
        for number in range(self.batch, len(pairs)):
            missing = self.sampler.absent(*pairs[number]) if draws.random() < ABSENT else None
            if missing is not None:
                absent[number] = True
                target[number] = 0.0
                pairs[number] = missing, draws.choice(pairs[number])
                kept[number] = torch.tensor([1.0, float(draws.random() >= ABSENT_ALONE)])
        positive, negative = (
            torch.stack([self.queries.side(clip, share) for clip in side])
            for side in zip(*pairs, strict=True)
        )
        return Batch(drawn.mixture, target, condition(positive, negative, kept), absent=absent)


class CorpusData(Data):
    """Mixtures of the prepared corpus; validation at 0 dB on unaltered recordings, both sides by text."""

    def __init__(
        self,
        corpus: Corpus,
        clap: Clap,
        tokenizer: Tokenizer,
        names: tuple[str, ...],
        *,
        steps: int,
        steps_per_validation: int,
        batch: int,
        seed: int,
    ) -> None:
        super().__init__(steps, steps_per_validation)
        self.corpus, self.clap, self.tokenizer = corpus, clap, tokenizer
        self.names, self.batch, self.seed = names, batch, seed
        self.labels = tuple(corpus.of("validation", names))

    def setup(self, stage: str) -> None:
        rank = self.trainer.global_rank
        window, seed = self.clap.config.window_samples, self.seed + 1000 * rank
        clips = [clip for found in self.corpus.of("train", self.names).values() for clip in found]
        sampler = Sampler(self.corpus, "train", self.names, window, self.seed)
        self.queries = QueryBank(self.clap, self.tokenizer, sampler, clips, seed)
        self.sampler = Sampler(self.corpus, "train", self.names, window, seed)
        self.held_out = Sampler(self.corpus, "validation", self.names, window, 77 + rank, NONE)

    def batches(self) -> Dataset:
        return MixtureBatches(
            self.sampler, self.queries, self.batch, self.seed + 1000 * self.trainer.global_rank
        )

    def validation_batches(self) -> list[Batch]:
        count, sampler = VALIDATION_MIXTURES // self.trainer.world_size, self.held_out
        drawn = sampler.mixtures(
            count, [sampler.pair(sampler.names[i % len(sampler.names)]) for i in range(count)]
        )
        sides = [
            torch.stack([self.queries.text(clip) for clip in side])
            for side in (drawn.targets, drawn.interferences)
        ]
        labels = torch.tensor([self.labels.index(clip.coarse) for clip in drawn.targets])
        columns: list[Tensor] = [drawn.mixture, drawn.target, condition(*sides), labels]
        return [Batch(*parts) for parts in zip(*(c.split(VALIDATION_BATCH) for c in columns), strict=True)]


def train(
    corpus: Corpus,
    clap: Clap,
    tokenizer: Tokenizer,
    names: tuple[str, ...],
    folder: Path,
    *,
    steps: int,
    mask_steps: int,
    batch: int,
    learning_rate: float = 1e-3,
    processes: int = 2,
    validate_every: int = 400,
    seed: int = 1,
    start: Bundle | None = None,
) -> Path:
    """Train for `steps` steps of `processes * batch` mixtures; returns `folder/separator.safetensors`.

    The weights written are the averaged ones. A `last.ckpt` that is already in `folder` is resumed.
    `start` is an earlier default to begin with.
    """
    lightning.seed_everything(seed, verbose=False)
    model = ClapSep(clap.config)
    initialise(model, clap)
    data = CorpusData(
        corpus,
        clap,
        tokenizer,
        names,
        steps=steps,
        steps_per_validation=validate_every,
        batch=batch,
        seed=seed,
    )
    if start is not None:
        adopt(model, clap, tokenizer, start)
    module = SeparatorTraining(
        model,
        learning_rate,
        encoder_share=0.5,
        cycle_steps=steps,
        mask_steps=mask_steps,
        masked=MASKED,
        labels=data.labels,
        seed=seed,
    )
    run(module, data, folder, processes=processes, precision=fastest_precision(), ema=EMA_DECAY)
    path = folder / SEPARATOR
    if module.global_rank == 0:
        save_file(module.model.state_dict(), path)
    return path
