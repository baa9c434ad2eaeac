"""One command trains the rows of a table, whatever interrupts it, and the tables say what the rows say."""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import ClassVar
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import data
import eval as evaluation
import model as models
import train


class Child:
    """In place of a process that trains: the same, here and now"""

    asked: ClassVar[list[list[str]]] = []

    def __init__(self, command: list[str], **how) -> None:
        self.asked.append(command[2:])
        train.main(command[2:])

    def wait(self) -> int:
        return 0

    def terminate(self) -> None:
        pass


def test_a_sweep_trains_each_row_once_goes_on_where_it_was_cut_and_tables_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train.SWEEPS, "own", """
        dense      --task vqa --plan dense --preset tiny
        converted  --task vqa --init DENSE --plan all""")
    monkeypatch.setattr(train.subprocess, "Popen", Child)
    monkeypatch.setattr(train.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, "", ""))
    sweep = ["--sweep", "own", "--seeds", "2", "--steps", "1", "--streams", "2", "--device", "cpu"]
    train.main(sweep)
    names = ["dense-seed0", "converted-seed0", "dense-seed1", "converted-seed1"]
    assert [argv[0].rpartition("/")[2] for argv in Child.asked] == names
    rows = json.loads(Path("out/own.json").read_text())
    assert {row["run"]: row["plan"] for row in rows} == dict(zip(names, ["dense", "all"] * 2, strict=True))
    assert rows[0]["init"].endswith("out/own/dense-seed0") and rows[0]["peak_memory"] > 10**7
    assert {"argv", "commit", "device", "torch", "placement"} <= rows[0].keys()
    assert re.fullmatch(r"([0-9a-f]{40}(-dirty)?)?", rows[0]["commit"])
    assert {"accuracy", "step_flops", "seconds_per_step"} <= rows[0]["free_running"].keys()
    Path("out/own/dense-seed1/eval.json").unlink()  # as if it had been killed just then
    Child.asked.clear()
    train.main(sweep)
    assert Child.asked == [["--out=out/own/dense-seed1", "--resume", "--device=cpu"]]
    assert len(json.loads(Path("out/own.json").read_text())) == len(rows)
    evaluation.main(["out/own", "--table"])
    assert "| `converted` | " in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"sweep must go on with the flags that .*, got .*\"steps\": \"2\""):
        train.main([*sweep, "--steps", "2"])
    Path("out/own/dense-seed0/eval.json").unlink()
    monkeypatch.setattr(Child, "wait", lambda self: 2)
    Child.asked.clear()
    with pytest.raises(ValueError, match=r"dense-seed0 must train and be evaluated, its end is in .*\.log"):
        train.main(sweep)
    assert len(Child.asked) == 1


def test_who_stops_a_sweep_stops_its_runs(tmp_path):
    command = [sys.executable, train.__file__, "--sweep", "scene", "--seeds", "2", "--jobs", "2"]
    begun, deadline = tmp_path / "out" / "scene" / "dense-seed0" / "log.jsonl", time.monotonic() + 120
    with subprocess.Popen([*command, "--device", "cpu"], cwd=tmp_path, stdout=subprocess.DEVNULL) as sweep:
        while not begun.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        sweep.terminate()
        assert sweep.wait(60) == 143
    length = begun.stat().st_size
    time.sleep(3)
    assert begun.stat().st_size == length and not (tmp_path / "out" / "scene.json").exists()


@pytest.mark.parametrize(("wrong", "complaint"), [
    (["--sweep", "nope"], "sweep must be one of narration, forecast, summary, scene, vqa, got nope"),
    (["--jobs", "2"], "jobs must be given with sweep, got no sweep"),
    (["--sweep", "scene", "--seed", "1"], "sweep must not be given with seed, which its rows have")])
def test_a_sweep_that_cannot_be_is_refused_in_a_sentence(wrong, complaint):
    with pytest.raises(ValueError, match=complaint):
        train.main(wrong)


def test_each_row_of_a_sweep_is_a_run_that_train_takes():
    for name, rows in train.SWEEPS.items():
        names = [line.split()[0] for line in rows.split("\n")[1:]]
        assert names[0] == "dense" and len(set(names)) == len(names)
        for row in rows.split("\n")[1:]:
            argv = ["--task", name, *row.split()[1:]]
            cfg, _ = train.models.parse(train.TrainConfig, argv, "")
            assert cfg.plan in {"arank", *train.PLACEMENTS}


@pytest.mark.parametrize(("n", "t", "p"), [(2, 12.706, 0.05), (3, 4.303, 0.05), (5, 2.776, 0.05),
                                           (5, 4.604, 0.01), (10, 2.262, 0.05), (5, 0.0, 1.0)])
def test_p_is_that_of_the_tables_of_students_t(n, t, p):
    spread = [i - (n - 1) / 2 for i in range(n)]
    error = evaluation.stdev(spread) / n**0.5
    assert evaluation.students_p([x + t * error for x in spread]) == pytest.approx(p, rel=0.002)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=9))
def test_p_is_a_share_the_same_for_both_signs_and_smaller_further_from_0(apart):
    p = evaluation.students_p(apart)
    assert 0 <= p <= 1 + 1e-9 and p == pytest.approx(evaluation.students_p([-x for x in apart]))
    mean = evaluation.fmean(apart)
    assert evaluation.students_p([x + mean for x in apart]) <= p + 1e-6


