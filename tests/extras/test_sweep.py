"""One command trains the rows of a table, whatever interrupts it."""

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import ClassVar

import pytest

import train
from data import Tokenizer, World
from eval import read
from extras import pretrained, pretrained_model, sweep, tables
from extras.baselines import VARIANTS
from mod import PLACEMENTS
from model import load, parse

ROOT = Path(__file__).parents[2]
FIXTURES = Path(__file__).parent / "fixtures"


class Child:
    """In place of a process that trains: the same, here and now"""

    asked: ClassVar[list[list[str]]] = []

    def __init__(self, command: list[str], **how) -> None:
        assert command[:4] == [sys.executable, "-m", "extras.sweep", "--row"]
        self.asked.append(command[4:])
        sweep.main(command[3:])

    def wait(self) -> int:
        return 0

    def terminate(self) -> None:
        pass


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A sweep of its own in an empty folder; its runs are trained in this process."""
    rows = """
        dense      --task vqa --plan dense --preset tiny
        converted  --task vqa --init DENSE --plan all"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sweep.SWEEPS, "own", rows)
    monkeypatch.setattr(sys, "argv", sys.argv)  # a row sets it
    monkeypatch.setattr(sweep.subprocess, "Popen", Child)
    git = subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(sweep.subprocess, "run", lambda *a, **k: git)
    Child.asked.clear()


SWEEP = ["own", "--seeds", "2", "--steps", "1", "--streams", "2", "--device", "cpu"]
NAMES = ["dense-seed0", "converted-seed0", "dense-seed1", "converted-seed1"]


def test_a_sweep_trains_each_row_once_and_tables_them(here, capsys):
    sweep.main(SWEEP)
    assert [argv[0].rpartition("/")[2] for argv in Child.asked] == NAMES
    rows = json.loads(Path("out/own.json").read_text())
    plans = dict(zip(NAMES, ["dense", "all"] * 2, strict=True))
    assert {row["run"]: row["plan"] for row in rows} == plans
    row = {row["run"]: row for row in rows}
    converted, dense = row["converted-seed0"], row["dense-seed0"]
    assert converted["init"].endswith("out/own/dense-seed0") and converted["peak_memory"] > 10**7
    assert {"argv", "commit", "device", "torch", "placement", "parameters"} <= converted.keys()
    assert re.fullmatch(r"([0-9a-f]{40}(-dirty)?)?", converted["commit"])
    assert {"accuracy", "step_flops", "seconds_per_step"} <= converted["free_running"].keys()
    for share in ("step_flops", "flops_of_dense"):
        assert converted["free_running"][share] < dense["free_running"][share] == 1
    assert dense["on_shapes_at"] == {}  # it has no routed layer
    assert converted["on_shapes_at"]["1"].keys() == {f"layer {n}" for n in range(3)} | {"chance", "at most"}
    tables.main(["out/own"])
    assert "| `converted` | " in capsys.readouterr().out


def test_a_sweep_goes_on_where_it_was_cut_off(here):
    sweep.main(SWEEP)
    rows = json.loads(Path("out/own.json").read_text())
    Path("out/own/dense-seed1/eval.json").unlink()  # as if it had been killed just then
    Child.asked.clear()
    sweep.main(SWEEP)
    assert Child.asked == [["--out=out/own/dense-seed1", "--resume", "--device=cpu"]]
    assert len(json.loads(Path("out/own.json").read_text())) == len(rows)
    wrong = r"sweep must go on with the flags that .*, got .*\"steps\": \"2\""
    with pytest.raises(ValueError, match=wrong):
        sweep.main([*SWEEP, "--steps", "2"])


def test_a_run_that_fails_ends_a_sweep(here, monkeypatch):
    monkeypatch.setattr(Child, "wait", lambda self: 2)
    failed = r"dense-seed0 must train and be evaluated, its end is in .*\.log"
    with pytest.raises(ValueError, match=failed):
        sweep.main(SWEEP)
    assert len(Child.asked) == 1 and not Path("out/own.json").exists()


