"""Every number and picture: the streaming metrics, a live narration, the costs.

    python eval.py [RUN]              evaluate a run (the newest in out/)
    python eval.py RUN --watch VIDEO  narrate a video as its frames arrive
    python eval.py --flops            the paper's costs, and those of this code
"""

import contextlib
import json
import math
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
from data import Sample, Tokenizer, Turn
from mod import Groups, computed, flops, placement
from model import Cache, VideoLM, load, opt, parse, preset, printable, run, write, write_json

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


def speaks(logits: Tensor, threshold: float) -> Tensor:
    """(..., vocabulary) at `<frame>` -> (...) bool: silence is not the best token, or below the threshold"""
    return (logits.argmax(-1) != data.SILENT) | (logits.softmax(-1)[..., data.SILENT] < threshold)


@torch.no_grad()
def read(model: VideoLM, tokenizer: Tokenizer, samples: list[Sample], threshold: float,
         batch: int = 16) -> list[Reading]:
    """Feed whole sequences, replies included, and read the decisions and the likelihoods -> a Reading each"""
    readings, device = [], model.lm_head.weight.device
    for at in range(0, len(samples), batch):
        b = data.collate(samples[at : at + batch], model.config.tokens_per_frame, tokenizer)
        groups = Groups.plan(b.group, model.config.keep, b.real).to(device)
        hidden = model(b.tokens.to(device), b.frames.to(device), groups, b.seed.to(device)).hidden
        for row, labels, decision in zip(hidden, b.labels, b.decision, strict=True):
            places = (labels >= 0).nonzero()[:, 0]
            logits = model.logits(row[places.to(device)]).float().cpu()  # (labelled, vocabulary)
            nll = F.cross_entropy(logits, labels[places], reduction="none").tolist()
            right = (logits.argmax(-1) == labels[places]).tolist()
            reading = Reading(speaks(logits[decision[places]], threshold).tolist(), {}, {})
            frame = -1
            for is_decision, x, ok in zip(decision[places].tolist(), nll, right, strict=True):
                frame += is_decision
                if not is_decision:
                    reading.nll.setdefault(frame, []).append(x)
                    reading.right.setdefault(frame, []).append(ok)
            readings.append(reading)
    return readings


def replies(sample: Sample) -> dict[int, str]:
    """What is said in a stream: frame -> text"""
    return {turn.frame: turn.text for turn in sample.turns if turn.role == "assistant"}


def cut(sample: Sample, frame: int, frames: int, reply: list[Turn]) -> Sample:
    """The stream as it was before `frame`, with this reply there, and none after it; `frames` long."""
    before = [turn for turn in sample.turns if turn.role == "user" or turn.frame < frame]
    return sample._replace(turns=before + reply, frames=sample.frames[:frames])


def gather_evidence(model: VideoLM, tokenizer: Tokenizer, truth: list[Sample], heard: list[Sample],
                    threshold: float) -> tuple[list[list[Evidence]], list[list[bool]]]:
    """Score every reply of every stream -> the evidence of its turns, and all its decisions.

    heard: the same streams with the replies that the model has in its context: the true ones (teacher-forced)
    or its own (free-running). The true reply is then scored after what was heard until its frame. Turns end
    at the true replies either way: free-running, a late reply is also a premature one of the next turn.
    """
    spoke = [reading.spoke for reading in read(model, tokenizer, heard, threshold)]
    turns = []  # (stream, first frame, reply, frames that may follow: at most the next turn's, and n - 1)
    for i, sample in enumerate(truth):
        first, said = 0, sorted(turn for turn in sample.turns if turn.role == "assistant")
        for n, turn in enumerate(said, 1):
            end = said[n].frame if n < len(said) else len(sample.frames) - 1  # of the next turn
            turns.append((i, first, turn, min(end - turn.frame, turn.frame - first)))
            first = turn.frame + 1
    told = [cut(heard[i], t.frame, t.frame + 1, [t]) for i, _, t, _ in turns]
    scored = read(model, tokenizer, told, threshold)
    waited = [(i, t, more) for i, first, t, more in turns if not any(spoke[i][first : t.frame + 1])]
    untold = [cut(heard[i], t.frame, t.frame + 1 + more, []) for i, t, more in waited]
    silent = read(model, tokenizer, untold, threshold)
    later = {(i, t.frame): reading.spoke[t.frame + 1 :]
             for (i, t, _), reading in zip(waited, silent, strict=True)}
    evidence: list[list[Evidence]] = [[] for _ in truth]
    for (i, first, t, _), reading in zip(turns, scored, strict=True):
        evidence[i].append(Evidence(spoke[i][first : t.frame + 1], later.get((i, t.frame), []),
                                    reading.nll[t.frame], reading.right[t.frame]))
    return evidence, spoke


