"""Query embeddings for training: phrases of the vocabulary, and one audio embedding per training clip."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from clapsep.clap import Clap
from clapsep.model import Resampler
from clapsep.training import vocabulary
from clapsep.training.conditions import interpolate
from clapsep.training.corpus import SAMPLE_RATE, Clip
from clapsep.training.data import Sampler
from clapsep.training.tokens import tokens

NOISE = 0.2
"""Norm of what is added to a training query: how far apart two text towers of the same lesson put a text."""

OWN_AUDIO = 0.25
"""Share of the audio queries that are of the very recording: those say more than any text does."""

TEMPLATES = ("{}", "{}", "the sound of {}", "sound of {}", "{} sound", "{} sounds")


def phrase(member: str, choose: random.Random) -> str:
    """A random text that is true of corpus class `member`."""
    return choose.choice(TEMPLATES).format(choose.choice(vocabulary.wordings(member)))


def embed_windows(clap: Clap, windows: Tensor, resampler: Resampler) -> Tensor:
    """(B, window samples at 32 kHz) -> audio embeddings (B, joint)."""
    return clap.embed_audio(resampler(windows))


class QueryBank:
    """Embeddings of every phrase and of a few windows of every training clip, computed once.

    A training query is `share * text + (1 - share) * audio`; the audio is a window of the recording itself
    for a share `OWN_AUDIO`, and of any recording of the same corpus class otherwise.
    """

    def __init__(
        self, clap: Clap, tokenizer: Tokenizer, sampler: Sampler, clips: Sequence[Clip], seed: int
    ) -> None:
        self.random = random.Random(seed)
        clap.eval()
        texts = sorted(
            {t.format(w) for m in vocabulary.COARSE_OF for w in vocabulary.wordings(m) for t in TEMPLATES}
        )
        resampler = Resampler(SAMPLE_RATE, clap.config.encoder.spectrogram.sample_rate)
        with torch.no_grad():
            self.texts = dict(zip(texts, clap.embed_text(*tokens(tokenizer, texts)), strict=True))
            audio: list[Tensor] = []
            for start in range(0, len(clips), 32):
                windows = sampler.windows(list(clips[start : start + 32]))
                audio += embed_windows(clap, windows, resampler).unbind()
        self.audio = {clip.name: embedding for clip, embedding in zip(clips, audio, strict=True)}
        self._alike: dict[str, list[str]] = {}
        for clip in clips:
            self._alike.setdefault(clip.member, []).append(clip.name)

    def text(self, clip: Clip) -> Tensor:
        """(joint,) embedding of a random phrase that is true of the clip."""
        return self.texts[phrase(clip.member, self.random)]

    def side(self, clip: Clip, share: float) -> Tensor:
        """(joint,) interpolation of a text (`share`) and an audio query for the clip, blurred."""
        name = clip.name if self.random.random() < OWN_AUDIO else self.random.choice(self._alike[clip.member])
        query = interpolate(self.text(clip), self.audio[name], share)
        draws = torch.Generator().manual_seed(self.random.getrandbits(63))
        return query + NOISE * torch.randn(len(query), generator=draws) / len(query) ** 0.5
