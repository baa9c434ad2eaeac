"""A user's mistake ends in one sentence on what must hold and what came, exit status 2, nothing written."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import eval as evaluation
import model as models
import train
from eval import GAMMA_PAPER, PAPER, gamma_cost, paper_cost
from model import VideoLM, load

ROOT = Path(__file__).parents[1]
SMALL = ["--steps", "1", "--batch", "1", "--streams", "1", "--device", "cpu"]


@pytest.mark.parametrize(("main", "argv", "complaint"), [
    (train.main, ["--plan", "sparse"], "plan must be one of dense, .*, got sparse"),
    (train.main, ["--preset", "huge"], "preset must be one of tiny, .*, got huge"),
    (train.main, ["--router", "magic"], "router must be one of learned, .*, got magic"),
    (train.main, ["--gate", "tanh"], "gate must be one of sigmoid, .*, got tanh"),
    (train.main, ["--task", "chess"], "task must be one of narration, scene, .*, got chess"),
    (train.main, ["--steps", "0"], "steps must be above 0 and below .*, got 0"),
    (train.main, ["--seed", "-1"], "seed must be at least 0 and below .*, got -1"),
    (train.main, ["--steps", "many"], "invalid int value: 'many'"),
    (train.main, ["--colour", "red"], "unrecognized arguments: --colour red"),
    (train.main, ["--step", "3"], "unrecognized arguments: --step 3"),
    (train.main, ["--device", "tpu"], "device must be cpu or, .*, got tpu"),
    (train.main, ["--data", "/absent"], "/absent must hold clips"),
    (train.main, ["--init", "/absent"], r"/absent/config\.json must hold the Config"),
    (train.main, ["--plan", "arank"], "init or llm must name a trained dense model for the plan arank"),
    (train.main, ["--masked", "all"], "masked must be one of text, .*, got all"),
    (train.main, ["--task", "scene", "--data", "x"], "task must not be given with data but to name a bench"),
    (train.main, ["--dense_layers", "1"], "dense_layers must be left out where it changes nothing, got 1"),
    (train.main, ["--router", "random", "--routing_loss", "1"], r"routing_loss must be left out .* got 1\.0"),
    (train.main, ["--shard"], "shard must be left out where it changes nothing, got True"),
    *((train.main, [f"--{name}", "1"], f"{name} must be given with {needs}, got no {needs}")
      for name, needs in (("fps", "data or resume"), ("lora_rank", "llm or resume"), ("seeds", "sweep"))),
    (train.main, ["--resume", "--seeds", "2"], "seeds must be given with sweep, got no sweep"),
    *((train.main, [*argv, f"--{name}", value], f"{name} must be left out .* got {value}")
      for name, value, *argv in (
          ("keep", "0.5", "--plan", "dense"), ("gate", "unit", "--plan", "early-exit"),
          ("masked", "none", "--plan", "dense"), ("gate", "unit", "--router", "uniform"),
          ("router", "shared", "--plan", "layer-skip"), ("muon_lr", "0.1", "--preset", "llama3-8b"))),
    (evaluation.main, ["--window", "4"], "window must be given with watch or html, got no watch or html"),
    (evaluation.main, ["--preset", "tiny"], "preset must be given with profile, got no profile"),
    (evaluation.main, ["--flops", "--watch", "x"], "flops must be given alone, got watch too"),
    (evaluation.main, ["out/x", "--flops"], "flops must be given alone, got run too"),
    (evaluation.main, ["--threshold", "2"], "threshold must be at most 1, got 2"),
    (evaluation.main, ["--watch", "x", "--window", "-1"], "window must be at least 0 and below .*, got -1"),
    (evaluation.main, ["absent", "--table"], "absent must hold runs, got none"),
    (evaluation.main, [], "out/ must hold a run to evaluate"),
])
def test_a_bad_flag_is_refused_in_a_sentence_and_writes_nothing(tmp_path, monkeypatch, main, argv, complaint):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=complaint):
        main([*argv, *(SMALL if main is train.main and {"--steps", "--device"}.isdisjoint(argv) else [])])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("script", "mistake", "complaint"), [
    ("train.py", "--keep=1.5", r"keep must be in \[0, 1\], got 1\.5"),
    ("eval.py", "nowhere", r"nowhere/config\.json must hold .*")])
def test_a_mistake_on_the_command_line_prints_one_line_and_exits_with_2(tmp_path, script, mistake, complaint):
    done = subprocess.run([sys.executable, ROOT / script, mistake], cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(f"{script}: error: {complaint}\n", done.stderr)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_a_sentence_and_a_defect_is_not(capsys, error):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as ended:
        models.run(main)
    assert ended.value.code == 2 and re.fullmatch(".*: error: .*memory.?\n", capsys.readouterr().err)
    error = RuntimeError("shapes differ")
    with pytest.raises(RuntimeError, match="shapes differ"):
        models.run(main)


def test_a_run_is_trained_evaluated_and_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main([*SMALL, "--plan", "all", "--keep", "0.5", "--out", "out/mine"])
    printed = capsys.readouterr().out
    for words in ("keep 0.5, 0.5, 0.5, 0.5", "median step", "LM-PPL", "TimeDiff", "Fluency",
                  "LM-Correctness", "decisions right", "out/mine/routing.png"):
        assert words in printed
    assert max(len(line) for line in printed.splitlines() if " s  " not in line) <= 80
    evaluation.main(["--streams", "1", "--device", "cpu"])  # the newest run in out/
    assert capsys.readouterr().out.startswith("out/mine: 1 held-out streams")
    result = json.loads(Path("out/mine/eval.json").read_text())
    assert set(result) == {"streams", "threshold", "teacher_forced", "free_running", "on_shapes"}
    assert Path("out/mine/routing.png").read_bytes().startswith(b"\x89PNG")


def test_a_dense_run_is_converted_with_two_commands_and_tabled_with_a_third(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = [*SMALL, "--task", "vqa"]
    train.main([*small, "--preset", "tiny", "--plan", "dense", "--out", "out/dense"])
    train.main([*small, "--init", "out/dense", "--plan", "arank", "--keep", "0.5", "--out", "out/gamma"])
    config, settings = (json.loads(Path(f"out/gamma/{n}.json").read_text()) for n in ("config", "train"))
    assert sorted(config["keep"]) == [0.5, 0.5, 0.5, 1.0] and config["num_hidden_layers"] == 4
    assert (config["router"], config["gate"], config["masked"]) == ("shared", "unit", "question+answer")
    assert (settings["routing_loss"], settings["plan"]) == (0.01, "arank")
    capsys.readouterr()
    evaluation.main(["out/dense", "--arank", "--device", "cpu"])
    *ranks, agreement = capsys.readouterr().out.splitlines()
    kinds = [{"dense": 1.0, "routed": 0.5}[line.split("+-")[1].split()[1]] for line in ranks[1:]]
    assert kinds == config["keep"] and agreement.startswith("Spearman correlation with 50 others")
    with pytest.raises(ValueError, match="ARank must be measured on a dense run"):
        evaluation.main(["out/gamma", "--arank", "--device", "cpu"])
    evaluation.main(["out", "--table"])
    table, rows = capsys.readouterr().out, json.loads(Path("out.json").read_text())
    assert [row["run"] for row in rows] == ["dense", "gamma"] and rows[1]["free_running"]["skipped"] > 0
    assert "| run | answers right | tokens skipped |" in table and "| `gamma` | 0.0% |" in table
    train.main(["--out", "out/gamma", "--resume", "--device", "cpu"])  # needs no --init and no ARank again
    with pytest.raises(ValueError, match="dense_layers must be fewer than the 4 layers, got 4"):
        train.main([*small, "--init", "out/dense", "--plan", "arank", "--dense_layers", "4"])
    models.save(Path("out/old"), VideoLM(replace(load(Path("out/dense")).config, vocab_size=9)))
    with pytest.raises(ValueError, match="preset must be left out where it changes nothing, got tiny"):
        train.main([*small, "--preset", "tiny", "--init", "out/dense"])
    with pytest.raises(ValueError, match="threshold must be given for a task with decisions, got vqa"):
        evaluation.main(["out/dense", "--threshold", "0.1", "--device", "cpu"])
    convert = ["--init", "out/old", "--plan", "arank"]
    for main, argv in ((evaluation.main, ["out/old"]), (train.main, convert)):
        with pytest.raises(ValueError, match=r"vocab_size must be \d+, the words of data\.WORDS, got 9"):
            main(argv)


def test_the_papers_cost_columns_are_reproduced():
    for skipped, paper in GAMMA_PAPER:
        assert gamma_cost(skipped) == pytest.approx(paper, abs=0.05)
    for plan, ratio, paper in PAPER:
        assert paper_cost(plan, ratio)[0] == pytest.approx(paper, abs=0.01)
    dense, routed = paper_cost("dense", 1.0), paper_cost("interleaved", 0.2)
    assert dense[2] == 32 * 11 * 2 * 8 * 128 * 2 and routed[2] == (16 * 11 + 16 * 3) * 2 * 8 * 128 * 2
    assert 0.6 < routed[1] / dense[1] < 0.64
