"""Pre-training of the two small CLAP towers on the training split.

The text tower is distilled first (`text_tower`) and then stays as it is; the audio tower learns to meet it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path

import lightning
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from clapsep.bundle import Bundle
from clapsep.clap import Clap
from clapsep.config import ModelConfig
from clapsep.query import Query, QueryError
from clapsep.spectral import Resampler
from clapsep.training import vocabulary
from clapsep.training.corpus import SAMPLE_RATE, Corpus
from clapsep.training.data import NONE, Sampler
from clapsep.training.loop import fastest_precision, make_trainer
from clapsep.training.losses import contrastive_loss
from clapsep.training.queries import embed_windows, phrase
from clapsep.training.text_tower import Lesson, distil
from clapsep.training.tokens import build_tokenizer, tokens

TOWERS, TOKENIZER = "towers.safetensors", "tokenizer.json"
FIRST_TEMPERATURE = 0.1
BACKGROUND_SHARE = 0.5


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


class TowerTraining(lightning.LightningModule):
    """Symmetric InfoNCE between windows and texts.

    The text tower learns at `text_share` of the learning rate; at 0 it is given, and stays as it is.
    """

    def __init__(
        self, clap: Clap, tokenizer: Tokenizer, steps: int, learning_rate: float, text_share: float
    ) -> None:
        super().__init__()
        self.clap = clap
        self.tokenizer = tokenizer
        self.resampler = Resampler(SAMPLE_RATE, clap.config.encoder.spectrogram.sample_rate)
        self.log_scale = torch.nn.Parameter(torch.tensor(math.log(1 / FIRST_TEMPERATURE)))
        self.steps = steps
        self.learning_rate = learning_rate
        self.text_share = text_share
        for module in (clap.text_branch, clap.text_projection):
            module.requires_grad_(text_share > 0)

    def training_step(self, batch: tuple[Tensor, list[str], Tensor], index: int) -> Tensor:
        windows, texts, positives = batch
        audio = embed_windows(self.clap, windows, self.resampler).float()
        ids = (part.to(self.device) for part in tokens(self.tokenizer, texts))
        text = self.clap.embed_text(*ids).float()
        with torch.autocast(self.device.type, enabled=False):
            loss = contrastive_loss(audio, text, positives, self.log_scale.exp().clamp(max=100.0))
        return loss

    def configure_optimizers(self):
        clap, rate = self.clap, self.learning_rate
        text = [*clap.text_branch.parameters(), *clap.text_projection.parameters()]
        audio = [*clap.audio_branch.parameters(), *clap.audio_projection.parameters(), self.log_scale]
        groups = [{"params": audio, "lr": rate}]
        if self.text_share > 0:
            groups.append({"params": text, "lr": self.text_share * rate})
        optimizer = torch.optim.AdamW(groups, rate, weight_decay=0.02)
        rates = [group["lr"] for group in groups]
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


def pretrain_text(config: ModelConfig, lesson: Lesson, steps: int, seed: int) -> tuple[Clap, Tokenizer]:
    """Fresh towers, the text one distilled for `steps` steps, and the tokenizer that goes with it."""
    lightning.seed_everything(seed, verbose=False)
    clap, tokenizer = Clap(config), build_tokenizer(lesson.vocabulary, config.text.max_tokens)
    distil(clap, tokenizer, lesson, steps=steps, seed=seed)
    return clap, tokenizer


@torch.no_grad()
def rotation(clap: Clap, tokenizer: Tokenizer, earlier: Bundle) -> Tensor:
    """(joint, joint), orthogonal: text embeddings of `clap` times it are nearest to those of `earlier`.

    Two lessons of one teacher have joint spaces that differ by a rotation (`text_tower.JointSpace`); it is
    found from the wordings whose words the earlier bundle knows (orthogonal Procrustes).
    """
    known, old = [], []
    for text in sorted({text for texts in vocabulary.all_wordings().values() for text in texts}):
        try:
            old.append(earlier.queries.conditions([Query(positive_text=text)])[0, : clap.config.joint])
        except QueryError:
            continue
        known.append(text)
    present = clap.eval().embed_text(*tokens(tokenizer, known))
    left, _, right = torch.linalg.svd(present.double().T @ torch.stack(old).double())
    return (left @ right).float()


@torch.no_grad()
def begin_audio(clap: Clap, tokenizer: Tokenizer, earlier: Bundle) -> None:
    """Give `clap` the audio tower of an earlier bundle, turned into its joint space."""
    clap.audio_branch.load_state_dict(earlier.clap.audio_branch.state_dict())
    clap.audio_projection.load_state_dict(earlier.clap.audio_projection.state_dict())
    turn, last = rotation(clap, tokenizer, earlier), clap.audio_projection[-1]
    last.weight.copy_(turn @ last.weight)
    last.bias.copy_(turn @ last.bias)


def pretrain(
    corpus: Corpus,
    clap: Clap,
    tokenizer: Tokenizer,
    names: tuple[str, ...],
    folder: Path,
    *,
    steps: int,
    batch: int = 24,
    learning_rate: float = 1e-3,
    processes: int = 2,
    seed: int = 1,
) -> None:
    """Train the audio tower for `steps` steps of `processes * batch` clips; writes both into `folder`."""
    lightning.seed_everything(seed, verbose=False)
    module = TowerTraining(clap, tokenizer, steps, learning_rate, text_share=0.0)
    trainer = make_trainer(
        folder,
        steps,
        processes,
        precision=fastest_precision(),
        clip=1.0,
        report_every=20,
        enable_checkpointing=False,
    )
    rank_seed = seed + 1000 * trainer.global_rank
    sampler = Sampler(corpus, "train", names, clap.config.window_samples, rank_seed)
    trainer.fit(module, DataLoader(ClipBatches(sampler, batch, rank_seed), batch_size=None))
    if trainer.is_global_zero:
        held_out = Sampler(corpus, "validation", names, clap.config.window_samples, 7, NONE)
        accuracy = retrieval_accuracy(clap, tokenizer, held_out, 480)
        print(f"held-out retrieval accuracy {accuracy:.3f} of {len(held_out.names)} classes", flush=True)
        save_towers(clap, tokenizer, folder)
    trainer.strategy.barrier()


def save_towers(clap: Clap, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the towers and their tokenizer."""
    tokenizer.save(str(folder / TOKENIZER))
    save_file(clap.state_dict(), folder / TOWERS)


def load_towers(config: ModelConfig, folder: Path) -> tuple[Clap, Tokenizer]:
    """The towers that `pretrain` left in `folder`. Raises FileNotFoundError where there are none."""
    clap = Clap(config)
    clap.load_state_dict(load_file(folder / TOWERS))
    return clap, Tokenizer.from_file(str(folder / TOKENIZER))
