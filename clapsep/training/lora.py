"""Low-rank adaptation (LoRA, arXiv 2106.09685) of the encoder's attention, as CLAPSep was trained."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clapsep.convert import LORA_ALPHA
from clapsep.htsat import Htsat, WindowAttention

RANK = 16
ADAPTED = ("qkv", "proj")


class LoraLinear(nn.Linear):
    """A Linear whose weight is frozen and has a trained update: W + (alpha / rank) B A.

    The update starts at zero. Parameters are named and initialised as loralib's.
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scale = LORA_ALPHA / rank

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + F.linear(F.linear(tokens, self.lora_A), self.lora_B) * self.scale


def add_lora(encoder: Htsat, rank: int = RANK) -> None:
    """Adapt `qkv` and `proj` of every window attention; these layers' biases train too, nothing else does."""
    encoder.requires_grad_(False)
    for attention in [module for module in encoder.modules() if isinstance(module, WindowAttention)]:
        for name in ADAPTED:
            adapted = LoraLinear(getattr(attention, name), rank)
            adapted.bias.requires_grad_(True)
            setattr(attention, name, adapted)


def has_lora(module: nn.Module) -> bool:
    """Whether some layer of it is adapted."""
    return any(isinstance(part, LoraLinear) for part in module.modules())
