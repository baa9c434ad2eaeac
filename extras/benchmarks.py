"""The benchmarks of the papers, read from their own annotation files.

    python train.py --task NAME --data DIR
    python -m extras.benchmarks    show this

task       files in DIR, beside the videos       videos           score
ego4d      all_narrations_redacted.json, lists:  <uid>.mp4        streaming
           *_val.json, *_test*.json
lta        fho_lta_taxonomy.json,                <video_uid>.mp4  edit distance
           fho_lta_train.json, fho_lta_val.json
coin-step  COIN.json                             <id>.mp4         top-1
coin-next, coin-task, coin-procedure, coin-goal: the same file and score
keystep    keystep_train.json, keystep_val.json  <take_name>.mp4  top-1
llava      train.json and val.json, or *.json    its images       relaxed

Clips whose video is missing are left out and counted. Times more than 2 s
after the end of a video are moved to its last frame, and counted. Without DIR
there are three worlds that stand in: scene, forecast, summary (worlds.py).
"""

import math
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

from numpy import ndarray

from data import (
    Clip,
    Clips,
    Sample,
    Tokenizer,
    Turn,
    check_entry,
    leave_out,
    need,
    need_time,
    parse_json,
    print_left_out,
    replies,
)
from extras import worlds
from extras.scores import draw_candidates, forecast, numbered, relaxed, top1, true_answers
from model import VideoLM, parse, run_main
from video import find_track, frame_index

# What reading a record raises that is not as it should be
MISTAKES = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError)


class Benchmark(Clips):
    """Clips to learn from and held-out clips, from the annotation files of a benchmark.

    A record is what a file has of one video or image, an entry what data.check_entry reads.
    records: folder, "train" or "val" -> what names a record, and the record
    entries: record -> its clips
    late: where of each clip that was read -> does it go on after the end of its video?
    """

    kind = "held-out clips"
    folder: Path
    late: dict[str, bool]
    records: ClassVar[Callable[[Path, str], Iterator[tuple[str, object]]]]
    entries: ClassVar[Callable[[object], Iterator[dict]]]

    @classmethod
    def open(cls, folder: str, fps: float, partial: bool, size: int) -> "Benchmark":
        if not folder:
            raise ValueError(
                f"data must name a folder of the benchmark for the task {cls.task}, got none"
            )
        train = cls.read(Path(folder), "train", partial)
        source = cls(train, size, fps, partial, cls.read(Path(folder), "val", partial))
        source.folder, source.late = Path(folder), {}
        return source

    @classmethod
    def read(cls, folder: Path, split: str, partial: bool = False) -> list[Clip]:
        """The clips of a split that have their video. partial: bad records are left out."""
        clips, left_out = [], {}
        try:
            for where, record in cls.records(folder, split):
                with leave_out(f"{where}:", partial, left_out):
                    clips += cls.clips_of(where, record, folder)
        except MISTAKES as error:
            if type(error) is ValueError:  # it names the file already
                raise
            raise ValueError(
                f"{folder} must hold annotations of {cls.task}, got {error!r:.60}"
            ) from None
        print_left_out(left_out)
        found = [clip for clip in clips if os.path.isfile(clip.video)]
        if not any(replies(clip) for clip in found):
            raise ValueError(
                f"{folder} must hold clips and replies ({cls.task}, {split}), "
                f"got {len(found)} clips of {len(clips)}"
            )
        if len(found) < len(clips):
            print(f"{folder}: {len(clips) - len(found)} of {len(clips)} clips lack their video")
        return found

    @classmethod
    def clips_of(cls, where: str, record: object, folder: Path) -> list[Clip]:
        """Raises ValueError for whatever is wrong with a record."""
        try:
            clips = []
            for number, entry in enumerate(cls.entries(record), 1):
                clips.append(check_entry(entry, f"{where}, clip {number}:", folder))
            return clips
        except MISTAKES as error:
            if type(error) is ValueError:
                raise
            raise ValueError(f"must have the fields of {cls.task}, got {error!r:.60}") from None

    def answers(self) -> list[str]:
        """All answers of the held-out clips"""
        return [turn["content"] for clip in self.tested for turn in replies(clip)]

    def held_out(self, count: int) -> list[Sample]:
        """As in data.py. Prints how many of the clips that were read so far are `late`."""
        samples = super().held_out(count)
        late = sum(self.late.values())
        if late:
            print(
                f"{self.folder}: the times of {late} of {len(self.late)} clips that were read lie "
                "more than 2 s after the end of their video, and were moved there"
            )
        return samples

    def decode(self, clip: Clip) -> ndarray:
        """As in data.py, but a span after the end of its video has the last frame."""
        try:
            return super().decode(clip)
        except ValueError:
            track = find_track(clip.video)
            last_key = max(track.keys, default=track.zero) - track.zero
            begin = max(0, last_key - 1 / self.fps)  # not after the last frame
            if clip.start <= begin:
                raise
        frames = super().decode(clip._replace(start=begin))
        self.late[clip.where] = True
        return frames[-1:].copy()

    def turns(self, clip: Clip, frames: int) -> list[Turn]:
        """As in data.py, but times after the last frame are moved there, and the clip is noted."""
        last = frame_index(clip.start, self.fps) + frames - 1
        late, moved = self.late.get(clip.where, False), []
        for turn in clip.turns:
            if frame_index(turn.get("time", clip.start), self.fps) > last:
                late, turn = True, turn | {"time": last / self.fps}
            moved.append(turn)
        self.late[clip.where] = late
        return super().turns(clip._replace(turns=moved, end=math.inf), frames)


