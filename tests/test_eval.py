"""What is scored is what a model did: turns cut as the metrics say, its own replies heard, pictures true."""

import re
import struct
import zlib
from itertools import chain

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from strategies import make_video, needs_ffmpeg

import data
import eval as evaluation
import train
from data import Sample, Tokenizer, Turn, World
from eval import (
    Evidence,
    Reading,
    Watcher,
    cut,
    evaluate,
    gather_evidence,
    on_shapes,
    picture,
    replies,
)
from model import Config, VideoLM, initialise, printable

TOKENIZER = Tokenizer()


def stream(frames, replies):
    turns = [Turn(0, "user", "Go."), *(Turn(f, "assistant", text) for f, text in replies.items())]
    return Sample(np.zeros((frames, 8, 8, 3), np.uint8), turns, 0)


@pytest.mark.parametrize(("speaks_at", "expected"), [
    ({2, 5, 9}, [([0, 0, 1], []), ([0, 0, 1], []), ([0, 0, 0, 1], [])]),
    ({1, 7}, [([0, 1, 0], []), ([0, 0, 0], [0, 1]), ([0, 1, 0, 0], [])]),  # early, 2 late, early
    (set(), [([0, 0, 0], [0, 0]), ([0, 0, 0], [0, 0]), ([0, 0, 0, 0], [0])]),  # never; 1 frame is left
])
def test_turns_are_cut_at_the_true_replies_and_a_silent_model_is_waited_for(monkeypatch, speaks_at, expected):
    def scripted(model, tokenizer, samples, threshold):  # whatever it heard, it speaks at these frames
        asked.extend(samples)
        return [Reading([f in speaks_at for f in range(len(s.frames))],
                        *({f: [value] for f in replies(s)} for value in (0.5, True))) for s in samples]

    monkeypatch.setattr(evaluation, "read", scripted)
    asked, truth, heard = [], stream(11, {2: "one", 5: "two", 9: "three"}), stream(11, {4: "mine"})
    evidence, spoke = gather_evidence(None, None, [truth, stream(3, {})], [heard, stream(3, {})], 0.0)
    assert evidence == [[Evidence(now, later, [0.5], [True]) for now, later in expected], []]
    assert [len(row) for row in spoke] == [11, 3]
    ends = [(len(s.frames) - 1, replies(s)) for s in asked]
    told = {last: said for last, said in ends if last in said}
    assert told == {2: {2: "one"}, 5: {4: "mine", 5: "two"}, 9: {4: "mine", 9: "three"}}


@pytest.mark.parametrize("opening", [[], [7]])
def test_free_running_is_scored_on_exactly_what_the_model_heard(monkeypatch, opening):
    monkeypatch.setattr(TOKENIZER, "opening", opening)
    config = Config(vocab_size=len(TOKENIZER), image_size=16, pool=2, num_hidden_layers=4, keep=(0.2,) * 4)
    model = initialise(VideoLM(config), 1).double()
    samples = World(size=16).held_out(3)
    samples[1] = cut(samples[1], 5, 5)
    samples[2].turns.append(Turn(4, "user", "And now?"))
    monkeypatch.setattr(evaluation, "speaks", lambda logits, *_: (logits[..., 7] * 100).int() % 2 == 0)
    _, own = evaluate(model, TOKENIZER, samples, 2.0)
    decided = [[f in replies(s) for f in range(len(s.frames))] for s in own]
    assert any(map(any, decided)) and not all(map(all, decided))  # else it shows nothing
    assert [r.spoke for r in evaluation.read(model, TOKENIZER, own, 0.0)] == decided
    said = [turn for s in own for turn in s.turns if turn.role == "assistant"]
    longest = max(len(TOKENIZER.encode(text)) for s in samples for text in replies(s).values())
    assert max(len(turn.said) for turn in said) == longest + 1  # it ends there, and is no right one
    assert all(turn.text == TOKENIZER.decode(turn.said) for turn in said)


def test_true_replies_are_scored_as_alone_and_what_comes_after_the_last_frame_is_left_out():
    config = Config(vocab_size=len(TOKENIZER), image_size=16, pool=2, num_hidden_layers=3, keep=(0.5,) * 3)
    model, samples = initialise(VideoLM(config), 1).double(), World(size=16).held_out(3)
    for sample in samples:
        if 7 not in replies(sample):
            sample.turns.append(Turn(7, "assistant", "There."))
    plain, _ = evaluate(model, TOKENIZER, samples, 2.0)
    more = [s._replace(turns=[*s.turns, Turn(8, "user", "And?"), Turn(8, "assistant", "No.")]) for s in samples]
    assert evaluate(model, TOKENIZER, more, 2.0)[0] == plain
    once, _ = gather_evidence(model, TOKENIZER, samples, samples, 0.0)
    alone, _ = gather_evidence(model, TOKENIZER, samples, list(samples), 0.0)
    for a, b in zip(chain(*once), chain(*alone), strict=True):
        assert (a.spoke, a.later, a.right) == (b.spoke, b.later, b.right) and a.nll == pytest.approx(b.nll)


