"""A window keeps an endless stream's memory and time per frame flat, whatever is said in it, or never."""

import gc
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from strategies import keep

import data
import eval as evaluation
from data import Tokenizer, Turn, World
from model import Config, VideoLM, initialise

TOKENIZER = Tokenizer()
SMALL = Config(vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
               num_attention_heads=2, num_key_value_heads=1, head_dim=16, image_size=16, pool=1,
               keep=(1.0, 0.5), vision_hidden_size=16, vision_intermediate_size=16, vision_layers=1)


def decide(monkeypatch, rule):
    """Frame number -> does the model speak?"""
    decisions = map(rule, iter(range(10**9)))
    monkeypatch.setattr(evaluation, "speaks", lambda *_: torch.tensor([next(decisions)]))


def resident() -> int:
    """Bytes of memory that this process has now, without those of files"""
    gc.collect()
    pages = Path("/proc/self/statm").read_text().split()
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells how much memory a process has")
@pytest.mark.parametrize("frames", [1_000, pytest.param(200_000, marks=pytest.mark.long)])
def test_memory_and_time_per_frame_stay_flat(monkeypatch, tmp_path, frames):
    model = initialise(VideoLM(SMALL), 0).eval()
    watcher = evaluation.Watcher(model, TOKENIZER, torch.zeros(1).long(), window=8, limit=3)
    decide(monkeypatch, lambda n: n % 100 == 99)
    noise = np.random.default_rng(0).integers(256, size=(16, 16, 16, 3), dtype=np.uint8)
    memory, clock = [], np.full(frames, np.nan)

    def stream():
        for n in range(frames):
            if n % (frames // 20) == 0:
                memory.append(resident())
            clock[n] = time.process_time()  # the machine has other work too
            yield noise[n % 16]

    turns = [Turn(0, "user", "Go.")]
    evaluation.narrate(watcher, stream(), 2.0, turns, tmp_path / "watch.png")
    took = np.diff(clock)
    early, late = np.median(took[frames // 20 : frames // 10]), np.median(took[-frames // 20 :])
    grown = memory[-1] / memory[2] - 1
    assert grown < 0.02
    if frames > 10_000:
        assert late < 1.25 * early
        keep("a stream watched with a window", f"{frames:,} frames, from the first tenth to the last: memory "
             f"{grown:+.2%} ({memory[2] / 1e6:.0f} MB), time a frame {late / early - 1:+.1%} "
             f"({1000 * early:.2f} ms)")
    assert int(watcher.cache.seen) > frames * 3 and max(layer.length for layer in watcher.cache.layers) < 100


def test_a_reply_without_an_end_is_ended_after_its_limit_and_the_stream_goes_on(monkeypatch):
    model = initialise(VideoLM(SMALL), 0).eval()
    never_ends = torch.zeros(len(TOKENIZER))
    never_ends[TOKENIZER.end] = -torch.inf
    monkeypatch.setattr(VideoLM, "logits", lambda self, hidden: self.lm_head(hidden) + never_ends)
    decide(monkeypatch, lambda n: True)
    watcher = evaluation.Watcher(model, TOKENIZER, torch.zeros(1).long(), limit=7)
    frames = torch.randint(256, (3, 1, 1, 3, 16, 16)).byte()
    said = [watcher.watch(frame)[0] for frame in frames]
    assert [(turn.frame, turn.role, len(turn.said)) for turn in said] == [(0, "assistant", 7)] * 3
    assert watcher.kept[1].shape == (1, SMALL.tokens_per_frame)  # of the frame, not of the reply
    assert int(watcher.cache.seen) == 3 * (2 + 1 + 1 + 7 + 1)  # frame, <frame>, <assistant>, reply, <end>


def test_no_window_is_kept_where_questions_may_skip_as_they_would_compete_in_one_chunk_and_not_in_two():
    model = VideoLM(replace(SMALL, masked="none"))
    with pytest.raises(ValueError, match=r"window must be 0 where questions may skip \(masked none\), got 8"):
        evaluation.Watcher(model, TOKENIZER, torch.zeros(1).long(), window=8)


def test_a_question_in_mid_stream_is_heard_before_its_frame_with_a_window_as_without(monkeypatch):
    model = initialise(VideoLM(SMALL), 0).double().eval()
    frames = torch.randint(256, (6, 1, 1, 3, 16, 16)).byte()
    seen, kept = [], []
    monkeypatch.setattr(evaluation, "speaks", lambda logits, *_: seen.append(logits) or torch.tensor([False]))
    for window in (0, 6):
        watcher = evaluation.Watcher(model, TOKENIZER, torch.zeros(1).long(), window=window)
        for n, frame in enumerate(frames):
            watcher.watch(frame, [[Turn(0, "user", "And now?")]] if n == 3 else None)
        kept.append(watcher.kept)
    whole = World(16, 6).held_out(1)[0]._replace(turns=[Turn(3, "user", "And now?")], seed=0)
    whole = whole._replace(frames=frames[:, 0, 0].movedim(1, -1).numpy())
    b, out = evaluation.hear(model, TOKENIZER, [whole])
    vision = (b.tokens[0] == data.VISION).nonzero()[:, 0]
    last = vision[-SMALL.tokens_per_frame :]
    assert all(watched.keys() == {1} and torch.equal(watched[1], out.keep[1][:, last]) for watched in kept)
    at_once = model.logits(out.hidden[0][b.decision[0]])
    for one_by_one in (seen[:6], seen[6:]):
        torch.testing.assert_close(torch.cat(one_by_one).double(), at_once, rtol=1e-5, atol=1e-5)
