"""Losses: the published separation loss, the easier mask loss of the first steps, the contrastive loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SNR_SHARE = 0.9
SI_SNR_SHARE = 0.1
SILENCE_FLOOR = 1e-3


def snr(estimate: Tensor, target: Tensor) -> Tensor:
    """(..., samples) x 2 -> 10 log10(|target|^2 / |target - estimate|^2), dB."""
    return _decibels(target.square().sum(-1), (target - estimate).square().sum(-1))


def si_snr(estimate: Tensor, target: Tensor) -> Tensor:
    """(..., samples) x 2 -> scale-invariant SNR of the zero-mean signals, dB (Le Roux et al., 2019)."""
    estimate = estimate - estimate.mean(-1, keepdim=True)
    target = target - target.mean(-1, keepdim=True)
    eps = torch.finfo(target.dtype).eps
    scale = ((estimate * target).sum(-1, keepdim=True) + eps) / (target.square().sum(-1, keepdim=True) + eps)
    projected = scale * target
    return _decibels(projected.square().sum(-1), (estimate - projected).square().sum(-1))


def _decibels(signal: Tensor, noise: Tensor) -> Tensor:
    # As torchmetrics, which the published training calls, keeps silence finite.
    eps = torch.finfo(signal.dtype).eps
    return 10.0 * torch.log10((signal + eps) / (noise + eps))


def separation_loss(estimate: Tensor, target: Tensor) -> Tensor:
    """-0.9 SNR - 0.1 SI-SNR, mean over the batch, dB (CLAPSep, arXiv 2402.17455, section III-D)."""
    return -(SNR_SHARE * snr(estimate, target) + SI_SNR_SHARE * si_snr(estimate, target)).mean()


def silence_loss(estimate: Tensor, mixture: Tensor) -> Tensor:
    """Energy of what is left where nothing should be, relative to the mixture's, mean in dB, at least -30."""
    left = estimate.square().sum(-1) / mixture.square().sum(-1).clamp(min=1e-8)
    return 10.0 * torch.log10(left + SILENCE_FLOOR).mean()


def mask_loss(mask: Tensor, target_magnitude: Tensor, interference_magnitude: Tensor) -> Tensor:
    """Binary cross-entropy of a mask against the ideal ratio mask, louder bins counting more.

    All (B, frames, bins). Moves from the constant mask within minutes where the waveform loss stalls.
    """
    total = target_magnitude + interference_magnitude
    ideal = target_magnitude / total.clamp(min=1e-8)
    weight = total.sqrt()
    weight = weight / weight.mean((1, 2), keepdim=True).clamp(min=1e-8)
    return F.binary_cross_entropy(mask.clamp(1e-4, 1 - 1e-4), ideal, weight=weight)


def contrastive_loss(audio: Tensor, text: Tensor, matches: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE where a row may have several positives.

    Args:
        audio: (N, joint) unit vectors.
        text: (N, joint) unit vectors.
        matches: (N, N), 1 where text j is true of audio i.
        scale: inverse temperature.
    """
    logits = scale * audio @ text.T
    by_audio = -(F.log_softmax(logits, 1) * matches / matches.sum(1, keepdim=True)).sum(1)
    by_text = -(F.log_softmax(logits, 0) * matches / matches.sum(0, keepdim=True)).sum(0)
    return (by_audio.mean() + by_text.mean()) / 2