def evaluate(model: VideoLM, tokenizer: Tokenizer, truth: list[Sample], fps: float,
             threshold: float = 0.0) -> tuple[dict, list[Sample]]:
    """Score streams both ways -> {"teacher_forced": {...}, "free_running": {...}, ...}, and what was said"""
    own = [s._replace(turns=[turn for turn in s.turns if turn.role == "user"] + said)
           for s, said in zip(truth, free_run(model, tokenizer, truth, threshold), strict=True)]
    result: dict = {"streams": len(truth), "threshold": threshold}
    for name, heard in (("teacher_forced", truth), ("free_running", own)):
        evidence, spoke = gather_evidence(model, tokenizer, truth, heard, threshold)
        result[name] = summarise(evidence, fps)
        right = [s == (f in replies(sample)) for sample, row in zip(truth, spoke, strict=True)
                 for f, s in enumerate(row)]
        result[name]["decision_accuracy"] = fmean(right)
    said, true = ({(i, *item) for i, s in enumerate(streams) for item in replies(s).items()}
                  for streams in (own, truth))
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
        self.device, self.streams, self.frame = model.lm_head.weight.device, len(seed), 0
        self.seed, self.cache = seed.to(self.device), Cache(model.config, len(seed), window, self.device)
        self.kept: dict[int, Tensor] = {}  # routed layer -> (B, P) bool, what it computed of the last frame

    @torch.no_grad()
    def feed(self, rows: list[list[int]], frames: Tensor | None = None) -> Tensor:
        """Append a chunk to each stream (empty: it waits) -> (B, vocabulary) logits after its last token"""
        c, lengths = self.model.config, torch.tensor([len(row) for row in rows])
        T = int(lengths.max())
        tokens = torch.tensor([row + [data.PAD] * (T - len(row)) for row in rows])  # (B, T)
        group = torch.where(tokens == data.VISION, self.frame, -1)
        groups = Groups.plan(group, c.keep, torch.arange(T) < lengths[:, None]).to(self.device)
        if frames is None:
            frames = torch.zeros(len(rows), 0, 3, c.image_size, c.image_size, dtype=torch.uint8)
        out = self.model(tokens.to(self.device), frames.to(self.device), groups, self.seed, self.cache)
        if frames.shape[1]:
            self.kept = {layer: keep[:, : c.tokens_per_frame].cpu() for layer, keep in out.keep.items()}
        last = (lengths - 1).clamp(min=0).to(self.device)
        return self.model.logits(out.hidden[torch.arange(len(rows), device=self.device), last]).float()

    def watch(self, frames: Tensor) -> list[str | None]:
        """frames: (B, 3, S, S) uint8, the next of each stream -> what is said of it, None: silence"""
        rows = [data.frame_turn(self.model.config.tokens_per_frame)] * self.streams
        logits = self.feed(rows, frames[:, None])
        self.frame += 1
        speaking = spoke = speaks(logits, self.threshold).tolist()
        said: list[list[int]] = [[] for _ in spoke]
        token = [data.ASSISTANT for _ in spoke]
        barred = [i for i in range(len(data.SPECIAL)) if i != data.END]  # a reply is only text, then `<end>`
        while any(speaking):
            logits = self.feed([[t] if now else [] for t, now in zip(token, speaking, strict=True)])
            speaking = [now and t != data.END for t, now in zip(token, speaking, strict=True)]
            logits[:, barred] = -math.inf
            for b, best in enumerate(logits.argmax(-1).tolist()):
                token[b] = best if len(said[b]) < self.limit else data.END
                if speaking[b] and token[b] != data.END:
                    said[b].append(token[b])
        return [self.tokenizer.decode(ids) if s else None for ids, s in zip(said, spoke, strict=True)]


