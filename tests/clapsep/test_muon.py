"""Muon: torch's own, in float32, shared out among processes; AdamW for the rest."""

from __future__ import annotations

import pytest
import torch
from torch import distributed, multiprocessing, nn

from clapsep.config import MINI
from clapsep.decoder import Film
from clapsep.model import ClapSep
from clapsep.training.muon import Muon, matrices, orthogonal


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 16), (16, 40), (16, 16), (12, 12)]
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def moved(optimizer: torch.optim.Optimizer, steps: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(steps):
        for parameter in trained:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [parameter.detach().clone() for parameter in trained]


def test_matrices_move_as_torchs_muon_moves_them():
    mine = moved(Muon([{"params": parameters(), "matrices": True}], lr=1e-2))
    torchs = torch.optim.Muon(parameters(), lr=1e-2, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for one, other, start in zip(mine, moved(torchs), parameters(), strict=True):
        # torch's is bfloat16: three digits.
        assert float((one - other).norm() / (other - start.detach()).norm()) < 0.02


def test_other_parameters_move_as_adamw_moves_them():
    mine = moved(Muon([{"params": parameters()}], lr=1e-2))
    for one, other in zip(mine, moved(torch.optim.AdamW(parameters(), 1e-2)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_it_goes_on_from_its_state_as_if_never_stopped():
    def optimizer(trained):
        return Muon([{"params": trained[:3], "matrices": True}, {"params": trained[3:]}], lr=1e-2)

    whole, first = optimizer(parameters()), optimizer(parameters())
    moved(whole)
    stopped = moved(first)
    second = optimizer([nn.Parameter(value) for value in stopped])
    second.load_state_dict(first.state_dict())
    for one, other in zip(moved(whole), moved(second), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
def test_all_directions_alike(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrix))
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert torch.linalg.svdvals(matrix).max() / torch.linalg.svdvals(matrix).min() > 5


def _share(rank: int, address: str, results) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    optimizer = Muon([{"params": parameters()[:3], "matrices": True}, {"params": parameters()[3:]}], lr=1e-2)
    results[rank] = moved(optimizer)
    distributed.destroy_process_group()


def test_two_processes_do_what_one_does(tmp_path):
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(_share, (str(tmp_path / "meeting"), results), nprocs=2)
        one, other = results[0], results[1]
    alone = moved(
        Muon([{"params": parameters()[:3], "matrices": True}, {"params": parameters()[3:]}], lr=1e-2)
    )
    for mine, theirs, expected in zip(one, other, alone, strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(mine, expected)


def test_what_reads_a_condition_is_no_matrix_of_activations():
    model = ClapSep(MINI)
    found = matrices(model, without=Film)
    names = {name for name, parameter in model.named_parameters() if parameter in found}
    assert any("self_attn.in_proj_weight" in name for name in names)
    assert any("qkv.weight" in name for name in names)
    assert not any("gamma" in name or "beta" in name or "bias" in name for name in names)
    assert all(parameter.ndim == 2 for parameter in found)
