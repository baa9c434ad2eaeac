"""The formula of the cost is what torch counts, and to keep less never costs more."""

from hypothesis import given
from hypothesis import strategies as st
from strategies import RATIOS, watches
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mod import computed, flops


@given(watches(max_streams=1), st.integers(0, 3))
def test_the_formula_is_the_count_of_a_real_forward_pass(watch, head):
    model, batch = watch.model, watch.whole()
    T, F = batch.tokens.shape[1], batch.frames.shape[1]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # fused ones go uncounted
        out = model(*batch)
        model.logits(out.hidden[:, :head])
    c = model.config
    tokens = computed(c.keep, T - F * c.tokens_per_frame, F, c.tokens_per_frame)
    assert tokens == [int(out.keep[layer].sum()) if layer in out.keep else T for layer in range(len(tokens))]
    assert 2 * sum(flops(c, tokens, F, min(head, T)).values()) == counter.get_total_flops()


@given(watches(max_streams=1), RATIOS, st.integers(0, 20), st.integers(0, 5))
def test_a_higher_keep_ratio_never_costs_less(watch, r, text, frames):
    c = watch.model.config
    low, high = (computed(keep, text, frames, c.tokens_per_frame)
                 for keep in (tuple(min(k, r) for k in c.keep), tuple(max(k, r) for k in c.keep)))
    costs = [flops(c, tokens, frames) for tokens in (low, high)]
    assert all(costs[0][term] <= costs[1][term] for term in costs[0])