def test_a_table_has_means_and_errors_in_the_order_asked_for_and_compares_seed_by_seed():
    rows = [{"run": f"{name}-seed{seed}", "seed": seed, "free_running": {"accuracy": value, "skipped": 0.5}}
            for name, values in {"a-b": (0.9, 0.8, 0.7), "dense": (0.5, 0.4, 0.3), "c": (0.1, 0.3)}.items()
            for seed, value in enumerate(values)]
    assert evaluation.table(rows, ["dense", "a-b", "c"]).splitlines()[2:] == [
        "| `dense` (3 seeds) | 40.0% ± 5.8% | 50.0% |  |",
        "| `a-b` (3 seeds) | 80.0% ± 5.8% | 50.0% | +40.0 points (p < 0.001) |",
        "| `c` (2 seeds) | 20.0% ± 10.0% | 50.0% | -25.0 points (p 0.344) |"]
    assert "against `c`" in evaluation.table(rows, ["a-b"], "c")
    for names, base in ((["absent"], ""), ([], "absent")):
        with pytest.raises(ValueError, match="the rows of a table must be runs of its file, got absent"):
            evaluation.table(rows, names, base)
    with pytest.raises(ValueError, match="a table must have one run of a seed, got dense-seed0 and dense"):
        evaluation.table([*rows, rows[3] | {"run": "dense"}])
    with pytest.raises(ValueError, match="the runs of a table must be evaluated alike"):
        evaluation.table([*rows, {"run": "d", "seed": 0, "streams": 8, "free_running": {"accuracy": 0.5}}])


def test_only_what_stands_between_markers_is_renewed(tmp_path):
    rows = [{"run": "dense", "seed": 0, "free_running": {"accuracy": 0.5}}]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    page = "before\n<!-- table: x.json dense -->\n{}\n<!-- end -->\n| after |\n"
    made = page.format(evaluation.table(rows))
    assert evaluation.render(page.format("old\n\nolder"), tmp_path) == made
    assert evaluation.render(made, tmp_path) == made
    assert evaluation.render(page.replace("{}\n", ""), tmp_path) == made  # nothing between the markers yet


def test_a_scene_shows_exactly_what_it_says():
    for sample in data.Scene(48).held_out(20):
        begin = sample.turns[0].text.split()[-2]
        said = {turn.frame: turn.text for turn in sample.turns if turn.role == "assistant"}
        for number, frame in enumerate(sample.frames):
            named = said.get(number, ".")[:-1].split()
            cells = [frame[16 * (cell // 3) :][:16, 16 * (cell % 3) :][:, :16] for cell in range(9)]
            shown = [next((c for c, rgb in data.COLOURS.items() if (cell == rgb).all(2).sum() > 20), None)
                     for cell in cells]
            in_order = [colour for colour in shown if colour]
            at = in_order.index(begin) if in_order else 0
            assert named == in_order[at:] + in_order[:at] and len(named) in (0, 3, 4, 5)


def test_what_a_router_looks_at_is_counted_against_chance():
    c = replace(models.preset("tiny"), vocab_size=len(data.Tokenizer()), keep=(0.5, 1.0, 0.0, 0.5))
    net, samples, tokenizer = models.build(c), data.Scene(48).held_out(4), data.Tokenizer()
    b, _ = evaluation.hear(net, tokenizer, samples)
    painted = sum((b.frames == torch.tensor(rgb)[:, None, None]).all(2) for rgb in data.COLOURS.values())
    shown = painted.view(4, 6, 6, 8, 6, 8).amax((3, 5)).flatten(2)  # (B, F, 36)
    score = torch.zeros(b.tokens.shape)
    score[b.tokens == data.VISION] = F.pad(shown, (1, 0), value=2).flatten().float()  # CLS, then shapes
    net.score = lambda *given: score
    looked = evaluation.on_shapes(net, tokenizer, samples)
    some = shown[shown.sum(2) > 0].float()
    assert looked["chance"] == pytest.approx(float(some.mean()))
    best = some.sum(1).clamp(max=18).sum() / (18 * len(some))  # of 19 of 37 kept, one is CLS
    assert looked["layer 0"] == looked["layer 3"] == pytest.approx(float(best)) and len(looked) == 3
    assert evaluation.on_shapes(models.build(replace(c, keep=(1.0,) * 4)), tokenizer, samples) == {}


def test_a_chart_is_an_svg_that_shows_each_curve_inside_its_frame_and_no_two_names_at_one_place():
    curves = {f"row {n}": [(0.5, 0.9, 0.01)] for n in range(9)} | {"line": [(0.1, 0.2, 0.0), (0.9, 0.4, 0.1)]}
    svg = ElementTree.fromstring(evaluation.chart("title", "across", "up", curves))
    texts = {t.text: t for t in svg.iter("{http://www.w3.org/2000/svg}text")}
    assert {"title", "across", "up", *curves} <= texts.keys()
    names = [(texts[name].get("x"), texts[name].get("y")) for name in curves]
    assert len(set(names)) == len(names)
    for circle in svg.iter("{http://www.w3.org/2000/svg}circle"):
        assert 60 <= float(circle.get("cx")) <= 540 and 50 <= float(circle.get("cy")) <= 310
    one = evaluation.chart("t", "a", "u", {"only": [(1.0, 0.5, 0.0)]})  # no span at all
    assert "nan" not in one and "inf" not in one


def test_the_charts_of_a_sweep_have_a_point_a_row_and_a_curve_a_routed_layer():
    rows = [{"run": f"{name}-seed{seed}", "seed": seed, "flops_of_dense": 0.7, "free_running": {
        "lm_correctness": 0.9 + seed / 100}, "on_shapes_at": {"40": {"layer 1": 0.5, "chance": 0.3},
                                                              "80": {"layer 1": 0.6, "chance": 0.3}}}
            for name in ("dense", "interleaved") for seed in range(2)]
    made = evaluation.charts(rows)
    assert made["quality.svg"].count("<circle") == 2 and made["router.svg"].count("<circle") == 4
    assert "layer 1" in made["router.svg"] and "chance" in made["router.svg"]
