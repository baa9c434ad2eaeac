"""ARank is the exact rank of the attention maps that a layer makes of real tokens, in any order and batch."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, collate, integers, normal, tiny, unit
from test_reference import norm

import data
from eval import rank_layers
from mod import arank, rank_placement
from model import layer_ranks, prepare


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


FREQUENCY = [0.9, 0.2]  # not those of rope_theta: a decoder with scaled RoPE has its own


def heads_of(weight, x):
    """The vectors of each token and head as d/2 complex numbers; RoPE turns number i of token t by t * FREQUENCY[i]"""
    found, frequency = [], torch.tensor(FREQUENCY, dtype=torch.float64)
    for t, row in enumerate(x):
        turn = torch.polar(torch.ones_like(frequency), t * frequency)
        vectors = (weight @ row).split(2 * len(turn))
        found.append([turn * torch.complex(*vector.chunk(2)) for vector in vectors])
    return found


def looks_at(block, c, x):
    """Head -> the token that each token looks at: of those until itself the one of the highest score"""
    normed, places = [norm(block.input_layernorm, row) for row in x], []
    q, k = (heads_of(p.weight, normed) for p in (block.self_attn.q_proj, block.self_attn.k_proj))
    for h in range(c.num_attention_heads):
        g, places_of = h // (c.num_attention_heads // c.num_key_value_heads), []
        for t in range(len(x)):
            scores = [(q[t][h].conj() * k[j][g]).real.sum().item() / math.sqrt(c.head_dim) for j in range(t + 1)]
            *_, second, best = -math.inf, *sorted(scores)
            assert best - second > 1000  # so sharp that the map has a single one in each row
            places_of.append(scores.index(best))
        places.append(places_of)
    return places


def layer_of(block, c, x, places):
    shared, out = c.num_attention_heads // c.num_key_value_heads, []
    for t, row in enumerate(x):
        heads = []
        for h, looked in enumerate(places):
            value = block.self_attn.v_proj.weight @ norm(block.input_layernorm, x[looked[t]])
            heads.append(value.split(c.head_dim)[h // shared])
        row = row + block.self_attn.o_proj.weight @ torch.cat(heads)
        normed, m = norm(block.post_attention_layernorm, row), block.mlp
        out.append(row + m.down_proj.weight @ (F.silu(m.gate_proj.weight @ normed) * (m.up_proj.weight @ normed)))
    return out


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_ranks_of_a_model_are_those_of_an_explicit_forward_pass(groups):
    model = tiny((1.0,) * 3, groups, "cpu", num_key_value_heads=groups)
    c, streams = model.config, [[unit(model.config, kind, n) for n, kind in enumerate(row)]
                                for row in ([1, 0, 1, 0, 0, 1], [0, 0, 1, 0, 1])]
    model.rope_frequency = FREQUENCY
    for block in model.layers:
        block.self_attn.q_proj.weight.mul_(1e7)
    batch = collate(model, streams, torch.zeros(2).long())
    ranks = layer_ranks(model, batch)
    for b, n in enumerate(batch.groups.real.sum(1).tolist()):
        x = list(model.embed(batch.tokens, batch.frames)[b, :n])
        for layer, block in enumerate(model.layers):
            places = looks_at(block, c, x)
            known = [len({place for t, place in enumerate(looked) if place < t}) for looked in places]
            assert ranks[b, layer] == sum(known) / c.num_attention_heads
            x = layer_of(block, c, x, places)


def test_the_rank_of_a_layer_is_its_mean_over_samples_each_measured_alone(capsys):
    tokenizer, world = data.Tokenizer(), data.World(8, 3)
    model = tiny((1.0,) * 2, 0, "cpu", vocab_size=len(tokenizer)).train()
    ranks, alone = rank_layers(model, world, 3), []
    assert not model.training  # a decoder with LoRA has dropout
    for sample in world.batch(0, 0, 3):
        batch = data.collate([sample], model.config, tokenizer)
        alone.append(layer_ranks(model, prepare(batch, model.config, torch.device("cpu"))))
    mean, spread = torch.cat(alone).mean(0), torch.cat(alone).std(0, correction=0)
    assert ranks == mean.tolist()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ARank of 3 samples") and len(lines) == 3
    for layer, line in enumerate(lines[1:]):
        assert line.startswith(f"layer {layer:2} {mean[layer]:7.1f} +-{spread[layer]:5.1f}  #")


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