def test_who_stops_a_sweep_stops_its_runs(tmp_path):
    flags = ["--seeds", "2", "--jobs", "2", "--device", "cpu"]
    command = [sys.executable, "-m", "extras.sweep", "narration", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    begun = tmp_path / "out" / "narration" / "dense-seed0" / "log.jsonl"
    deadline = time.monotonic() + 120
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, cwd=tmp_path, stdout=quiet, env=environment) as process:
        while not begun.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.terminate()
        assert process.wait(60) == 143
    length = begun.stat().st_size
    time.sleep(3)
    assert begun.stat().st_size == length
    assert not (tmp_path / "out" / "narration.json").exists()


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ([], "sweep must be one of narration, forecast, summary, scene, vqa, got none"),
        (["nope"], "sweep must be one of narration, forecast, summary, scene, vqa, got nope"),
        (["scene", "--jobs", "0"], "jobs must be above 0 and below .*, got 0"),
        (["scene", "--seed", "1"], "unrecognized arguments: --seed 1"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_in_a_sentence(wrong, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=complaint):
        sweep.main(wrong)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_looked_at_on_32_held_out_streams_without_dropout(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)  # a row sets it
    look, run, training = sweep.look, tmp_path / "run", []
    monkeypatch.setattr(sweep, "look", lambda folder, model, step: training.append(model.training) or look(folder, model, step))
    sweep.train_row([f"--out={run}", "--steps", "1", "--batch", "1", "--streams", "0", "--device", "cpu"])
    assert training == [False, False]
    last = sweep.read_lines(run / "looks.jsonl")[-1]
    readings = read(load(run).eval(), Tokenizer(), World(48).held_out(32), 0.0)
    nll = [loss for reading in readings for losses in reading.nll.values() for loss in losses]
    right = [one for reading in readings for some in reading.right.values() for one in some]
    assert last["perplexity"] == pytest.approx(math.exp(fmean(nll))) and last["reply_accuracy"] == fmean(right)


@pytest.mark.parametrize(("flags", "scores"), [
    ({"init": "x", "save_every": 150}, {"reply_accuracy_before": 0.25}), ({"save_every": 25}, {"steps_to_95": 10.0}),
    ({"init": "x", "save_every": 26, "steps": 9}, {"reply_accuracy_before": 0.25}), ({}, {})])
def test_replies_before_the_first_step_are_those_of_a_conversion_and_steps_are_counted_on_a_fine_line(flags, scores):
    seen = {0: 0.25, 10: 0.95, 20: 0.125}
    assert sweep.scores_over_steps(seen, train.TrainConfig(**flags)) == scores


def test_each_row_of_a_sweep_is_a_run_that_train_takes():
    for name in sweep.SWEEPS:
        rows = sweep.rows_of(name)
        names = [row[0] for row in rows]
        assert names[0] == "dense" and len(set(names)) == len(names)
        for _, *words in rows:
            flags = [word for word in words if word not in VARIANTS]
            cfg, _ = parse(train.TrainConfig, ["--task", name, *flags], "")
            assert cfg.plan in {*train.MEASURED, *PLACEMENTS}


@pytest.mark.parametrize(("word", "name"), [("WORST", "rank_placement"), ("A-MOD", "VideoLM"), ("RANDOM-SELECTION", "VideoLM")])
def test_a_word_of_a_row_puts_its_variant_in_the_place_of_what_train_uses(word, name, tmp_path, monkeypatch):
    (row,) = [row for table in ("scene", "vqa") for row in sweep.rows_of(table) if row[-1] == word][:1]
    command = sweep.Sweep("scene", [], 1, {}, "cpu").command(tmp_path / "run", row[1:], 0)
    assert command[4] == word and word not in command[5:]
    for module in (train, sweep.core):  # so that they are as before when the test ends
        if hasattr(module, name):
            monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(pretrained_model, "PretrainedLM", pretrained_model.PretrainedLM)
    began = []
    monkeypatch.setattr(train, "main", began.append)
    sweep.train_row(command[4:])
    assert getattr(train, name) is VARIANTS[word][1] and began == [command[5:]]
    assert hasattr(sweep.core, "rank_placement") is False
    if name == "VideoLM":  # models of folders too
        assert issubclass(pretrained_model.PretrainedLM, VARIANTS[word][1])


def test_the_worst_placement_keeps_the_lowest_ranks_dense():
    assert VARIANTS["WORST"][1]([3.0, 1.0, 2.0], 0.5, 1) == (0.5, 1.0, 0.5)


@pytest.mark.parametrize(("looks", "steps"), [
    ({}, 0), ({25: 0.5}, 25), ({25: 0.95}, 25), ({25: 0.5, 50: 1.0}, 47.5), ({50: 1.0, 25: 0.75}, 45), ({10: 0.2, 20: 0.2}, 20)])
def test_the_steps_to_a_goal_lie_on_the_line_between_two_looks(looks, steps):
    assert sweep.steps_to(0.95, looks) == pytest.approx(steps)


def test_0_steps_or_streams_stand_for_those_of_the_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    began = []
    monkeypatch.setattr(sweep.Sweep, "train", lambda self, seeds: began.append(self.flags))
    monkeypatch.setattr(sweep, "collect", lambda folder: [])
    Path("out").mkdir()
    sweep.main(["scene", "--steps", "0", "--streams", "0"])
    sweep.main(["scene", "--streams", "8"])
    assert began == [{}, {"streams": "8"}]


@pytest.mark.parametrize(
    ("flags", "share"),
    [
        (["--llm", "smollm2", "--vision", "siglip"], 0.8722),  # adapters, and a frozen encoder
        (["--llm", "smollm2", "--vision", "siglip", "--train_vision"], 0.8748),
        (["--llm", "smollm2", "--lora_rank", "0"], 0.8707),
        (["--vision", "siglip"], 0.9405),
    ],
)
def test_the_share_of_a_step_knows_what_adapts_and_what_is_frozen(flags, share, tmp_path):
    pytest.importorskip("tokenizers", reason="reads tokenizer.json")
    folders = {"smollm2", "siglip"}
    argv = [str(FIXTURES / flag) if flag in folders else flag for flag in flags]
    argv += ["--batch", "2", "--out", str(tmp_path / "run"), "--device", "cpu"]
    settings, model = pretrained.prepare_run(*parse(pretrained.PretrainedFlags, argv, ""))
    batch = sweep.first_batch(tmp_path / "run", model, settings)
    assert sweep.step_share(model, batch) == share


def test_a_folder_without_runs_or_with_a_broken_one_is_refused_in_a_sentence(here, tmp_path):
    with pytest.raises(ValueError, match="absent must hold runs, got none"):
        sweep.collect(Path("absent"))
    sweep.main([*SWEEP, "--seeds", "1"])
    broken = Path("out/own/dense-seed0")
    for name, text in (("log.jsonl", "{"), ("eval.json", "[]"), ("train.json", "{}")):
        kept = (broken / name).read_text()
        (broken / name).write_text(text)
        if name == "train.json":  # it says nothing, so all its values are the defaults
            (broken / name).write_text('{"colour": 1}')
        with pytest.raises(ValueError, match="dense-seed0 must be an evaluated run: "):
            sweep.collect(broken.parent)
        (broken / name).write_text(kept)
    assert len(sweep.collect(broken.parent)) == 2