def read_annotations(file: Path, key: str = "") -> object:
    """What a JSON file has at a key, or all of it. Raises ValueError, naming the file."""
    with leave_out(str(file), False, {}):
        found = parse_json(file.read_bytes(), object_hook=Record)
        return found[key] if key else found


class Record(dict):
    """A JSON object in which a missing key is a ValueError."""

    def __missing__(self, key: str) -> None:
        raise ValueError(f"must have {key!r} where it has {str(list(self))[:60]}, got none")


def sentence(text: str) -> str:
    need(text.strip(" ."), "a text must not be empty", text)
    text = " ".join(text.split()).rstrip(". ")
    return f"{text[:1].upper()}{text[1:]}."


def question_of_span(video: str, start: float, end: float, question: str, answer: str) -> dict:
    """An entry: a question before the first frame of a span, its answer at the last"""
    asked = {"time": start, "role": "user", "content": question}
    said = {"time": end, "role": "assistant", "content": answer}
    return {"video": f"{video}.mp4", "start": start, "end": end, "conversation": [asked, said]}


# --- narration ----------------------------------------------------------------------------------


class Ego4D(Benchmark):
    """Ego4D narrations, a stream of each video and annotator.

    val: the videos in any *_val.json of a benchmark; those in any *_test*.json are in neither
    Times are on a grid of 0.5 s, where the later of two texts replaces the earlier. The first ten
    minutes of a video are used.
    """

    task = "ego4d"
    query = (
        "Narrate what happens, as it happens. "
        "Call who wears the camera C, and others by letters."
    )

    @classmethod
    def records(cls, folder: Path, split: str) -> Iterator[tuple[str, object]]:
        val, test = listed_videos(folder, "*_val.json"), listed_videos(folder, "*_test*.json")
        file = folder / "all_narrations_redacted.json"
        for uid, video in read_annotations(file, "videos").items():
            of = "val" if uid in val else "test" if uid in test else "train"
            if of == split:
                yield f"{file}, {uid}", (uid, video)

    @classmethod
    def entries(cls, record: tuple[str, dict]) -> Iterator[dict]:
        uid, video = record
        for said in narrations(video).values():
            turns = [{"time": 0, "role": "user", "content": cls.query}]
            for time, text in said.items():
                if text != turns[-1]["content"]:
                    turns.append({"time": time, "role": "assistant", "content": text})
            yield {"video": f"{uid}.mp4", "end": turns[-1]["time"], "conversation": turns}

    def turns(self, clip: Clip, frames: int) -> list[Turn]:
        """Of the texts after the last frame the first is moved there, others are left out.

        So does the code of VideoLLM-online.
        """
        told = []
        for turn in clip.turns:
            told.append(turn)
            if frame_index(turn["time"], self.fps) >= frames:
                break
        return super().turns(clip._replace(turns=told), frames)


def listed_videos(folder: Path, lists: str) -> set[str]:
    """The videos in files of these names"""
    found = set()
    for file in folder.glob(lists):
        named = re.findall(rb'"video_uid"\s*:\s*"([^"]+)"', file.read_bytes())
        found.update(uid.decode(errors="replace") for uid in named)
    return found


def narrations(video: dict) -> dict[str, dict[float, str]]:
    """annotator -> time -> text, cleaned of the tags #C (the wearer), #O and #unsure"""
    said: dict[str, dict[float, str]] = defaultdict(dict)
    for narration in video["narrations"]:
        need_time("time", narration["time"], 0, 1e9)
    for narration in sorted(video["narrations"], key=lambda narration: narration["time"]):
        text = re.sub(r"#(C|O|unsure)?|@c", "", narration["text"], flags=re.IGNORECASE)
        text = text.strip(" .,\n")
        if len(text.split()) >= 2 and narration["time"] <= 600:
            time = frame_index(narration["time"], 2) / 2
            said[narration["_annotation_uid"]][time] = sentence(text)
    return said