def free_run(model: VideoLM, tokenizer: Tokenizer, samples: list[Sample], threshold: float = 0.0,
             batch: int = 32) -> list[list[Turn]]:
    """What the model says of each stream when it hears only the user and itself -> a list of turns each"""
    said: list[list[Turn]] = [[] for _ in samples]
    for at in range(0, len(samples), batch):
        chunk = samples[at : at + batch]
        watcher = Watcher(model, tokenizer, torch.tensor([s.seed for s in chunk]), threshold)
        for f in range(max(len(s.frames) for s in chunk)):
            asked = [[t.text for t in s.turns if t.role == "user" and t.frame == f] for s in chunk]
            if any(asked):
                rows = [[i for text in texts for i in data.user_turn(tokenizer, text)] for texts in asked]
                watcher.feed(rows)
            frames = np.stack([s.frames[min(f, len(s.frames) - 1)] for s in chunk])  # ended ones stand still
            for b, text in enumerate(watcher.watch(torch.from_numpy(frames).permute(0, 3, 1, 2))):
                if text is not None and f < len(chunk[b].frames):
                    said[at + b].append(Turn(f, "assistant", text))
    return said


def narrate(watcher: Watcher, frames: Iterator[np.ndarray], fps: float, query: str, drawing: Path) -> None:
    """Print what the model says of a stream as frames arrive, each with its time; then draw the routing."""
    watcher.feed([data.user_turn(watcher.tokenizer, query)])
    shown, every, count, began = [], 1, 0, time.perf_counter()
    for count, frame in enumerate(frames, 1):
        text = watcher.watch(torch.from_numpy(frame.copy()).permute(2, 0, 1)[None])[0]
        if text is not None:
            print(printable(f"{(count - 1) / fps:7.1f} s  {text}"), flush=True)
        if (count - 1) % every == 0:
            shown.append((frame, {layer: keep[0] for layer, keep in watcher.kept.items()}))
        if len(shown) > 12:  # every second one stays: the picture spans the stream, however long it is
            shown, every = shown[::2], 2 * every
    took = time.perf_counter() - began
    print(f"{count} frames, {count / fps:.1f} s of video in {took:.1f} s: {1000 * took / count:.0f} ms each\n"
          f"tokens in the cache of each layer: {', '.join(map(str, watcher.cache.length))}")
    picture(drawing, *zip(*shown, strict=True))
    print(f"routing drawn in {drawing}")


# --- pictures and tables ------------------------------------------------------------------------------------


def picture(path: Path, frames: list[np.ndarray], kept: list[dict[int, Tensor]]) -> None:
    """A stream's routing as a PNG: frames in columns; below each, a row a routed layer, skipped patches pale.

    frames: (S, S, 3) uint8 each;  kept: per frame, routed layer -> (1 + p * p,) bool; a bar on top is CLS
    """
    scale, gap = max(1, 112 // len(frames[0])), 4
    side, layers = scale * len(frames[0]), sorted(kept[0])
    height, width = (side + gap) * (1 + len(layers)) + gap, (side + gap) * len(frames) + gap
    image = np.full((height, width, 3), 255, np.uint8)
    for left, frame, keep in zip(range(gap, width, side + gap), frames, kept, strict=False):
        big = frame.repeat(scale, axis=0).repeat(scale, axis=1)  # (side, side, 3)
        image[gap : gap + side, left : left + side] = big
        for top, layer in zip(range(side + 2 * gap, height, side + gap), layers, strict=False):
            p = math.isqrt(len(keep[layer]) - 1)
            patch = np.arange(side) * p // side  # (side,) the patch that a pixel lies in
            computed_here = keep[layer][1:].view(p, p).numpy()[patch][:, patch, None]  # (side, side, 1)
            image[top : top + side, left : left + side] = np.where(computed_here, big, 255 - (255 - big) // 5)
            if keep[layer][0]:
                image[top - gap + 1 : top - 1, left : left + side] = (40, 90, 200)
    above = np.concatenate([np.zeros_like(image[:1]), image[:-1]])
    raw = b"".join(b"\2" + line.tobytes() for line in image - above)  # 2: as differences to the row above
    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(raw, 9)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d))
                    for kind, d in chunks)
    write(path, lambda unfinished: unfinished.write_bytes(b"\x89PNG\r\n\x1a\n" + body))