def test_long_examples_are_cut_on_the_screen_and_each_loop_has_a_bar(monkeypatch, tmp_path, capsys):
    config = Config(vocab_size=len(TOKENIZER), image_size=16, pool=2, keep=(1.0,) * 3)
    model, loops = initialise(VideoLM(config), 1), set()
    monkeypatch.setattr(evaluation, "tqdm", lambda steps, doing, **_: loops.add(doing) or steps)
    for world, text in ((World(16, 2), "talk " * 25), (data.VQA(16), "why " * 30)):
        monkeypatch.setattr(world, "held_out", lambda count, world=world, text=text: [
            s._replace(turns=[t._replace(text=text) for t in s.turns]) for s in type(world)(16, 2).held_out(count)])
        evaluation.report(tmp_path, model, world, 4)
        printed = capsys.readouterr().out
        assert f" {text[:100].strip()}" in printed and text.strip() not in printed
    assert loops == {"watching", "reading", "answering"}


def test_what_is_read_is_what_the_model_says_of_each_token_and_the_shares_are_counted(monkeypatch):
    config = Config(vocab_size=len(TOKENIZER), image_size=16, pool=2, num_hidden_layers=4, keep=(0.2,) * 4)
    model, samples = initialise(VideoLM(config), 1).double().requires_grad_(False), World(16).held_out(3)
    b, out = evaluation.hear(model, TOKENIZER, samples)
    for sample, reading, tokens, hidden in zip(
            samples, evaluation.read(model, TOKENIZER, samples, 0.0), b.tokens, out.hidden, strict=True):
        says, frames = model.logits(hidden).log_softmax(-1), (tokens == TOKENIZER.frame).nonzero()[:, 0]
        assert reading.nll.keys() == reading.right.keys() == replies(sample).keys()
        for frame, text in replies(sample).items():
            true = list(enumerate([*TOKENIZER.encode(text), TOKENIZER.end], int(frames[frame]) + 1))
            assert reading.nll[frame] == pytest.approx([-says[at, t].item() for at, t in true], rel=1e-4)
            assert reading.right[frame] == [says[at].argmax().item() == t for at, t in true]
    asked = []
    monkeypatch.setattr(evaluation, "speaks", lambda logits, threshold, _: asked.append(threshold) or (
        torch.ones(logits.shape[:-1]).bool()))
    monkeypatch.setattr(evaluation.Watcher, "reply", lambda *_: [Turn(0, "assistant", "A")] * 3)
    samples[0].turns[:] = [Turn(frame, "assistant", "A") for frame in (1, 2)]
    free = evaluate(model, TOKENIZER, samples[:1] * 3, 2.0, 0.7)[0]["free_running"]
    assert set(asked) == {0.7} and free["decision_accuracy"] == 2 / 8  # it speaks at all 8 frames
    assert (free["said_right"], free["said_wrong"]) == (1, 6 / 2)


