"""gamma-MoD: masked text never skips, a router is taught what it selected, answers decode as in one pass."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import routings

import data
import mod
import train
from data import VQA, Tokenizer, Turn, World
from eval import Watcher, hear
from mod import MASKED, Groups
from model import Config, VideoLM, initialise

TOKENIZER = Tokenizer()
TEXT = st.text(max_size=4)


@given(TEXT, st.lists(st.tuples(TEXT, TEXT), max_size=3), st.integers(1, 5), st.sampled_from([*MASKED]))
def test_masked_text_belongs_to_no_group_and_all_else_to_that_of_the_image(system, pairs, P, masked):
    turns = [Turn(1, role, text) for q, a in pairs for role, text in (("user", q), ("assistant", a))]
    tokens, group, _ = data.layout([Turn(0, "system", system), *turns], 1, P, TOKENIZER, MASKED[masked])
    before = len(TOKENIZER.encode(system)) + 1
    expected = [-1 if "system" in MASKED[masked] else 0] * before + [0] * P + [-1]  # `<frame>` never skips
    for turn in turns:
        opening = -1 if "user" in MASKED[masked] else 0  # `<assistant>` ends what asks
        length = 1 + len(TOKENIZER.encode(turn.text))  # with `<end>`
        expected += [opening] + [-1 if turn.role in MASKED[masked] else 0] * length
    assert group == [-1, *expected[1:]]  # the first token of a stream never skips
    assert [i for i, t in enumerate(tokens) if t == data.VISION] == [*range(before, before + P)]


@pytest.mark.parametrize("masked", sorted(MASKED))
def test_a_decision_to_speak_is_made_without_what_is_then_said(masked):
    config = Config(vocab_size=len(TOKENIZER), num_hidden_layers=4, keep=(0.5,) * 4, router="shared", masked=masked)
    model, silent = initialise(VideoLM(config), 0).double(), data.World(48, frames=2).held_out(1)[0]
    hidden = []
    for said in ([], [Turn(1, "assistant", "A red disc.")]):
        heard = silent._replace(turns=[Turn(0, "user", "Go."), *said])
        batch = data.collate([heard], config, TOKENIZER)
        out = model(batch.tokens, batch.frames, Groups.plan(batch.group, config.keep), batch.seed)
        hidden.append(out.hidden[batch.decision])
    torch.testing.assert_close(*hidden, rtol=0, atol=1e-12)


@given(routings())
def test_the_routing_loss_is_the_mean_cross_entropy_towards_what_was_selected(case):
    keep = mod.select(case.score, case.groups, case.r)
    tokens = zip(*(t.flatten().tolist() for t in (case.score, keep, case.id)), strict=True)
    slow = [math.log1p(math.exp(-s if kept else s)) for s, kept, id in tokens if id >= 0]
    loss = mod.routing_loss(case.score, keep, case.groups).item()
    assert loss == pytest.approx(sum(slow) / max(1, len(slow)))
    alone = Groups.plan(torch.zeros(1, 1).long(), (0.5,))  # a group of one token, which is kept
    one = mod.routing_loss(torch.ones(1, 1), torch.ones(1, 1).bool(), alone)
    assert one.item() == pytest.approx(math.log1p(math.exp(-1)))


class Asks(World):
    """A question before the first frame, its answer at the last"""

    asks = True

    def draw(self, frames, rng, split):
        self.paint(frames[2], rng, *data.draw_thing(rng), 1, 1)
        return [Turn(0, "user", "What is next?"), Turn(self.frames - 1, "assistant", "1. A red disc.")]


@pytest.mark.parametrize("world", [VQA(16), Asks(16)], ids=["after-all", "at-a-frame"])
@pytest.mark.parametrize("masked", sorted(MASKED))
def test_an_answer_given_token_by_token_is_that_of_one_pass_over_the_same_groups(masked, world):
    tokenizer = Tokenizer(())  # of bytes only: what is said is re-read as the same tokens
    config = Config(vocab_size=len(tokenizer), image_size=16, pool=2, num_hidden_layers=4, keep=(0.5, 1.0, 0.2, 0.5),
                    router="shared", masked=masked)
    model = initialise(VideoLM(config), 1).double().requires_grad_(False)
    samples = world.held_out(3)
    watcher = Watcher(model, tokenizer, torch.zeros(3, dtype=torch.int64), limit=6)
    said = watcher.ask(samples)
    free = "assistant" not in MASKED[masked] and samples[0].turns[-1].frame == world.frames
    for b, (sample, text) in enumerate(zip(samples, said, strict=True)):
        heard = sample._replace(turns=[*sample.turns[:-1], sample.turns[-1]._replace(text=text)])
        batch = data.collate([heard], config, tokenizer)
        answer = len(tokenizer.encode(text)) + 1  # with `<end>`
        late = torch.arange(batch.tokens.shape[1]) >= batch.tokens.shape[1] - answer
        id = torch.where(late & free, torch.arange(len(late)), batch.group)
        groups = Groups.plan(id, config.keep, late=(late & free)[None])
        out = model(batch.tokens, batch.frames, groups, batch.seed)
        logits = model.logits(out.hidden[0, -answer - 1 : -1])  # what follows each token of the answer
        logits[:, [i for i in range(len(data.SPECIAL)) if i != TOKENIZER.end]] = -torch.inf
        assert logits.argmax(-1)[:6].tolist() == batch.tokens[0, -answer:][:6].tolist()
        counts = [int(out.keep[layer].sum()) if layer in out.keep else len(late) for layer in range(4)]
        assert watcher.computed()[b].tolist() == counts


@pytest.mark.parametrize(("plan", "router", "normed"), [
    ("dense", "learned", True), ("layer-skip", "learned", True), ("interleaved", "uniform", True),
    ("interleaved", "learned", False), ("interleaved", "shared", False)])
def test_the_first_routers_of_a_trained_decoder_are_normed_and_those_that_it_has_stay(plan, router, normed):
    donor = train.build(train.TrainConfig(plan=plan, router=router))
    assert not donor.config.router_norm
    converted = train.route(train.TrainConfig(init="run"), donor.config, donor)
    assert converted.router_norm == normed and converted.router == "learned"


def test_each_flag_of_routing_changes_what_is_computed():
    flags = [{}, {"plan": "all"}, {"plan": "all", "router": "shared"}, {"plan": "dense"}, {"keep": 0.5}, {"router": "random"},
             {"router": "uniform"}, {"gate": "linear"}, {"gate": "sigmoid"},
             {"weigh": "update"},
             *({"masked": name} for name in MASKED if name != "text")]
    heard = []
    for given_flags in flags:
        model = train.build(train.TrainConfig(task="vqa", **given_flags))
        heard.append(hear(model, TOKENIZER, VQA(48).held_out(1))[1].hidden)
    for i, a in enumerate(heard):
        assert all(not torch.allclose(a, b) for b in heard[:i]), flags[i]