# --- long-term anticipation ---------------------------------------------------------------------


def taxonomy(folder: Path) -> tuple[list[str], list[str]]:
    """Ego4D's verbs, of one word each, and its nouns"""
    file = folder / "fho_lta_taxonomy.json"
    verbs = short_names(read_annotations(file, "verbs"))
    nouns = short_names(read_annotations(file, "nouns"))
    verbs = [name.replace("_", "-") for name in verbs]
    nouns = [name.replace("_", " ") for name in nouns]
    return verbs, nouns


def pick(words: list[str], key: str, action: dict) -> str:
    """The verb or noun of an action"""
    label = action[key]
    fits = type(label) is int and 0 <= label < len(words)
    need(fits, f"{key} must be below {len(words)}", label)
    return words[label]


def short_names(words: list[str]) -> list[str]:
    """What stands before "_(" in each, unless two are then alike"""
    short = [word.split("_(")[0] for word in words]
    return [s if short.count(s) == 1 else word for s, word in zip(short, words, strict=True)]


class LTA(Benchmark):
    """Ego4D long-term anticipation: eight actions are seen, the next 20 are listed."""

    task, asks = "lta", True

    @classmethod
    def records(cls, folder: Path, split: str) -> Iterator[tuple[str, object]]:
        names, clips = taxonomy(folder), defaultdict(list)
        file = folder / f"fho_lta_{split}.json"
        for action in read_annotations(file, "clips"):
            uid = action.get("clip_uid") if isinstance(action, dict) else None
            clips[str(uid)].append(action)
        for uid, actions in clips.items():
            yield f"{file}, {uid}", (actions, *names)

    @classmethod
    def entries(cls, record: tuple[list[dict], list[str], list[str]]) -> Iterator[dict]:
        question = "Eight actions are seen. List the 20 that follow, each as a verb and a noun."
        actions, verbs, nouns = record
        actions = sorted(actions, key=lambda action: action["action_idx"])
        places = {action["action_idx"] for action in actions}
        need(len(places) == len(actions), "each action_idx must come once", len(actions))
        names = []
        for action in actions:
            verb = pick(verbs, "verb_label", action)
            noun = pick(nouns, "noun_label", action)
            names.append(sentence(f"{verb} {noun}"))
        for i in range(len(actions) - 27):
            first, eighth = actions[i], actions[i + 7]
            began = first["clip_parent_start_sec"]
            start = began + first["action_clip_start_sec"]
            end = began + eighth["action_clip_end_sec"]
            answer = numbered(names[i + 8 : i + 28])
            yield question_of_span(first["video_uid"], start, end, question, answer)

    def answers(self) -> list[str]:
        """Actions that have every word of the taxonomy"""
        verbs, nouns = taxonomy(self.folder)
        with_verbs = [f"{verb} {nouns[0]}" for verb in verbs]
        return with_verbs + [f"{verbs[0]} {noun}" for noun in nouns]

    def score(
        self, model: VideoLM, tokenizer: Tokenizer, samples: list[Sample], said: list[str]
    ) -> dict[str, float]:
        """Edit distances of the best of five candidates, one greedy and four drawn"""
        candidates = draw_candidates(model, tokenizer, samples, said)
        return forecast(candidates, true_answers(tokenizer, samples), self.answers())


# --- steps --------------------------------------------------------------------------------------


class Steps(Benchmark):
    """Benchmarks whose answers are lines of a closed set."""

    asks = True

    def score(
        self, model: VideoLM, tokenizer: Tokenizer, samples: list[Sample], said: list[str]
    ) -> dict[str, float]:
        """Top-1 accuracy"""
        return top1(said, true_answers(tokenizer, samples), self.answers())


class Keystep(Steps):
    """Ego-Exo4D fine-grained keysteps: name the step of each segment.

    The papers do not say how they ask. Assumed: a segment is a clip, its step_name the answer. A
    take has one video per camera; link or copy the one to watch to <take_name>.mp4.
    """

    task = "keystep"

    @classmethod
    def records(cls, folder: Path, split: str) -> Iterator[tuple[str, object]]:
        file = folder / f"keystep_{split}.json"
        for uid, take in read_annotations(file, "annotations").items():
            yield f"{file}, {uid}", take

    @classmethod
    def entries(cls, record: dict) -> Iterator[dict]:
        for segment in record["segments"]:
            start, end = segment["start_time"], segment["end_time"]
            answer = sentence(segment["step_name"])
            yield question_of_span(record["take_name"], start, end, "Which step is this?", answer)


CAMEL = r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])"  # between words, as in ReplaceCDDrive


