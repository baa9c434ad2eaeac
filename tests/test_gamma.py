"""gamma-MoD: one router for all layers, masked text that never skips, a dense run that becomes routed."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, integers, models, routings, watches

import data
import mod
import train
from data import VQA, Tokenizer, Turn
from eval import Watcher
from mod import GATES, MASKED, Groups
from model import Config, VideoLM, initialise, load, save

TOKENIZER = Tokenizer()
SHARED = watches(max_streams=2, max_chunks=2, router="shared")
ROUTED = routings(st.sampled_from([0.2, 0.5, 0.75]))
TEXT = st.text(max_size=4)
PROMPTS = [TEXT, st.lists(st.tuples(TEXT, TEXT), max_size=3), st.integers(1, 5), st.sampled_from([*MASKED])]


@given(models(router="shared"))
def test_the_shared_router_is_one_tensor_wherever_it_goes(tmp_path_factory, model):
    names = [name for name in model.state_dict() if name.startswith("routers")]
    assert names == ["routers.shared.weight"] * any(0 < r < 1 for r in model.config.keep)
    save(folder := tmp_path_factory.mktemp("run"), model)
    assert [name for name in load(folder).state_dict() if name.startswith("routers")] == names
    optimizers = train.make_optimizers(model.requires_grad_(True), train.TrainConfig())
    trained = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sum(p is router.weight for router in model.routers.values() for p in trained) == len(names)


@given(SHARED)
def test_the_gradients_of_all_routed_layers_add_up_in_the_shared_router(watch):
    model, batch = watch.model, watch.whole()
    apart = VideoLM(replace(model.config, router="learned")).double().to(batch.tokens.device)
    routers = {f"routers.{n}.weight": model.routers["shared"].weight for n in apart.routers}
    apart.load_state_dict({k: v for k, v in model.state_dict().items() if "routers" not in k} | routers)
    for net in (model.requires_grad_(True), apart):
        net(*batch).hidden.sin().sum().backward()
    sums = [sum((r.weight.grad for r in net.routers.values() if r.weight.grad is not None), torch.zeros(16))
            for net in (model, apart)]
    torch.testing.assert_close(*sums, rtol=1e-9, atol=1e-9, check_dtype=False)


@given(*PROMPTS)
def test_masked_text_belongs_to_no_group_and_all_else_to_that_of_the_image(system, pairs, P, masked):
    turns = [Turn(1, role, text) for q, a in pairs for role, text in (("user", q), ("assistant", a))]
    tokens, group, _ = data.layout([Turn(0, "system", system), *turns], 1, P, TOKENIZER, MASKED[masked])
    before = len(TOKENIZER.encode(system)) + 1
    expected = [-1 if "system" in MASKED[masked] else 0] * before + [0] * P + [-1]  # `<frame>` never skips
    for turn in turns:
        opening = -1 if "user" in MASKED[masked] else 0  # `<assistant>` ends what asks
        length = 1 + len(TOKENIZER.encode(turn.text))  # with `<end>`
        expected += [opening] + [-1 if turn.role in MASKED[masked] else 0] * length
    assert group == expected
    assert [i for i, t in enumerate(tokens) if t == data.VISION] == [*range(before, before + P)]


@pytest.mark.parametrize("masked", sorted(MASKED))
def test_a_decision_to_speak_is_made_without_what_is_then_said(masked):
    config = Config(vocab_size=len(TOKENIZER), keep=(0.5,) * 4, router="shared", masked=masked)
    model, silent = initialise(VideoLM(config), 0).double(), data.World(48, frames=2).held_out(1)[0]
    hidden = []
    for said in ([], [Turn(1, "assistant", "A red disc.")]):
        heard = silent._replace(turns=[Turn(0, "user", "Go."), *said])
        batch = data.collate([heard], config.tokens_per_frame, TOKENIZER, MASKED[masked])
        out = model(batch.tokens, batch.frames, Groups.plan(batch.group, config.keep))
        hidden.append(out.hidden[batch.decision])
    torch.testing.assert_close(*hidden, rtol=0, atol=1e-12)


@given(ROUTED)
def test_the_routing_loss_is_the_mean_cross_entropy_towards_what_each_stream_selected(case):
    groups, score = case.groups(), case.score.to(case.device)
    keep = mod.select(score, groups, case.r)
    slow = [F.softplus(-s if kept else s) for b in range(len(case.id))
            for s, kept, id in zip(score[b], keep[b], case.id[b].tolist(), strict=True) if id >= 0]
    expected = sum(slow) / len(slow) if slow else torch.zeros_like(score.sum())
    torch.testing.assert_close(mod.routing_loss(score, keep, groups), expected)


@given(SEEDS, st.integers(1, 6))
def test_a_late_token_is_computed_if_its_weight_is_at_least_a_half(seed, T):
    id, score = torch.arange(T)[None], integers(seed, -2, 3, 1, T).double()
    groups = Groups.plan(id, (0.0, 0.5, 1.0), late=torch.ones(1, T, dtype=torch.bool))
    assert torch.equal(mod.select(score, groups, 0.5), score.sigmoid() >= 0.5)
    assert not mod.select(score, groups, 0.0).any()


@pytest.mark.parametrize("masked", sorted(MASKED))
def test_an_answer_given_token_by_token_is_that_of_one_pass_over_the_same_groups(masked):
    tokenizer = Tokenizer(())  # of bytes only: what is said is re-read as the same tokens
    config = Config(vocab_size=len(tokenizer), image_size=16, pool=2, keep=(0.5, 1.0, 0.2, 0.5),
                    router="shared", masked=masked)
    model = initialise(VideoLM(config), 1).double().requires_grad_(False)
    samples = VQA(16).held_out(3)
    watcher = Watcher(model, tokenizer, torch.zeros(3, dtype=torch.int64), limit=6)
    said, free = watcher.ask(samples), "assistant" not in MASKED[masked]
    for b, (sample, text) in enumerate(zip(samples, said, strict=True)):
        heard = sample._replace(turns=[*sample.turns[:-1], sample.turns[-1]._replace(text=text)])
        batch = data.collate([heard], config.tokens_per_frame, tokenizer, MASKED[masked])
        answer = len(tokenizer.encode(text)) + 1  # with `<end>`
        late = torch.arange(batch.tokens.shape[1]) >= batch.tokens.shape[1] - answer
        id = torch.where(late & free, torch.arange(len(late)), batch.group)
        out = model(batch.tokens, batch.frames, Groups.plan(id, config.keep, late=(late & free)[None]))
        logits = model.logits(out.hidden[0, -answer - 1 : -1])  # what follows each token of the answer
        logits[:, [i for i in range(len(data.SPECIAL)) if i != tokenizer.end]] = -torch.inf
        assert logits.argmax(-1)[:6].tolist() == batch.tokens[0, -answer:][:6].tolist()
        counts = [int(out.keep[layer].sum()) if layer in out.keep else len(late) for layer in range(4)]
        assert watcher.computed()[b].tolist() == counts


def test_converted_at_keep_one_a_dense_run_is_itself_bit_for_bit_and_a_unit_weight_starts_at_one(tmp_path):
    dense = initialise(VideoLM(Config(vocab_size=len(TOKENIZER))), 0)
    save(tmp_path, dense)
    chosen = {"plan": "all", "keep": 1.0, "gate": "unit", "router": "shared", "masked": "question"}
    converted = train.build(train.TrainConfig(init=str(tmp_path), **chosen))
    batch = data.collate(VQA(48).held_out(3), 37, TOKENIZER, MASKED["question"])
    groups = Groups.plan(batch.group, converted.config.keep, batch.real)
    a, b = (model(batch.tokens, batch.frames, groups).hidden for model in (dense, converted))
    assert torch.equal(a, b) and GATES["unit"](torch.zeros(())) == 1
