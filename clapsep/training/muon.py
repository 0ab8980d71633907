"""Muon (Jordan, 2024): the momentum of a matrix, orthogonalised, moves all its directions alike.

`torch.optim.Muon` computes in bfloat16, which is twenty times as slow on a CPU that does not know it, and
takes matrices alone; this one is float32, is AdamW for the remaining parameters, and shares the products out
among the processes of a run.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, distributed, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
"""Of the Newton-Schulz iteration (those of `torch.optim.Muon`): singular values end between 0.7 and 1.2."""

RMS_OF_ADAM = 0.2
"""Brings an update to the size that AdamW's have (Liu et al., arXiv 2502.16982), so both share a rate."""


def matrices(module: nn.Module, without: type[nn.Module]) -> set[Tensor]:
    """The weights of `module` that map activations to activations, but for those inside a `without`."""
    left_out = {p for inner in module.modules() if isinstance(inner, without) for p in inner.parameters()}
    found = set()
    for inner in module.modules():
        if isinstance(inner, nn.Linear):
            found.add(inner.weight)
        elif isinstance(inner, nn.MultiheadAttention):
            found.add(inner.in_proj_weight)
    return found - left_out


class Muon(torch.optim.AdamW):
    """Muon where a group has `matrices` set, AdamW elsewhere.

    Every process holds the whole state; each orthogonalises its share of the matrices and all exchange them.

    Args:
        groups: parameter groups; `lr`, `matrices`.
        lr: learning rate.
        momentum: of Muon, Nesterov's.
        weight_decay: decoupled, of both.
    """

    def __init__(
        self, groups: Iterable[dict], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        groups = [{"matrices": False, "momentum": momentum, **group} for group in groups]
        super().__init__(groups, lr, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure=None):
        """As every optimiser's; the matrices' gradients are gone afterwards."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if not group["matrices"]:
                continue
            parameters = [p for p in group["params"] if p.grad is not None]
            for parameter, update in zip(parameters, self._muon(parameters, group), strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
                # AdamW passes over what has no gradient.
                parameter.grad = None
        super().step()
        return loss

    def _muon(self, parameters: list[Tensor], group: dict) -> list[Tensor]:
        together = distributed.is_available() and distributed.is_initialized()
        rank, count = (distributed.get_rank(), distributed.get_world_size()) if together else (0, 1)
        updates = []
        for number, parameter in enumerate(parameters):
            state = self.state[parameter]
            if not state:
                # AdamW, when it is loaded, looks for a step in every state.
                state.update(step=torch.zeros(()), momentum=torch.zeros_like(parameter))
            momentum = state["momentum"]
            momentum.lerp_(parameter.grad, 1 - group["momentum"])
            if number % count == rank:
                ahead = parameter.grad.lerp(momentum, group["momentum"])
                updates.append(RMS_OF_ADAM * max(parameter.shape) ** 0.5 * orthogonal(ahead))
            else:
                updates.append(torch.zeros_like(parameter))
        if together:
            flat = torch.cat([update.flatten() for update in updates])
            distributed.all_reduce(flat)
            parts = flat.split([update.numel() for update in updates])
            updates = [part.view_as(update) for part, update in zip(parts, updates, strict=True)]
        return updates


def orthogonal(matrix: Tensor) -> Tensor:
    """(M, N) -> the matrix with its singular values brought near one (Newton-Schulz)."""
    tall = matrix.shape[0] > matrix.shape[1]
    found = matrix.T if tall else matrix
    found = found / found.norm().clamp(min=1e-7)
    linear, cubic, quintic = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = found @ found.T
        found = torch.addmm(
            found, torch.addmm(gram, gram, gram, beta=cubic, alpha=quintic), found, beta=linear
        )
    return found.T if tall else found