def draw_routing(model: VideoLM, tokenizer: Tokenizer, sample: Sample, path: Path) -> None:
    """The routing of one stream, heard with its true replies."""
    c, device = model.config, model.lm_head.weight.device
    b = data.collate([sample], c.tokens_per_frame, tokenizer)
    with torch.no_grad():
        groups = Groups.plan(b.group, c.keep).to(device)
        out = model(b.tokens.to(device), b.frames.to(device), groups, b.seed.to(device))
    vision = b.group >= 0  # (1, T)
    keep = {layer: k.cpu()[vision].view(-1, c.tokens_per_frame) for layer, k in out.keep.items()}  # (F, P)
    kept = [{layer: k[f] for layer, k in keep.items()} for f in range(len(sample.frames))]
    picture(path, list(sample.frames), kept)


METRICS = (("LM-PPL", "lm_ppl", "{:.3f}"), ("  of the mean", "lm_ppl_corrected", "{:.3f}"),
           ("TimeDiff (s)", "time_diff", "{:.3f}"), ("  corrected", "time_diff_corrected", "{:.3f}"),
           ("Fluency", "fluency", "{:.1%}"), ("  corrected", "fluency_corrected", "{:.1%}"),
           ("LM-Correctness", "lm_correctness", "{:.1%}"), ("reply tokens right", "reply_accuracy", "{:.1%}"),
           ("decisions right", "decision_accuracy", "{:.1%}"), ("replies said right", "said_right", "{:.1%}"),
           ("replies said wrong", "said_wrong", "{:.1%}"))


def report(folder: Path, model: VideoLM, tokenizer: Tokenizer, source: data.Source, streams: int,
           threshold: float = 0.0) -> None:
    """Evaluate a run, print it with one stream as narrated; eval.json and routing.png go into its folder."""
    samples = source.held_out(streams)
    result, own = evaluate(model, tokenizer, samples, source.fps, threshold)
    print(f"{folder}: {len(samples)} {source.kind}\n{'':24}teacher-forced  free-running")
    for title, name, form in METRICS:
        cells = [form.format(result[way][name]) if name in result[way] else ""
                 for way in ("teacher_forced", "free_running")]
        print(f"  {title:20}{cells[0]:>16}{cells[1]:>14}")
    print("the first of them as narrated, free-running (<- the truth, where it differs):")
    for f in range(len(samples[0].frames)):
        mine, true = (replies(streams[0]).get(f, "(silent)") for streams in (own, samples))
        print(printable(f"  {f / source.fps:5.1f} s  {mine}" + ("" if mine == true else f"   <- {true}")))
    write_json(folder / "eval.json", result)
    draw_routing(model, tokenizer, samples[0], folder / "routing.png")
    print(f"its routing is drawn in {folder / 'routing.png'}")


PAPER = (("Full computation", "dense", 1.0, 48.29), ("EarlyExit", "early-exit", 0.0, 7.14),
         ("LayerSkip", "layer-skip", 0.0, 26.35), ("Interleaved", "interleaved", 0.2, 30.74),
         ("All", "all", 0.2, 13.18), ("All-Deep", "all-deep", 0.2, 15.37),
         ("Interleaved-Deep", "interleaved-deep", 0.2, 31.83),
         ("Interleaved", "interleaved", 0.1, 28.54), ("Interleaved", "interleaved", 0.3, 32.93))


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


