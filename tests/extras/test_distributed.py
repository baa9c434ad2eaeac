"""Several processes, on copies or on shares of the weights, do what one does."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import train
from extras import distributed

ROOT = Path(__file__).parents[2]
RUN = ["--task", "vqa", "--preset", "tiny", "--plan", "all", "--batch", "4", "--steps", "3", "--device", "cpu",
       "--adam_lr", "0.02", "--muon_lr", "0.02", "--streams", "1", "--save_every", "2"]  # in a warm-up of 20 steps


def outcome(run: Path) -> tuple[list[float], list[float], dict, dict]:
    """The losses, norms of gradients and weights, and the shapes of the state of the optimizers"""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()[1:]]
    losses, norms = ([line[key] for line in lines] for key in ("loss", "grad_norm"))
    state = {name: t.shape for name, t in load_file(run / "optimizer-3.safetensors").items()}
    return losses, norms, load_file(run / "model.safetensors"), state


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    train.main([*RUN, "--out", str(folder)])
    return outcome(folder)


@pytest.mark.parametrize("how", [[], ["--shard"]], ids=["replicated", "sharded"])
def test_two_processes_have_the_losses_and_the_weights_of_one_on_the_same_batches(alone, tmp_path, how):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, "-m", "extras.distributed", "--out", tmp_path / "run"]
    for flags in ([*RUN, *how], ["--resume", "--device", "cpu", *how]):  # the second has nothing left to do
        done = subprocess.run([*command, *flags], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("drawn in") == 1  # the first process speaks for all
    losses, norms, weights, state = outcome(tmp_path / "run")
    assert losses == pytest.approx(alone[0], rel=1e-4) and norms == pytest.approx(alone[1], rel=0.01)
    assert state == alone[3]
    torch.testing.assert_close(weights, alone[2], rtol=0.02, atol=0.002)


def test_flags_that_do_not_go_together_are_refused_in_a_sentence(monkeypatch):
    monkeypatch.setattr(distributed, "RANKS", 3)
    with pytest.raises(ValueError, match="batch must be a multiple of the 3 processes, got 16"):
        distributed.DistributedFlags()
    monkeypatch.setattr(distributed, "RANKS", 1)
    with pytest.raises(ValueError, match="compile must be left out with shard, got both"):
        distributed.DistributedFlags(shard=True, compile=True)
    with pytest.raises(ValueError, match=r"merge must be left out here: python -m extras\.pretrained"):
        distributed.DistributedFlags(merge="out/run")


def test_a_process_without_a_clip_is_refused_in_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(data.World, "batch", lambda *given, **how: [])
    with pytest.raises(ValueError, match="data must hold a clip for each of 1 processes, got too few"):
        distributed.main([*RUN, "--out", str(tmp_path / "run")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", [[], ["--shard"]], ids=["replicated", "sharded"])
def test_two_processes_go_on_with_a_run_that_one_began(alone, tmp_path, how):
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        original = train.log_step

        def stop(folder, step, *given):
            if step == 2:
                raise KeyboardInterrupt
            return original(folder, step, *given)

        patch.setattr(train, "log_step", stop)
        train.main([*RUN, "--out", str(folder)])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, "-m", "extras.distributed", "--out", folder, "--resume", "--device", "cpu", *how]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    losses, norms, weights, state = outcome(folder)
    assert losses == pytest.approx(alone[0], rel=1e-4) and norms == pytest.approx(alone[1], rel=0.01)
    assert state == alone[3]
    torch.testing.assert_close(weights, alone[2], rtol=0.02, atol=0.002)


def test_what_is_made_ahead_comes_in_order_and_its_error_comes_too():
    made = []
    batches = distributed.Ahead(lambda seed, step, count: made.append(step) or 6 / (3 - step))
    assert [batches(0, step, 1) for step in range(3)] == [2, 3, 6] and made[:3] == [0, 1, 2]
    assert batches(1, 0, 1) == 2  # of another seed, which was not ahead
    with pytest.raises(ZeroDivisionError):
        batches(0, 3, 1)


def test_one_process_needs_no_torchrun_and_is_the_same(alone, tmp_path):
    distributed.main([*RUN, "--out", str(tmp_path / "run")])
    losses, norms, weights, _ = outcome(tmp_path / "run")
    assert (losses, norms) == alone[:2] and all(torch.equal(t, alone[2][name]) for name, t in weights.items())
    assert train.make_optimizers.__module__ == "train"  # it is as it was


def test_flags_of_pretrained_count_without_a_folder_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the default run of the repository may be there
    cfg = distributed.DistributedFlags(pool=2)
    assert distributed.start(cfg, {"pool"})[1].config.pool == 2
    assert distributed.start(replace(cfg, pool=0), set())[1].config.pool == 6
