"""The loss is the weighted cross-entropy over labelled places, divided by their number, and nothing else."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model import Config, VideoLM, initialise, streaming_loss


@pytest.fixture(scope="module")
def model():
    return initialise(VideoLM(Config(vocab_size=8)), 0).double()


def test_three_labels_worked_out_by_hand(model, monkeypatch):
    monkeypatch.setattr(model, "logits", lambda hidden: hidden[..., :2])  # two words, logits as given
    hidden = torch.zeros(1, 4, 128, dtype=torch.float64)
    hidden[0, 1, 0] = math.log(3)  # the first word has 3/4 there, 1/2 elsewhere
    labels = torch.tensor([[0, 0, -100, 1]])
    weight = torch.tensor([[1.0, 1.0, 9.0, 5.0]], dtype=torch.float64)  # a decision with sigma = 5
    expected = (math.log(2) + math.log(4 / 3) + 5 * math.log(2)) / 3
    assert streaming_loss(model, hidden, labels, weight).item() == pytest.approx(expected)


@given(st.integers(0, 99), st.integers(1, 3), st.integers(1, 6))
def test_the_loss_is_what_a_slow_loop_over_the_labelled_places_adds_up(model, seed, streams, length):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(streams, length, 128, generator=generator, dtype=torch.float64)
    labels = torch.randint(-3, 8, (streams, length), generator=generator)
    labels[labels < 0] = -100
    weight = torch.rand(streams, length, generator=generator, dtype=torch.float64)
    loss = streaming_loss(model, hidden, labels, weight)
    slow = [-(w * model.logits(h).log_softmax(-1)[y]).item() for h, y, w in
            zip(hidden.flatten(0, 1), labels.flatten(), weight.flatten(), strict=True) if y >= 0]
    assert loss.item() == pytest.approx(sum(slow) / max(1, len(slow)))


def test_logits_are_computed_only_where_something_is_predicted(model, monkeypatch):
    asked = []
    original = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: asked.append(tuple(hidden.shape)) or original(hidden))
    labels = torch.full((2, 50), -100)
    labels[0, 3] = labels[1, 7] = 1
    streaming_loss(model, torch.zeros(2, 50, 128, dtype=torch.float64), labels, torch.ones(2, 50))
    assert asked == [(2, 128)]
