"""Every number and picture: the streaming metrics, a live narration, the costs.

    python eval.py [RUN]              evaluate a run (the newest in out/)
    python eval.py RUN --watch VIDEO  narrate a video as its frames arrive
    python eval.py RUN --arank        the rank of each layer's attention maps
    python eval.py --flops            the papers' costs, and those of this code
    python eval.py [RUNS] --table     results/, or a folder of runs, as tables
"""

import contextlib
import json
import math
import re
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

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
    """LM-PPL, TimeDiff (in frames), Fluency, LM-Correctness of one turn, as VideoLLM-online's code has them.

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
    return {"lm_ppl": math.exp(fmean(turn.nll)), "lm_correctness": prefix / m,
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
    mean["lm_ppl_corrected"] = math.exp(fmean(x for turn in every for x in turn.nll))
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
        self.model, self.tokenizer, self.threshold, self.limit = model, tokenizer, threshold, limit
        self.device, self.streams, self.group = model.lm_head.weight.device, len(seed), 0  # the next group
        self.seed, self.cache = seed.to(self.device), Cache(model.config, len(seed), window, self.device)
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

    def reply(self, speaking: list[bool], logits: Tensor | None = None,
              drawn: Tensor | None = None) -> list[Turn]:
        """Let these streams speak of a frame; or answer a prompt, from the logits (B, vocabulary) after it

        drawn: (B,) bool on the host, streams whose tokens are drawn, not the most likely
        """
        said, t = [[] for _ in speaking], self.tokenizer
        barred = [t.pad, t.user, t.assistant, t.frame, t.silent]  # a reply is only text, then `<end>`
        token = [t.assistant for _ in speaking]
        group, generator = -1 if logits is None or "assistant" in self.masked else 0, torch.Generator()
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
            rows = [[[i], [group], [-100]] if now else [[]] * 3
                    for i, now in zip(token, speaking, strict=True)]
            logits = self.feed(rows, late=True)
            speaking = [now and i != t.end for i, now in zip(token, speaking, strict=True)]
        return [Turn(0, "assistant", t.decode(ids), tuple(ids)) for ids in said]

    def ask(self, samples: list[Sample], drawn: Tensor | None = None) -> list[str]:
        """What it answers where each sample ends; all before the answer is one prompt. drawn: as in reply"""
        prompts = [[*s.turns[:-1], s.turns[-1]._replace(text="")] for s in samples]
        rows = [[part[:-1] for part in self.layout(turns, len(s.frames))]  # without the `<end>` of the answer
                for turns, s in zip(prompts, samples, strict=True)]
        logits = self.feed(rows, data.stack([s.frames for s in samples]))
        return [turn.text for turn in self.reply([True] * len(samples), logits, drawn)]

    def computed(self) -> Tensor:
        """(B, L) int64, the tokens of each stream that each layer computed so far"""
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


def narrate(watcher: Watcher, frames: Iterator[np.ndarray], fps: float, query: str, drawing: Path) -> None:
    """Print what the model says of a stream as frames arrive, each with its time; draw the last twelve."""
    shown, count, began = deque(maxlen=12), 0, time.perf_counter()
    for count, frame in enumerate(frames, 1):
        asked = [[Turn(0, "user", query)]] if count == 1 else None
        said = watcher.watch(data.stack([frame[None]]), asked)[0]
        if said:
            print(printable(f"{(count - 1) / fps:7.1f} s  {said.text}"), flush=True)
        shown.append((frame, {layer: keep[0] for layer, keep in watcher.kept.items()}))
    took = time.perf_counter() - began
    write(drawing, lambda path: path.write_bytes(data.picture(*zip(*shown, strict=True))))
    print(f"{count} frames, {count / fps:.1f} s of video in {took:.1f} s: {1000 * took / count:.0f} ms each\n"
          f"tokens in the cache of each layer: {', '.join(map(str, watcher.computed()[0].tolist()))}\n"
          f"routing drawn in {drawing}")


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
            return math.isfinite(b) and abs(a - b) <= 0.05 * abs(b)
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
    ranks, others = (ranks_of(model, tokenizer, source.batch(0, step, samples)) for step in (0, 1))
    mean, spread = ranks.mean(0), ranks.std(0, correction=0)
    print(f"ARank of {len(ranks)} samples: rank of the attention maps, mean over heads, +- spread")
    for layer, r in enumerate(rank_placement(mean.tolist(), 0.5)):
        bar, kind = "#" * round(40 * float(mean[layer] / mean.max())), "dense" if r == 1 else "routed"
        print(f"layer {layer:2} {mean[layer]:7.1f} +-{spread[layer]:5.1f}  {kind:6}  {bar}")
    order = torch.stack([m.argsort().argsort().double() for m in (mean, others.mean(0))])
    print(f"Spearman correlation with a second batch of {len(others)}: {torch.corrcoef(order)[0, 1]:.2f}")


# --- pictures and tables ------------------------------------------------------------------------------------


def draw_routing(model: VideoLM, tokenizer: Tokenizer, sample: Sample, pixels: np.ndarray,
                 path: Path) -> None:
    """The routing of one stream, heard with its true replies. pixels: (F, S, S, 3) uint8"""
    b, out = hear(model, tokenizer, [sample])
    vision = b.tokens == data.VISION  # (1, T)
    keep = {layer: k.cpu()[vision].view(len(pixels), -1) for layer, k in out.keep.items()}  # (F, P)
    shown = range(0, len(pixels), math.ceil(len(pixels) / 12))  # of a long stream 12 frames, from all over it
    kept = [{layer: k[f] for layer, k in keep.items()} for f in shown]
    write(path, lambda unfinished: unfinished.write_bytes(data.picture([pixels[f] for f in shown], kept)))


METRICS = (  # title, key, form; those indented correct a quirk of the one above
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
    ("time per answer", "seconds_per_answer", "{:.4f} s"), ("training step", "seconds_per_step", "{:.3f} s"))


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
    for kind, share in result.get("accuracy_of", {}).items():
        print(printable(f"    {kind:18}{share:>18.1%}"))
    print("for example, free-running (<- the truth, where it differs):")
    for about, mine, true in examples:
        print(printable(f"  {about}{mine}" + f"   <- {true}" * (mine != true)))
    write_json(folder / "eval.json", result)
    draw_routing(model, tokenizer, samples[0], source.pixels(samples[0]), folder / "routing.png")
    print(f"the routing of the first is drawn in {folder / 'routing.png'}")


def print_tables(folder: str) -> None:
    """The tables of results/*.json; or that of the runs in a folder, which is written to folder.json"""
    if folder := folder.rstrip("/"):
        write_json(Path(f"{folder}.json"), data.collect(Path(folder)))
    for file in [Path(f"{folder}.json")] if folder else sorted(Path(__file__).parent.glob("results/*.json")):
        print(f"{file}\n\n{table(json.loads(file.read_text()))}\n")


def table(rows: list[dict]) -> str:
    """Markdown, free-running; in a cell the values of all seeds of a run, one if they read the same"""
    known = {key for row in rows for key in row["free_running"]}
    columns = [metric for metric in METRICS if metric[1] in known and metric[0][0] != " "]
    lines = [f"| run | {' | '.join(title for title, _, _ in columns)} |", "|---" * (len(columns) + 1) + "|"]
    runs: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        runs.setdefault(row["run"].split("-seed")[0], []).append(row["free_running"])
    for name, seeds in sorted(runs.items()):
        cells = ([form.format(s[key]) for s in seeds if key in s] or ["-"] for _, key, form in columns)
        lines.append(f"| `{name}` | {' | '.join(' / '.join(c if len({*c}) > 1 else c[:1]) for c in cells)} |")
    return "\n".join(lines)


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


def encode_once(source: data.Source, model: VideoLM, cache: Path) -> None:
    """Have a folder's clips go through a frozen encoder once; their features are kept in this directory."""
    c, device = model.config, model.lm_head.weight.device
    if c.frozen("vision_model.") and isinstance(source, data.Folder):
        written = [file.stat().st_mtime_ns for file in sorted(Path(c.vision).glob("*.safetensors"))]
        about = [v for name, v in vars(c).items() if name.startswith(("vision", "image", "patch", "pool"))]
        key = f"{about} {written}"
        source.encode(lambda pixels: model.vision_model(pixels.to(device)), cache, key)


# --- command line -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvalConfig:
    run: str = opt("", "run folder (default: the newest in out/)", positional=True)
    watch: str = opt("", "video to narrate live instead")
    flops: bool = opt(False, "print the papers' cost tables instead")
    arank: bool = opt(False, "rank the layers of a dense run instead (gamma-MoD)")
    table: bool = opt(False, "print the tables of results/, or of the folder of runs RUN and write RUN.json")
    merge: str = opt("", "folder for the same run with its adapters merged into the weights")
    streams: int = opt(64, "held-out streams to evaluate on")
    threshold: float = opt(0.0, "speak where silence is less likely than this (theta of VideoLLM-online)")
    query: str = opt(data.QUERY, "with --watch: what to ask before the first frame")
    window: int = opt(0, "with --watch: frames to remember, 0: all")
    partial: bool = opt(False, "with --watch: use what can be decoded of a damaged video")
    device: str = opt("", "cpu or cuda (default: cuda where there is one)")

    def __post_init__(self) -> None:
        models.check_fields(self, may_be_zero=("window", "threshold"))
        if self.threshold > 1:
            raise ValueError(f"threshold must be at most 1, got {self.threshold}")


def main(argv: list[str] | None = None) -> None:
    cfg, _ = models.parse(EvalConfig, argv, __doc__)
    if cfg.flops:
        return print_cost()
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
    if cfg.watch:
        watcher = Watcher(model, tokenizer, torch.zeros(1).long(), cfg.threshold, cfg.window or None)
        video = data.read_video(Path(cfg.watch), trained["fps"], model.config.image_size, cfg.partial)
        with contextlib.closing(video) as frames:  # also where the watching is broken off
            return narrate(watcher, frames, trained["fps"], cfg.query, folder / "watch.png")
    source = data.open_source(**trained, size=model.config.image_size)
    encode_once(source, model, folder.parent / "features")
    if cfg.arank:
        return print_ranks(model, tokenizer, source)
    report(folder, model, tokenizer, source, cfg.streams, cfg.threshold)


if __name__ == "__main__":
    models.run(main)
