"""Queries (positive and negative, text and audio) and the condition vectors that steer the separation."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import fsspec
import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from clapsep.audio import AudioError, Recording, StreamResampler
from clapsep.clap import Clap
from clapsep.config import ModelConfig

WINDOW_BATCH = 8


class QueryError(ValueError):
    """A query that cannot be embedded; the message names the side, the value and the fix."""


@dataclass(frozen=True)
class Query:
    """What to keep (positive) and what to remove (negative), each side by text, by audio or by both.

    Audio is given as URIs of recordings of any length. A plain string counts as one value.

    Raises QueryError for a query without any value, for an empty value and for one that is no string.
    """

    positive_text: tuple[str, ...] = ()
    negative_text: tuple[str, ...] = ()
    positive_audio: tuple[str, ...] = ()
    negative_audio: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            values = (value,) if isinstance(value, str) else tuple(value or ())
            for item in values:
                if not isinstance(item, str) or not item.strip():
                    raise QueryError(
                        f"{field.name}: {item!r} is not a query; give non-empty text, or leave it out"
                    )
            object.__setattr__(self, field.name, values)
        if not any(getattr(self, field.name) for field in fields(self)):
            names = ", ".join(field.name for field in fields(self))
            raise QueryError(f"the query is empty; set at least one of {names}")


class QueryEncoder:
    """Turns queries into condition vectors; embeddings of texts and recordings are kept in a bounded cache.

    Several texts of a side are averaged, several recordings too; the text and the audio of one side are
    summed. A recording is mixed down to mono and resampled to the encoder's rate; one longer than the
    encoder's window is the average of consecutive windows, the last drawn back to end with the recording,
    scaled to norm 1. (laion-clap embeds one window at a random position instead.)

    `vocabulary` is what the model was trained on, named when a text holds words that the tokenizer does not
    know; `allow_unfamiliar` embeds such texts all the same. Safe to call from several threads.
    """

    def __init__(
        self,
        clap: Clap,
        tokenizer: Tokenizer,
        config: ModelConfig,
        *,
        vocabulary: Sequence[str] = (),
        allow_unfamiliar: bool = False,
        cache_size: int = 4096,
    ) -> None:
        self.clap = clap
        self.config = config
        self.vocabulary = tuple(vocabulary)
        self.allow_unfamiliar = allow_unfamiliar
        self.cache_size = cache_size
        # A copy: a tokenizer file may ask for truncation or padding, and truncation would go unnoticed.
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self._cache: OrderedDict[tuple[str, ...], Tensor] = OrderedDict()
        self._lock = threading.Lock()

    @torch.no_grad()
    def conditions(self, queries: Sequence[Query]) -> Tensor:
        """(len(queries), condition_dim) float32 on the model's device: positive, then negative side.

        A missing side is zeros. Each row has L2 norm 1 where `config.condition_normalize` is set.

        Raises QueryError for text that is too long or unfamiliar, AudioError for an unreadable recording.
        """
        texts = self._texts([text for q in queries for text in q.positive_text + q.negative_text])
        recordings = self._recordings([uri for q in queries for uri in q.positive_audio + q.negative_audio])

        def side(asked: tuple[str, ...], uris: tuple[str, ...]) -> Tensor:
            total = torch.zeros(self.config.joint, device=self.device)
            for found in ([texts[text] for text in asked], [recordings[uri] for uri in uris]):
                if found:
                    total = total + torch.stack(found).mean(dim=0)
            return total

        rows = [
            torch.cat(
                [
                    side(query.positive_text, query.positive_audio),
                    side(query.negative_text, query.negative_audio),
                ]
            )
            for query in queries
        ]
        if not rows:
            return torch.zeros(0, self.config.condition_dim, device=self.device)
        condition = torch.stack(rows)
        if self.config.condition_normalize:
            condition = torch.nn.functional.normalize(condition, dim=-1)
        return condition

    @torch.no_grad()
    def familiarity(self, query: Query) -> float | None:
        """How near the query's wording is to what the model was trained on: -1..1, 1 for a text of it.

        Of each text the cosine to the nearest text of the vocabulary, of the query that of its farthest text.
        None for a query without text, and for a model whose card lists no vocabulary.

        Raises QueryError for text that is too long or unfamiliar.
        """
        texts = query.positive_text + query.negative_text
        if not texts or not self.vocabulary:
            return None
        known = torch.stack(list(self._texts(self.vocabulary).values()))
        asked = torch.stack(list(self._texts(texts).values()))
        return round((asked @ known.T).amax(dim=1).min().clamp(-1.0, 1.0).item(), 4)

    @property
    def device(self) -> torch.device:
        """Where the towers' weights are, and the conditions with them."""
        return next(self.clap.parameters()).device

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """`input_ids` and `attention_mask`, (len(texts), tokens) int64, padded to the longest text.

        Raises QueryError for a text longer than `config.text.max_tokens`, without words, or with
        unfamiliar ones.
        """
        encodings = self.tokenizer.encode_batch(list(texts))
        limit = self.config.text.max_tokens
        unknown = self.tokenizer.token_to_id("<unk>")
        for text, encoding in zip(texts, encodings, strict=True):
            if len(encoding.ids) > limit:
                raise QueryError(
                    f"text {text!r} has {len(encoding.ids)} tokens; the model reads at most {limit}: "
                    "shorten it"
                )
            if all(encoding.special_tokens_mask):
                raise QueryError(f"text {text!r} holds no words; describe the sound")
            spans = zip(encoding.ids, encoding.offsets, strict=True)
            words = [text[start:end] for token, (start, end) in spans if token == unknown]
            if words and not self.allow_unfamiliar:
                known = ", ".join(self.vocabulary) or "see the bundle's card"
                raise QueryError(
                    f"text {text!r} has words this model never learned ({', '.join(words)}); "
                    f"it knows: {known}. Reword the query, or pass --allow-unfamiliar to run it all the same"
                )
        longest = max(len(encoding.ids) for encoding in encodings)
        ids = torch.full((len(encodings), longest), self.config.text.pad_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, encoding in enumerate(encodings):
            ids[row, : len(encoding.ids)] = torch.tensor(encoding.ids)
            mask[row, : len(encoding.ids)] = 1
        return ids, mask

    def _texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        found = self._recall({text: ("text", text) for text in texts})
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        # One by one: what shares a batch with a text changes its embedding's last bits, and so the stem's.
        found |= {text: self._embed_text(text) for text in missing}
        self._remember({("text", text): found[text] for text in missing})
        return found

    def _recordings(self, uris: Sequence[str]) -> dict[str, Tensor]:
        keys = {uri: ("audio", uri, _version(uri)) for uri in dict.fromkeys(uris)}
        found = self._recall(keys)
        missing = {uri: self._embed_recording(uri) for uri in keys if uri not in found}
        self._remember({keys[uri]: embedding for uri, embedding in missing.items()})
        return found | missing

    def _embed_text(self, text: str) -> Tensor:
        ids, mask = self.tokens([text])
        return self.clap.embed_text(ids.to(self.device), mask.to(self.device))[0]

    def _embed_recording(self, uri: str) -> Tensor:
        sample_rate = self.config.encoder.spectrogram.sample_rate
        window = round(self.config.window_seconds * sample_rate)
        total = torch.zeros(self.config.joint, device=self.device)
        count = 0
        batch: list[np.ndarray] = []
        for samples in encoder_windows(_mono(uri, sample_rate), window):
            if len(samples) == 0:
                raise AudioError(f"{uri!r} is too short for a query: no sample is left at {sample_rate} Hz")
            batch.append(repeat_pad(samples, window))
            count += 1
            if len(batch) == WINDOW_BATCH:
                total = total + self._embed_windows(batch)
                batch = []
        if batch:
            total = total + self._embed_windows(batch)
        return torch.nn.functional.normalize(total / count, dim=-1)

    def _embed_windows(self, batch: Sequence[np.ndarray]) -> Tensor:
        waveform = torch.from_numpy(int16_round_trip(np.stack(batch)))
        return self.clap.embed_audio(waveform.to(self.device)).sum(dim=0)

    def _recall(self, keys: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
        with self._lock:
            found = {name: self._cache[key] for name, key in keys.items() if key in self._cache}
            for name in found:
                self._cache.move_to_end(keys[name])
        return found

    def _remember(self, embeddings: dict[tuple[str, ...], Tensor]) -> None:
        with self._lock:
            self._cache.update(embeddings)
            while len(self._cache) > self.cache_size:
                self._cache.popitem(last=False)


def _version(uri: str) -> str:
    # A changed file (size, time or entity tag) must not be answered from the cache.
    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
        # Drivers keep listings, which know nothing of what was written since.
        filesystem.invalidate_cache(path)
        return str(filesystem.ukey(path))
    except Exception:
        # Decoding meets the same trouble and says what it is.
        return ""


def _mono(uri: str, sample_rate: int) -> Iterator[np.ndarray]:
    with Recording(uri) as recording:
        resampler = StreamResampler(1, recording.sample_rate, sample_rate)
        for mixture, _ in recording.blocks():
            for piece in resampler.process(mixture.mean(axis=1, keepdims=True)):
                yield piece[:, 0]
        yield resampler.finish()[:, 0]


def encoder_windows(blocks: Iterator[np.ndarray], window: int) -> Iterator[np.ndarray]:
    """Consecutive windows of `window` samples; the last is drawn back so that it is a full one too.

    A signal of at most one window comes out whole. Memory: two windows and a block.
    """
    held = np.zeros(0, dtype=np.float32)
    previous = held
    for block in blocks:
        held = np.concatenate([held, block])
        # A whole window waits for more samples, so that the end is never met empty-handed.
        while len(held) > window:
            previous, held = held[:window], held[window:]
            yield previous
    yield np.concatenate([previous, held])[-window:]


def repeat_pad(samples: np.ndarray, length: int) -> np.ndarray:
    """(n,) to (length,): as many whole repeats as fit, then zeros (laion-clap's "repeatpad")."""
    repeated = np.tile(samples, length // len(samples))
    return np.pad(repeated, (0, length - len(repeated)))


def int16_round_trip(samples: np.ndarray) -> np.ndarray:
    """float32 to 16-bit and back as laion-clap does: clipped to ±1, times 32767, truncated toward zero."""
    scaled = (np.clip(samples, -1.0, 1.0) * np.float32(32767.0)).astype(np.int16)
    return (scaled / np.float32(32767.0)).astype(np.float32)
