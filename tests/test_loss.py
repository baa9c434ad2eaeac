"""The loss is a weighted cross-entropy, the mean over labelled places, and the routing loss."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, integers, normal, tiny

import data
import mod
import train
from model import streaming_loss

TOKENIZER, CFG = data.Tokenizer(), train.TrainConfig(adam_lr=1e-9, muon_lr=1e-9, clip=0.01)


def ready(model, seed):
    batch = data.collate(data.World(8, 3).batch(seed, 0, 2), model.config.tokens_per_frame, TOKENIZER,
                         mod.MASKED["text"])
    return train.make_ready(batch, model.config, 1.0, torch.device("cpu"))


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


@given(SEEDS, st.sampled_from(["learned", "shared"]), st.sampled_from([0.0, 0.3, 2.0]))
def test_the_loss_has_both_terms_and_the_routing_loss_reaches_the_routers(seed, router, weight):
    model = tiny((0.5, 1.0, 0.2), seed, "cpu", vocab_size=len(TOKENIZER), router=router).requires_grad_()
    b = ready(model, seed)
    terms = train.batch_loss(model, b, torch.ones(2), weight)
    out = model(b.tokens, b.frames, b.groups, b.seed)
    streaming = streaming_loss(model, out.hidden, b.at, b.target, b.weight)
    routing = sum(mod.routing_loss(score, out.keep[layer], b.groups) for layer, score in out.score.items())
    assert terms.tolist() == pytest.approx([streaming.item(), weight * routing.item()]) and routing > 0.1
    reached = torch.autograd.grad(terms[1], [*model.routers.parameters()], allow_unused=True)
    assert all(gradient.abs().max() > 0 for gradient in reached) or weight == 0


@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_clipped_before_they_are_used(seed, monkeypatch):
    model = tiny((1.0, 0.5), seed, "cpu", vocab_size=len(TOKENIZER)).requires_grad_()
    optimizers, used = train.make_optimizers(model, CFG), []
    for optimizer in optimizers:
        monkeypatch.setattr(optimizer, "step", lambda o=optimizer: used.extend(
            p.grad.flatten() for group in o.param_groups for p in group["params"] if p.grad is not None))
    told = train.train_step(train.batch_loss, model, optimizers, CFG, ready(model, seed), 0)
    assert told[2] > 2 * CFG.clip and torch.cat(used).norm().item() == pytest.approx(CFG.clip, rel=1e-3)