def print_cost() -> None:
    print("Llama-3-8B, 600 frames x 10 tokens, a forward pass in teraMACs (2 FLOPs each)")
    print(f"{'placement':18}{'keep':>4}{'paper':>8}{'formula':>9}{'computed here':>15}"
          f"{'of dense':>10}{'KV KiB/frame':>14}")
    dense, encoder = paper_cost("dense", 1.0)[1], flops(preset("llama3-8b"), [], frames=600)["vision"] / 1e12
    for name, plan, ratio, paper in PAPER:
        formula, here, kv = paper_cost(plan, ratio)
        print(f"{name:18}{ratio:4.1f}{paper:8.2f}{formula:9.2f}{here:15.2f}"
              f"{here / dense:10.1%}{kv / 1024:14.0f}")
    print("formula: as the paper counts (unmerged LoRA, lm_head over vision tokens, no\n"
          "attention). computed here: attention counted, lm_head only over text, no LoRA,\n"
          f"one <frame> token a frame; not the encoder, {encoder:.1f} T in every row.")


# --- command line -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvalConfig:
    run: str = opt("", "run folder (default: the newest in out/)", positional=True)
    watch: str = opt("", "video to narrate live instead")
    flops: bool = opt(False, "print the paper's cost table instead")
    streams: int = opt(64, "held-out streams to evaluate on")
    threshold: float = opt(0.0, "speak where silence is less likely than this (theta of VideoLLM-online)")
    query: str = opt(data.QUERY, "with --watch: what to ask before the first frame")
    window: int = opt(0, "with --watch: frames to remember, 0: all")
    partial: bool = opt(False, "with --watch: use what can be decoded of a damaged video")
    device: str = opt("", "cpu or cuda (default: cuda where there is one)")

    def __post_init__(self) -> None:
        for name, holds, rule in (("streams", self.streams > 0, "at least 1"),
                                  ("window", self.window >= 0, "at least 0"),
                                  ("threshold", 0 <= self.threshold <= 1, "in [0, 1]")):
            if not holds:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)}")


def pick_device(name: str) -> torch.device:
    if name not in ("", "cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device must be cpu or, where there is one, cuda, got {name}")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def newest_run() -> Path:
    runs = sorted(Path("out").glob("*/model.safetensors"), key=lambda file: file.stat().st_mtime)
    if not runs:
        raise ValueError("out/ must hold a run to evaluate, got none: make one with `python train.py`")
    return runs[-1].parent


def read_settings(file: Path) -> dict:
    """What a run was trained on. Raises ValueError, naming the file, where it does not say."""
    keys = {"task": str, "data": str, "fps": float, "partial": bool}
    try:
        values = json.loads(file.read_text())
        data.check_fps(values["fps"])
        return {key: kind(values[key]) for key, kind in keys.items()}
    except (OSError, ValueError, TypeError, KeyError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file} must be JSON with {', '.join(keys)}, got {why}") from None


def main(argv: list[str] | None = None) -> None:
    cfg, _ = parse(EvalConfig, argv, __doc__)
    if cfg.flops:
        return print_cost()
    folder = Path(cfg.run) if cfg.run else newest_run()
    model, tokenizer = load(folder, pick_device(cfg.device)).eval(), Tokenizer()
    trained = read_settings(folder / "train.json")
    if cfg.watch:
        seed = torch.zeros(1, dtype=torch.int64)
        watcher = Watcher(model, tokenizer, seed, cfg.threshold, cfg.window or None)
        video = data.read_video(Path(cfg.watch), trained["fps"], model.config.image_size, cfg.partial)
        with contextlib.closing(video) as frames:  # also where the watching is broken off
            return narrate(watcher, frames, trained["fps"], cfg.query, folder / "watch.png")
    source = data.open_source(**trained, size=model.config.image_size)
    report(folder, model, tokenizer, source, cfg.streams, cfg.threshold)


if __name__ == "__main__":
    run(main)
