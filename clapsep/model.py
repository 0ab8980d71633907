"""The separator: a mixture window and a condition to the target's waveform."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clapsep.config import ModelConfig
from clapsep.decoder import Decoder, DecoderInputs
from clapsep.htsat import Htsat
from clapsep.spectral import Resampler, Stft


class Features(NamedTuple):
    """All that a mixture window gives the decoder; it does not depend on the query.

    Attributes:
        spectrum: (B, frames, bins) complex64.
        magnitude: (B, frames, bins) float32.
        encoder: `Htsat.features`, shallow to deep.
    """

    spectrum: Tensor
    magnitude: Tensor
    encoder: tuple[Tensor, ...]


class Encoded(NamedTuple):
    """Mixtures as `ClapSep.decode` takes them, ready for any query.

    Attributes:
        spectrum: (B, frames, bins) complex64.
        inputs: what the decoder needs.
        samples: length of the mixtures.
    """

    spectrum: Tensor
    inputs: DecoderInputs
    samples: int


class ClapSep(nn.Module):
    """CLAPSep (arXiv 2402.17455) with LoRA merged into `audio_branch`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.stft = Stft(config.spectrogram)
        self.resampler = Resampler(config.sample_rate, config.encoder.spectrogram.sample_rate)
        self.audio_branch = Htsat(config.encoder)
        # The separator reads the features before CLAP's final norm.
        del self.audio_branch.norm
        self.decoder_model = Decoder(config)

    @property
    def sample_rate(self) -> int:
        """Rate of mixtures and targets, Hz."""
        return self.config.sample_rate

    @property
    def window(self) -> int:
        """Longest mixture, samples."""
        return self.config.window_samples

    def features(self, mixture: Tensor) -> Features:
        """Encode mixtures.

        Args:
            mixture: (B, samples) float32 at `sample_rate`, 513 samples to `window`.

        Raises:
            ValueError: the mixture is longer than a window.
        """
        if mixture.shape[-1] > self.window:
            raise ValueError(
                f"mixture of {mixture.shape[-1]} samples is longer than a window of {self.window}"
            )
        spectrum = self.stft(mixture)
        branch = self.audio_branch
        power = branch.power(self.resampler(mixture))
        # The separator was trained on silence after the last frame, not on a stretched image.
        padded = F.pad(power, (0, 0, 0, branch.config.frames - power.shape[1]))
        encoder = branch.features(branch.image(branch.normalised_log_mel(padded)))
        return Features(spectrum, spectrum.abs(), encoder)

    def mask(self, features: Features, condition: Tensor) -> Tensor:
        """(B, condition_dim) -> mask (B, frames, bins) in 0..1."""
        return self.decoder_model(self.decoder_model.prepare(features.magnitude, features.encoder), condition)

    def encode(self, mixture: Tensor) -> Encoded:
        """(B, samples), as `features` takes them: all that does not depend on the query."""
        features = self.features(mixture)
        inputs = self.decoder_model.prepare(features.magnitude, features.encoder)
        return Encoded(features.spectrum, inputs, mixture.shape[-1])

    def decode(self, encoded: Encoded, index: Tensor, condition: Tensor) -> Tensor:
        """Separate mixtures by number, (N,) int64 in 0..B-1, by a (N, condition_dim) each -> (N, samples)."""
        mask = self.decoder_model(encoded.inputs.at(index), condition)
        return self.stft.inverse(encoded.spectrum[index] * mask, encoded.samples)

    def separate(self, mixture: Tensor, condition: Tensor) -> Tensor:
        """(B, samples), (B, condition_dim) -> target (B, samples) with the mixture's phase."""
        every = torch.arange(len(mixture), device=mixture.device)
        return self.decode(self.encode(mixture), every, condition)

    forward = separate
