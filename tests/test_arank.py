"""ARank is the exact rank of the attention maps that a layer makes of real tokens, in any order and batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, collate, integers, normal, tiny, unit

from mod import arank, rank_placement
from model import layer_ranks


def pointing(parents: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k: (1, H, T, T) with which token t of head h attends to token parents[h][t] <= t, and to no other"""
    T = len(parents[0])
    k = torch.eye(T, dtype=torch.float64).expand(1, len(parents), T, T)
    return 1e4 * k[0, 0][torch.tensor(parents)][None], k


PARENTS = st.integers(1, 9).flatmap(
    lambda T: st.lists(st.tuples(*(st.integers(0, t) for t in range(T))).map(list), min_size=1, max_size=3))


def known(parents: list[list[int]]) -> float:
    """One row for each parent that is not the token itself: those are the columns below the diagonal"""
    return sum(len({p for t, p in enumerate(row) if p < t}) for row in parents) / len(parents)


@given(PARENTS)
def test_maps_of_known_rank_have_that_rank_in_any_order_of_heads(parents):
    q, k = pointing(parents)
    real = torch.ones(1, q.shape[2], dtype=torch.bool)
    assert arank(q, k, real).tolist() == [pytest.approx(known(parents))]
    assert torch.equal(arank(q.flip(1), k, real), arank(q, k, real))


@given(st.lists(PARENTS.filter(lambda parents: len(parents) == 2), min_size=1, max_size=3), st.integers(0, 4),
       st.booleans())
def test_neighbours_order_and_padding_do_not_change_it(samples, more, softmax):
    T = max(len(parents[0]) for parents in samples) + more
    q, k = (normal(seed, len(samples), 2, T, T) for seed in (1, 2))  # what padding holds does not matter
    real = torch.zeros(len(samples), T)
    for b, parents in enumerate(samples):
        n = len(parents[0])
        q[b, :, :n, :n], k[b, :, :n, :n] = (t[0] for t in pointing(parents))
        q[b, :, :n, n:] = 0
        real[b, :n] = 1
    ranks = arank(q, k, real.bool(), softmax)
    alone = [arank(q[b : b + 1, :, :n], k[b : b + 1, :, :n], real[b : b + 1, :n].bool(), softmax)
             for b, n in enumerate(real.sum(1).int().tolist())]
    assert torch.equal(ranks, torch.cat(alone))
    assert torch.equal(arank(q.flip(0), k.flip(0), real.bool().flip(0), softmax), ranks.flip(0))
    assert not softmax or ranks.tolist() == pytest.approx([known(parents) for parents in samples])


@given(SEEDS, st.integers(1, 6), st.integers(6, 12))
def test_before_the_softmax_the_rank_is_that_of_the_head(seed, d, T):
    q, k = normal(seed, 2, 3, T, d), normal(seed + 1, 2, 3, T, d)
    assert arank(q, k, torch.ones(2, T, dtype=torch.bool), softmax=False).tolist() == [d, d]


@pytest.mark.parametrize("softmax", [True, False])
def test_each_layer_is_measured_on_its_own_input_with_its_own_heads(softmax):
    model = tiny((1.0,) * 3, 0, "cpu")
    for name, p in model.layers[1].named_parameters():
        p.mul_("q_proj" not in name)  # attends to all alike: full rank below the diagonal, or none at all
    batch = collate(model, [[unit(model.config, kind, n) for n in range(3)] for kind in (True, False)],
                    torch.tensor([0, 1]))
    ranks = layer_ranks(model, batch.tokens, batch.frames, batch.groups.real, softmax)
    full = batch.groups.real.sum(1) - 1.0
    assert ranks.shape == (2, 3) and ranks[:, 1].tolist() == (full.tolist() if softmax else [0, 0])
    assert (ranks[:, [0, 2]] > 0).all() and (softmax or (ranks <= model.config.head_dim).all())


def test_a_routed_model_has_no_arank():
    batch = collate(model := tiny((1.0, 0.5), 0, "cpu"), [[unit(model.config, True, 0)]], torch.tensor([0]))
    with pytest.raises(ValueError, match=r"^ARank must be measured on a dense run, got one of keep"):
        layer_ranks(model, batch.tokens, batch.frames, batch.groups.real)


@given(SEEDS, st.integers(1, 40), st.integers(0, 5))
def test_the_highest_ranks_stay_dense_and_ties_go_to_the_earlier_layer(seed, layers, dense_layers):
    ranks = integers(seed, 0, 5, layers).tolist()
    keep = rank_placement(ranks, 0.5, dense_layers)
    dense = [layer for layer, r in enumerate(keep) if r == 1]
    assert len(dense) == min(layers, dense_layers or min(4, -(-layers // 8))) and set(keep) <= {1.0, 0.5}
    assert dense == sorted(sorted(range(layers), key=lambda layer: (-ranks[layer], layer))[: len(dense)])


@pytest.mark.parametrize(("layers", "dense"), [(4, 1), (8, 1), (24, 3), (32, 4), (40, 4)])
def test_by_default_four_of_32_and_of_40_layers_stay_dense_as_in_the_paper(layers, dense):
    assert rank_placement([1.0] * layers, 0.3).count(1.0) == dense
