"""Of each group exactly its capacity is kept: the best, ties to the earlier; and all tokens without a group, never padding."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, normal, routings

import mod
from mod import Groups, Router, capacity, random_score, uniform_score
from model import Config, VideoLM, initialise


@given(routings())
def test_select_keeps_what_a_slow_loop_keeps(case):
    keep = mod.select(case.score, case.groups, case.r).tolist()
    known = (t.tolist() for t in (case.id, case.real, case.late, case.score))
    for row, id, real, late, score in zip(keep, *known, strict=True):
        chosen = {t for t, g in enumerate(id) if g < 0 and real[t]}
        for group in set(id) - {-1}:
            tokens = [t for t, g in enumerate(id) if g == group]
            best = sorted(tokens, key=lambda t: (-score[t], t))[: capacity(len(tokens), case.r)]
            chosen |= {t for t in best if not late[t] or score[t] >= 0}  # late: sigmoid(score) >= 0.5
        assert [t for t, kept in enumerate(row) if kept] == sorted(chosen)


def test_random_scores_are_spread_evenly_and_differ_between_streams_layers_and_positions():
    position, seeds = torch.arange(10_000).expand(3, -1), torch.tensor([5, 6, 2**40])
    draws = torch.cat([random_score(position, layer, seeds) for layer in (0, 1, 31)])  # (9, 10000)
    assert draws.min() >= 0 and draws.max() <= 1
    for row in draws:
        assert (torch.histc(row, 10, 0, 1) - 1000).abs().max() < 150  # 5 standard deviations
        assert row.unique().numel() > 9_990
    shifted = torch.cat([draws[:, :-1], draws[:1, 1:]])  # a draw says nothing of the next one
    assert (torch.corrcoef(shifted) - torch.eye(10)).abs().max() < 0.05


def test_scores_of_a_bfloat16_model_are_products_of_float32():
    x, weight = normal(0, 1, 100, 64).bfloat16(), normal(1, 64)
    for normed in (False, True):
        router = Router(64, normed).bfloat16()
        router.weight.data.copy_(weight)
        rms = x.double().square().mean(-1).sqrt() if normed else 1
        exact = x.double() @ router.weight.double() / rms
        torch.testing.assert_close(router(x), exact.float(), rtol=1e-5, atol=1e-5)


@given(SEEDS, st.floats(1e-3, 1e3))
def test_a_normed_router_hears_the_direction_of_a_state_and_not_its_size(seed, size):
    router, x = Router(16, True), normal(seed, 1, 9, 16)
    router.weight.data.copy_(normal(seed + 1, 16))
    torch.testing.assert_close(router(size * x), router(x), rtol=1e-9, atol=1e-9)


def test_scores_of_a_fresh_normed_router_are_near_0_so_that_unit_starts_almost_unchanged():
    fresh = initialise(VideoLM(Config(keep=(1.0, 0.2, 1.0), router_norm=True)), 0).routers["1"]
    assert fresh(1000 * normal(0, 1, 99, 128)).abs().max() < 0.6  # 6 standard deviations


def test_random_scores_are_those_of_every_version():
    scores = random_score(torch.tensor([[0, 1, 2**20]] * 2), 3, torch.tensor([7, 2**40]))
    known = [[0.8675942420959473, 0.7329200506210327, 0.00939879659563303],
             [0.06967102736234665, 0.07512325048446655, 0.5457699298858643]]
    assert scores.tolist() == known and mod.PADDING > 10**15  # later than any stream is long


@given(st.integers(1, 80), st.floats(0.01, 1))
def test_uniform_scores_keep_exactly_k_evenly_spaced_tokens_and_the_first(n, r):
    groups, k = Groups.plan(torch.zeros(1, n, dtype=torch.int64), (r,)), capacity(n, r)
    kept = mod.select(uniform_score(groups, r), groups, r)[0].nonzero()[:, 0].tolist()
    gaps = [b - a for a, b in zip(kept, [*kept[1:], kept[0] + n], strict=True)]
    assert len(kept) == k and kept[0] == 0 and max(gaps) - min(gaps) <= 1
