"""Every number and picture: metrics, a live narration, costs, speed and memory.

    python eval.py [RUN]              evaluate a run (the newest in out/)
    python eval.py RUN --watch VIDEO  narrate a video as its frames arrive
    python eval.py RUN --html FILE    a page of a stream, or of --watch VIDEO
    python eval.py RUN --arank        the rank of each layer's attention maps
    python eval.py --flops            the papers' costs, and those of this code
    python eval.py --profile          speed and memory, dense beside MoD
    python eval.py [RUNS] --table     the READMEs' tables, or that of a folder
"""

import contextlib
import itertools
import json
import math
import os
import re
import textwrap
import time
import warnings
import weakref
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from html import escape
from pathlib import Path
from statistics import fmean, median, quantiles, stdev
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

import data
import model as models
from data import Sample, Tokenizer, Turn
from mod import MASKED, PADDING, Groups, computed, flops, placement, rank_placement
from model import Cache, Output, VideoLM, layer_ranks, load, opt, preset, printable, write, write_json

# --- the four metrics of VideoLLM-online --------------------------------------------------------------------


class Evidence(NamedTuple):
    """What a model did in one turn: n frames, at the last of which it should say m tokens."""

    spoke: list[bool]  # n decisions at the frames of the turn; only the last should be True
    later: list[bool]  # decisions at the frames after it, where the model was silent throughout
    nll: list[float]  # m negative log likelihoods of the true tokens, in nats
    right: list[bool]  # m: is the most likely token the true one?


def turn_metrics(turn: Evidence) -> dict[str, float]:
    """LM-PPL (to e^100), TimeDiff (frames), Fluency, LM-Correctness of a turn, as the code of VideoLLM-online

    Beside those with a quirk stands the corrected form. TimeDiff: a reply that never came is later than the
    frames left for it, not just as late, or punctual if none were. Fluency: a premature decision is wrong.
    """
    n, m = len(turn.spoke), len(turn.nll)
    prefix = turn.right.index(False) if False in turn.right else m
    if True in turn.spoke:
        late = true_late = turn.spoke.index(True) - (n - 1)  # 0: on time, below: early
    elif True in turn.later:
        late = true_late = turn.later.index(True) + 1
    else:
        late, true_late = len(turn.later), len(turn.later) + 1
    coded = n + prefix if late == 0 else n + late if late < 0 else n - 1
    true = n + prefix if true_late == 0 else n - 1 + min(true_late, 0)
    return {"lm_ppl": math.exp(min(100.0, fmean(turn.nll))), "lm_correctness": prefix / m,
            "time_diff": abs(late), "time_diff_corrected": abs(true_late),
            "fluency": coded / (n + m), "fluency_corrected": true / (n + m)}


def summarise(streams: list[list[Evidence]], fps: float) -> dict[str, float]:
    """Mean over the turns of a stream, then over streams, as coded there; TimeDiff in seconds.

    Corrected: `lm_ppl_corrected` is the perplexity of the mean over all tokens, not the mean of perplexities;
    `reply_accuracy` counts every right token, LM-Correctness only those before the first wrong one.
    """
    streams = [turns for turns in streams if turns]
    if not streams:
        raise ValueError("streams must hold at least one reply to be evaluated on, got none")
    rows = [[turn_metrics(turn) for turn in turns] for turns in streams]
    mean = {name: fmean(fmean(row[name] for row in turns) for turns in rows) for name in rows[0][0]}
    mean |= {name: value / fps for name, value in mean.items() if name.startswith("time_diff")}
    every = [turn for turns in streams for turn in turns]
    mean["lm_ppl_corrected"] = math.exp(min(100.0, fmean(x for turn in every for x in turn.nll)))
    mean["reply_accuracy"] = fmean(x for turn in every for x in turn.right)
    return mean


class Reading(NamedTuple):
    """A model's answers at the labelled places of one given sequence."""

    spoke: list[bool]  # F decisions
    nll: dict[int, list[float]]  # frame of a reply -> m
    right: dict[int, list[bool]]  # frame of a reply -> m


def speaks(logits: Tensor, threshold: float, silent: int) -> Tensor:
    """(..., vocabulary) at `<frame>` -> (...) bool: silence is not the best token, or below the threshold"""
    return (logits.argmax(-1) != silent) | (logits.softmax(-1)[..., silent] < threshold)


@torch.no_grad()
def hear(model: VideoLM, tokenizer: Tokenizer, samples: list[Sample]) -> tuple[data.Batch, Output]:
    """Feed whole sequences, replies included -> the batch, on the host, and what the model makes of it"""
    c, device = model.config, model.lm_head.weight.device
    b = data.collate(samples, c.tokens_per_frame, tokenizer, MASKED[c.masked])
    groups = Groups.plan(b.group, c.keep, b.real).to(device)
    return b, model(b.tokens.to(device), b.frames.to(device), groups, b.seed.to(device))


@torch.no_grad()
def read(model: VideoLM, tokenizer: Tokenizer, samples: list[Sample], threshold: float,
         batch: int = 16) -> list[Reading]:
    """The decisions and the likelihoods in whole sequences -> a Reading each"""
    readings = []
    for at in range(0, len(samples), batch):
        b, out = hear(model, tokenizer, samples[at : at + batch])
        for row, labels, decision in zip(out.hidden, b.labels, b.decision, strict=True):
            places = (labels >= 0).nonzero()[:, 0]
            logits = model.logits(row[places.to(row.device)]).float().cpu()  # (labelled, vocabulary)
            nll = F.cross_entropy(logits, labels[places], reduction="none")
            right, decides = logits.argmax(-1) == labels[places], decision[places]
            spoke = speaks(logits[decides], threshold, tokenizer.silent).tolist()
            reply = torch.where(decides, -1, decides.cumsum(0) - 1)  # frame of a reply's token, -1: of none
            nll, right = ({f: values[reply == f].tolist() for f in {*reply.tolist()} - {-1}}
                          for values in (nll, right))
            readings.append(Reading(spoke, nll, right))
    return readings


def replies(sample: Sample) -> dict[int, str]:
    """What is said of the frames of a stream: frame -> text"""
    return {turn.frame: turn.text for turn in sample.turns
            if turn.role == "assistant" and turn.frame < len(sample.frames)}


def cut(sample: Sample, frame: int, frames: int, *reply: Turn) -> Sample:
    """The stream as it was before `frame`, with this reply there, and none after it; `frames` long."""
    before = [t for t in sample.turns if t.frame < (frame if t.role == "assistant" else frames)]
    return sample._replace(turns=[*before, *reply], frames=sample.frames[:frames])


def gather_evidence(model: VideoLM, tokenizer: Tokenizer, truth: list[Sample], heard: list[Sample],
                    threshold: float) -> tuple[list[list[Evidence]], list[list[bool]]]:
    """Score every reply of every stream -> the evidence of its turns, and all its decisions.

    heard: the same streams with the replies that the model has in its context: the true ones (teacher-forced)
    or its own (free-running). The true reply is then scored after what was heard until its frame. Turns end
    at the true replies either way: free-running, a late reply is also a premature one of the next turn.
    """
    spoke = [reading.spoke for reading in read(model, tokenizer, heard, threshold)]
    turns, told, untold = [], [], []
    for i, sample in enumerate(truth):
        said = replies(sample)
        last, frames = len(sample.frames) - 1, sorted(said)
        for before, frame, after in zip([-1, *frames], frames, [*frames[1:], last], strict=False):
            decided = spoke[i][before + 1 : frame + 1]
            turns.append((i, frame, decided))
            told.append(cut(heard[i], frame, frame + 1, Turn(frame, "assistant", said[frame])))
            if not any(decided):  # waited for: at most until the next turn ends, and n - 1 frames
                untold.append(cut(heard[i], frame, min(after + 1, frame + len(decided))))
    waiting = iter(read(model, tokenizer, untold, threshold))
    evidence: list[list[Evidence]] = [[] for _ in truth]
    for (i, frame, decided), scored in zip(turns, read(model, tokenizer, told, threshold), strict=True):
        later = [] if any(decided) else next(waiting).spoke[frame + 1 :]
        evidence[i].append(Evidence(decided, later, scored.nll[frame], scored.right[frame]))
    return evidence, spoke