class Coin(Steps):
    """COIN: name the step, the next step or the task, or list up to five steps to come."""

    @classmethod
    def records(cls, folder: Path, split: str) -> Iterator[tuple[str, object]]:
        file = folder / "COIN.json"
        for name, video in read_annotations(file, "database").items():
            yield f"{file}, {name}", (name, video, split)

    @classmethod
    def entries(cls, record: tuple[str, dict, str]) -> Iterator[dict]:
        name, video, split = record
        subsets = {"training": "train", "testing": "val"}
        need(video["subset"] in subsets, "subset must be training or testing", video["subset"])
        if subsets[video["subset"]] == split:
            for start, end, question, answer in cls.questions(video)[cls.task]:
                yield question_of_span(name, start, end, question, answer)

    @classmethod
    def questions(cls, video: dict) -> dict[str, list[tuple]]:
        """task -> (start, end, question, answer) of each clip of a video"""
        asked = defaultdict(list)
        goal = sentence(re.sub(CAMEL, " ", video["class"]))
        asked["coin-task"].append((video["start"], video["end"], "What is the task?", goal))
        more = "What are the next steps, five at most?"
        steps = []
        for step in video["annotation"]:
            segment = step["segment"]
            pair = isinstance(segment, list) and len(segment) == 2
            need(pair, "segment must be [start, end]", segment)
            start, end = segment
            steps.append((start, end, sentence(step["label"])))
        for i, (start, end, label) in enumerate(steps):
            asked["coin-step"].append((start, end, "What is being done?", label))
            after = [later for _, _, later in steps[i + 1 : i + 6]]
            if after:
                listed = numbered(after)
                asked["coin-next"].append((start, end, "What is the next step?", after[0]))
                asked["coin-procedure"].append((start, end, more, listed))
                asked["coin-goal"].append((start, end, f"The task is: {goal} {more}", listed))
        return asked


class CoinStep(Coin):
    task = "coin-step"


class CoinNext(Coin):
    task = "coin-next"


class CoinTask(Coin):
    task = "coin-task"


class CoinProcedure(Coin):
    task = "coin-procedure"


class CoinGoal(Coin):
    task = "coin-goal"


# --- images -------------------------------------------------------------------------------------


class Llava(Benchmark):
    """Image instructions of LLaVA: questions after the image.

    Without val.json, every twentieth image is val. Entries without an image are left out, and so
    are turns that are no pair of a question and an answer. Several images are a mistake.
    """

    task, asks = "llava", True

    @classmethod
    def records(cls, folder: Path, split: str) -> Iterator[tuple[str, object]]:
        whole = not (folder / "val.json").exists()
        files = sorted(folder.glob("*.json")) if whole else [folder / f"{split}.json"]
        for file in files:
            for number, entry in enumerate(read_annotations(file), 1):
                yield f"{file}, entry {number}", (entry, split if whole else "")

    @classmethod
    def entries(cls, record: tuple[dict, str]) -> Iterator[dict]:
        entry, split = record
        image = image_of(entry)
        is_val = zlib.crc32(str(image).encode()) % 20 == 0
        if not image or (split and is_val != (split == "val")):
            return
        turns = question_pairs(entry["conversations"])
        if turns:
            yield {"video": image, "end": 0, "conversation": turns}

    def score(
        self, model: VideoLM, tokenizer: Tokenizer, samples: list[Sample], said: list[str]
    ) -> dict[str, float]:
        """Relaxed accuracy"""
        return relaxed(said, true_answers(tokenizer, samples))


def image_of(entry: dict) -> object:
    """The image of an entry, or nothing: some files have null, an empty text or a list there."""
    image = entry.get("image")
    if isinstance(image, list):
        need(len(image) < 2, "image must be one file", image)
        image = image[0] if image else None
    return image


def question_pairs(conversation: list[dict]) -> list[dict]:
    """Untimed turns: each question of the human that the model answers, and the answer"""
    said = []
    for turn in conversation:
        text = turn["value"]
        known = type(text) in (str, int, float) and text == text  # NaN is not
        need(known, "value must be text or a number", text)
        said.append((turn["from"], str(text).replace("<image>", "").strip()))
    turns = []
    for (asks, question), (tells, answer) in pairwise(said):
        if (asks, tells) == ("human", "gpt") and question and answer:
            turns.append({"role": "user", "content": question})
            turns.append({"role": "assistant", "content": answer})
    return turns


COIN = (CoinStep, CoinNext, CoinTask, CoinProcedure, CoinGoal)
TASKS = worlds.TASKS | {source.task: source for source in (Ego4D, LTA, *COIN, Keystep, Llava)}


@dataclass(frozen=True)
class NoFlags:
    """This command has no flags."""


def main(argv: list[str] | None = None) -> None:
    parse(NoFlags, argv, __doc__)
    print(__doc__)


if __name__ == "__main__":
    run_main(main)
