"""A user's mistake ends in one sentence on what must hold and what came, exit status 2, nothing written."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import eval as evaluation
import model as models
import train
from model import Config, VideoLM, load

ROOT = Path(__file__).parents[1]
SMALL = ["--steps", "1", "--batch", "1", "--streams", "1", "--device", "cpu"]


@pytest.mark.parametrize(("main", "argv", "complaint"), [
    (train.main, ["--plan", "sparse"], "plan must be one of dense, .*, got sparse"),
    (train.main, ["--preset", "huge"], "preset must be one of tiny, .*, got huge"),
    (train.main, ["--router", "magic"], "router must be one of learned, .*, got magic"),
    (train.main, ["--gate", "tanh"], "gate must be one of sigmoid, .*, got tanh"),
    (train.main, ["--task", "chess"], "task must be one of narration, vqa, .*got chess"),
    (evaluation.main, ["--arank", "--watch", "x"], "watch must be given alone, got arank too"),
    (train.main, ["--steps", "0"], "steps must be above 0 and below .*, got 0"),
    (train.main, ["--seed", "-1"], "seed must be at least 0 and below .*, got -1"),
    (train.main, ["--steps", "many"], "invalid int value: 'many'"),
    (train.main, ["--colour", "red"], "unrecognized arguments: --colour red"),
    (train.main, ["--step", "3"], "unrecognized arguments: --step 3"),
    (train.main, ["--device", "tpu"], "device must be cpu or, .*, got tpu"),
    (train.main, ["--data", "/absent"], "/absent must hold clips"),
    (train.main, ["--init", "/absent"], r"/absent/config\.json must be JSON"),
    (train.main, ["--plan", "arank"], "init must name a dense run for the plan arank, got none"),
    (train.main, ["--masked", "all"], "masked must be one of text, .*, got all"),
    (train.main, ["--task", "vqa", "--data", "x"], "task must not be given with data but to name a bench"),
    (train.main, ["--shard"], "unrecognized arguments: --shard"),
    (evaluation.main, ["--window", "4"], "window must be given with watch, got no watch"),
    (evaluation.main, ["--query", "What?"], "query must be given with watch, got no watch"),
    (evaluation.main, ["--flops"], "unrecognized arguments: --flops"),
    (evaluation.main, ["--threshold", "2"], "threshold must be at most 1, got 2"),
    (evaluation.main, ["--watch", "x", "--window", "-1"], "window must be at least 0 and below .*, got -1"),
    (evaluation.main, [], "out/ must hold a run to evaluate"),
])
def test_a_bad_flag_is_refused_in_a_sentence_and_writes_nothing(tmp_path, monkeypatch, main, argv, complaint):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=complaint):
        main([*argv, *(SMALL if main is train.main and {"--steps", "--device"}.isdisjoint(argv) else [])])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("script", "mistake", "complaint"), [
    ("train.py", "--keep=1.5", r"keep must be in \[0, 1\], got 1\.5"),
    ("eval.py", "nowhere", r"nowhere/config\.json must be JSON: .*")])
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
        models.run_main(main)
    assert ended.value.code == 2 and re.fullmatch(".*: error: .*memory.?\n", capsys.readouterr().err)
    error = RuntimeError("shapes differ")
    with pytest.raises(RuntimeError, match="shapes differ"):
        models.run_main(main)


def test_who_has_had_enough_gets_the_status_of_an_interrupt():
    def main(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        models.run_main(main)
    assert ended.value.code == 130


def test_a_flag_has_the_default_and_the_type_of_its_field_and_the_run_needs_no_flag(capsys):
    with pytest.raises(SystemExit):
        evaluation.main(["--help"])
    printed = capsys.readouterr().out
    assert "(default: 0)" in printed and "(default: False)" not in printed and "(default: )" not in printed
    cfg, given = models.parse(evaluation.EvalConfig, ["here", "--threshold", "1", "--no-arank"], "")
    assert (cfg.run, cfg.threshold, cfg.arank, given) == ("here", 1.0, False, {"run", "threshold", "arank"})


def test_a_number_may_be_as_large_as_its_type_and_the_device_is_the_best_there_is():
    models.check_range("steps", 2**31 - 1, may_be_zero=False)
    with pytest.raises(ValueError, match=r"steps must be above 0 and below 2\*\*31, got 2147483648"):
        models.check_range("steps", 2**31, may_be_zero=False)
    assert models.pick_device("").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_flag_that_may_be_repeated_keeps_each_text_and_a_config_holds_numbers():
    cfg, given = models.parse(evaluation.EvalConfig, ["--ask", "1 a", "run", "--ask", "2 b"], "")
    assert (list(cfg.ask), cfg.run, given) == (["1 a", "2 b"], "run", {"ask", "run"})
    assert list(models.parse(evaluation.EvalConfig, [], "")[0].ask) == []
    for keep in ((1.0, "a"), ("a", "b"), (1.0, None)):
        with pytest.raises(ValueError, match="keep must be numbers"):
            Config(keep=keep)
    with pytest.raises(ValueError, match="keep must be of type tuple"):
        Config(keep=[1.0, 1.0])


def test_a_run_is_trained_evaluated_and_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main([*SMALL, "--plan", "all", "--keep", "0.5", "--out", "out/mine"])
    printed = capsys.readouterr().out
    for words in ("keep ratios of the layers: 0.5, 0.5, 0.5\n", "LM-PPL", "TimeDiff", "Fluency",
                  "LM-Correctness", "decisions right", "out/mine/routing.png"):
        assert words in printed
    assert max(len(line) for line in printed.splitlines() if " s  " not in line) <= 80
    evaluation.main(["--streams", "1", "--device", "cpu"])  # the newest run in out/
    assert capsys.readouterr().out.startswith("out/mine: 1 held-out streams")
    result = json.loads(Path("out/mine/eval.json").read_text())
    assert set(result) == {"streams", "threshold", "teacher_forced", "free_running", "on_shapes"}
    assert Path("out/mine/routing.png").read_bytes().startswith(b"\x89PNG")


def test_a_dense_run_is_converted_with_two_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = [*SMALL, "--task", "vqa"]
    train.main([*small, "--preset", "tiny", "--plan", "dense", "--out", "out/dense"])
    train.main([*small, "--init", "out/dense", "--plan", "arank", "--keep", "0.5", "--out", "out/gamma"])
    config, settings = (json.loads(Path(f"out/gamma/{n}.json").read_text()) for n in ("config", "train"))
    assert sorted(config["keep"]) == [0.5, 0.5, 1.0] and config["num_hidden_layers"] == 3
    assert (config["router"], config["gate"], config["masked"]) == ("shared", "unit", "question+answer")
    assert (settings["routing_loss"], settings["plan"]) == (0.01, "arank")
    assert config["router_norm"]  # the decoder was trained before
    assert not load(Path("out/dense")).config.router_norm
    printed = capsys.readouterr().out
    evaluation.main(["out/dense", "--arank", "--device", "cpu"])
    shown = capsys.readouterr().out
    assert shown in printed  # the ranks of the same samples
    ranks = [float(line.split("+-")[0].split()[-1]) for line in shown.splitlines()[1:]]
    assert config["keep"] == [1.0 if rank == max(ranks) else 0.5 for rank in ranks]
    train.main([*small, "--preset", "tiny", "--steps", "1", "--streams", "0", "--out", "out/short"])
    assert not Path("out/short/eval.json").exists()
    with pytest.raises(ValueError, match="ARank must be measured on a dense run"):
        evaluation.main(["out/gamma", "--arank", "--device", "cpu"])
    result = json.loads(Path("out/gamma/eval.json").read_text())
    tokens = result["tokens"]
    assert result["free_running"]["skipped"] > 0 and len(tokens["computed"]) == 3
    assert max(tokens["computed"]) == tokens["given"] > min(tokens["computed"])
    train.main(["--out", "out/gamma", "--resume", "--device", "cpu"])  # needs no --init and no ARank again
    with pytest.raises(ValueError, match="dense_layers must be at most 3, got 4"):
        train.main([*small, "--init", "out/dense", "--plan", "arank", "--dense_layers", "4"])
    models.save(Path("out/old"), VideoLM(replace(load(Path("out/dense")).config, vocab_size=9)))
    with pytest.raises(ValueError, match="preset must be left out with init, got tiny"):
        train.main([*small, "--preset", "tiny", "--init", "out/dense"])
    shutil.copy("out/dense/train.json", "out/old")
    convert = ["--init", "out/old", "--plan", "arank"]
    for main, argv in ((evaluation.main, ["out/old"]), (train.main, convert)):
        with pytest.raises(ValueError, match=r"vocab_size must be \d+, the words of data\.WORDS, got 9"):
            main(argv)