def evaluate(model: VideoLM, tokenizer: Tokenizer, truth: list[Sample], fps: float,
             threshold: float = 0.0) -> tuple[dict, list[Sample]]:
    """Score streams both ways -> {"teacher_forced": {...}, "free_running": {...}, ...}, and what was said"""
    own = [s._replace(turns=[turn for turn in s.turns if turn.role != "assistant"] + said)
           for s, said in zip(truth, free_run(model, tokenizer, truth, threshold), strict=True)]
    result: dict = {"streams": len(truth), "threshold": threshold}
    for name, heard in (("teacher_forced", truth), ("free_running", own)):
        evidence, spoke = gather_evidence(model, tokenizer, truth, heard, threshold)
        result[name] = summarise(evidence, fps)
        right = [s == (f in replies(sample)) for sample, row in zip(truth, spoke, strict=True)
                 for f, s in enumerate(row)]
        result[name]["decision_accuracy"] = fmean(right)
    said, true = ({(i, f, tokenizer.decode(tokenizer.encode(text))) for i, s in enumerate(streams)
                   for f, text in replies(s).items()} for streams in (own, truth))  # as it can be said
    result["free_running"] |= {"said_right": len(said & true) / len(true),
                               "said_wrong": len(said - true) / len(true)}
    return result, own


# --- watching a stream --------------------------------------------------------------------------------------


class Watcher:
    """A model that watches B streams, decides after each frame whether to speak, and hears what it says.

    Replies are greedy. One that reaches `limit` tokens is ended in context too: the sequence keeps its form.
    """

    def __init__(self, model: VideoLM, tokenizer: Tokenizer, seed: Tensor, threshold: float = 0.0,
                 window: int | None = None, limit: int = 200) -> None:
        if window and "user" not in MASKED[model.config.masked]:
            raise ValueError(f"window must be 0 where questions may skip (masked none), got {window}")
        self.model, self.tokenizer, self.threshold, self.limit = model, tokenizer, threshold, limit
        self.device, self.streams, self.group = model.lm_head.weight.device, len(seed), 0  # the next group
        self.seed, self.cache = seed.to(self.device), Cache(model, len(seed), window)
        self.kept: dict[int, Tensor] = {}  # routed layer -> (B, P) bool, what it computed of the last frame
        self.masked, self.begins = MASKED[model.config.masked], True

    def layout(self, turns: list[Turn], frames: int) -> list[list[int]]:
        P = self.model.config.tokens_per_frame
        return data.layout(turns, frames, P, self.tokenizer, self.masked, self.begins)

    @torch.no_grad()
    def feed(self, rows: list[list[list[int]]], frames: Tensor | None = None, late: bool = False) -> Tensor:
        """Append a chunk to each stream -> (B, vocabulary) logits after its last token

        rows: of data.layout, empty: the stream waits;  late: what may skip came too late to compete
        """
        c, self.begins = self.model.config, False
        tokens, group, _, real = data.pad(rows, self.tokenizer)  # (B, T) each
        group = group.where(group < 0, group + self.group)
        self.group = max(self.group, int(group.max()) + 1)
        groups = Groups.plan(group, c.keep, real.bool(), (group >= 0) & late).to(self.device)
        if frames is None:
            frames = torch.zeros(len(rows), 0, 3, c.image_size, c.image_size, dtype=torch.uint8)
        out = self.model(tokens.to(self.device), frames.to(self.device), groups, self.seed, self.cache)
        if frames.shape[1] == 1:
            vision = (tokens == data.VISION).to(self.device)
            self.kept = {layer: keep[vision].view(len(rows), -1).cpu() for layer, keep in out.keep.items()}
        last = (real.sum(1) - 1).clamp(min=0).to(self.device)
        return self.model.logits(out.hidden[torch.arange(len(rows), device=self.device), last]).float()

    def watch(self, frames: Tensor, asked: list[list[Turn]] | None = None) -> list[Turn | None]:
        """frames: (B, 1, ...), the next of each stream;  asked: turns of frame 0, that come before it
        -> what is said of it, as a turn of frame 0, None: silence
        """
        asked = asked or [[]] * self.streams
        text = [self.layout(turns, 0) for turns in asked]
        if any(row[0] for row in text) and self.cache.starts is not None:  # there a chunk begins with a frame
            self.feed(text)
            asked = [[]] * self.streams
        logits = self.feed([self.layout(turns, 1) for turns in asked], frames)
        spoke = speaks(logits, self.threshold, self.tokenizer.silent).tolist()
        return [turn if s else None for turn, s in zip(self.reply(spoke), spoke, strict=True)]

    def reply(self, speaking: list[bool], logits: Tensor | None = None, group: Sequence[int] = (),
              drawn: Tensor | None = None) -> list[Turn]:
        """Let these streams speak of a frame; or answer a prompt, from the logits (B, vocabulary) after it

        group: of each answer, -1: it never skips;  drawn: (B,) bool on the host, streams whose tokens are
        drawn, not the most likely
        """
        said, t = [[] for _ in speaking], self.tokenizer
        barred = [t.pad, t.user, t.assistant, t.frame, t.silent]  # a reply is only text, then `<end>`
        token = [t.assistant for _ in speaking]
        generator, group = torch.Generator(), group or [-1] * len(speaking)
        while any(speaking):
            if logits is not None:
                logits[:, barred] = -math.inf
                best = logits.argmax(-1).cpu()
                if drawn is not None and drawn.any():
                    draw = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator)[:, 0]
                    best = torch.where(drawn, draw, best)
                token = [choice if len(ids) < self.limit else t.end
                         for choice, ids in zip(best.tolist(), said, strict=True)]
                for b, ids in enumerate(said):
                    ids.extend([token[b]] if speaking[b] and token[b] != t.end else [])
            rows = [[[i], [g], [-100]] if now else [[]] * 3
                    for i, g, now in zip(token, group, speaking, strict=True)]
            logits = self.feed(rows, late=True)
            speaking = [now and i != t.end for i, now in zip(token, speaking, strict=True)]
        return [Turn(0, "assistant", t.decode(ids), tuple(ids)) for ids in said]

    def ask(self, samples: list[Sample], drawn: Tensor | None = None) -> list[str]:
        """What it answers where each sample ends; all before the answer is one prompt. drawn: as in reply"""
        prompts = [[*s.turns[:-1], s.turns[-1]._replace(text="")] for s in samples]
        laid = [self.layout(turns, len(s.frames)) for turns, s in zip(prompts, samples, strict=True)]
        rows = [[part[:-1] for part in row] for row in laid]  # without the `<end>` of the answer
        logits = self.feed(rows, data.stack([s.frames for s in samples]))
        group = [min(row[1][-1], 0) for row in laid]  # as that `<end>`: an answer at a frame never skips
        return [turn.text for turn in self.reply([True] * len(samples), logits, group, drawn)]

    def computed(self) -> Tensor:
        """(B, L) int64, the tokens of each stream that each layer computed and still remembers"""
        rows = zip(self.cache.rows, self.cache.length, strict=True)
        return torch.stack([(row[2][:, 0, :n, 0] < PADDING).sum(1) for row, n in rows], dim=1)


def free_run(model: VideoLM, tokenizer: Tokenizer, samples: list[Sample], threshold: float = 0.0,
             batch: int = 32) -> list[list[Turn]]:
    """What the model says of each stream when it hears only the user and itself -> a list of turns each"""
    said: list[list[Turn]] = [[] for _ in samples]
    for at in range(0, len(samples), batch):
        chunk = samples[at : at + batch]
        watcher = Watcher(model, tokenizer, torch.tensor([s.seed for s in chunk]), threshold)
        for f in range(max(len(s.frames) for s in chunk)):
            asked = [[t._replace(frame=0) for t in s.turns if t.role != "assistant" and t.frame == f]
                     for s in chunk]
            frames = data.stack([s.frames[[min(f, len(s.frames) - 1)]] for s in chunk])  # ended: stands still
            for b, turn in enumerate(watcher.watch(frames, asked)):
                if turn and f < len(chunk[b].frames):
                    said[at + b].append(turn._replace(frame=f))
    return said


def narrate(watcher: Watcher, frames: Iterator[np.ndarray], fps: float, query: str, drawing: Path,
            html: str = "") -> None:
    """Print what the model says of a stream as frames arrive, each with its time; draw the last twelve.

    html: file for a page of all of them, which are then held in memory
    """
    shown, count, began = deque(maxlen=None if html else 12), 0, time.perf_counter()
    for count, frame in enumerate(frames, 1):
        asked = [[Turn(0, "user", query)]] if count == 1 else None
        said = watcher.watch(data.stack([frame[None]]), asked)[0]
        if said:
            print(printable(f"{(count - 1) / fps:7.1f} s  {said.text}"), flush=True)
        shown.append((frame, {layer: keep[0] for layer, keep in watcher.kept.items()}, said and said.text))
    took, (pictures, kept, texts) = time.perf_counter() - began, zip(*shown, strict=True)
    write(drawing, lambda path: path.write_bytes(data.picture(pictures[-12:], kept[-12:])))
    if html:
        text = page(query, fps, pictures, kept, texts)
        write(Path(html), lambda path: path.write_text(text))
        print(f"{html}: a page of all {count} frames")
    print(f"{count} frames, {count / fps:.1f} s of video in {took:.1f} s: {1000 * took / count:.0f} ms each\n"
          f"tokens in the cache of each layer: {', '.join(map(str, watcher.computed()[0].tolist()))}\n"
          f"routing drawn in {drawing}")


