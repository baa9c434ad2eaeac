"""The number of tokens that a layer computes is r * n rounded, exactly; the plans are those of the papers."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mod import capacity, placement


@given(st.integers(0, 3000), st.integers(0, 6), st.integers(0, 10**6))
def test_capacity_is_the_nearest_integer_and_halves_go_up(n, digits, numerator):
    exact = Fraction(numerator % (10**digits + 1), 10**digits)
    nearest = math.floor(exact * n + Fraction(1, 2))
    assert capacity(n, float(exact)) == (min(n, max(1, nearest)) if exact else 0)


@pytest.mark.parametrize(("n", "r", "k"), [(10, 0.0, 0), (0, 0.5, 0), (10, 0.01, 1), (10, 0.05, 1), (10, 0.15, 2),
                                           (10, 0.25, 3), (100, 0.07, 7), (1, 0.9, 1), (10, 1.0, 10)])
def test_capacity_of_a_few_groups(n, r, k):
    assert capacity(n, r) == k


@pytest.mark.parametrize("r", [-0.1, 1.5, float("nan")])
def test_a_keep_ratio_outside_the_unit_interval_is_refused(r):
    for refuse in (lambda: capacity(10, r), lambda: placement("all", 4, r)):
        with pytest.raises(ValueError, match=r"^keep must be in \[0, 1\], got "):
            refuse()
    with pytest.raises(ValueError, match=r"^plan must be one of dense, .*, got sparse"):
        placement("sparse", 4, 0.2)


@pytest.mark.parametrize(("plan", "r", "routed"), [
    ("dense", 0.2, []), ("interleaved", 0.2, range(1, 32, 2)), ("all", 0.2, range(32)),
    ("interleaved-deep", 0.2, range(3, 32, 2)), ("all-deep", 0.2, range(2, 32)),
    ("early-exit", 0.0, range(2, 32)), ("layer-skip", 0.0, range(1, 32, 2)),
    ("two-of-three", 0.2, [layer for layer in range(32) if layer % 3])])
def test_the_plans_route_the_layers_that_the_paper_names(plan, r, routed):
    assert placement(plan, 32, 0.2) == tuple(r if layer in routed else 1.0 for layer in range(32))


def test_the_cosine_falls_from_one_to_r_rounded_and_is_dense_above_85_percent():
    assert placement("cosine", 9, 0.1) == (1.0, 1.0, 1.0, 0.6913, 0.5, 0.3087, 0.1464, 0.1, 0.1)
    assert (placement("cosine", 1, 0.2), placement("cosine", 2, 0.2)) == ((1.0,), (1.0, 0.2))
