"""Each benchmark is read from its own annotation files by the rules of the papers, trained on and scored."""

import json

import pytest
from strategies import make_video, needs_ffmpeg

import eval as evaluation
import train
from data import READERS, Folder
from eval import SCORES, edit_distance


def action(n, video="v"):
    return {"video_uid": video, "clip_uid": "c", "action_idx": n, "clip_parent_start_sec": 0.5,
            "action_clip_start_sec": n / 8, "action_clip_end_sec": (n + 1) / 8,
            "verb_label": n % 2, "noun_label": n % 3}


def recipe(subset, *labels):
    steps = [{"label": label, "segment": [n, n + 0.8]} for n, label in enumerate(labels)]
    return {"class": "MakeTea", "start": 0.2, "end": 2.9, "subset": subset, "annotation": steps}


TALKS = [{"time": time, "text": text, "_annotation_uid": annotator} for time, text, annotator in (
    (0.6, "#C C picks up #unsure", "1"), (0.9, "#C C drops a cup.", "1"), (0.1, "#O b", "1"),
    (1.2, "#c C drops a cup", "1"), (2.1, "#O A man X  walks ", "1"), (1.0, "#C C sits", "2"))]
TAKES = {"annotations": {"u": {"take_name": "v", "segments": [
    {"start_time": 0.3, "end_time": 1.1, "step_name": "Add salt", "step_unique_id": 7}]}}}
