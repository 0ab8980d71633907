"""Seconds per 10 s clip: this package's full-size model against the published inference written plainly.

`python -m benchmarks.model [--rounds N]`. Both run in one process, turn about, on the same regenerated
weights, one clip at a time; each figure is the median over the rounds, each ratio the median of the rounds'
ratios. Text is embedded anew for every clip on both sides (in use, this package keeps it).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.published import Published
from clapsep.clap import Clap
from clapsep.config import ModelConfig
from clapsep.convert import clap_tensors, clapsep_tensors
from clapsep.model import ClapSep
from tests.golden import CONFIGS, checkpoint
from tests.regenerate import rng, signal

TEXT_TOKENS = (7, 5)
"""Lengths of a usual positive and negative query, start and end marks included."""
PUBLISHED_TEXT_TOKENS = 77
PARTS = ("text query", "mixture features", "mask and waveform")


@dataclass(frozen=True)
class Contenders:
    """Both implementations with the same weights, and one clip to separate.

    Attributes:
        published: the yardstick.
        clap, model: this package's.
        mixture: (1, window) float32 at 32 kHz.
        texts: token ids of the positive and the negative query.
    """

    published: Published
    clap: Clap
    model: ClapSep
    mixture: Tensor
    texts: tuple[Tensor, Tensor]

    def condition(self, embed: Callable[[Tensor, Tensor], Tensor], length: int) -> Tensor:
        """(1, condition_dim): both texts padded to `length` tokens, embedded and normalised together."""
        ids = torch.full((2, length), self.model.config.text.pad_id)
        for row, text in enumerate(self.texts):
            ids[row, : len(text)] = text
        mask = (ids != self.model.config.text.pad_id).long()
        return torch.nn.functional.normalize(embed(ids, mask).reshape(1, -1), dim=-1)

    def run_published(self) -> tuple[dict[str, float], Tensor]:
        """Seconds per part, and the target (1, window)."""
        clock = _Clock()
        condition = self.condition(self.published.embed_text, PUBLISHED_TEXT_TOKENS)
        clock.lap("text query")
        features = self.published.features(self.mixture)
        clock.lap("mixture features")
        _, target = self.published.separate(features, condition, self.mixture.shape[-1])
        clock.lap("mask and waveform")
        return clock.seconds, target

    def run_ours(self) -> tuple[dict[str, float], Tensor]:
        """Seconds per part, and the target (1, window)."""
        clock = _Clock()
        condition = self.condition(self.clap.embed_text, max(len(text) for text in self.texts))
        clock.lap("text query")
        features = self.model.features(self.mixture)
        clock.lap("mixture features")
        masked = features.spectrum * self.model.mask(features, condition)
        target = self.model.stft.inverse(masked, self.mixture.shape[-1])
        clock.lap("mask and waveform")
        return clock.seconds, target


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] = now - self._last
        self._last = now


def contenders(size: str = "full") -> Contenders:
    """Both implementations on regenerated weights; size "full", or "tiny" for a quick look."""
    config: ModelConfig = CONFIGS[size]
    file_a = {key.removeprefix("module."): value for key, value in checkpoint(size, "a").items()}
    file_b = checkpoint(size, "b")
    towers, _ = clap_tensors(file_a, config, "file a")
    separator, _ = clapsep_tensors(file_b, towers, config, "file b")
    clap, model = Clap(config), ClapSep(config)
    clap.load_state_dict({**clap.state_dict(), **towers}, assign=True)
    model.load_state_dict({**model.state_dict(), **separator}, assign=True)
    draw = rng("tokens:benchmark")
    texts = [
        torch.tensor([0, *draw.integers(4, config.text.vocabulary, length - 2), 2]) for length in TEXT_TOKENS
    ]
    mixture = torch.from_numpy(signal("benchmark", config.sample_rate, config.window_seconds))[None]
    published = Published(file_a, file_b, config)
    return Contenders(published, clap.eval(), model.eval(), mixture, (texts[0], texts[1]))


@torch.no_grad()
def measure(both: Contenders, rounds: int) -> list[tuple[Mapping[str, float], Mapping[str, float]]]:
    """Seconds per part of every round, (published, ours); the first, cold round is not counted."""
    results = []
    for index in range(rounds + 1):
        # The order alternates, so that neither always runs on the other's warm caches.
        first, second = (both.run_published, both.run_ours)[:: 1 if index % 2 else -1]
        seconds = {run.__name__: run()[0] for run in (first, second)}
        results.append((seconds["run_published"], seconds["run_ours"]))
    return results[1:]


def table(results: list[tuple[Mapping[str, float], Mapping[str, float]]]) -> str:
    """Medians per part and for the whole clip."""
    lines = [f"{'per 10 s clip':<20}{'published':>12}{'clapsep':>12}{'ratio':>9}"]
    for name, parts in [*((part, (part,)) for part in PARTS), ("whole clip", PARTS)]:
        pairs = [tuple(sum(side[part] for part in parts) for side in pair) for pair in results]
        published, ours = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(theirs / own for theirs, own in pairs)
        lines.append(f"{name:<20}{published:>10.3f} s{ours:>10.3f} s{ratio:>8.2f}x")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", choices=sorted(CONFIGS), default="full")
    arguments = parser.parse_args()
    results = measure(contenders(arguments.size), arguments.rounds)
    print(
        f"{arguments.size}-size model, float32, CPU, {torch.get_num_threads()} threads, "
        f"{arguments.rounds} rounds"
    )
    print(table(results))


if __name__ == "__main__":
    main()