def page(title: str, fps: float, frames: Sequence[np.ndarray], kept: Sequence[dict[int, Tensor]],
         said: Sequence[str | None]) -> str:
    """A stream as HTML that needs nothing else: a slider, what routed layers computed, what was said"""
    rows = {layer: ["".join(str(int(k)) for k in keep[layer]) for keep in kept] for layer in sorted(kept[0])}
    stream = {"title": title, "fps": fps, "frames": [b64encode(data.png(f)).decode() for f in frames],
              "kept": rows, "said": [text if text is None else printable(text) for text in said]}
    before, after = (Path(__file__).parent / "assets" / "watch.html").read_text().split("null/*", 1)
    script = json.dumps(stream).replace("<", "\\u003c")  # so that no text ends the script
    return before + script + after.split("*/", 1)[1]


# --- questions and their answers ----------------------------------------------------------------------------


def edit_distance(a: Sequence, b: Sequence) -> int:
    """How many items must be put in, left out or replaced to make one sequence the other (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


@cache
def nearest(text: str, known: tuple[str, ...]) -> str:
    """The known text of the least edit distance, of equally near ones the first; to all of them at once."""
    at = np.arange(1 + max(map(len, known)))
    codes = np.array([[ord(c) for c in other.ljust(len(at) - 1, "\0")] for other in known])  # (n, longest)
    row = np.tile(at, (len(known), 1))
    for c in text:
        best = row + 1
        best[:, 1:] = np.minimum(best[:, 1:], row[:, :-1] + (codes != ord(c)))
        row = np.minimum.accumulate(best - at, axis=1) + at
    return known[int(row[range(len(known)), [len(other) for other in known]].argmin())]


def lines(answer: str) -> list[str]:
    """The lines of an answer in lower case, without their numbers and full stops"""
    found = [re.sub(r"^\d+[.)](\s+|$)", "", line.strip()).lower().removesuffix(".")
             for line in answer.split("\n")]
    return [line for line in found if line] or [""]


def top1(said: list[list[str]], true: list[str], known: list[str]) -> dict[str, float]:
    """COIN and keysteps: share of lines that are right as they are, or as the nearest line of any answer

    said: candidates for each answer, of which the first counts;  known: all answers of the split
    Over all lines of all answers. Exact: a missing line is wrong, as in the paper. Nearest: it is not
    counted, as in the code of VideoLLM-online.
    """
    categories = tuple(sorted({line for answer in known for line in lines(answer)}))
    pairs = [pair for mine, answer in zip(said, true, strict=True)
             for pair in zip(lines(mine[0]), lines(answer), strict=False)]
    total = sum(len(lines(answer)) for answer in true)
    return {"top1_exact": sum(mine == line for mine, line in pairs) / total,
            "top1_nearest": fmean(nearest(mine, categories) == line for mine, line in pairs)}


def forecast(said: list[list[str]], true: list[str], known: list[str]) -> dict[str, float]:
    """ED@Z: edit distance to the Z true actions, over Z, least of the candidates; of verb, noun and both

    The first word of a line is its verb. A word counts as the nearest one of the taxonomy, here those known;
    an answer of fewer lines than Z goes on with its last, and one of more is cut.
    """
    def actions(answer: str) -> list[list[str]]:
        return [[verb, noun] for verb, _, noun in (line.partition(" ") for line in lines(answer))]

    every = [action for answer in known for action in actions(answer)]
    verbs, nouns = (tuple(sorted({action[part] for action in every})) for part in (0, 1))
    distances = {"ed_verb": [], "ed_noun": [], "ed_action": []}
    for candidates, truth in zip(said, map(actions, true), strict=True):
        tried = [[[nearest(verb, verbs), nearest(noun, nouns)] for verb, noun in actions(answer)]
                 for answer in candidates]
        tried = [(mine + mine[-1:] * len(truth))[: len(truth)] for mine in tried]
        for values, part in zip(distances.values(), (slice(1), slice(1, 2), slice(2)), strict=True):
            goal = [action[part] for action in truth]
            values.append(min(edit_distance([a[part] for a in mine], goal) for mine in tried) / len(truth))
    return {name: fmean(values) for name, values in distances.items()}


def relaxed(said: list[list[str]], true: list[str], known: list[str]) -> dict[str, float]:
    """Image questions: share of answers that are the same in either case, or a number within 5 %"""
    def same(mine: str, truth: str) -> bool:
        mine, truth = (text.strip().lower().rstrip(".%") for text in (mine, truth))
        with contextlib.suppress(ValueError):
            a, b = (float(text.replace(",", "")) for text in (mine, truth))
            return mine == truth or (math.isfinite(b) and abs(a - b) <= 0.05 * abs(b))
        return mine == truth

    return {"relaxed": fmean(same(mine[0], answer) for mine, answer in zip(said, true, strict=True))}


SCORES = {"top1": top1, "forecast": forecast, "relaxed": relaxed}


def evaluate_answers(model: VideoLM, tokenizer: Tokenizer, samples: list[Sample], source: data.Source,
                     batch: int = 32) -> tuple[dict, list[str]]:
    """Ask each sample its last question -> {"free_running": {...}, ...}, and what was answered

    accuracy: share of answers word for word right; beside it what the source scores. Forecasts have five
    candidates, one greedy and four drawn.  skipped: of all tokens, answers too, in the routed layers
    flops_of_dense: of what the rule computes, with the encoder, over every token in every layer
    """
    said, c, n, began = [], model.config, 5 if "forecast" in source.scores else 1, time.perf_counter()
    passed, macs, routed = torch.zeros(2), torch.zeros(2), torch.tensor(c.keep) < 1  # pairs: computed, given
    for at in range(0, len(samples), batch // n):
        asked = [s for s in samples[at : at + batch // n] for _ in range(n)]
        watcher = Watcher(model, tokenizer, torch.tensor([s.seed for s in asked]), limit=512)
        said += watcher.ask(asked, torch.arange(len(asked)) % n > 0)
        for s, tokens, seen in zip(asked, watcher.computed().cpu(), watcher.cache.seen.cpu(), strict=True):
            for i, row in enumerate((tokens, seen.expand_as(tokens))):  # (L,) each
                passed[i] += row[routed].sum()
                macs[i] += sum(flops(c, row.tolist(), len(s.frames), 1).values())
    took, kinds = time.perf_counter() - began, {}
    true = [tokenizer.decode(tokenizer.encode(s.turns[-1].text)) for s in samples]  # as it can be said
    right = [mine == answer for mine, answer in zip(said[::n], true, strict=True)]
    for s, ok in zip(samples, right, strict=True):
        kinds.setdefault(s.turns[-2].text.split(" the ")[0], []).append(ok)
    free = {"accuracy": fmean(right), "skipped": float((passed[1] - passed[0]) / passed[1].clamp(min=1)),
            "flops_of_dense": float(macs[0] / macs[1]), "seconds_per_answer": took / len(said)}
    candidates = [said[i : i + n] for i in range(0, len(said), n)]
    for name in source.scores:
        free |= SCORES[name](candidates, true, source.answers())
    few = {kind: fmean(oks) for kind, oks in kinds.items() if len(kinds) < 10}
    return {"questions": len(samples), "free_running": free, "accuracy_of": few}, said[::n]


# --- gamma-MoD: the rank of attention maps ------------------------------------------------------------------


def ranks_of(model: VideoLM, tokenizer: Tokenizer, samples: list[Sample]) -> Tensor:
    """(samples, L) float64, the ARank of each layer in each sample, one after the other"""
    c, device = model.config, model.lm_head.weight.device
    batches = [data.collate([s], c.tokens_per_frame, tokenizer, MASKED[c.masked]) for s in samples]
    ranks = [layer_ranks(model.eval(), b.tokens.to(device), b.frames.to(device), b.real) for b in batches]
    return torch.cat(ranks).cpu()


def print_ranks(model: VideoLM, tokenizer: Tokenizer, source: data.Source, samples: int = 50) -> None:
    """A bar a layer, the spread over samples, the placement it implies, and what other samples say."""
    every = ranks_of(model, tokenizer, source.batch(0, 0, 2 * samples))
    ranks, others = every[:samples], every[samples:]
    mean, spread = ranks.mean(0), ranks.std(0, correction=0)
    print(f"ARank of {len(ranks)} samples: rank of the attention maps, mean over heads, +- spread")
    for layer, r in enumerate(rank_placement(mean.tolist(), 0.5)):
        bar, kind = "#" * round(40 * float(mean[layer] / mean.max())), "dense" if r == 1 else "routed"
        print(f"layer {layer:2} {mean[layer]:7.1f} +-{spread[layer]:5.1f}  {kind:6}  {bar}")
    if len(others):
        order = torch.stack([m.argsort().argsort().double() for m in (mean, others.mean(0))])
        print(f"Spearman correlation with {len(others)} others: {torch.corrcoef(order)[0, 1]:.2f}")


# --- pictures and tables ------------------------------------------------------------------------------------


def on_shapes(model: VideoLM, tokenizer: Tokenizer, samples: list[Sample]) -> dict[str, float]:
    """Of the patches that each routed layer keeps in the embedded world, the share that show some of a shape

    Of frames with shapes; "chance" is the share of all their patches. {} where no layer chooses.
    """
    was_training = model.training
    b, out = hear(model.eval(), tokenizer, samples)
    model.train(was_training)
    colours = torch.tensor(list(data.COLOURS.values()))[:, None, None, :, None, None]
    painted = (b.frames == colours).all(3).any(0)  # (colours, B, F, 3, S, S) -> (B, F, S, S)
    shows = F.adaptive_max_pool2d(painted.float(), model.config.pool).flatten(2) > 0  # (B, F, P - 1)
    some, vision, share = shows.any(-1), b.tokens == data.VISION, {}
    for layer, keep in out.keep.items():
        kept = keep.cpu()[vision].view(*shows.shape[:2], -1)[..., 1:]  # (B, F, P - 1), CLS is no patch
        if kept[some].any():
            share[f"layer {layer}"] = float(shows[some][kept[some]].float().mean())
    return share | {"chance": float(shows[some].float().mean())} if share else {}


def draw_routing(model: VideoLM, tokenizer: Tokenizer, sample: Sample, pixels: np.ndarray,
                 path: Path) -> None:
    """The routing of one stream, heard with its true replies. pixels: (F, S, S, 3) uint8"""
    b, out = hear(model, tokenizer, [sample])
    vision = b.tokens == data.VISION  # (1, T)
    keep = {layer: k.cpu()[vision].view(len(pixels), -1) for layer, k in out.keep.items()}  # (F, P)
    shown = range(0, len(pixels), math.ceil(len(pixels) / 12))  # of a long stream 12 frames, from all over it
    kept = [{layer: k[f] for layer, k in keep.items()} for f in shown]
    write(path, lambda unfinished: unfinished.write_bytes(data.picture([pixels[f] for f in shown], kept)))


METRICS = (  # title, key, form; those indented, corrections of the one above and times, are in no table
    ("LM-PPL", "lm_ppl", "{:.3f}"), ("  of the mean", "lm_ppl_corrected", "{:.3f}"),
    ("TimeDiff", "time_diff", "{:.3f} s"), ("  corrected", "time_diff_corrected", "{:.3f} s"),
    ("Fluency", "fluency", "{:.1%}"), ("  corrected", "fluency_corrected", "{:.1%}"),
    ("LM-Correctness", "lm_correctness", "{:.1%}"), ("reply tokens right", "reply_accuracy", "{:.1%}"),
    ("decisions right", "decision_accuracy", "{:.1%}"), ("replies said right", "said_right", "{:.1%}"),
    ("  said wrong", "said_wrong", "{:.1%}"), ("answers right", "accuracy", "{:.1%}"),
    ("top-1", "top1_exact", "{:.1%}"), ("top-1, nearest", "top1_nearest", "{:.1%}"),
    ("ED of verbs", "ed_verb", "{:.3f}"), ("ED of nouns", "ed_noun", "{:.3f}"),
    ("ED of actions", "ed_action", "{:.3f}"), ("relaxed accuracy", "relaxed", "{:.1%}"),
    ("tokens skipped", "skipped", "{:.1%}"), ("FLOPs of dense", "flops_of_dense", "{:.1%}"),
    ("of a dense step", "step_flops", "{:.1%}"), ("  time per answer", "seconds_per_answer", "{:.4f} s"))


def report(folder: Path, model: VideoLM, tokenizer: Tokenizer, source: data.Source, streams: int,
           threshold: float = 0.0) -> None:
    """Evaluate a run, print it with examples; eval.json and routing.png go into its folder."""
    samples = source.held_out(streams)
    if source.asks:
        result, said = evaluate_answers(model, tokenizer, samples, source)
        examples = [(s.turns[-2].text + " ", a.lstrip(), s.turns[-1].text.lstrip())
                    for s, a in zip(samples[:8], said, strict=False)]
    else:
        result, own = evaluate(model, tokenizer, samples, source.fps, threshold)
        mine, true = replies(own[0]), replies(samples[0])
        examples = [(f"{f / source.fps:5.1f} s  ", mine.get(f, "(silent)"), true.get(f, "(silent)"))
                    for f in range(min(24, len(samples[0].frames)))]
    ways = [way for way in ("teacher_forced", "free_running") if way in result]
    print(f"{folder}: {len(samples)} {source.kind}\n{'':22}" + "".join(f"{way:>18}" for way in ways))
    for title, key, form in METRICS:
        cells = [form.format(result[way][key]) if key in result[way] else "" for way in ways]
        if any(cells):
            print(f"  {title:20}" + "".join(f"{cell:>18}" for cell in cells))
    if isinstance(source, data.World):
        result["on_shapes"] = on_shapes(model, tokenizer, samples[:64])
        for where, share in result["on_shapes"].items():
            print(f"  {'kept patches on shapes: ' + where:40}{share:>18.1%}")
    for kind, share in result.get("accuracy_of", {}).items():
        print(printable(f"    {kind:18}{share:>18.1%}"))
    print("for example, free-running (<- the truth, where it differs):")
    for about, mine, true in examples:
        print(printable(f"  {about}{mine}" + f"   <- {true}" * (mine != true)))
    write_json(folder / "eval.json", result)
    draw_routing(model, tokenizer, samples[0], source.pixels(samples[0]), folder / "routing.png")
    print(f"the routing of the first is drawn in {folder / 'routing.png'}")


Curve = list[tuple[float, float, float]]  # x, y, standard error of y


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between two, six at most"""
    rough = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(step for step in (rough, 2 * rough, 5 * rough, 10 * rough) if (high - low) / step <= 6)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def chart(title: str, across: str, up: str, curves: dict[str, Curve]) -> str:
    """An SVG of points with their errors; those of a curve are joined, and its name stands at the last."""
    xs = [x for curve in curves.values() for x, _, _ in curve]
    ys = [v for curve in curves.values() for _, y, e in curve for v in (y - e, y + e)]
    margins = [0.06 * (max(v) - min(v) or 1) for v in (xs, ys)]
    (left, right), (low, high) = ((min(v) - m, max(v) + m) for v, m in zip((xs, ys), margins, strict=True))
    parts = [f'<rect width="720" height="370" fill="#fff"/><text x="60" y="28" font-size="15">{title}</text>',
             f'<text x="300" y="358" text-anchor="middle">{across}</text>',
             f'<text transform="translate(14 180) rotate(-90)" text-anchor="middle">{up}</text>']
    wide, tall = 480 / (right - left), 260 / (high - low)
    for value in ticks(low, high):
        y = 310 - tall * (value - low)
        parts.append(f'<path d="M60 {y:.1f}H540" stroke="#ddd"/>'
                     f'<text x="54" y="{y + 4:.1f}" text-anchor="end">{value:.0%}</text>')
    for value in ticks(left, right):
        parts.append(f'<text x="{60 + wide * (value - left):.1f}" y="330" text-anchor="middle">'
                     f'{f"{value:.0%}" if right < 2 else round(value)}</text>')
    points = {name: [(60 + wide * (x - left), 310 - tall * (y - low), tall * error) for x, y, error in curve]
              for name, curve in curves.items()}
    taken = [(x - 4, x + 4, y) for at in points.values() for x, y, _ in at]  # from where to where, how high
    for i, (name, at) in enumerate(points.items()):
        colour = f"hsl({360 * i // len(curves)},70%,38%)"
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in at)
        parts.append(f'<g stroke="{colour}"><polyline points="{line}" fill="none"/>')
        parts += [f'<path d="M{x:.1f} {y - e:.1f}v{2 * e:.1f}"/><circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" '
                  f'fill="{colour}"/>' for x, y, e in at]
        (x, own, _), long = at[-1], 5.8 * len(name)
        near = ((begin, begin + long, y) for n in range(65) for y in (own - 4 * n, own + 4 * n)
                for begin in (x + 7, x - 7 - long) if 50 < y < 310 and begin > 60)
        taken.append(next((a for a in near if not any(a[0] < b[1] and b[0] < a[1] and abs(a[2] - b[2]) < 12
                                                      for b in taken)), (x + 7, x + 7 + long, own)))
        begin, end, y = taken[-1]  # where there is room
        parts.append(f'<path d="M{x:.1f} {own:.1f}L{begin if begin > x else end:.1f} {y:.1f}"/></g>'
                     f'<text x="{begin:.1f}" y="{y + 4:.1f}" textLength="{long:.0f}" fill="{colour}" '
                     f'stroke="#fff" stroke-width="3" paint-order="stroke">{escape(name)}</text>')
    return ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 370" font-family="sans-serif" '
            'font-size="12">\n' + "\n".join(parts) + "\n</svg>\n")


