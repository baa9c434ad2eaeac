"""Several processes, on copies or on shares of the weights, do what one does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train

ROOT = Path(__file__).parents[1]
RUN = ["--task", "vqa", "--preset", "tiny", "--plan", "all", "--batch", "4", "--steps", "3", "--warmup", "0",
       "--adam_lr", "0.001", "--muon_lr", "0.001", "--streams", "1", "--save_every", "2", "--device", "cpu"]


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
    done = subprocess.run([*torchrun, ROOT / "train.py", *RUN, *how, "--out", tmp_path / "run"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    losses, norms, weights, state = outcome(tmp_path / "run")
    assert losses == pytest.approx(alone[0], rel=1e-4) and norms == pytest.approx(alone[1], rel=0.01)
    assert state == alone[3]
    torch.testing.assert_close(weights, alone[2], rtol=0.02, atol=0.002)  # Muon rounds to bfloat16


def test_a_batch_must_be_shared_out_evenly(monkeypatch):
    monkeypatch.setattr(train, "RANKS", 3)
    with pytest.raises(ValueError, match="batch must be a multiple of the 3 processes, got 16"):
        train.TrainConfig()