TALK = [{"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": "40"},
        {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes"}]
FILES = {
    "ego4d": {"all_narrations_redacted.json": {"videos": {uid: {"narrations": TALKS} for uid in "vwxy"}},
              "fho_val.json": {"clips": [{"video_uid": "v"}]},
              "nlq_test_unannotated.json": {"videos": [{"video_uid": "v"}, {"video_uid": "w"}]}},
    "lta": {"fho_lta_taxonomy.json": {"verbs": ["turn_on_(start)", "take"],
                                      "nouns": ["bat_(sport)", "bat_(animal)", "cup_(mug,_glass)"]},
            "fho_lta_train.json": {"clips": [action(n) for n in range(30)][::-1]},
            "fho_lta_val.json": {"clips": [action(n, "w") for n in range(28)]}},
    "coin": {"COIN.json": {"database": {"v": recipe("training", "boil water", "pour it", "stir"),
                                        "w": recipe("testing", "stir", "sip")}}},
    "keystep": {"keystep_train.json": TAKES, "keystep_val.json": TAKES},
    "llava": {"mix.json": [*({"image": f"i/a.{kind}", "conversations": TALK} for kind in ("png", "jpg")),
                           {"image": "i/a.png", "conversations": TALK[1:3]}, {"id": 3}]},
}


@pytest.fixture
def folder(tmp_path):
    """The annotations of all benchmarks, and their videos and images."""
    for name, files in FILES.items():
        (tmp_path / name / "i").mkdir(parents=True)
        for file, values in files.items():
            (tmp_path / name / file).write_text(json.dumps(values))
    return tmp_path


def read(folder, task, split="train"):
    return list(READERS[task][0](folder / task.split("-")[0], split))


def spans(entries):
    """video, start, end and answer of questions about spans"""
    assert all([t["role"] for t in e["conversation"]] == ["user", "assistant"] for e in entries)
    assert all([t["time"] for t in e["conversation"]] == [e["start"], e["end"]] for e in entries)
    return [(e["video"], e["start"], e["end"], e["conversation"][1]["content"]) for e in entries]


def test_narrations_are_cleaned_put_on_the_grid_and_split_by_the_lists_of_benchmarks(folder):
    mine, other, *_ = read(folder, "ego4d")  # two passes of each video that is in no list
    assert [(t["time"], t["content"]) for t in mine["conversation"]][1:] == [
        (1.0, "C drops a cup."), (2.5, "A man X walks.")]  # at 1.0 the later; at 1.5 the same again
    assert [(t["time"], t["content"]) for t in other["conversation"]][1:] == [(1.0, "C sits.")]
    assert (mine["video"], mine["end"]) == ("x.mp4", 2.5)
    assert {e["video"] for e in read(folder, "ego4d", "val")} == {"v.mp4"}  # though a test list has it


def test_from_eight_actions_the_next_twenty_are_asked(folder):
    first, *_, last = entries = spans(read(folder, "lta"))
    assert len(entries) == 3 and first[:3] == ("v.mp4", 0.5, 1.5) and last[:3] == ("v.mp4", 0.75, 1.75)
    answer = first[3].split("\n")
    assert answer[:3] == ["1. Turn-on cup.", "2. Take bat (sport).", "3. Turn-on bat (animal)."]
    assert len(answer) == 20 and [e[0] for e in spans(read(folder, "lta", "val"))] == ["w.mp4"]


def test_steps_next_steps_tasks_and_procedures_of_coin(folder):
    assert spans(read(folder, "coin-step"))[1] == ("v.mp4", 1, 1.8, "Pour it.")
    assert [a for *_, a in spans(read(folder, "coin-next"))] == ["Pour it.", "Stir."]
    assert spans(read(folder, "coin-task")) == [("v.mp4", 0.2, 2.9, "Make Tea.")]
    assert [a for *_, a in spans(read(folder, "coin-procedure"))] == ["1. Pour it.\n2. Stir.", "1. Stir."]
    assert "Make Tea." in read(folder, "coin-goal")[0]["conversation"][0]["content"]
    assert [e[0] for e in spans(read(folder, "coin-step", "val"))] == ["w.mp4"] * 2


def test_keysteps_and_questions_about_images(folder):
    assert spans(read(folder, "keystep")) == [("v.mp4", 0.3, 1.1, "Add salt.")]
    (entry,) = read(folder, "llava")
    assert [turn["content"] for turn in entry["conversation"]] == ["How many?", "40", "Sure?", "Yes"]
    assert entry["video"] == "i/a.png"  # by image, so that none is in both
    assert [entry["video"] for entry in read(folder, "llava", "val")] == ["i/a.jpg"]


@needs_ffmpeg
@pytest.mark.parametrize(("task", "score"), [  # the five of COIN share their code
    ("ego4d", "fluency"), ("lta", "ed_action"), ("coin-goal", "top1_nearest"), ("keystep", "top1_exact"),
    ("llava", "relaxed")])
def test_each_benchmark_is_trained_on_and_evaluated(folder, task, score, monkeypatch, capsys):
    data, run = folder / task.split("-")[0], folder / "run"
    for video in "vwx":
        make_video(data / f"{video}.mp4", 4.3, 8, "testsrc2=size=32x32")
    for image in ("a.png", "a.jpg"):  # large and detailed: ffmpeg takes such a jpg for a pattern of names
        make_video(data / "i" / image, 1, 1, "testsrc2=size=640x480", "format=rgb24")
    monkeypatch.setattr(evaluation.Watcher.__init__, "__defaults__", (0.0, None, 5))  # 5 tokens a reply
    train.main(["--task", task, "--data", str(data), "--out", str(run), "--steps", "1", "--batch", "1",
                "--streams", "1", "--device", "cpu"])
    assert score in json.loads((run / "eval.json").read_text())["free_running"]
    printed = capsys.readouterr().out
    assert "1 held-out clips" in printed
    assert ("2 of 4 clips lack their video" in printed) == (task == "ego4d")
    tested = {clip.video.name for clip in Folder(data, 16, task=task).tested}
    assert tested == {{"ego4d": "v.mp4", "keystep": "v.mp4", "llava": "a.jpg"}.get(task, "w.mp4")}


@pytest.mark.parametrize(("task", "file", "broken", "complaint"), [
    ("coin-step", "COIN.json", '{"data": 1}', r"COIN\.json must have 'database' where it has \['data'\]"),
    ("coin-step", "COIN.json", '{"database": [1]}', "must hold annotations of coin-step, got AttributeError"),
    ("coin-step", "COIN.json", json.dumps({"database": {"v": {
        "class": "A", "subset": "training", "start": 0, "end": 1,
        "annotation": [{"label": "a", "segment": [1]}]}}}),
     r"must hold annotations of coin-step, got ValueError\('not enough values"),
    ("lta", "fho_lta_train.json", '{"clips": [{}]}', r"fho_lta_train\.json must have 'clip_uid'"),
    ("ego4d", "all_narrations_redacted.json", "[", r"all_narrations_redacted\.json must be JSON"),
    ("keystep", "keystep_train.json", None, r"No such file.*keystep_train\.json"),
    ("llava", "mix.json", "[]", r"must hold clips and replies \(llava, train\), got 0 clips of 0"),
])
def test_a_broken_schema_is_named_in_a_sentence(folder, task, file, broken, complaint):
    path = folder / task.split("-")[0] / file
    path.write_text(broken) if broken else path.unlink()
    with pytest.raises((ValueError, OSError), match=complaint):
        Folder(path.parent, 16, task=task)


@pytest.mark.parametrize(("metric", "said", "true", "expected"), [
    # 1 of 4 lines is right as it is, "stirr" as the nearest, where the missing line is not counted
    ("top1", [["1. Pour it.\n2. stirr"], ["pour"]], ["1. Pour it.\n2. Stir.\n3. Sip.", "Sip."],
     [1 / 4, 2 / 3]),
    # the first has all verbs ("tke" is nearest to "take", the last is repeated), the second all nouns
    ("forecast", [["1. tke cup.\n2. take bat", "put pan\nput bat"]],
     ["1. Take pan.\n2. Take bat.\n3. Take bat."], [0, 0, 1 / 3]),
    ("relaxed", [["41.9%"], ["43"], ["YES."], ["nan"], ["Inf"]], ["40", "40", "Yes", "1", "inf"], [3 / 5]),
])
def test_answers_are_scored_as_worked_out_by_hand(metric, said, true, expected):
    known = [*true, "Put cup."] if metric == "forecast" else true
    assert list(SCORES[metric](said, true, known).values()) == pytest.approx(expected)
    assert [edit_distance(*pair) for pair in (("kitten", "sitting"), ("", "ab"), ([1], [1]))] == [3, 2, 0]