def mean_of(values: list[float]) -> tuple[float, float]:
    """Mean and standard error"""
    return fmean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def charts(rows: list[dict]) -> dict[str, str]:
    """What the runs of the sweep `scene` show -> name of a picture, the picture"""
    runs = {name: list(same.values()) for name, same in by_run(rows).items()}
    quality = {name: [(same[0]["flops_of_dense"],
                       *mean_of([row["free_running"]["lm_correctness"] for row in same]))]
               for name, same in runs.items()}
    looks: dict[str, Curve] = {}
    for step, shares in runs["interleaved"][0]["on_shapes_at"].items():
        for where in shares:
            values = [row["on_shapes_at"][step][where] for row in runs["interleaved"]]
            looks.setdefault(where, []).append((int(step), *mean_of(values)))
    return {"quality.svg": chart("Quality against cost", "FLOPs of a training step, of the dense one's",
                                 "LM-Correctness", quality),
            "router.svg": chart("Kept patches that show a shape, interleaved, keep 0.2", "training step",
                                "share of the kept patches", looks)}


MARKED = re.compile(r"(<!-- table: (\S+)(.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(text: str, folder: Path) -> str:
    """Make the tables between markers of what these name, `table: FILE.json [ROW ...] [against ROW]`"""
    def made(found: re.Match) -> str:
        rows, (names, _, base) = json.loads((folder / found[2]).read_text()), found[3].partition("against")
        return f"{found[1]}{table(rows, names.split(), base.strip())}\n{found[4]}"

    return MARKED.sub(made, text)


def print_tables(folder: str) -> None:
    """Renew the tables of the READMEs; or print that of a folder of runs, also written to folder.json"""
    if folder := folder.rstrip("/"):
        made = table(rows := data.collect(Path(folder)))
        write_json(Path(f"{folder}.json"), rows)
        return print(made)
    root = Path(__file__).parent
    for page in (root / "README.md", root / "results" / "README.md"):
        text = render(page.read_text(), root / "results")
        write(page, lambda unfinished, text=text: unfinished.write_text(text))
        print(f"{page}: {len(MARKED.findall(text))} tables")
    scenes = root / "results" / "scene.json"
    for name, picture in charts(json.loads(scenes.read_text())).items() if scenes.exists() else ():
        write(root / "assets" / name, lambda unfinished, picture=picture: unfinished.write_text(picture))


def by_run(rows: list[dict]) -> dict[str, dict[int, dict]]:
    """Rows by the name of their run without its seed, and by that; all must have been evaluated alike"""
    runs: dict[str, dict[int, dict]] = {}
    for row in rows:
        same = runs.setdefault(re.sub(r"-seed\d+$", "", row["run"]), {})
        if other := same.get(row["seed"]):
            raise ValueError(f"a table must have one run of a seed, got {other['run']} and {row['run']}")
        same[row["seed"]] = row
    how = sorted({str([row.get(key) for key in ("streams", "questions", "threshold")]) for row in rows})
    if len(how) > 1:
        raise ValueError(f"the runs of a table must be evaluated alike, got {' and '.join(how)}")
    return runs


def table(rows: list[dict] | dict, names: Sequence[str] = (), base: str = "") -> str:
    """Markdown, free-running: the mean of all seeds of a run +- its standard error, and how far from the base

    names: of runs, as rows in this order; none: all.  base: of the runs compared with, by default dense
    """
    if isinstance(rows, dict):
        if "checks" in rows:
            return grid([["check", "found"], *([name, row["found"]] for name, row in rows["checks"].items())])
        return speed_table(rows["rows"], "stream" in names)
    runs = {name: {seed: row["free_running"] for seed, row in same.items()}
            for name, same in by_run(rows).items()}
    names = names or sorted(runs)
    if missing := [name for name in (*names, base or names[0]) if name not in runs]:
        raise ValueError(f"the rows of a table must be runs of its file, got {missing[0]}")
    base = base or "dense"
    beside = runs.get(base, {})
    known = {key for name in names for values in runs[name].values() for key in values}
    columns = [metric for metric in METRICS if metric[1] in known and metric[0][0] != " "]
    main = "lm_correctness" if "lm_correctness" in known else "accuracy"
    uneven, compared = len({len(runs[name]) for name in names}) > 1, len(beside) > 1
    lines = [["run", *(title for title, _, _ in columns), *([f"against `{base}`"] if compared else [])]]
    for name in names:
        line = [f"`{name}`" + f" ({len(runs[name])} seeds)" * uneven]
        line += [spread([run[key] for run in runs[name].values() if key in run], form)
                 for _, key, form in columns]
        apart = [runs[name][n][main] - beside[n][main] for n in sorted(runs[name].keys() & beside.keys())]
        told = len(apart) > 1 and name != base
        p = f"{students_p(apart):.3f}".replace("0.000", "< 0.001") if told else ""
        cell = f"{100 * fmean(apart):+.1f} points (p {p})" if told else ""
        lines.append([*line, cell] if compared else line)
    return grid(lines)


def spread(values: list[float], form: str) -> str:
    """Mean +- standard error"""
    if len({form.format(v) for v in values}) < 2:
        return form.format(values[0]) if values else "-"
    return " ± ".join(map(form.format, mean_of(values)))


def students_p(apart: list[float]) -> float:
    """How often a sample would have a mean at least so far from 0, were that the mean of all (t-test)

    t = sqrt(n - 1) * tan(angle) makes the density of t that of cos(angle)^(n - 2) on a quarter turn.
    """
    n, error = len(apart), stdev(apart) / len(apart) ** 0.5
    angle = math.atan2(abs(fmean(apart)), error * (n - 1) ** 0.5)
    tail, whole = (torch.trapezoid(x.cos() ** (n - 2), x)
                   for x in (torch.linspace(a, math.pi / 2, 10_001).double() for a in (angle, 0.0)))
    return float(tail / whole)


def speed_table(rows: list[dict], stream: bool) -> str:
    """What `profile` measured, as Markdown: work on whole streams, or what is saved on one more frame"""
    if not stream:
        return grid([list(COLUMNS), *(cells(row) for row in rows if row["work"] != "stream")])
    saved = {(row["tokens_per_frame"], row["before"], row["streams"]): f"{row['saved']:.0%}"
             for row in rows if row["work"] == "stream"}
    pools, contexts, streams = (sorted(set(values)) for values in zip(*saved, strict=True))
    lines = [[str(P), f"{before:,}", *(saved.get((P, before, n), "-") for n in streams)]
             for P in pools for before in contexts]
    return grid([["tokens a frame", "tokens before", *(f"{n} streams" for n in streams)], *lines])


def grid(lines: list[list[str]]) -> str:
    """A Markdown table; the first line is its head."""
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([rows[0], "|---" * len(lines[0]) + "|", *rows[1:]])


PAPER = (("dense", 1.0, 48.29), ("early-exit", 0.0, 7.14), ("layer-skip", 0.0, 26.35),  # plan, r, teraMACs
         ("interleaved", 0.2, 30.74), ("all", 0.2, 13.18), ("all-deep", 0.2, 15.37),
         ("interleaved-deep", 0.2, 31.83), ("interleaved", 0.1, 28.54), ("interleaved", 0.3, 32.93))


def paper_cost(plan: str, keep_ratio: float) -> tuple[float, float, int]:
    """Cost of 600 frames x 10 tokens on Llama-3-8B.    Table 1 of VideoLLM-MoD

    -> teraMACs as the paper counts: linear layers with unmerged rank-128 LoRA, connector and lm_head on the
    6,000 vision tokens and some 130 of text; no attention, no encoder
    -> teraMACs as computed here: attention too, no LoRA, one `<frame>` a frame, logits only to predict text
    -> bytes of keys and values that a frame leaves in the cache, at 2 bytes a number
    """
    c, frames, text = preset("llama3-8b"), 600, 130
    keep, P = placement(plan, c.num_hidden_layers, keep_ratio), c.tokens_per_frame
    paper = flops(c, computed(keep, text, frames, P), frames, text + frames * P, lora_rank=128)
    here = flops(c, computed(keep, text + frames, frames, P), frames, text + frames)
    as_paper = sum(paper[term] for term in ("linears", "lora", "head", "projector"))
    kv = 2 * 2 * c.num_key_value_heads * c.head_dim * sum(computed(keep, 1, 1, P))
    return as_paper / 1e12, (sum(here.values()) - here["vision"]) / 1e12, kv


GAMMA_PAPER = ((0.0, 19.2), (0.164, 16.3), (0.355, 13.0), (0.379, 12.6), (0.489, 10.7), (0.515, 10.3),
               (0.577, 9.3), (0.743, 6.5))  # share of tokens that skip a routed layer, TFLOPs of LLaVA-HR-7B


def gamma_cost(skipped: float, tokens: int = 1400) -> float:
    """TeraFLOPs, 2 per MAC, of a prefill where 4 of 32 layers are dense.    Table 1 of gamma-MoD"""
    computed_there = [tokens] * 4 + [round(tokens * (1 - skipped))] * 28
    return 2 * sum(flops(preset("vicuna-7b"), computed_there).values()) / 1e12


def print_cost() -> None:
    print("VideoLLM-MoD. Llama-3-8B, 600 frames x 10 tokens, a forward pass in teraMACs")
    print(f"{'placement':18}{'keep':>4}{'paper':>8}{'formula':>9}{'computed here':>15}"
          f"{'of dense':>10}{'KV KiB/frame':>14}")
    dense, encoder = paper_cost("dense", 1.0)[1], flops(preset("llama3-8b"), [], frames=600)["vision"] / 1e12
    for plan, ratio, paper in PAPER:
        formula, here, kv = paper_cost(plan, ratio)
        print(f"{plan:18}{ratio:4.1f}{paper:8.2f}{formula:9.2f}{here:15.2f}"
              f"{here / dense:10.1%}{kv / 1024:14.0f}")
    print("formula: as the paper counts (unmerged LoRA, lm_head over vision tokens, no\n"
          "attention). computed here: attention counted, lm_head only over text, no LoRA,\n"
          f"one <frame> token a frame; not the encoder, {encoder:.1f} T in every row.\n\n"
          "gamma-MoD. Vicuna-7B, 1,400 tokens, 4 dense and 28 routed layers, in teraFLOPs\n"
          "(2 a MAC, attention without causal halving); what skips is as measured there\n"
          "skipped   paper formula")
    for skipped, paper in GAMMA_PAPER:
        print(f"{skipped:7.1%}{paper:8.1f}{gamma_cost(skipped):8.2f}")


def encode_once(source: data.Source, model: VideoLM, run: Path) -> None:
    """Have a folder's clips go through a frozen encoder once; features/, beside the run, keeps theirs."""
    c, device = model.config, model.lm_head.weight.device
    if c.frozen("vision_model.") and isinstance(source, data.Folder):
        written = [file.stat().st_mtime_ns for file in sorted(Path(c.vision).glob("*.safetensors"))]
        about = [v for name, v in vars(c).items() if name.startswith(("vision", "image", "patch", "pool"))]
        source.encode(lambda pixels, vision=model.vision_model: vision(pixels.to(device)),
                      run.parent / "features", f"{about} {written}", partial(write, mark=f".{os.getpid()}"))


# --- speed and memory: dense beside MoD, of the same weights, at the same shapes ----------------------------

KINDS = {"dense": 1.0, "mod": 0.2}  # keep ratio of every other layer
PROFILES = {  # of training steps pool, frames (0: as many as fit, dense), streams; of prefills pool, frames;
    "tiny": ([(6, 8, 16), (6, 32, 4)], [(6, 64), (6, 256)],  # of streaming all of these pools, tokens before,
             [1, 3, 6], [512, 8192], [1, 8, 32]),  # and parallel streams
    "llama3-8b": ([(3, 600, 1), (7, 0, 1), (7, 600, 1)], [(3, 600), (7, 600)],
                  [3, 7, 14], [8192, 65536], [1, 4, 16])}


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors seen that are alive, now and at most; fake ones take no memory."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most, self.known = 0, 0, WeakIdKeyDictionary()

    def __torch_dispatch__(self, function: Callable, types: object, args: tuple = (),
                           kwargs: dict | None = None) -> object:
        tree_map_only(Tensor, self.count, args)
        return tree_map_only(Tensor, self.count, function(*args, **(kwargs or {})))

    def count(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage not in self.known:
            self.known[storage] = size = storage.nbytes()
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, lambda: setattr(self, "now", self.now - size))
        return t


def drawn_batch(c: models.Config, frames: int, streams: int) -> data.Batch:
    """Streams of the embedded world; for a frozen decoder features, and a reply to every tenth frame."""
    if c.lora_rank:
        features = np.zeros((frames, c.tokens_per_frame, c.vision_hidden_size), np.float32)
        said = [Turn(frame, "assistant", "A red disc, top left.") for frame in range(9, frames, 10)]
        samples = [Sample(features, [Turn(0, "user", data.QUERY), *said], n) for n in range(streams)]
    else:
        samples = data.World(c.image_size, frames).batch(0, 0, streams)
    return data.collate(samples, c.tokens_per_frame, Tokenizer(), MASKED[c.masked])


def step_flops(c: models.Config, b: data.Batch, optimizers: Sequence[torch.optim.Optimizer],
               checkpointing: bool = False) -> float:
    """FLOPs of a training step. Backward costs as much as forward for what is computed, and as much again for
    weights that learn; a frozen encoder goes only forward; with gradient checkpointing, layers do so twice.
    Causal attention is half of all pairs. Muon: five times three products a matrix.
    """
    B, T = b.tokens.shape
    width, head = Groups.plan(b.group, c.keep, b.real).width, int((b.labels >= 0).sum()) / B
    macs = flops(c, [T if r == 1 else width[r] for r in c.keep], b.frames.shape[1], head, c.lora_rank)
    macs["attention"] /= 2
    times = dict.fromkeys(macs, 3) | dict.fromkeys(("linears", "head"), 2 if c.lora_rank else 3)
    if b.frames.dim() < 5 or c.frozen("vision_model."):  # with features the encoder does not run at all
        times["vision"] = int(b.frames.dim() == 5)
    times |= {term: times[term] + checkpointing for term in ("linears", "attention", "lora")}
    passes = 2 * B * sum(times[term] * n for term, n in macs.items())
    matrices = [sorted(p.shape) for optimizer in optimizers if isinstance(optimizer, torch.optim.Muon)
                for p in optimizer.param_groups[0]["params"]]
    return passes + sum(10 * (2 * m * m * n + m**3) for m, n in matrices)


def count_peak(action: Callable[[], object], held: Iterable[Tensor] = ()) -> int:
    """Bytes of `held`, and of what an action reads and makes, alive at its peak"""
    with Alive() as alive, torch.compiler.set_stance("force_eager"):
        for t in held:
            alive.count(t)
        action()
    return alive.most


def count_memory(c: models.Config, b: data.Batch, checkpointing: bool = False) -> int:
    """Bytes alive at the peak of a training step, found without taking them."""
    import train  # what is measured is its step; it imports this module, so here it can come only now

    ready, cfg = train.make_ready(b, c, 1.0, torch.device("cpu")), train.TrainConfig()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = models.build(c)
        model.gradient_checkpointing, optimizers = checkpointing, train.make_optimizers(model, cfg)
        step = partial(train.train_step, train.batch_loss, model, optimizers, cfg, ready)
        return count_peak(lambda: [step(n) for n in (0, 1)], model.parameters())  # the first makes moments


def longest(c: models.Config, memory: float) -> int:
    """Frames of one stream that a training step has room for: each takes as much as any other."""
    few, more = (count_memory(c, drawn_batch(c, frames, 1)) for frames in (100, 200))
    return int(100 + (memory - few) / (more - few) * 100)


class Profile:
    """Measures a preset on a device, dense and MoD in turn, and keeps a row of each kind of work."""

    def __init__(self, name: str, device: torch.device, compiled: bool) -> None:
        if name not in PROFILES:
            raise ValueError(f"preset must be one of {', '.join(PROFILES)} to be profiled, got {name}")
        self.config, self.device, self.compiled, self.rows = preset(name), device, compiled, []
        self.gpu = device.type == "cuda"
        self.timed = self.gpu or not self.config.lora_rank  # on a CPU, 8B is only counted
        self.dtype = torch.bfloat16 if self.gpu or self.config.lora_rank else torch.float32
        self.memory = torch.cuda.get_device_properties(device).total_memory if self.gpu else 141e9
        self.ceiling = self.measure_ceiling() if self.timed else {}

    def of(self, kind: str, pool: int) -> models.Config:
        """Dense or routed, with frames of 1 + pool * pool tokens: the same weights fit all."""
        c = self.config
        return replace(c, keep=placement("interleaved", c.num_hidden_layers, KINDS[kind]), pool=pool)

    def measure_ceiling(self) -> dict[str, float]:
        """FLOP/s of a large matrix product, bytes/s of a large copy, the best of all."""
        n, size = (8192, 2**30) if self.gpu else (2048, 2**27)
        a, b = (torch.randn(n, n, device=self.device).to(self.dtype) for _ in range(2))
        source, target = (torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2))
        taken = self.take_turns({"flops": lambda: a @ b, "bytes": lambda: target.copy_(source)})
        return {"flops": 2 * n**3 / min(taken["flops"]), "bytes": 2 * size / min(taken["bytes"])}

    def take_turns(self, actions: dict[str, Callable[[], object]], repeats: int = 12) -> dict:
        """The seconds that each action took, in turn, so that what slows the machine slows them all."""
        wait, taken = torch.cuda.synchronize if self.gpu else int, {name: [] for name in actions}
        for _ in range(repeats):
            for name, action in actions.items():
                wait()
                began = time.perf_counter()
                action()
                wait()
                taken[name].append(time.perf_counter() - began)
        return taken

    def graphs(self) -> dict:
        """How much was compiled so far"""
        return torch._dynamo.utils.counters["stats"] if self.compiled else {}

    def add(self, work: str, about: dict, costs: dict[str, dict], actions: dict[str, Callable]) -> None:
        """Measure and keep a row. costs: kind -> flops and bytes that no implementation can do without"""
        least = {kind: max(cost[name] / self.ceiling.get(name, 1) for name in ("flops", "bytes"))
                 for kind, cost in costs.items()}
        row = {"work": work, **about, **costs, "implied": 1 - least["mod"] / least["dense"]}
        if actions:
            self.take_turns(actions, 3)  # to warm up
            graphs = dict(self.graphs())
            taken = self.take_turns(actions)
            row["recompiled"] = graphs != self.graphs()
            for kind, seconds in taken.items():
                first, middle, third = quantiles(seconds, n=4)
                costs[kind] |= {"seconds": middle, "spread": (third - first) / middle / 2,
                                "of_ceiling": least[kind] / middle}
            row["saved"] = median(1 - b / a for a, b in zip(taken["dense"], taken["mod"], strict=True))
        for kind, action in actions.items():
            if self.gpu:
                costs[kind] |= self.count_waits(action)
            elif "peak" not in costs[kind]:
                costs[kind]["peak"] = count_peak(action)
        self.rows.append(row)
        print(*map(str.ljust, cells(row), COLUMNS.values()), sep="", flush=True)

    def count_waits(self, action: Callable[[], object]) -> dict[str, int]:
        """How often the host waits for the device in it, and the peak of its memory"""
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_sync_debug_mode("warn")  # warns that it is a prototype, once
        with warnings.catch_warnings(record=True, action="always") as waits:
            action()
        torch.cuda.set_sync_debug_mode("default")
        return {"peak": torch.cuda.max_memory_allocated(), "waits": len(waits)}

    def train(self, pool: int, frames: int, streams: int) -> None:
        """A training step as train.py takes it, without the making of its batch."""
        import train

        cfg, kinds, optimizers = train.TrainConfig(), {kind: self.of(kind, pool) for kind in KINDS}, []
        fits = {kind: longest(c, self.memory) for kind, c in kinds.items()} if self.config.lora_rank else {}
        frames = frames or max(1, int(0.9 * fits["dense"]))
        checkpointing = bool(fits) and frames > fits["dense"]
        batch, actions = drawn_batch(kinds["mod"], frames, streams), {}
        about = {"frames": frames, "tokens_per_frame": 1 + pool**2, "streams": streams, "longest": fits,
                 "gradient_checkpointing": checkpointing}

        def step(kind: str, ready: train.Ready) -> None:
            model.config = kinds[kind]
            train.train_step(loss_of, model, optimizers, cfg, ready, 0)

        def make() -> train.Ready:
            c = kinds["mod"]
            return train.make_ready(drawn_batch(c, frames, streams), c, 1.0, self.device)

        if self.timed:
            model = models.build(kinds["mod"], device=self.device)
            model.gradient_checkpointing = checkpointing
            optimizers = train.make_optimizers(model, cfg)
            loss_of = torch.compile(train.batch_loss, fullgraph=True) if self.compiled else train.batch_loss
            actions = {kind: partial(step, kind, train.make_ready(batch, c, 1.0, self.device))
                       for kind, c in kinds.items()}
            about["batch_seconds"] = median(self.take_turns({"batch": make})["batch"])
        costs = {kind: {"flops": step_flops(c, batch, optimizers, checkpointing), "bytes": 0,
                        "peak": count_memory(c, batch, checkpointing)} for kind, c in kinds.items()}
        self.add("train", about, costs, actions)

    @cached_property
    def model(self) -> VideoLM:
        """What watches: no adapters, as they are merged"""
        model = models.build(replace(self.of("mod", 1), lora_rank=0), device=self.device)
        model = model.to(self.dtype).eval()
        if self.compiled:
            compile_layers(model)
        return model

    def watcher(self, kind: str, pool: int, streams: int) -> Watcher:
        self.model.config = self.of(kind, pool)
        return Watcher(self.model, Tokenizer(), torch.zeros(streams).long())

    def prefill(self, pool: int, frames: int) -> None:
        """A whole stream at once into an empty cache, as features of its frames."""
        P = 1 + pool**2
        features = torch.randn(1, frames, P, self.config.vision_hidden_size, device=self.device)

        def fill(kind: str) -> None:
            watcher = self.watcher(kind, pool, 1)
            watcher.feed([watcher.layout([], frames)], features)

        costs = {}
        for kind in KINDS:
            c = self.of(kind, pool)
            tokens = computed(c.keep, frames, frames, P)
            macs = flops(c, tokens, frames, 1)
            passes = sum(macs.values()) - macs["vision"] - macs["attention"] / 2  # causal: half of all pairs
            costs[kind] = {"flops": 2 * passes, "bytes": 0,
                           "cache": sum(tokens) // frames * self.row_bytes()}
        self.add("prefill", {"frames": frames, "tokens_per_frame": P, "streams": 1}, costs,
                 {kind: partial(fill, kind) for kind in KINDS})

    def row_bytes(self) -> int:
        """Keys and values of a token in a layer"""
        return 2 * self.config.num_key_value_heads * self.config.head_dim * self.dtype.itemsize

    def stream(self, pool: int, before: int, streams: int) -> None:
        """One more frame of each stream, as features, after so many tokens."""
        P, model, costs, actions = 1 + pool**2, self.model, {}, {}
        frames = before // (P + 1)
        features = torch.randn(streams, 1, P, self.config.vision_hidden_size, device=self.device)
        decoder = [model.layers, model.norm, model.lm_head, model.multi_modal_projector]
        weights = sum(p.numel() for part in decoder for p in part.parameters()) * self.dtype.itemsize

        def see(watcher: Watcher, c: models.Config) -> None:
            model.config = c
            watcher.feed([watcher.layout([], 1)] * streams, features)

        for kind in KINDS:
            watcher = self.watcher(kind, pool, streams)
            c, now = model.config, computed(model.config.keep, 1, 1, P)
            held = [frames * n for n in now]
            macs = flops(c, now, 1, 1) | {"vision": 0, "attention": sum(
                2 * n * (n + m) * c.num_attention_heads * c.head_dim for n, m in zip(now, held, strict=True))}
            cache = streams * sum(held) * self.row_bytes()
            if cache > self.memory / 4:
                return
            costs[kind] = {"flops": 2 * streams * sum(macs.values()), "bytes": weights + cache,
                           "cache": sum(now) * self.row_bytes()}
            preload(watcher, frames)
            actions[kind] = partial(see, watcher, c)
        about = {"frames": frames, "tokens_per_frame": P, "streams": streams, "before": before}
        self.add("stream", about, costs, actions)


def compile_layers(model: VideoLM) -> None:
    """Each chunk through all layers in one graph; kinds of chunk, and rooms that grow apart, are others."""
    torch._dynamo.config.recompile_limit = 64
    model.decode = torch.compile(model.decode, fullgraph=True, dynamic=True)


def preload(watcher: Watcher, frames: int) -> None:
    """Fill the cache as if so many frames had been watched; keys and values are drawn."""
    tokens = watcher.model.config.tokens_per_frame + 1
    id = torch.arange(frames).repeat_interleave(tokens)
    id[tokens - 1 :: tokens] = -1  # <frame>
    groups = Groups.plan(id.expand(watcher.streams, -1), watcher.model.config.keep)
    watcher.cache.advance(groups.to(watcher.device))
    watcher.group = frames
    for layer, (k, v, position) in enumerate(watcher.cache.rows):
        n = watcher.cache.length[layer]
        k.normal_(), v.normal_()
        position[:, :, :n] = torch.arange(n, device=watcher.device)[:, None]
        watcher.cache.used[layer] = n


def profile(name: str, device: torch.device, compiled: bool) -> None:
    """The whole measurement of a preset -> out/profile-NAME-DEVICE.json"""
    p = Profile(name, device, compiled)
    steps, prefills, pools, contexts, streams = PROFILES[name]
    about = {"preset": name, "device": torch.cuda.get_device_name() if p.gpu else "cpu",
             **data.provenance(), "threads": torch.get_num_threads(), "dtype": str(p.dtype),
             "compiled": compiled, "ceiling": p.ceiling}
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    print(*map(str.ljust, COLUMNS, COLUMNS.values()), sep="")
    file = Path("out") / f"profile-{name}-{device.type}.json"
    file.parent.mkdir(exist_ok=True)
    plan = [(p.train, work) for work in steps]
    if p.timed:
        plan += [(p.prefill, work) for work in prefills]
        plan += [(p.stream, work) for work in itertools.product(pools, contexts, streams)]
    for measure, work in plan:
        try:
            measure(*work)
        except torch.OutOfMemoryError:  # the rest can be measured all the same
            print(measure.__name__, *work, "out of memory")
        write_json(file, about | {"rows": p.rows})
    print("\n".join(textwrap.fill(remark(row), 80, subsequent_indent="  ") for row in p.rows
                    if row["work"] != "stream"))
    print(f"written to {file}")


COLUMNS = {"work": 8, "F x P x streams": 16, "dense": 9, "MoD": 9, "saved": 7, "implied": 8, "realised": 9,
           "ceiling": 8, "peak": 6}  # of a profile, and their widths on the screen
SHAPE = "{frames} x {tokens_per_frame} x {streams}"


def cells(row: dict) -> list[str]:
    """Under COLUMNS: seconds, what MoD saves of them, that over what the FLOPs imply, peak memory saved"""
    kinds, shape = (row["dense"], row["mod"]), SHAPE.format(**row)
    taken = ["-"] * 6
    if "saved" in row:
        taken = [*(f"{1000 * kind['seconds']:.4g} ms" for kind in kinds), f"{row['saved']:.1%}", "",
                 f"{row['saved'] / row['implied']:.0%}", f"{kinds[1]['of_ceiling']:.0%}"]
    taken[3] = f"{row['implied']:.1%}"
    return [row["work"], shape, *taken, f"{1 - kinds[1]['peak'] / kinds[0]['peak']:.0%}"]


def remark(row: dict) -> str:
    """What else there is to say of work on whole streams"""
    kinds, shape = (row["dense"], row["mod"]), SHAPE.format(**row)
    said = ["peak memory {:.2f} GB, MoD {:.2f} GB".format(*(kind["peak"] / 1e9 for kind in kinds))]
    if row.get("gradient_checkpointing"):
        said[0] += " (with gradient checkpointing)"
    elif row.get("longest"):
        said.append("longest stream {:,} frames, MoD {:,}".format(*row["longest"].values()))
    if "batch_seconds" in row:
        said.append(f"making a batch: {row['batch_seconds'] / kinds[1]['seconds']:.1%} of a MoD step")
    if row["work"] == "prefill":
        said.append("cache {:.1f} kB a frame, MoD {:.1f} kB".format(*(kind["cache"] / 1e3 for kind in kinds)))
    return f"{row['work']} {shape}: {'; '.join(said)}"


# --- command line -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvalConfig:
    run: str = opt("", "run folder (default: the newest in out/)", positional=True)
    watch: str = opt("", "video to narrate live instead")
    flops: bool = opt(False, "print the papers' cost tables instead")
    arank: bool = opt(False, "rank the layers of a dense run instead (gamma-MoD)")
    profile: bool = opt(False, "measure speed and memory, dense beside MoD, at the sizes of --preset instead")
    preset: str = opt("tiny", ", ".join(PROFILES), needs="profile")
    table: bool = opt(False, "renew the tables of the READMEs from results/, or print that of the folder of "
                             "runs RUN and write RUN.json")
    merge: str = opt("", "folder for the same run with its adapters merged into the weights")
    streams: int = opt(64, "held-out streams to evaluate on")
    threshold: float = opt(0.0, "speak where silence is less likely than this (theta of VideoLLM-online)")
    query: str = opt("", "what to ask before the first frame (default: as narration or ego4d asks)",
                     needs="watch")
    html: str = opt("", "file for a page of the stream watched: --watch, or else one of the embedded world")
    window: int = opt(0, "frames to remember, 0: all", needs="watch or html")
    compile: bool = opt(False, "compile the model")
    partial: bool = opt(False, "use what can be decoded of a damaged video", needs="watch")
    device: str = opt("", "cpu or cuda (default: cuda where there is one)")

    def __post_init__(self) -> None:
        models.check_fields(self, may_be_zero=("window", "threshold"))
        every = ["flops", "profile", "table", "merge", "arank", "watch" if self.watch else "html"]
        every += ["run"] if self.flops or self.profile else []
        if len(modes := [name for name in every if getattr(self, name)]) > 1:
            raise ValueError(f"{modes[0]} must be given alone, got {modes[1]} too")
        if self.threshold > 1:
            raise ValueError(f"threshold must be at most 1, got {self.threshold}")


def watch(cfg: EvalConfig, model: VideoLM, tokenizer: Tokenizer, trained: dict, drawing: Path) -> None:
    """--watch, or --html alone"""
    if cfg.html and (Path(cfg.html).suffix != ".html" or not Path(cfg.html).parent.is_dir()):
        raise ValueError(f"html must name an .html file in a folder that is there, got {cfg.html}")
    watcher = Watcher(model, tokenizer, torch.zeros(1).long(), cfg.threshold, cfg.window or None)
    size, fps = model.config.image_size, trained["fps"]
    query = cfg.query or (data.NARRATE if trained["task"] == "ego4d" else data.QUERY)
    if cfg.watch:
        video = data.read_video(Path(cfg.watch), fps, size, cfg.partial)
    else:
        world = data.TASKS.get("" if trained["data"] else trained["task"])
        if world is None or world.asks:
            raise ValueError(f"watch must be given with html for the task {trained['task']}, got no video")
        sample = world(size).held_out(1)[0]
        query, video = sample.turns[0].text, (frame for frame in sample.frames)
    with contextlib.closing(video) as frames:  # also where the watching is broken off
        narrate(watcher, frames, fps, query, drawing, cfg.html)


def main(argv: list[str] | None = None) -> None:
    cfg, given = models.parse(EvalConfig, argv, __doc__)
    if cfg.flops:
        return print_cost()
    if cfg.profile:
        return profile(cfg.preset, models.pick_device(cfg.device), cfg.compile)
    if cfg.table:
        return print_tables(cfg.run)
    folder = Path(cfg.run) if cfg.run else data.newest_run()
    model = load(folder, models.pick_device(cfg.device)).eval()
    tokenizer = data.tokenizer_for(model.config.vocab_size, model.config.llm)
    trained = data.read_settings(folder / "train.json")
    if cfg.merge:
        if Path(cfg.merge).exists():
            raise ValueError(f"merge must be a new folder, got {cfg.merge}")
        models.save(Path(cfg.merge), models.merge(model))
        write_json(Path(cfg.merge) / "train.json", trained)
        return print(f"{cfg.merge}: {folder} without adapters")
    if cfg.compile:
        compile_layers(model)
    if cfg.watch or cfg.html:
        return watch(cfg, model, tokenizer, trained, folder / "watch.png")
    source = data.open_source(**trained, size=model.config.image_size)
    if source.asks and "threshold" in given:
        raise ValueError(f"threshold must be given for a task with decisions, got {trained['task']}")
    encode_once(source, model, folder)
    if cfg.arank:
        return print_ranks(model, tokenizer, source)
    report(folder, model, tokenizer, source, cfg.streams, cfg.threshold)


if __name__ == "__main__":
    models.run(main)