@needs_ffmpeg
def test_a_video_is_watched_with_and_without_a_window(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_video(tmp_path / "clip.mp4", 20)
    train.main(["--steps", "1", "--batch", "1", "--streams", "1", "--device", "cpu", "--out", "run"])
    capsys.readouterr()
    monkeypatch.setattr(evaluation.Watcher.__init__, "__defaults__", (0.0, 0, 5))  # 5 tokens a reply
    for flags, fewest, most in (([], 40 * 38, 40 * 38 + 60), (["--window", "3"], 3 * 38, 3 * 38 + 12)):
        decisions = (torch.tensor([frame == 2]) for frame in range(40))
        monkeypatch.setattr(evaluation, "speaks", lambda *_, d=decisions: next(d))
        evaluation.main(["run", "--watch", "clip.mp4", "--query", "Go.", "--device", "cpu", *flags,
                         "--ask", "5 What?", "--ask", "7.5 Why?"])
        *said, counted, held, drawn = capsys.readouterr().out.splitlines()
        assert counted.startswith("40 frames, 20.0 s of video") and drawn.endswith("run/watch.png")
        assert [float(line.split()[0]) for line in said] == [1.0, 5.0, 7.5]
        assert fewest <= int(held.split(": ")[1].split()[0]) <= most  # layer 0 is dense
    assert (tmp_path / "run" / "watch.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("window", [0, 3])
def test_a_question_in_mid_stream_comes_before_the_frame_of_its_time_and_is_answered(
        window, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "speaks", lambda logits, *_: torch.zeros(1).bool())  # it never decides to
    model, fed = initialise(VideoLM(Config(vocab_size=len(TOKENIZER))), 0), []
    watcher, feed = Watcher(model, TOKENIZER, torch.zeros(1).long(), window=window, limit=3), Watcher.feed

    def remember(self, rows, *given, **named):
        fed.extend(rows[0].tokens)
        return feed(self, rows, *given, **named)

    monkeypatch.setattr(Watcher, "feed", remember)
    frames, texts = World(48).held_out(1)[0].frames, ["1.2 What?", "0 Who?", "9 And now?", "1.5  Why?"]
    turns = [Turn(0, "user", "Go."), *(data.parse_question(text, 2.0) for text in texts)]
    evaluation.narrate(watcher, iter(frames), 2.0, turns, tmp_path / "watch.png")
    printed = [line for line in capsys.readouterr().out.splitlines() if " s  " in line[:12]]
    assert [float(line.split()[0]) for line in printed] == [0.0, 1.5, 4.0]  # after frames 0 and 3, at the end
    answers = []
    for n, token in enumerate(fed):
        if token == TOKENIZER.assistant:
            answers.append(tuple(fed[n + 1 : fed.index(TOKENIZER.end, n)]))
    said = [Turn(frame, "assistant", "", ids) for frame, ids in zip((0, 3, 8), answers, strict=True)]
    whole = [*turns[:1], turns[2], turns[1], turns[4], *said[:2], turns[3]._replace(frame=8), said[2]]
    P = model.config.tokens_per_frame
    assert fed == data.layout(whole, 8, P, TOKENIZER, model.config.masked_roles).tokens


@pytest.mark.parametrize("text", ["What?", "12.5", "-1 What?", "nan What?", "12.5 ", "1e3 What?", ""])
def test_what_is_no_time_and_question_is_refused(text):
    with pytest.raises(ValueError, match=re.escape(f"ask must be seconds and a question, got {text!r}")):
        data.parse_question(text, 2.0)


def test_what_a_model_says_cannot_steer_the_terminal():
    assert printable("red \x1b[2J\r\n\udc80 disc").replace("\N{MIDDLE DOT}", "_") == "red _[2J___ disc"


def test_the_picture_fades_what_was_skipped_and_nothing_else():
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (112, 112, 3), dtype=np.uint8) for _ in range(2)]
    kept = [{1: torch.tensor(keep).bool()} for keep in ([1, 0, 1, 0, 0], [0, 1, 1, 1, 0])]
    png = picture(frames, kept)
    width, height = struct.unpack(">2I", png[16:24])
    start = png.index(b"IDAT")
    size = struct.unpack(">I", png[start - 4 : start])[0]
    rows = np.frombuffer(zlib.decompress(png[start + 4 : start + 4 + size]), np.uint8).reshape(height, -1)
    image = rows[:, 1:].reshape(height, width, 3)
    assert np.array_equal(image[120:232, 4:88], evaluation.draw_text("layer 1", 112))
    assert (image[4:116, :88] == 255).all()  # the frames have no name
    for column, (frame, keep) in enumerate(zip(frames, kept, strict=True)):
        left = 92 + column * 116
        assert np.array_equal(image[4:116, left : left + 112], frame)
        for patch, is_kept in enumerate(keep[1][1:].tolist()):
            top, side = 120 + patch // 2 * 56, left + patch % 2 * 56
            part = frame[patch // 2 * 56 :, patch % 2 * 56 :][:56, :56]
            shown = image[top : top + 56, side : side + 56]
            assert np.array_equal(shown, part if is_kept else 255 - (255 - part) // 5)
        assert (image[118, left] != 255).any() == bool(keep[1][0])  # the bar: CLS is computed


def test_a_name_in_the_picture_is_drawn_letter_by_letter():
    one, two = (evaluation.draw_text(text, 40) for text in ("l", "layer 10"))
    assert np.array_equal(one[:, :10], two[:, :10]) and not np.array_equal(one, two)
    assert (evaluation.draw_text("0", 40)[:, :10] == two[:, 70:80]).all()
    shapes = {evaluation.draw_text(letter, 40).tobytes() for letter in evaluation.GLYPHS}
    assert len(shapes) == len(evaluation.GLYPHS) and evaluation.GLYPHS.keys() >= set("layer 0123456789")


def test_what_a_router_looks_at_is_counted_against_chance_and_against_the_most():
    config = Config(vocab_size=len(TOKENIZER), num_hidden_layers=4, keep=(0.5, 1.0, 0.0, 0.5))
    world, net = World(48), initialise(VideoLM(config), 0)
    samples = world.held_out(4)
    b, _ = evaluation.hear(net, TOKENIZER, samples)
    painted = sum((b.frames == torch.tensor(rgb)[:, None, None]).all(2) for rgb in data.COLOURS.values())
    shown = painted.view(4, 8, 6, 8, 6, 8).amax((3, 5)).flatten(2)  # (B, F, 36)
    score = torch.zeros(b.tokens.shape)
    score[b.tokens == data.VISION] = F.pad(shown, (1, 0), value=2).flatten().float()  # CLS, then shapes
    net.score = lambda *given: score
    looked = on_shapes(net, TOKENIZER, samples, world)
    some = shown[shown.sum(2) > 0].float()
    assert looked["chance"] == pytest.approx(float(some.mean()))
    best = some.sum(1).clamp(max=18).sum() / (18 * len(some))  # of 19 of 37 kept, one is CLS
    assert looked["layer 0"] == looked["layer 3"] == looked["at most"] == pytest.approx(float(best))
    assert looked.keys() == {"layer 0", "layer 3", "at most", "chance"}
    dense = initialise(VideoLM(Config(vocab_size=len(TOKENIZER))), 0)
    assert on_shapes(dense, TOKENIZER, samples, world) == {}


def test_a_frame_is_cls_and_the_grid_of_mean_patches_row_by_row():
    vision = initialise(VideoLM(Config(image_size=16, patch_size=4, pool=2)), 0).double().vision_model
    pixels = torch.randint(256, (1, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    hidden = vision.hidden(pixels.double() / 127.5 - 1)[0]  # as transformers has it: see test_pretrained
    assert hidden.mean(1).abs().max() < 1e-9  # from scratch: after the final norm
    grid = hidden[1:].unflatten(0, (2, 2, 2, 2)).mean((1, 3)).flatten(0, 1)  # 4 x 4 patches in fours
    torch.testing.assert_close(vision(pixels)[0], torch.cat([hidden[:1], grid]), rtol=0, atol=1e-12)


def test_an_answer_that_goes_on_after_the_true_one_is_wrong(monkeypatch):
    model, world = initialise(VideoLM(Config(vocab_size=len(TOKENIZER))), 0), data.VQA(48)
    samples = world.held_out(3)
    true = [TOKENIZER.encode(sample.turns[-1].text) for sample in samples]
    for after, accuracy in ((TOKENIZER.end, 1), (TOKENIZER.encode(" red")[0], 0)):
        said = iter(zip(*([*ids, *[after] * 9] for ids in true), strict=False))
        monkeypatch.setattr(Watcher, "choose", lambda self, logits, said=said: torch.tensor(next(said)))
        assert evaluation.evaluate_answers(model, TOKENIZER, samples, world)[0]["free_running"]["accuracy"] == accuracy


@pytest.mark.parametrize("keep", [(0.5, 1.0, 0.2), (1.0,) * 3])
def test_answers_are_counted_right_word_for_word_and_skipped_tokens_over_the_routed_layers(monkeypatch, keep):
    config = Config(vocab_size=len(TOKENIZER), image_size=16, pool=2, keep=keep, router="shared", masked="question+answer")
    model, world = initialise(VideoLM(config), 1).double(), data.VQA(16)
    samples = [s._replace(turns=[*s.turns[:-2], Turn(1, "user", question), Turn(1, "assistant", " red")])
               for s, question in zip(world.held_out(5), ["Who is the one?", "Who is the other?", "Why?"] * 2, strict=False)]
    answers, original = iter([" red", " red.", " Red", " red", " red"]), evaluation.Watcher.ask

    def ask(watcher, asked):
        original(watcher, asked)
        told.append((watcher.computed(), watcher.cache.seen, watcher.seed.tolist()))
        return [next(answers) for _ in asked]

    told = []
    monkeypatch.setattr(evaluation.Watcher, "ask", ask)
    monkeypatch.setattr(evaluation.Watcher, "reply", lambda *_: [])  # the prompts alone
    world.score = lambda model, tokenizer, samples, said: {"lengths": [len(text) for text in said]}
    monkeypatch.setattr(evaluation, "BATCH", 2)
    result, said = evaluation.evaluate_answers(model, TOKENIZER, samples, world)
    computed, given = (torch.cat([part[i] for part in told]).double() for i in (0, 1))
    assert [seed for *_, seeds in told for seed in seeds] == [s.seed for s in samples]
    assert said == [" red", " red.", " Red", " red", " red"] and result["questions"] == 5
    assert result["tokens"] == {"computed": computed.mean(0).tolist(), "given": given.mean().item()}
    assert computed[:, 1].tolist() == given[:, 0].tolist()  # the dense layer
    skipped = 1 - float(computed[:, 0].sum() + computed[:, 2].sum()) / (2 * float(given.sum()))
    assert (skipped > 0.2) == (keep[0] < 1)
    free = {"accuracy": 3 / 5, "skipped": pytest.approx(skipped)}
    assert result["free_running"] == free | {"lengths": [4, 5, 4, 4, 4]}
