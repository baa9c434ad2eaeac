"""The loss is a weighted cross-entropy, the mean over labelled places, and the routing loss."""

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, integers, normal, tiny

import data
import mod
import train
from model import prepare, streaming_loss

TOKENIZER = data.Tokenizer()


def ready(model, seed, size=8):
    batch = data.collate(data.World(size, 3).batch(seed, 0, 2), model.config, TOKENIZER)
    return prepare(batch, model.config, torch.device("cpu"))


def test_token_0_is_a_label_like_any_other():
    model = tiny((1.0,), 0, "cpu", vocab_size=len(TOKENIZER))
    batch = data.collate(data.World(8, 3).batch(0, 0, 1), model.config, TOKENIZER)
    batch.labels[0, :2] = torch.tensor([0, -100])
    made = prepare(batch, model.config, torch.device("cpu"))
    assert made.at[0] == made.target[0] == 0 and made.at.tolist() == (batch.labels[0] >= 0).nonzero()[:, 0].tolist()


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


@given(SEEDS, st.sampled_from(["learned", "shared"]), st.sampled_from([0.0, 0.3, 2.0]), st.sampled_from([0.5, 1.0, 3.0]))
def test_the_loss_has_both_terms_and_the_routing_loss_reaches_the_routers(seed, router, weight, sigma):
    model = tiny((0.5, 1.0, 0.2), seed, "cpu", vocab_size=len(TOKENIZER), router=router).requires_grad_()
    b = ready(model, seed)
    terms = train.batch_loss(model, b, sigma, weight)
    out = model(b.tokens, b.frames, b.groups, b.seed)
    of_label = torch.where(b.decision, sigma, 1.0)  # sigma on decisions, 1 on replies
    streaming = streaming_loss(model, out.hidden, b.at, b.target, of_label)
    routing = sum(mod.routing_loss(score, out.keep[layer], b.groups) for layer, score in out.score.items())
    assert terms.tolist() == pytest.approx([streaming.item(), weight * routing.item()]) and routing > 0.1
    reached = torch.autograd.grad(terms[1], [*model.routers.parameters()], allow_unused=True)
    assert all(gradient.abs().max() > 0 for gradient in reached) or weight == 0


def test_the_log_has_both_terms_and_their_sum(tmp_path):
    said = train.log_step(tmp_path, 7, torch.tensor([2.0, 0.5]), torch.tensor(3.0), 99, 0.0)
    line = json.loads((tmp_path / "log.jsonl").read_text())
    assert line.pop("seconds") > 0 and said.startswith("loss 2.500, ")
    assert line == {"step": 7, "loss": 2.5, "routing_loss": 0.5, "grad_norm": 3.0, "tokens": 99}


@given(SEEDS, st.sampled_from(["update", "update+values"]))
def test_a_router_learns_in_each_layer_but_in_the_last_only_if_values_are_weighed(seed, weigh):
    model = tiny((0.5, 1.0, 0.2), seed, "cpu", vocab_size=len(TOKENIZER), weigh=weigh).requires_grad_()
    train.batch_loss(model, ready(model, seed), 1.0, 0.0).sum().backward()
    learns = [bool(router.weight.grad.abs().max() > 0) for router in model.routers.values()]
    assert learns == [True, weigh == "update+values"]


@pytest.mark.parametrize("weigh", ["update", "update+values"])
@pytest.mark.parametrize("plan", ["interleaved", "all"])
def test_the_routers_of_the_default_model_learn_in_the_first_step_but_that_of_the_last_layer(plan, weigh):
    model = train.build(train.TrainConfig(plan=plan, weigh=weigh))
    train.batch_loss(model, ready(model, 0, 48), 1.0, 0.0).sum().backward()
    learns = {layer: bool(router.weight.grad.abs().max() > 0) for layer, router in model.routers.items()}
    last = {"2": weigh == "update+values"}  # nobody reads what vision tokens become there
    assert learns == ({"1": True} if plan == "interleaved" else {"0": True, "1": True} | last)


@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_clipped_before_they_are_used_and_the_rate_is_set_before(seed, monkeypatch, tmp_path):
    cfg, used, rates = train.TrainConfig(out=str(tmp_path), steps=1, batch=2, seed=seed), [], []
    model = tiny((1.0, 0.5), seed, "cpu", vocab_size=len(TOKENIZER)).requires_grad_()
    monkeypatch.setattr(train, "CLIP", 0.01)
    for kind in (train.Muon, train.AdamW):
        def step(self):
            rates.append(self.param_groups[0]["lr"] / self.defaults["lr"])
            used.extend(p.grad.flatten() for p in self.param_groups[0]["params"] if p.grad is not None)

        monkeypatch.setattr(kind, "step", step)
    train.learn(cfg, model, data.World(8, 3))
    told = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[1])["grad_norm"]
    assert told > 0.02 and torch.cat(used).norm().item() == pytest.approx(0.01, rel=1e-3)
    assert rates == [train.learning_rate(0, 1)] * 2


def test_the_learning_rate_rises_for_20_steps_and_falls_to_zero_as_a_cosine():
    rates = [train.learning_rate(step, 400) for step in range(400)]
    assert rates[0] == pytest.approx(1 / 20) and rates[19] == max(rates) == pytest.approx(0.9944, abs=1e-4)
    assert rates[200] == pytest.approx(0.5) and 0 < rates[399] < 1e-4
