"""Every number and picture of a run: metrics, a live narration, ranks of layers.

    python eval.py [RUN]              evaluate a run (the newest in out/)
    python eval.py RUN --watch VIDEO  narrate a video as its frames arrive
    python eval.py RUN --arank        the rank of each layer's attention maps
"""

import contextlib
import math
import struct
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
from data import Row, Sample, Source, Tokenizer, Turn, collate, stack_frames
from mod import PADDING
from model import (
    Cache,
    Output,
    VideoLM,
    Window,
    check_fields,
    check_range,
    flag,
    layer_ranks,
    load,
    parse,
    pick_device,
    prepare,
    printable,
    read_json,
    run_main,
    write,
    write_json,
)
from video import read_video

BATCH = 32  # streams or questions at a time

# --- the four metrics of VideoLLM-online ----------------------------------------------------------


class Evidence(NamedTuple):
    """What a model did in one turn of n frames, at the last of which it should say m tokens."""

    spoke: list[bool]  # n decisions at the frames of the turn; only the last should be True
    later: list[bool]  # decisions at the frames after it, where the model was silent throughout
    nll: list[float]  # m negative log likelihoods of the true tokens, in nats
    right: list[bool]  # m: is the most likely token the true one?


def turn_metrics(turn: Evidence) -> dict[str, float]:
    """LM-PPL, TimeDiff (frames), Fluency and LM-Correctness of a turn, as VideoLLM-online's code.

    Beside those with a quirk stands the corrected form. TimeDiff: a reply that never came counts as
    one frame later than the last one left for it. Fluency: a premature decision is a wrong one.
    """
    n, m = len(turn.spoke), len(turn.nll)
    prefix = turn.right.index(False) if False in turn.right else m
    if True in turn.spoke:
        late = true_late = turn.spoke.index(True) - (n - 1)  # 0: on time, below: early
    elif True in turn.later:
        late = true_late = turn.later.index(True) + 1
    else:
        late, true_late = len(turn.later), len(turn.later) + 1
    if late == 0:
        coded = n + prefix
    else:
        coded = n + late if late < 0 else n - 1
    true = n + prefix if true_late == 0 else n - 1 + min(true_late, 0)
    return {
        "lm_ppl": math.exp(min(100.0, fmean(turn.nll))),
        "lm_correctness": prefix / m,
        "time_diff": abs(late),
        "time_diff_corrected": abs(true_late),
        "fluency": coded / (n + m),
        "fluency_corrected": true / (n + m),
    }


def summarise(streams: list[list[Evidence]], fps: float) -> dict[str, float]:
    """Mean over the turns of a stream, then over streams, as VideoLLM-online; TimeDiff in seconds.

    `lm_ppl_corrected` is the perplexity of the mean over all tokens, not the mean of perplexities;
    `reply_accuracy` counts every right token, LM-Correctness only those before the first wrong one.
    """
    streams, mean = list(filter(None, streams)), {}
    if not streams:
        raise ValueError("streams must hold at least one reply to be evaluated on, got none")
    rows = [[turn_metrics(turn) for turn in turns] for turns in streams]
    for name in rows[0][0]:
        mean[name] = fmean(fmean(row[name] for row in turns) for turns in rows)
        if name.startswith("time_diff"):
            mean[name] /= fps
    every = list(chain(*streams))
    nll = fmean(chain(*(turn.nll for turn in every)))
    mean["lm_ppl_corrected"] = math.exp(min(100.0, nll))
    mean["reply_accuracy"] = fmean(chain(*(turn.right for turn in every)))
    return mean


class Reading(NamedTuple):
    """A model's answers at the labelled places of one given sequence."""

    spoke: list[bool]  # F decisions
    nll: dict[int, list[float]]  # frame of a reply -> m
    right: dict[int, list[bool]]  # frame of a reply -> m


def speaks(logits: Tensor, threshold: float, silent: int) -> Tensor:
    """(..., vocabulary) at `<frame>` -> (...) bool: silence is not the best, or below threshold"""
    return (logits.argmax(-1) != silent) | (logits.softmax(-1)[..., silent] < threshold)


def bar(steps: Iterable, doing: str) -> Iterable:
    """The same steps, with a bar on the screen where they take longer than a second"""
    return tqdm(steps, doing, leave=False, ncols=80, delay=1)


