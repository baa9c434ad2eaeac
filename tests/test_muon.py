"""Our Muon, which works in float32 on a CPU, is torch's, which works in bfloat16."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, normal

from model import Config, VideoLM
from train import Muon, TrainConfig, make_optimizers, orthogonal

SIDE = st.integers(1, 40)


@given(SEEDS, SIDE, SIDE)
def test_the_update_has_singular_values_near_one_and_the_directions_of_the_gradient(seed, rows, columns):
    x = normal(seed, rows, columns)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    turned = u.mT @ orthogonal(x) @ v.mT  # in the directions of the gradient
    values = turned.diagonal()
    assert torch.allclose(turned, values.diag(), atol=1e-6) and values.max() < 1.25
    assert (values[s > 0.05 * s.norm()] > 0.6).all()  # a tiny one needs more than five steps


@given(SEEDS, SIDE, SIDE)
def test_three_steps_are_those_of_torch_but_for_its_rounding(seed, rows, columns):
    begin = normal(seed, rows, columns).float()
    ours, theirs = begin.clone().requires_grad_(), begin.clone().requires_grad_()
    optimizers = [Muon([ours], 0.1), torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0)]
    for step in range(3):
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = normal(seed + step + 1, rows, columns).float()
            optimizer.step()
    moved = (theirs - begin).norm()
    assert (ours - theirs).norm() < 0.05 * moved


def test_a_parameter_without_a_gradient_stays_and_has_no_momentum():
    p = torch.ones(2, 2, requires_grad=True)
    optimizer = Muon([p], 0.1)
    optimizer.step()
    assert torch.equal(p, torch.ones(2, 2)) and not optimizer.state


@pytest.mark.parametrize("shape", [(1, 1), (3, 3)])
def test_a_gradient_of_zero_changes_nothing(shape):
    assert torch.equal(orthogonal(torch.zeros(shape)), torch.zeros(shape))


def test_muon_learns_the_matrices_of_blocks_and_projector_and_nothing_else():
    model = VideoLM(Config(num_hidden_layers=1, keep=(0.5,)))
    learns = {name for name, p in model.named_parameters() if p.requires_grad and model.uses_muon(name, p)}
    heads = {f"layers.0.self_attn.{name}_proj.weight" for name in "qkvo"}
    mlp = {f"layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert learns == heads | mlp | {f"multi_modal_projector.linear_{n}.weight" for n in (1, 2)}


def test_all_that_learns_has_one_optimizer_and_no_weight_decays():
    model = VideoLM(Config())
    muon, adam = optimizers = make_optimizers(model, TrainConfig(muon_lr=0.3, adam_lr=0.1))
    assert (muon.defaults["lr"], adam.defaults["lr"], adam.defaults["weight_decay"]) == (0.3, 0.1, 0)
    learns = [p for optimizer in optimizers for p in optimizer.param_groups[0]["params"]]
    assert {id(p) for p in learns} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(learns) == len(set(map(id, learns)))
