"""Sizes of the model, as frozen dataclasses, and the two presets.

`BASE` is the published CLAPSep on the LAION-CLAP checkpoint `music_audioset_epoch_15_esc_90.14`
(arXiv 2402.17455, section 3). `MINI` is the embedded default: the same architecture and parameter
names, sized for two CPU cores.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class SpectrogramConfig:
    """A centred, reflect-padded Hann STFT.

    Attributes:
        sample_rate: Hz.
        n_fft: window and transform length, samples.
        hop: samples between frames.
    """

    sample_rate: int
    n_fft: int
    hop: int

    @property
    def bins(self) -> int:
        """Frequencies from 0 Hz to the Nyquist frequency."""
        return self.n_fft // 2 + 1

    def frames(self, samples: int) -> int:
        """Frames of a signal of `samples` samples."""
        return samples // self.hop + 1


@dataclass(frozen=True)
class EncoderConfig:
    """The HTSAT audio encoder (laion-clap `clap_module/htsat.py`).

    Attributes:
        spectrogram: front end of the encoder (48 kHz).
        mel_bins: mel bands, Slaney scale and norm.
        f_min: lowest mel edge, Hz.
        f_max: highest mel edge, Hz.
        spec_size: height and width of the square image the Swin stages see.
        patch: height and width of one patch, pixels.
        embed: channels after the patch embedding; doubled by every stage but the last.
        depths: Swin blocks per stage.
        heads: attention heads per stage.
        window: height and width of an attention window, patches.
    """

    spectrogram: SpectrogramConfig = SpectrogramConfig(sample_rate=48_000, n_fft=1024, hop=480)
    mel_bins: int = 64
    f_min: float = 50.0
    f_max: float = 14_000.0
    spec_size: int = 256
    patch: int = 4
    embed: int = 128
    depths: tuple[int, ...] = (2, 2, 12, 2)
    heads: tuple[int, ...] = (4, 8, 16, 32)
    window: int = 8

    @property
    def segments(self) -> int:
        """Time segments stacked along the frequency axis of the image."""
        return self.spec_size // self.mel_bins

    @property
    def frames(self) -> int:
        """Mel frames of one image."""
        return self.spec_size * self.segments

    @property
    def grids(self) -> tuple[int, ...]:
        """Side of the square patch grid at each stage."""
        return tuple(self.spec_size // self.patch // 2**stage for stage in range(len(self.depths)))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at each stage."""
        return tuple(self.embed * 2**stage for stage in range(len(self.depths)))


@dataclass(frozen=True)
class TextConfig:
    """The RoBERTa text encoder (transformers `RobertaModel`).

    Attributes:
        vocabulary: number of token ids.
        width: hidden size.
        layers: transformer layers.
        heads: attention heads.
        feed_forward: width of the feed-forward layer.
        positions: size of the position table; the first two rows belong to padding.
        max_tokens: longest text, tokens, start and end marks included.
        pad_id: id of the padding token.
        norm_eps: epsilon of every LayerNorm.
    """

    vocabulary: int = 50_265
    width: int = 768
    layers: int = 12
    heads: int = 12
    feed_forward: int = 3072
    positions: int = 514
    max_tokens: int = 77
    pad_id: int = 1
    norm_eps: float = 1e-5


@dataclass(frozen=True)
class DecoderConfig:
    """The mask estimator.

    Attributes:
        depths: Swin blocks per stage, deepest stage first.
        masker_width: width of the mask transformer (published `d_attn`).
        masker_layers: layers of the mask transformer.
        masker_heads: attention heads of the mask transformer.
    """

    depths: tuple[int, ...] = (1, 1, 1, 1)
    masker_width: int = 640
    masker_layers: int = 3
    masker_heads: int = 8


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the shapes and the numerics of a bundle.

    Attributes:
        name: name of the preset.
        spectrogram: STFT that the mask is applied to (32 kHz).
        window_seconds: length of one model window, seconds.
        joint: width of the CLAP embedding space.
        condition_normalize: whether concat(positive, negative) is L2-normalised as one vector.
            The published training code and demo do, its evaluation script does not.
        symmetric: whether every query is also asked with its sides swapped, and what that leaves counts as
            much: the masks of a query and of the swapped one add up to 1. The published model asks once.
        encoder, text, decoder: sizes of the parts.
    """

    name: str = "base"
    spectrogram: SpectrogramConfig = SpectrogramConfig(sample_rate=32_000, n_fft=1024, hop=320)
    window_seconds: float = 10.0
    joint: int = 512
    condition_normalize: bool = True
    symmetric: bool = False
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    text: TextConfig = field(default_factory=TextConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)

    @property
    def sample_rate(self) -> int:
        """Rate of the waveforms that the model separates, Hz."""
        return self.spectrogram.sample_rate

    @property
    def window_samples(self) -> int:
        """Length of one model window, samples at `sample_rate`."""
        return round(self.window_seconds * self.sample_rate)

    @property
    def condition_dim(self) -> int:
        """Width of concat(positive, negative)."""
        return 2 * self.joint

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy, the inverse of `from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Rebuild from `to_dict`. Raises TypeError for a field this version does not know."""
        encoder = dict(values["encoder"])
        encoder["spectrogram"] = SpectrogramConfig(**encoder["spectrogram"])
        parts = {
            "spectrogram": SpectrogramConfig(**values["spectrogram"]),
            "encoder": EncoderConfig(**_tuples(encoder)),
            "text": TextConfig(**values["text"]),
            "decoder": DecoderConfig(**_tuples(values["decoder"])),
        }
        return cls(**{**values, **parts})


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


BASE = ModelConfig()

MINI = ModelConfig(
    name="mini",
    window_seconds=2.5,
    joint=128,
    symmetric=True,
    encoder=EncoderConfig(spec_size=128, embed=32, depths=(2, 2, 4, 1), heads=(2, 4, 8, 16)),
    text=TextConfig(
        vocabulary=5504, width=128, layers=2, heads=4, feed_forward=256, positions=34, max_tokens=32
    ),
    decoder=DecoderConfig(masker_width=256, masker_layers=1),
)