@torch.no_grad()
def hear(
    model: VideoLM, tokenizer: Tokenizer, samples: list[Sample]
) -> tuple[data.Batch, Output]:
    """Feed whole sequences, replies included -> the batch on the host, and the model's output"""
    batch = collate(samples, model.config, tokenizer)
    x = prepare(batch, model.config, model.norm.weight.device)
    return batch, model(x.tokens, x.frames, x.groups, x.seed)


@torch.no_grad()
def read(
    model: VideoLM, tokenizer: Tokenizer, samples: list[Sample], threshold: float
) -> list[Reading]:
    """The decisions and the likelihoods in whole sequences -> a Reading each"""
    readings = []
    for first in bar(range(0, len(samples), BATCH), "reading"):
        b, out = hear(model, tokenizer, samples[first : first + BATCH])
        for row, labels, decision in zip(out.hidden, b.labels, b.decision, strict=True):
            places = (labels >= 0).nonzero()[:, 0]
            logits = model.logits(row[places.to(row.device)]).float().cpu()  # (M, vocabulary)
            nll = F.cross_entropy(logits, labels[places], reduction="none").tolist()
            right = (logits.argmax(-1) == labels[places]).tolist()
            spoke = speaks(logits, threshold, tokenizer.silent).tolist()
            reading = Reading([], {}, {})
            for i, decides in enumerate(decision[places].tolist()):
                if decides:
                    reading.spoke.append(spoke[i])
                else:  # a token of the reply to the frame that was decided on last
                    frame = len(reading.spoke) - 1
                    reading.nll.setdefault(frame, []).append(nll[i])
                    reading.right.setdefault(frame, []).append(right[i])
            readings.append(reading)
    return readings


def replies(sample: Sample) -> dict[int, str]:
    """What is said of the frames of a stream: frame -> text"""
    said = [turn for turn in sample.turns if turn.role == "assistant"]
    return {turn.frame: turn.text for turn in said if turn.frame < len(sample.frames)}


def cut(sample: Sample, frame: int, frames: int, *reply: Turn) -> Sample:
    """The stream with its replies before `frame`, then this one, and `frames` frames"""
    turns = []
    for turn in sample.turns:
        if turn.frame < (frame if turn.role == "assistant" else frames):
            turns.append(turn)
    return sample._replace(turns=[*turns, *reply], frames=sample.frames[:frames])


def gather_evidence(
    model: VideoLM,
    tokenizer: Tokenizer,
    truth: list[Sample],
    heard: list[Sample],
    threshold: float,
) -> tuple[list[list[Evidence]], list[list[bool]]]:
    """Score every reply of every stream -> the evidence of its turns, and all its decisions.

    heard: the same streams with the replies that the model has in its context: the true ones
    (teacher-forced) or its own (free-running). The true reply is scored after what was heard until
    its frame. Turns end at the true replies; a late reply is also a premature one of the next turn.
    VideoLLM-online's code differs in two places. It does not wait after the last reply of a stream,
    so a model that is silent there counts as punctual. And it waits without the questions that are
    asked meanwhile.
    """
    readings = read(model, tokenizer, heard, threshold)
    turns, told, untold = [], [], []
    for i, sample in enumerate(truth):
        said = replies(sample)
        frames = sorted(said)
        ends = [*frames[1:], len(sample.frames) - 1]  # where the next turn ends
        for before, frame, after in zip([-1, *frames], frames, ends, strict=False):
            decided = readings[i].spoke[before + 1 : frame + 1]
            turns.append((i, frame, decided))
            told.append(cut(heard[i], frame, frame + 1, Turn(frame, "assistant", said[frame])))
            if not any(decided):  # wait for it until the next turn ends, at most n - 1 frames
                last = min(after, frame + len(decided) - 1)
                untold.append(cut(heard[i], frame, last + 1))
    waited = iter(read(model, tokenizer, untold, threshold))
    evidence = [[] for _ in truth]
    if heard is truth:  # then each true reply has been read where it stands
        scored = [readings[i] for i, _, _ in turns]
    else:
        scored = read(model, tokenizer, told, threshold)
    for (i, frame, decided), reading in zip(turns, scored, strict=True):
        later = [] if any(decided) else next(waited).spoke[frame + 1 :]
        evidence[i].append(Evidence(decided, later, reading.nll[frame], reading.right[frame]))
    return evidence, [reading.spoke for reading in readings]


