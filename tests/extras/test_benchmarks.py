"""Each benchmark is read from its annotation files by the rules of the papers, and scored."""

import json
import math
import subprocess
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import make_video, needs_ffmpeg

import data
import eval as evaluation
import train
from extras import benchmarks
from extras.benchmarks import TASKS
from extras.scores import edit_distance, forecast, nearest, relaxed, top1


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
    "ego4d": {"all_narrations_redacted.json": {
                  "videos": {uid: {"narrations": TALKS} for uid in "vwxy"}},
              "fho_val.json": {"clips": [{"video_uid": "v"}]},
              "nlq_test_unannotated.json": {"videos": [{"video_uid": "v"}, {"video_uid": "w"}]}},
    "lta": {"fho_lta_taxonomy.json": {"verbs": ["turn_on_(start)", "take"],
                                      "nouns": ["bat_(sport)", "bat_(animal)", "cup_(mug,_glass)"]},
            "fho_lta_train.json": {"clips": [action(n) for n in range(30)][::-1]},
            "fho_lta_val.json": {"clips": [action(n, "w") for n in range(28)]}},
    "coin": {"COIN.json": {"database": {"v": recipe("training", "boil water", "pour it", "stir"),
                                        "w": recipe("testing", "stir", "sip")}}},
    "keystep": {"keystep_train.json": TAKES, "keystep_val.json": TAKES},
    "llava": {"mix.json": [
        *({"image": f"i/a.{kind}", "conversations": TALK} for kind in ("png", "jpg")),
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
    source = TASKS[task]
    found = [source.entries(record) for _, record in source.records(folder / task.split("-")[0], split)]
    return list(chain(*found))


def open_task(folder, task):
    return data.open_source(task, str(folder), 2.0, False, 16)


def spans(entries):
    """video, start, end and answer of questions about spans"""
    for e in entries:
        assert [t["role"] for t in e["conversation"]] == ["user", "assistant"]
        assert [t["time"] for t in e["conversation"]] == [e["start"], e["end"]]
    return [(e["video"], e["start"], e["end"], e["conversation"][1]["content"]) for e in entries]


def test_narrations_are_cleaned_put_on_the_grid_and_split_by_the_lists_of_benchmarks(folder):
    mine, other, *_ = read(folder, "ego4d")  # two passes of each video that is in no list
    assert [(t["time"], t["content"]) for t in mine["conversation"]][1:] == [
        (1.0, "C drops a cup."), (2.5, "A man X walks.")]  # at 1.0 the later; at 1.5 the same again
    assert [(t["time"], t["content"]) for t in other["conversation"]][1:] == [(1.0, "C sits.")]
    assert (mine["video"], mine["end"]) == ("x.mp4", 2.5)
    assert {e["video"] for e in read(folder, "ego4d", "val")} == {"v.mp4"}  # in a test list too


def test_from_eight_actions_the_next_twenty_are_asked(folder):
    first, *_, last = entries = spans(read(folder, "lta"))
    assert len(entries) == 3
    assert first[:3] == ("v.mp4", 0.5, 1.5) and last[:3] == ("v.mp4", 0.75, 1.75)
    answer = first[3].split("\n")
    assert answer[:3] == ["1. Turn-on cup.", "2. Take bat (sport).", "3. Turn-on bat (animal)."]
    assert len(answer) == 20 and [e[0] for e in spans(read(folder, "lta", "val"))] == ["w.mp4"]


def test_steps_next_steps_tasks_and_procedures_of_coin(folder):
    assert spans(read(folder, "coin-step"))[1] == ("v.mp4", 1, 1.8, "Pour it.")
    assert [a for *_, a in spans(read(folder, "coin-next"))] == ["Pour it.", "Stir."]
    assert spans(read(folder, "coin-task")) == [("v.mp4", 0.2, 2.9, "Make Tea.")]
    answers = [a for *_, a in spans(read(folder, "coin-procedure"))]
    assert answers == ["1. Pour it.\n2. Stir.", "1. Stir."]
    assert "Make Tea." in read(folder, "coin-goal")[0]["conversation"][0]["content"]
    assert [e[0] for e in spans(read(folder, "coin-step", "val"))] == ["w.mp4"] * 2


def test_keysteps_and_questions_about_images(folder):
    assert spans(read(folder, "keystep")) == [("v.mp4", 0.3, 1.1, "Add salt.")]
    (entry,) = read(folder, "llava")
    said = [turn["content"] for turn in entry["conversation"]]
    assert said == ["How many?", "40", "Sure?", "Yes"]
    assert entry["video"] == "i/a.png"  # by image, so that none is in both
    assert [entry["video"] for entry in read(folder, "llava", "val")] == ["i/a.jpg"]


@needs_ffmpeg
@pytest.mark.parametrize(("task", "score"), [  # the five of COIN share their code
    ("ego4d", "fluency"), ("lta", "ed_action"), ("coin-goal", "top1_nearest"),
    ("keystep", "top1_exact"), ("llava", "relaxed")])
def test_each_benchmark_is_trained_on_and_evaluated(folder, task, score, monkeypatch, capsys):
    videos, run = folder / task.split("-")[0], folder / "run"
    for video in "vwx":
        make_video(videos / f"{video}.mp4", 4.3, 8, "testsrc2=size=32x32")
    for image in ("a.png", "a.jpg"):  # large: ffmpeg takes such a jpg for a pattern of names
        make_video(videos / "i" / image, 1, 1, "testsrc2=size=640x480", "format=rgb24")
    monkeypatch.setattr(evaluation.Watcher.__init__, "__defaults__", (0.0, 0, 5))  # of a reply
    train.main(["--task", task, "--data", str(videos), "--out", str(run), "--steps", "1",
                "--batch", "1", "--streams", "1", "--device", "cpu"])
    assert score in json.loads((run / "eval.json").read_text())["free_running"]
    printed = capsys.readouterr().out
    assert "1 held-out clips" in printed
    assert ("2 of 4 clips lack their video" in printed) == (task == "ego4d")
    assert "after the end of their video" not in printed
    tested = {clip.video.name for clip in open_task(videos, task).tested}
    names = {"ego4d": "v.mp4", "keystep": "v.mp4", "llava": "a.jpg"}
    assert tested == {names.get(task, "w.mp4")}


@pytest.mark.parametrize(("task", "file", "broken", "complaint"), [
    ("coin-step", "COIN.json", '{"data": 1}',
     r"COIN\.json must have 'database' where it has \['data'\]"),
    ("coin-step", "COIN.json", '{"database": {"v": {}}}', r"COIN\.json, v: must have 'subset'"),
    ("coin-step", "COIN.json", '{"database": [1]}',
     "must hold annotations of coin-step, got AttributeError"),
    ("coin-step", "COIN.json", json.dumps({"database": {"v": {
        "class": "A", "subset": "training", "start": 0, "end": 1,
        "annotation": [{"label": "a", "segment": [1]}]}}}),
     r"COIN\.json, v: segment must be \[start, end\], got \[1\]"),
    ("lta", "fho_lta_train.json", '{"clips": [{}]}',
     r"fho_lta_train\.json, None: must have 'action_idx'"),
    ("lta", "fho_lta_train.json", '{"clips": [7]}', r"fho_lta_train\.json, None: must have the fields of lta"),
    ("ego4d", "all_narrations_redacted.json", "[", r"all_narrations_redacted\.json must be JSON"),
    ("keystep", "keystep_train.json", None, r"No such file.*keystep_train\.json"),
    ("llava", "mix.json", "[]", r"must hold clips and replies \(llava, train\), got 0 clips of 0"),
])
def test_a_broken_schema_is_named_in_a_sentence(folder, task, file, broken, complaint):
    path = folder / task.split("-")[0] / file
    path.write_text(broken) if broken else path.unlink()
    with pytest.raises((ValueError, OSError), match=complaint):
        open_task(path.parent, task)


def test_top_1_is_over_all_lines_as_they_are_or_as_the_nearest_known_line():
    # 1 of 4 lines is right as it is, "stirr" as the nearest, where the missing line is not counted
    true = ["1. Pour it.\n2. Stir.\n3. Sip.", "Sip."]
    scores = top1(["1. Pour it.\n2. stirr", "pour"], true, true)
    assert scores == {"top1_exact": 1 / 4, "top1_nearest": pytest.approx(2 / 3)}


def test_a_forecast_counts_as_its_best_candidate_in_verbs_nouns_and_both():
    # the first has all verbs ("tke" is nearest to "take", the last is repeated), the second nouns
    said = [["1. tke cup.\n2. take bat", "put pan\nput bat"]]
    true = ["1. Take pan.\n2. Take bat.\n3. Take bat."]
    scores = forecast(said, true, [*true, "Put cup."])
    assert scores == {"ed_verb": 0, "ed_noun": 0, "ed_action": pytest.approx(1 / 3)}


def test_a_relaxed_answer_is_the_same_or_a_number_within_5_percent():
    said, true = ["41.9%", "43", "YES.", "nan", "Inf"], ["40", "40", "Yes", "1", "inf"]
    assert relaxed(said, true) == {"relaxed": pytest.approx(3 / 5)}


@given(st.text("ab c", max_size=6), st.lists(st.text("ab c", min_size=1, max_size=6), min_size=1))
def test_the_nearest_text_is_that_of_the_least_edit_distance(text, known):
    pairs = (("kitten", "sitting"), ("", "ab"), ([1], [1]))
    assert [edit_distance(*pair) for pair in pairs] == [3, 2, 0]
    assert nearest(text, tuple(known)) == min(known, key=lambda other: edit_distance(text, other))


def test_a_benchmark_needs_a_folder_and_all_tasks_are_named_in_the_help(capsys):
    with pytest.raises(ValueError, match=r"data must name a folder .* for the task lta, got none"):
        data.open_source("lta", "", 2.0, False, 16)
    with pytest.raises(ValueError, match=f"one of narration, vqa, {', '.join(TASKS)}, got chess"):
        data.open_source("chess", "", 2.0, False, 16)
    benchmarks.main([])
    printed = capsys.readouterr().out
    for task, source in TASKS.items():
        assert task in printed and source.task == task and data.find_task(task) is source


@needs_ffmpeg
def test_of_the_narrations_after_the_end_of_a_video_the_first_is_moved_there(folder, capsys):
    said = [{"time": t, "text": f"#C C sees {t}", "_annotation_uid": "1"} for t in (1, 9, 2.5)]
    known = {"videos": {uid: {"narrations": said} for uid in "vx"}}
    (folder / "ego4d" / "all_narrations_redacted.json").write_text(json.dumps(known))
    for video, seconds in (("v", 0.4), ("x", 9)):
        make_video(folder / "ego4d" / f"{video}.mp4", seconds, 5, "testsrc2=size=32x32")
    source = open_task(folder / "ego4d", "ego4d")
    (whole,) = source.batch(0, 0, 1)
    (short,) = source.held_out(1)
    assert [turn.frame for turn in whole.turns] == [0, 2, 5, 18]
    # A span may end up to 2 s after its file, in copies of the last frame.
    assert [(turn.frame, turn.text) for turn in short.turns[1:]] == [(2, "C sees 1."), (4, "C sees 2.5.")]
    assert len(short.frames) == 5
    assert "the times of 1 of 2 clips that were read lie more than 2 s after" in capsys.readouterr().out


@needs_ffmpeg
@pytest.mark.parametrize(("rate", "fps", "partial", "frames"), [  # and 2 s of copies
    (5, 2, False, 11 + 4), (100, 2, True, 11 + 4), (100, 0.24, False, 2)])  # 100: key pictures at 0, 2.5 and 5 s
def test_of_a_clip_the_frames_and_times_after_the_end_are_those_at_the_end(folder, rate, fps, partial, frames):
    spans = [[0.3, 1.2], [4.8, 5.2], [5.1, 8.3], [6.2, 30], [26, 30], [26.1, 26.4], [10**8 + 0.3, 10**8 + 0.5]]
    steps = [{"label": f"step {i}", "segment": span} for i, span in enumerate(spans)]
    known = {"v": recipe("training", "wait"), "w": recipe("testing") | {"annotation": steps}}
    (folder / "coin" / "COIN.json").write_text(json.dumps({"database": known}))
    (folder / "coin" / "v.mp4").touch()
    made = make_video(folder / "made.mp4", 5.3, rate, "testsrc2=size=32x32")
    begin_late = "-c copy -output_ts_offset 20 -f matroska".split()
    subprocess.run(["ffmpeg", "-v", "error", "-i", made, *begin_late, folder / "coin" / "w.mp4"], check=True)
    source = data.open_source("coin-step", str(folder / "coin"), fps, partial, 16)
    whole = data.Clips.decode(source, source.tested[0]._replace(start=0, end=30))
    assert len(whole) == frames
    samples = source.held_out(len(spans))
    late = [math.ceil(fps * end) >= frames for _, end in spans]
    assert [source.late[clip.where] for clip in source.tested] == late and not source.left_out
    for i, (sample, (start, end)) in enumerate(zip(samples, spans, strict=True)):
        first, last = (min(math.ceil(fps * time), frames - 1) for time in (start, end))
        assert np.array_equal(sample.frames, whole[first : last + 1])
        assert np.array_equal(source.pixels(sample), sample.frames)
        assert [turn.frame for turn in sample.turns] == [0, last - first]
        assert sample.turns[1].text == f"Step {i}."


@needs_ffmpeg
def test_a_video_that_is_damaged_is_refused_though_its_end_is_whole(folder):
    for video in "vw":
        path = make_video(folder / "coin" / f"{video}.mp4", 5.3, 100, "testsrc2=size=32x32")
        stored = bytearray(path.read_bytes())
        stored[len(stored) // 4 : len(stored) // 4 + 99] = bytes(99)
        path.write_bytes(stored)
    with pytest.raises(ValueError, match=r"COIN\.json, v, clip 1: .*v\.mp4 must decode whole"):
        open_task(folder / "coin", "coin-task").batch(0, 0, 1)


SECONDS = st.floats(0, 1e9) | st.floats(0, 20)


@given(st.tuples(SECONDS, SECONDS).map(sorted), st.integers(1, 9), st.sampled_from([0.1, 1.0, 2.0, 30.0]), st.booleans())
def test_a_clip_that_was_encoded_before_is_late_where_its_answer_has_no_frame(span, frames, fps, partial):
    entry = benchmarks.question_of_span("v", *span, "What?", "This.")
    clip = data.check_entry(entry, "here", Path())
    source = TASKS["coin-step"]([clip], 16, fps, partial)
    source.late, source.encode = {}, lambda clip: np.zeros((frames, 1, 1), np.float32)
    (sample,) = source.batch(0, 0, 1)
    asked = math.ceil(span[1] * fps - 1e-9) - math.ceil(span[0] * fps - 1e-9)  # frames after the first
    assert [turn.frame for turn in sample.turns] == [0, min(asked, frames - 1)]
    assert source.late == {"here": asked >= frames} and not source.left_out


@needs_ffmpeg
def test_a_run_on_annotations_that_all_lie_after_the_end_of_their_videos_is_trained_and_evaluated(folder, capsys):
    steps = {"annotation": [{"id": "7", "segment": [60 + n, 62.5 + n], "label": f"step {n}"} for n in range(3)]}
    known = {"v": recipe("training") | steps, "w": recipe("testing") | steps}
    (folder / "coin" / "COIN.json").write_text(json.dumps({"database": known}))
    for video in "vw":
        make_video(folder / "coin" / f"{video}.mp4", 1, 5, "testsrc2=size=32x32")
    train.main(["--task", "coin-step", "--data", str(folder / "coin"), "--out", str(folder / "run"), "--steps", "2",
                "--batch", "3", "--device", "cpu"])
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "lie more than" in line]
    assert said == (f"{folder / 'coin'}: the times of 6 of 6 clips that were read lie more than 2 s after the end of "
                    "their video, and were moved there")
    assert "top1_exact" in json.loads((folder / "run" / "eval.json").read_text())["free_running"]


def test_all_videos_and_segments_of_both_subsets_are_counted_in_the_schema_of_coin(tmp_path):
    """The real file has 11,827 videos, 9,030 of them to train on, and 46,354 segments; here is a hundredth of it."""
    counts, known = [*range(1, 8)] * 16 + [1, 2, 3, 4, 4, 1], {}
    testing = {n for n in range(118) if (n + 1) * 28 // 118 > n * 28 // 118}
    for n, count in enumerate(counts):
        steps = [{"id": str(i), "segment": [10.0 * i, 10 * i + 7], "label": f"put the lid, {i}"} for i in range(count)]
        known[f"-id_{n}"] = {
            "video_url": f"https://www.youtube.com/embed/-id_{n}", "recipe_type": n % 12, "start": 0.0, "end": 80,
            "duration": 99.5, "class": "ReplaceCDDriveWithSSD", "annotation": steps,
            "subset": "testing" if n in testing else "training"}
        (tmp_path / f"-id_{n}.mp4").touch()
    (tmp_path / "COIN.json").write_text(json.dumps({"database": known}))
    found = {task: open_task(tmp_path, task) for task in TASKS if task.startswith("coin")}
    step, task = found.pop("coin-step"), found.pop("coin-task")
    assert (len(task.clips), len(task.tested), sum(counts)) == (90, 28, 463)
    assert task.answers() == ["Replace CD Drive With SSD."] * 28
    for clips, chosen in ((step.clips, set(range(118)) - testing), (step.tested, testing)):
        assert [clip.video.stem for clip in clips] == [f"-id_{n}" for n in sorted(chosen) for _ in range(counts[n])]
    assert len(step.clips) + len(step.tested) == 463
    assert found.keys() == {"coin-next", "coin-procedure", "coin-goal"}
    for source in found.values():  # a step to come has each but the last of its video
        assert len(source.clips) + len(source.tested) == 463 - 118
    lines = [answer.count("\n") + 1 for answer in found["coin-procedure"].answers()]
    assert lines == [min(5, counts[n] - i) for n in sorted(testing) for i in range(1, counts[n])]


@pytest.mark.parametrize(("task", "file", "spoil", "complaint"), [
    ("lta", "fho_lta_train.json", lambda f: f["clips"][3].update(verb_label=-1),
     "verb_label must be below 2, got -1"),
    ("lta", "fho_lta_train.json", lambda f: f["clips"][3].update(noun_label=True),
     "noun_label must be below 3, got True"),
    ("lta", "fho_lta_train.json", lambda f: f["clips"][3].update(action_idx=7),
     "each action_idx must come once"),
    ("coin-step", "COIN.json", lambda f: f["database"]["v"]["annotation"][0].update(label=" . "),
     "a text must not be empty"),
    ("coin-step", "COIN.json", lambda f: f["database"]["v"].update(subset="validation"),
     "subset must be training or testing, got 'validation'"),
    ("llava", "mix.json", lambda f: f.insert(0, {"image": "a.png", "conversations": [
        TALK[0], {"from": "gpt", "value": float("nan")}]}), "value must be text or a number, got nan"),
    *(("ego4d", "all_narrations_redacted.json",
       lambda f, time=time: f["videos"]["x"]["narrations"][0].update(time=time),
       "time must be a number from 0 to 1e") for time in (float("nan"), float("inf"), True, -1)),
])
def test_a_value_that_no_record_can_have_is_refused(folder, task, file, spoil, complaint):
    place = folder / task.split("-")[0]
    values = json.loads((place / file).read_text())
    spoil(values)
    (place / file).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"{file}, [^:]*: {complaint}"):
        open_task(place, task)


def test_a_list_of_videos_that_is_no_text_still_names_its_videos(folder):
    place = folder / "ego4d"
    listed = (place / "fho_val.json").read_bytes()
    (place / "fho_val.json").write_bytes(b"\xff" * 10**5 + listed)
    assert {e["video"] for e in read(folder, "ego4d", "val")} == {"v.mp4"}


LEFT_OUT = {  # task -> a record without which the rest is read: how to break the file of FILES
    "ego4d": ("all_narrations_redacted.json", lambda f: f["videos"].update(u={"narrations": [{}]})),
    "lta": ("fho_lta_train.json", lambda f: f["clips"].append({"clip_uid": "d"})),
    "coin-step": ("COIN.json", lambda f: f["database"].update(
        u=recipe("training", "sip") | {"annotation": [{"label": "sip", "segment": [5, 2]}]})),
    "keystep": ("keystep_train.json", lambda f: f["annotations"].update(z={"segments": 3})),
    "llava": ("mix.json", lambda f: f.append(None)),
}


@pytest.mark.parametrize("task", LEFT_OUT)
def test_a_bad_record_is_named_and_with_partial_the_others_are_read(folder, task, capsys):
    place = folder / task.split("-")[0]
    for name in ("v.mp4", "w.mp4", "x.mp4", "i/a.png", "i/a.jpg"):
        (place / name).touch()
    before = [clip[1:] for clip in open_task(place, task).clips]
    name, spoil = LEFT_OUT[task]
    broken = json.loads((place / name).read_text())
    spoil(broken)
    (place / name).write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=rf"{name}, [^:]*: .*must "):
        open_task(place, task)
    capsys.readouterr()
    assert [clip[1:] for clip in data.open_source(task, str(place), 2.0, True, 16).clips] == before
    assert f"left out with --partial: 1, the first is {place / name}" in capsys.readouterr().out


@pytest.mark.parametrize(("image", "read"), [
    (None, ""), ([], ""), ("", ""), (["i/b.png"], "i/b.png"), ("i/b.png", "i/b.png")])
def test_an_image_may_be_absent_or_a_list_of_one_and_an_answer_a_number(image, read):
    entry = {"image": image, "conversations": [TALK[0], {"from": "gpt", "value": 3}]}
    found = list(benchmarks.Llava.entries((entry, "")))
    assert [e["video"] for e in found] == [read] * bool(read)
    assert all(e["conversation"][1]["content"] == "3" for e in found)


def test_several_images_in_an_entry_are_named(folder):
    two = {"image": ["i/a.png", "i/a.jpg"], "conversations": TALK}
    (folder / "llava" / "mix.json").write_text(json.dumps([two]))
    with pytest.raises(ValueError, match=r"mix\.json, entry 1: image must be one file, got \['i/a"):
        open_task(folder / "llava", "llava")
