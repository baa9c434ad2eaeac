"""The loss is the weighted cross-entropy over labelled places, divided by their number, and nothing else."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, integers, normal, tiny

from model import streaming_loss


@given(SEEDS, st.integers(1, 3), st.integers(1, 6))
def test_the_loss_adds_up_over_the_labelled_places_and_asks_for_no_other_logits(seed, streams, length):
    model = tiny((1.0,), seed, "cpu")
    hidden, weight = normal(seed, streams, length, 16), normal(seed + 1, streams, length).abs()
    labels, asked = integers(seed, -20, 23, streams, length), []
    labels[labels < 0] = -100
    spy = SimpleNamespace(logits=lambda rows: asked.append(len(rows)) or model.logits(rows))
    at = (labels.flatten() >= 0).nonzero()[:, 0]
    loss = streaming_loss(spy, hidden, at, labels.flatten()[at], weight.flatten()[at])
    places = zip(hidden.flatten(0, 1), labels.flatten(), weight.flatten(), strict=True)
    slow = [-w * model.logits(h).log_softmax(-1)[y] for h, y, w in places if y >= 0]
    assert asked == [len(slow)]
    assert loss.item() == pytest.approx(float(sum(slow)) / max(1, len(slow)))