def evaluate(
    model: VideoLM, tokenizer: Tokenizer, truth: list[Sample], fps: float, threshold: float = 0.0
) -> tuple[dict, list[Sample]]:
    """Score streams, true replies in the context or its own -> the results, and what it said

    What comes after the last frame is left out.
    """
    truth = [cut(s, len(s.frames), len(s.frames)) for s in truth]
    said = free_run(model, tokenizer, truth, threshold)
    own = [cut(s, 0, len(s.frames), *turns) for s, turns in zip(truth, said, strict=True)]
    result = {"streams": len(truth), "threshold": threshold}
    for name, heard in {"teacher_forced": truth, "free_running": own}.items():
        evidence, spoke = gather_evidence(model, tokenizer, truth, heard, threshold)
        result[name] = summarise(evidence, fps)
        right = []
        for sample, decisions in zip(truth, spoke, strict=True):
            due = replies(sample)
            right += [spoken == (frame in due) for frame, spoken in enumerate(decisions)]
        result[name]["decision_accuracy"] = fmean(right)
    said, true = all_replies(own, tokenizer), all_replies(truth, tokenizer)
    result["free_running"] |= {
        "said_right": len(said & true) / len(true),
        "said_wrong": len(said - true) / len(true),
    }
    return result, own


def all_replies(samples: list[Sample], tokenizer: Tokenizer) -> set[tuple[int, int, str]]:
    """Number of the stream, frame and text of each reply, after a tokenizer round trip"""
    found = set()
    for i, sample in enumerate(samples):
        for frame, text in replies(sample).items():
            found.add((i, frame, tokenizer.decode(tokenizer.encode(text))))
    return found


# --- watching a stream ----------------------------------------------------------------------------


