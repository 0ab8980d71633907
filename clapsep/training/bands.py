"""Deep supervision: what the decoder gives its masker, held to the ideal mask of every mel band.

The masker costs more than encoder and decoder together. So of many queries the decoder learns which of the
sources is meant, by this loss, and of some the masker learns to cut it out.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from clapsep.config import ModelConfig
from clapsep.spectral import mel_filters
from clapsep.training.losses import mask_loss


class BandSupervision(nn.Module):
    """A mask over mel bands, and its loss; a model that is trained has no use for it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        bands = config.encoder.mel_bins
        self.logits = nn.Linear(bands, bands)
        nn.init.eye_(self.logits.weight)
        nn.init.zeros_(self.logits.bias)
        filters = mel_filters(replace(config.encoder, spectrogram=config.spectrogram))
        self.register_buffer("filters", filters, persistent=False)

    def forward(self, bands: Tensor, target: Tensor, interference: Tensor) -> Tensor:
        """`Decoder.bands` (N, frames, mel_bins), magnitudes (N, frames, bins) x 2 -> `mask_loss`."""
        mask = torch.sigmoid(self.logits(bands)).float()
        return mask_loss(mask, target @ self.filters, interference @ self.filters)
