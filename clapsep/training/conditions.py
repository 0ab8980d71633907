"""Training conditions: one interpolation of text and audio queries, and sides that are left out."""

from __future__ import annotations

import torch
from torch import Tensor

ONE_SIDED = 0.25
"""Share of the examples with the positive side only, and share with the negative side only."""


def kept_sides(draws: Tensor, positive_only: float = ONE_SIDED, negative_only: float = ONE_SIDED) -> Tensor:
    """(N,) uniform in 0..1 -> (N, 2) float: 1 where the positive, the negative side of an example is kept.

    CLAPSep's training draws once for a whole batch; the shares are the same.
    """
    one_sided = positive_only + negative_only
    positive = (draws < positive_only) | (draws >= one_sided)
    return torch.stack([positive, draws >= positive_only], dim=1).float()


def interpolate(text: Tensor, audio: Tensor, share: float | Tensor) -> Tensor:
    """(..., joint) x 2 -> `share` of the text's embedding and the rest of the audio's."""
    return share * text + (1.0 - share) * audio


def condition(positive: Tensor, negative: Tensor, kept: Tensor | None = None) -> Tensor:
    """(N, joint) x 2 -> (N, 2 * joint) of unit norm; a side that is not `kept` (N, 2) is zeros."""
    if kept is not None:
        positive, negative = positive * kept[:, :1], negative * kept[:, 1:]
    return torch.nn.functional.normalize(torch.cat([positive, negative], dim=1), dim=-1)