class Watcher:
    """A model that watches B streams, decides after each frame whether to speak, and hears itself.

    Replies are greedy. One that reaches `limit` tokens is ended, in the context too.
    seed: (B,) names the streams, for a random router;  window: frames to remember, 0: all
    """

    def __init__(
        self,
        model: VideoLM,
        tokenizer: Tokenizer,
        seed: Tensor,
        threshold: float = 0.0,
        window: int = 0,
        limit: int = 200,
    ) -> None:
        if window and "user" not in model.config.masked_roles:
            raise ValueError(
                f"window must be 0 where questions may skip (masked none), got {window}"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.seed = seed
        self.threshold = threshold
        self.window = window
        self.limit = limit
        self.cache = Window(model, len(seed), window) if window else Cache(model, len(seed))
        self.next_group = 0
        self.begins = True
        self.kept = {}  # routed layer -> (B, P) bool, of the last frame

    def layout(self, turns: list[Turn], frames: int) -> Row:
        P, roles = self.model.config.tokens_per_frame, self.model.config.masked_roles
        return data.layout(turns, frames, P, self.tokenizer, roles, self.begins)

    @torch.no_grad()
    def feed(self, rows: list[Row], frames: Tensor | None = None, late: bool = False) -> Tensor:
        """Append a chunk to each stream -> (B, vocabulary) logits after its last token

        rows: empty where a stream waits;  frames: (B, F, ...)
        late: this is decoded text. Each of its tokens skips or not by its own score
        """
        model, B = self.model, len(rows)
        device = model.norm.weight.device
        self.begins = False
        if frames is None:
            frames = torch.zeros(B, 0)
        batch = data.make_batch(rows, frames, self.seed, self.tokenizer)
        group = batch.group.where(batch.group < 0, batch.group + self.next_group)
        self.next_group = max(self.next_group, int(group.max()) + 1)
        batch = batch._replace(group=group)
        x = prepare(batch, model.config, device, (group >= 0) & late)
        out = model(x.tokens, x.frames, x.groups, x.seed, self.cache)
        if frames.shape[1] == 1:
            vision = x.tokens == data.VISION
            self.kept = {l: keep[vision].view(B, -1).cpu() for l, keep in out.keep.items()}
        last = (batch.real.sum(1) - 1).clamp(min=0).to(device)
        return model.logits(out.hidden[torch.arange(B, device=device), last]).float()

    def feed_tokens(self, tokens: list[int], feeding: list[bool], group: list[int]) -> Tensor:
        """One token of text to each stream that is `feeding`, in this group or none (-1)"""
        rows = []
        for token, now, g in zip(tokens, feeding, group, strict=True):
            row = Row([], [], [])
            if now:
                row.add([token], g)
            rows.append(row)
        return self.feed(rows, late=True)

    def watch(
        self, frames: Tensor, asked: list[list[Turn]] | None = None, must_speak: bool = False
    ) -> list[Turn | None]:
        """frames: (B, 1, ...), the next of each stream;  asked: turns of frame 0, before it
        must_speak: reply to this frame without deciding to
        -> what is said of it, as a turn of frame 0, None: silence
        """
        B = len(self.seed)
        asked = asked or [[]] * B
        if self.window and any(asked):  # with a window, a chunk begins with its frame
            self.feed([self.layout(turns, 0) for turns in asked])
            asked = [[]] * B
        logits = self.feed([self.layout(turns, 1) for turns in asked], frames)
        speaking = speaks(logits, self.threshold, self.tokenizer.silent).tolist()
        return self.speak([must_speak or decided for decided in speaking])

    def speak(self, speaking: list[bool]) -> list[Turn | None]:
        """Let these streams reply now -> their replies, None: silence"""
        B = len(speaking)
        if not any(speaking):
            return [None] * B
        logits = self.feed_tokens([self.tokenizer.assistant] * B, speaking, [-1] * B)
        said = self.reply(logits, speaking, [-1] * B)
        return [turn if spoke else None for turn, spoke in zip(said, speaking, strict=True)]

    def reply(self, logits: Tensor, speaking: list[bool], group: list[int]) -> list[Turn]:
        """What these streams say. logits: (B, vocabulary) of the first token;  group: of each"""
        t, said = self.tokenizer, [[] for _ in speaking]
        barred = [t.pad, t.user, t.assistant, t.frame, t.silent]  # a reply is text, then `<end>`
        while any(speaking):
            logits[:, barred] = -math.inf
            token = self.choose(logits).tolist()
            for b, ids in enumerate(said):
                if len(ids) == self.limit:
                    token[b] = t.end
                if speaking[b] and token[b] != t.end:
                    ids.append(token[b])
            logits = self.feed_tokens(token, speaking, group)
            speaking = [now and i != t.end for now, i in zip(speaking, token, strict=True)]
        return [Turn(0, "assistant", t.decode(ids), tuple(ids)) for ids in said]

    def choose(self, logits: Tensor) -> Tensor:
        """(B, vocabulary) -> (B,) int64 on the host, the tokens to say"""
        return logits.argmax(-1).cpu()

    def ask(self, samples: list[Sample]) -> list[str]:
        """What it answers where each sample ends; everything before the answer is one prompt."""
        rows, group = [], []
        for sample in samples:
            turns = [*sample.turns[:-1], sample.turns[-1]._replace(text="")]
            row = self.layout(turns, len(sample.frames))
            group.append(min(row.group[-1], 0))  # of `<end>`: may the answer skip?
            rows.append(Row(row.tokens[:-1], row.group[:-1], row.labels[:-1]))
        logits = self.feed(rows, stack_frames([s.frames for s in samples]))
        return [turn.text for turn in self.reply(logits, [True] * len(rows), group)]

    def computed(self) -> Tensor:
        """(B, L) int64, the tokens of each stream that each layer computed and still remembers"""
        counts = []
        for layer in self.cache.layers:
            counts.append((layer.position[:, : layer.length] < PADDING).sum(1))
        return torch.stack(counts, dim=1)


def free_run(
    model: VideoLM, tokenizer: Tokenizer, samples: list[Sample], threshold: float = 0.0
) -> list[list[Turn]]:
    """What the model says of each stream when it hears only the user and itself"""
    said, limit = [], longest_reply(tokenizer, samples)
    for first in range(0, len(samples), BATCH):
        chunk = samples[first : first + BATCH]
        seed = torch.tensor([s.seed for s in chunk])
        watcher = Watcher(model, tokenizer, seed, threshold, limit=limit)
        said += watch_all(watcher, chunk)
    return said


def longest_reply(tokenizer: Tokenizer, samples: list[Sample]) -> int:
    """Tokens after which a reply is ended, so that no model talks on and on

    One more than the longest true reply has: cut there, a longer reply does not become a true one.
    """
    texts = [turn.text for s in samples for turn in s.turns if turn.role == "assistant"]
    return max(map(len, map(tokenizer.encode, texts)), default=0) + 1


def watch_all(watcher: Watcher, samples: list[Sample]) -> list[list[Turn]]:
    """Watch whole streams side by side; one that has ended stands still and is not listened to."""
    said = [[] for _ in samples]
    for f in bar(range(max(len(s.frames) for s in samples)), "watching"):
        asked = [data.questions_at(s.turns, f) for s in samples]
        now = [s.frames[[min(f, len(s.frames) - 1)]] for s in samples]
        for b, turn in enumerate(watcher.watch(stack_frames(now), asked)):
            if turn and f < len(samples[b].frames):
                said[b].append(turn._replace(frame=f))
    return said


def narrate(
    watcher: Watcher, frames: Iterator[np.ndarray], fps: float, turns: list[Turn], drawing: Path
) -> None:
    """Print what the model says as frames arrive, with the time; draw the last twelve.

    turns: the query, then questions. The reply to the frame after a question is its answer, also
    where there are several. Those that come after the last frame are asked at the end, in turn.
    """
    shown, count, began = deque(maxlen=12), 0, time.perf_counter()
    for frame in frames:
        asked = data.questions_at(turns, count)
        must_speak = len(asked) > (count == 0)  # the query alone needs no answer
        (said,) = watcher.watch(stack_frames([frame[None]]), [asked], must_speak)
        print_reply(count / fps, said)
        shown.append((frame, {layer: keep[0] for layer, keep in watcher.kept.items()}))
        count += 1
    for turn in turns:
        if turn.frame >= count:
            watcher.feed([watcher.layout([turn._replace(frame=0)], 0)])
            print_reply(count / fps, *watcher.speak([True]))
    png = picture(*zip(*shown, strict=True))
    write(drawing, lambda path: path.write_bytes(png))
    print(f"{count} frames, {count / fps:.1f} s of video in {time.perf_counter() - began:.1f} s")
    print("tokens in the cache of each layer:", *watcher.computed()[0].tolist())
    print(f"routing drawn in {drawing}")


def print_reply(seconds: float, said: Turn | None) -> None:
    if said:
        print(printable(f"{seconds:7.1f} s  {said.text}"), flush=True)


# --- questions, and the rank of attention maps ----------------------------------------------------


def evaluate_answers(
    model: VideoLM, tokenizer: Tokenizer, samples: list[Sample], source: Source
) -> tuple[dict, list[str]]:
    """Ask each sample its last question -> the results, and what was answered

    accuracy: share of answers that are right word for word
    skipped: share of all tokens, answers too, that the routed layers skipped
    tokens: how many each layer computed and how many there were, mean over the samples
    """
    said, computed, given = [], [], []
    limit = longest_reply(tokenizer, samples)
    for first in bar(range(0, len(samples), BATCH), "answering"):
        asked = samples[first : first + BATCH]
        watcher = Watcher(model, tokenizer, torch.tensor([s.seed for s in asked]), limit=limit)
        said += watcher.ask(asked)
        computed.append(watcher.computed().cpu())
        given.append(watcher.cache.seen.cpu())
    computed, given = torch.cat(computed).double(), torch.cat(given).double()  # (N, L), (N, 1)
    routed = torch.tensor(model.config.keep) < 1  # (L,)
    share = computed[:, routed].sum() / (given.sum() * routed.sum())
    right = []
    for sample, answer in zip(samples, said, strict=True):
        right.append(answer == tokenizer.decode(tokenizer.encode(sample.turns[-1].text)))
    scores = source.score(model, tokenizer, samples, said)
    scores["accuracy"] = fmean(right)
    scores["skipped"] = float(1 - share) if routed.any() else 0.0
    result = {
        "questions": len(samples),
        "free_running": scores,
        "tokens": {"computed": computed.mean(0).tolist(), "given": float(given.mean())},
    }
    return result, said


def rank_layers(model: VideoLM, source: Source, samples: int = 50) -> list[float]:
    """The ARank of each layer, mean over samples; a bar per layer is printed, and the spread."""
    c, tokenizer, found = model.config, data.tokenizer_for(model.config), []
    for sample in bar(source.batch(0, 0, samples), "ranking"):
        batch = collate([sample], c, tokenizer)
        found.append(layer_ranks(model.eval(), prepare(batch, c, model.norm.weight.device)))
    ranks = torch.cat(found)  # (samples, L)
    mean, spread = ranks.mean(0), ranks.std(0, correction=0)
    print(f"ARank of {len(ranks)} samples: rank of the attention maps, mean over heads, +- spread")
    for layer, rank in enumerate(mean):
        line = "#" * round(40 * float(rank / mean.max()))
        print(f"layer {layer:2} {rank:7.1f} +-{spread[layer]:5.1f}  {line}")
    return mean.tolist()


# --- what a run shows -----------------------------------------------------------------------------


def on_shapes(
    model: VideoLM, tokenizer: Tokenizer, samples: list[Sample], world: data.World
) -> dict[str, float]:
    """Of the patches that each routed layer keeps, the share that shows some of a shape

    Of frames with shapes; "chance" is that share of all their patches, "at most" what a layer
    could reach. {} where no layer chooses.
    """
    batch, out = hear(model, tokenizer, samples)
    shows = world.shows_shape(batch.frames, model.config.pool)  # (B, F, P - 1)
    some = shows.any(-1)  # (B, F)
    shows, share, most = shows[some], {}, []  # (N, P - 1)
    for layer, keep in out.keep.items():
        kept = keep.cpu()[batch.tokens == data.VISION].view(*some.shape, -1)[some, 1:]  # no CLS
        n = kept.sum(-1)  # (N,)
        if n.any():
            share[f"layer {layer}"] = float(shows[kept].float().mean())
            most.append(float(n.clamp(max=shows.sum(-1)).sum() / n.sum()))
    if share:
        share |= {"at most": max(most), "chance": float(shows.float().mean())}
    return share


GLYPHS = {  # letters and digits of "layer 12": 3 x 5 dots each, row by row
    "l": "110 010 010 010 111",
    "a": "000 110 011 101 111",
    "y": "000 101 111 001 110",
    "e": "000 111 101 110 111",
    "r": "000 111 100 100 100",
    " ": "000 000 000 000 000",
    "0": "111 101 101 101 111",
    "1": "010 110 010 010 111",
    "2": "110 001 010 100 111",
    "3": "110 001 010 001 110",
    "4": "101 101 111 001 001",
    "5": "111 100 110 001 110",
    "6": "011 100 111 101 111",
    "7": "111 001 010 010 010",
    "8": "111 101 111 101 111",
    "9": "111 101 111 001 110",
}


def picture(frames: list[np.ndarray], kept: list[dict[int, Tensor]]) -> bytes:
    """A stream's routing as a PNG: frames in columns, and a row per routed layer, with its name.

    Patches that the layer skipped are pale; a blue bar on top says that it computed CLS.
    frames: (S, S, 3) uint8 each;  kept: per frame, routed layer -> (1 + p * p,) bool
    """
    scale, layers = max(1, 112 // len(frames[0])), sorted(kept[0])
    side = scale * len(frames[0])
    tops = range(4, 4 + (side + 4) * (1 + len(layers)), side + 4)
    lefts = range(92, 92 + (side + 4) * len(frames), side + 4)
    image = np.full((tops.stop, lefts.stop, 3), 255, np.uint8)
    for layer, top in zip(layers, tops[1:], strict=True):
        image[top : top + side, 4:88] = draw_text(f"layer {layer}", side)
    for frame, keep, left in zip(frames, kept, lefts, strict=True):
        columns = slice(left, left + side)
        big = frame.repeat(scale, axis=0).repeat(scale, axis=1)  # (side, side, 3)
        image[4 : 4 + side, columns] = big
        for layer, top in zip(layers, tops[1:], strict=True):
            p = math.isqrt(len(keep[layer]) - 1)
            patch = np.arange(side) * p // side  # (side,) the patch that a pixel lies in
            computed = keep[layer][1:].view(p, p).numpy()[patch][:, patch, None]
            tile = np.where(computed, big, 255 - (255 - big) // 5)
            image[top : top + side, columns] = tile
            if keep[layer][0]:
                image[top - 3 : top - 1, columns] = (40, 90, 200)
    return png(image)


def draw_text(text: str, height: int) -> np.ndarray:
    """-> (height, 84, 3) uint8, grey on white, half way down"""
    image = np.full((height, 84, 3), 255, np.uint8)
    for place, letter in enumerate(text):
        rows = GLYPHS[letter].split()
        dots = np.array([[dot == "1" for dot in row] for row in rows])  # (5, 3)
        dots = dots.repeat(3, axis=0).repeat(3, axis=1)  # (15, 9)
        top, left = height // 2 - 7, 10 * place
        image[top : top + 15, left : left + 9][dots] = 90
    return image


def png(image: np.ndarray) -> bytes:
    """(H, W, 3) uint8 -> the file"""
    height, width, _ = image.shape
    rows = np.pad(image.reshape(height, -1), ((0, 0), (1, 0)))  # a row begins with 0: no filter
    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(rows, 9), b"IEND": b""}
    file = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks.items():
        checksum = zlib.crc32(kind + body)
        file += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)
    return file


def draw_routing(
    model: VideoLM, tokenizer: Tokenizer, sample: Sample, pixels: np.ndarray, path: Path
) -> None:
    """The routing of one stream, heard with its true replies. pixels: (F, S, S, 3) uint8"""
    batch, out = hear(model, tokenizer, [sample])
    vision, F = batch.tokens == data.VISION, len(pixels)
    shown = range(0, F, math.ceil(F / 12))  # 12 frames from all over a long stream
    kept = [{} for _ in shown]
    for layer, keep in out.keep.items():
        of_frame = keep.cpu()[vision].view(F, -1)  # (F, P)
        for column, f in zip(kept, shown, strict=True):
            column[layer] = of_frame[f]
    drawn = picture([pixels[f] for f in shown], kept)
    write(path, lambda unfinished: unfinished.write_bytes(drawn))


METRICS = (  # title, key, form; those indented are corrections of the one above, and times
    ("LM-PPL", "lm_ppl", "{:.3f}"),
    ("  of the mean", "lm_ppl_corrected", "{:.3f}"),
    ("TimeDiff", "time_diff", "{:.3f} s"),
    ("  corrected", "time_diff_corrected", "{:.3f} s"),
    ("Fluency", "fluency", "{:.1%}"),
    ("  corrected", "fluency_corrected", "{:.1%}"),
    ("LM-Correctness", "lm_correctness", "{:.1%}"),
    ("reply tokens right", "reply_accuracy", "{:.1%}"),
    ("decisions right", "decision_accuracy", "{:.1%}"),
    ("replies said right", "said_right", "{:.1%}"),
    ("  said wrong", "said_wrong", "{:.1%}"),
    ("answers right", "accuracy", "{:.1%}"),
    ("tokens skipped", "skipped", "{:.1%}"),
)


def report(
    folder: Path, model: VideoLM, source: Source, streams: int, threshold: float = 0.0
) -> None:
    """Evaluate a run, print it with examples; eval.json and routing.png go into its folder."""
    tokenizer = data.tokenizer_for(model.config)
    samples, examples = source.held_out(streams), []
    if source.asks:
        result, said = evaluate_answers(model, tokenizer, samples, source)
        for sample, answer in zip(samples[:8], said, strict=False):
            question, true = sample.turns[-2].text, sample.turns[-1].text
            examples.append((question, answer.strip(), true.strip()))
    else:
        result, own = evaluate(model, tokenizer, samples, source.fps, threshold)
        mine, true = replies(own[0]), replies(samples[0])
        for f in range(min(24, len(samples[0].frames))):
            said = mine.get(f, "(silent)"), true.get(f, "(silent)")
            examples.append((f"{f / source.fps:5.1f} s ", *said))
    if isinstance(source, data.World):
        result["on_shapes"] = on_shapes(model, tokenizer, samples[:64], source)
    print(f"{folder}: {len(samples)} {source.kind}")
    print_results(result)
    for where, share in result.get("on_shapes", {}).items():
        print(f"  {'kept patches on shapes: ' + where:40}{share:>18.1%}")
    print("for example, free-running, 100 letters of each (<- the truth, where it differs):")
    for about, mine, true in examples:
        differs = f"   <- {true:.100}" if mine != true else ""
        print(printable(f"  {about:.100} {mine:.100}{differs}"))
    write_json(folder / "eval.json", result)
    draw_routing(model, tokenizer, samples[0], source.pixels(samples[0]), folder / "routing.png")
    print(f"the routing of the first is drawn in {folder}/routing.png")


def print_results(result: dict) -> None:
    """A line per metric, a column per way of listening"""
    ways = [way for way in ("teacher_forced", "free_running") if way in result]
    known = [key for _, key, _ in METRICS]
    others = [(key, key, "{:.3f}") for key in result["free_running"] if key not in known]
    print(" " * 22 + "".join(map("{:>18}".format, ways)))
    for title, key, form in [*METRICS, *others]:
        line = f"  {title:20}"
        for way in ways:
            line += f"{form.format(result[way][key]) if key in result[way] else '':>18}"
        if key in result["free_running"]:
            print(line)


# --- command line ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class WatchConfig:
    """Which run watches what, and how"""

    run: str = flag("", "run folder (default: the newest in out/)", positional=True)
    watch: str = flag("", "video to watch (default: held-out streams of the run's task)")
    query: str = flag("", "of --watch: what to ask first (default: what the task asks)")
    window: int = flag(0, "of --watch: frames to remember, 0: all")
    partial: bool = flag(False, "of --watch: use what can be decoded of a damaged video")
    threshold: float = flag(0.0, "speak where silence is less likely than this")
    device: str = flag("", "cpu or cuda (default: cuda where there is one)")

    may_be_zero = ("window", "threshold", "streams")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.threshold > 1:
            raise ValueError(f"threshold must be at most 1, got {self.threshold}")


@dataclass(frozen=True)
class EvalConfig(WatchConfig):
    ask: tuple = flag((), 'of --watch: "12.5 What is it?" asks at that time; may be repeated')
    arank: bool = flag(False, "rank the layers of a dense run instead (gamma-MoD)")
    streams: int = flag(0, "held-out streams (0: 64, of a pretrained model 16)")


def newest_run() -> Path:
    runs = list(Path("out").glob("*/model.safetensors"))
    if not runs:
        raise ValueError("out/ must hold a run to evaluate, got none: run `python train.py`")
    return max(runs, key=lambda file: file.stat().st_mtime).parent


def read_settings(folder: Path) -> dict:
    """What a run was trained on: task, data, fps and partial, the arguments of data.open_source"""
    file = folder / "train.json"
    values = read_json(file)
    try:
        check_range("fps", float(values["fps"]), may_be_zero=False)
        kinds = {"task": str, "data": str, "fps": float, "partial": bool}
        return {name: kind(values[name]) for name, kind in kinds.items()}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} must hold the settings of a run, got {error!r}") from None


