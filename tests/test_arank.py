"""ARank is the exact rank of the attention maps that a layer makes of real tokens, in any order and batch."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, collate, integers, normal, tiny, unit

from mod import arank, rank_placement
from model import layer_ranks


@given(SEEDS, st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(0, 4))
def test_maps_of_known_rank_have_it_in_any_batch_and_beside_any_padding(seed, sizes, more):
    B, T = len(sizes), max(sizes) + more
    real = torch.arange(T) < torch.tensor(sizes)[:, None]
    parents = integers(seed, 0, 2520, B, 2, T) % torch.arange(1, T + 1)  # the one token <= t that t sees
    one_hot, padding = torch.eye(T, dtype=torch.float64), ~real[:, None, :, None]
    q = (1e4 * one_hot[parents]).where(~padding, normal(seed, B, 2, T, T))
    k = one_hot.where(~padding, normal(seed + 1, B, 2, T, T))
    # One row for each parent; those of the token itself are not below the diagonal.
    known = [sum(len({p for t, p in enumerate(head[:n]) if p < t}) for head in heads) / 2
             for heads, n in zip(parents.tolist(), sizes, strict=True)]
    ranks = arank(q, k, real)
    assert ranks.tolist() == pytest.approx(known) and ranks.dtype == torch.float64


def test_the_rank_of_the_code_is_that_of_the_maps_of_torchs_own_attention_without_their_diagonal():
    q, k = (2 * normal(seed, 1, 1, 48, 8).float() for seed in (0, 1))
    maps = F.scaled_dot_product_attention(q, k, torch.eye(48)[None, None], is_causal=True)
    rank = int(torch.linalg.matrix_rank(maps[0, 0].tril(-1)))
    assert 30 < rank < 47 and arank(q, k, torch.ones(1, 48).bool()).tolist() == [rank]
    k = torch.eye(48)[None, None]  # each looks at the sixth before it, or else at itself
    q = 1e4 * k.roll(6, 2) + 1e3 * k
    assert arank(q, k, torch.ones(1, 48).bool()).tolist() == [42]
    k = torch.eye(8)[None, None]  # each looks at the one before it, and would rather look at the next
    q = 1e4 * k.roll(-1, 2) + 1e3 * k.roll(1, 2)
    assert arank(q, k, torch.ones(1, 8).bool()).tolist() == [6]  # the last: at the first


def test_bfloat16_has_the_rank_of_the_same_numbers_in_float32():
    q, k = (2 * normal(seed, 1, 2, 64, 8).bfloat16() for seed in (0, 1))
    real = torch.ones(1, 64).bool()
    assert arank(q, k, real).tolist() == arank(q.float(), k.float(), real).tolist()


def test_each_layer_is_measured_on_its_own_input_with_its_own_heads():
    model = tiny((1.0,) * 3, 0, "cpu")
    for name, p in model.layers[1].named_parameters():
        p.mul_("q_proj" not in name)  # attends to all alike: full rank below the diagonal
    batch = collate(model, [[unit(model.config, kind, n) for n in range(3)] for kind in (True, False)],
                    torch.tensor([0, 1]))
    ranks = layer_ranks(model, batch)
    full = batch.groups.real.sum(1) - 1.0
    assert ranks.shape == (2, 3) and ranks[:, 1].tolist() == full.tolist()
    assert (ranks[:, [0, 2]] > 0).all()


@pytest.mark.parametrize(("layers", "dense"), [(1, 1), (8, 1), (9, 2), (24, 3), (25, 4), (32, 4), (40, 4)])
def test_an_eighth_of_the_layers_stays_dense_and_at_most_four(layers, dense):  # 4 of 32 and 40
    assert rank_placement([0.0] * layers, 0.5) == (1.0,) * dense + (0.5,) * (layers - dense)


@given(SEEDS, st.integers(1, 40), st.integers(1, 41))
def test_the_highest_ranks_stay_dense_and_ties_go_to_the_earlier_layer(seed, layers, dense_layers):
    ranks = integers(seed, 0, 5, layers).tolist()
    if dense_layers > layers:
        with pytest.raises(ValueError, match=f"dense_layers must be at most {layers}, got {dense_layers}"):
            rank_placement(ranks, 0.5, dense_layers)
        return
    keep = rank_placement(ranks, 0.5, dense_layers)
    dense = [layer for layer, r in enumerate(keep) if r == 1]
    assert len(dense) == dense_layers and set(keep) <= {1.0, 0.5}
    assert dense == sorted(sorted(range(layers), key=lambda layer: (-ranks[layer], layer))[: len(dense)])