def watch(cfg: EvalConfig, model: VideoLM, folder: Path, settings: dict) -> None:
    """--watch"""
    tokenizer = data.tokenizer_for(model.config)
    watcher = Watcher(model, tokenizer, torch.tensor([0]), cfg.threshold, cfg.window)
    query = cfg.query or data.find_task(settings["task"]).query
    size, fps = model.config.image_size, settings["fps"]
    turns = [Turn(0, "user", query), *(data.parse_question(text, fps) for text in cfg.ask)]
    video = read_video(Path(cfg.watch), fps, size, cfg.partial)
    with contextlib.closing(video) as frames:  # also on KeyboardInterrupt
        narrate(watcher, frames, fps, turns, folder / "watch.png")


def main(argv: list[str] | None = None) -> None:
    cfg, given = parse(EvalConfig, argv, __doc__)
    for name in sorted(given & {"query", "ask", "window", "partial"}):
        if not cfg.watch:
            raise ValueError(f"{name} must be given with watch, got no watch")
    if cfg.watch and cfg.arank:
        raise ValueError("watch must be given alone, got arank too")
    folder = Path(cfg.run) if cfg.run else newest_run()
    model = load(folder, pick_device(cfg.device)).eval()
    settings = read_settings(folder)
    if cfg.watch:
        return watch(cfg, model, folder, settings)
    source = data.open_source(**settings, size=model.config.image_size)
    source = model.adapt_source(source, folder)
    if cfg.arank:
        rank_layers(model, source)
        return
    streams = cfg.streams or model.config.usual_flags.get("streams", 64)
    report(folder, model, source, streams, cfg.threshold)


if __name__ == "__main__":
    run_main(main)
