"""The plan `measured` routes the layers that cost least, and says how far ARank agrees."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, integers

import data
import train
from data import collate
from extras import measured
from extras.measured import layer_costs, losses_of, one_by_one, places_of, spearman
from model import Config, VideoLM, initialise, load, prepare

TOKENIZER, WORLD = data.Tokenizer(), data.VQA(16)


def dense_model() -> VideoLM:
    config = Config(vocab_size=len(TOKENIZER), image_size=16, pool=2, masked="question", num_hidden_layers=3)
    return initialise(VideoLM(config), 0).double()


@pytest.mark.parametrize("router", ["learned", "shared", "uniform"])
def test_the_cost_of_a_layer_is_what_a_model_that_routes_it_alone_loses_more(router):
    dense = dense_model()
    routed = dense.rerouted(replace(dense.config, keep=(0.2,) * 3, router=router, router_norm=True), 0).double()
    batches = [collate([sample], dense.config, TOKENIZER) for sample in WORLD.held_out(3)]
    costs = layer_costs(routed, batches, 0.2)
    for b, batch in enumerate(batches):
        losses = []
        for keep in ((1.0, 1.0, 1.0), (0.2, 1.0, 1.0), (1.0, 0.2, 1.0), (1.0, 1.0, 0.2)):
            alone = dense.rerouted(replace(routed.config, keep=keep), 1).double()
            alone.load_state_dict({name: t for name, t in routed.state_dict().items() if name in alone.state_dict()})
            inputs = prepare(batch, alone.config, torch.device("cpu"))
            losses.append(train.batch_loss(alone, inputs, 1.0, 0.0)[0].item())
        assert costs[b].tolist() == pytest.approx([loss - losses[0] for loss in losses[1:]], abs=1e-12)
    assert routed.config.keep == (0.2,) * 3 and costs.unique().numel() == 9
    assert torch.equal(losses_of(routed, batches, one_by_one(3, 0.2))[:, 0], losses_of(routed, batches, [(1.0,) * 3])[:, 0])


@given(SEEDS, st.integers(2, 9))
def test_rank_correlation_is_1_for_the_same_order_and_minus_1_for_the_reverse_and_counts_ties_by_halves(seed, n):
    values = integers(seed, 0, 4, n).tolist()
    places = places_of(values).tolist()
    for value, place in zip(values, places, strict=True):
        first = sum(other < value for other in values)
        assert place == (first + first + values.count(value) - 1) / 2
    if len(set(values)) > 1:
        assert spearman(values, [v**3 for v in values]) == pytest.approx(1)
        assert spearman(values, [-v for v in values]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)


def test_a_dense_run_is_converted_by_the_plan_measured_which_prints_both_orders(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measured, "SAMPLES", 3)
    small = ["--task", "vqa", "--steps", "1", "--batch", "2", "--streams", "0", "--device", "cpu"]
    train.main([*small, "--plan", "dense", "--preset", "tiny", "--out", "out/dense"])
    capsys.readouterr()
    convert = ["--init", "out/dense", "--dense_layers", "2", "--keep", "0.5"]
    measured.main([*small, *convert, "--out", "out/measured"])
    printed = capsys.readouterr().out.splitlines()
    table = [line.split() for line in printed[printed.index(
        next(line for line in printed if line.startswith("layer    ARank"))) + 1 :][:3]]
    costs = [float(row[3]) for row in table]
    keep = load(Path("out/measured")).config.keep
    assert keep == tuple(0.5 if cost == min(costs) else 1.0 for cost in costs)
    assert sorted(float(row[4]) for row in table) == [1, 2, 3] and max(map(len, printed)) <= 80
    assert any(line.startswith("Spearman's correlation of the two orders: ") for line in printed)
    assert load(Path("out/measured")).config.router_norm  # its decoder was trained before
    train.main(["--out", "out/measured", "--resume", "--device", "cpu"])  # measures nothing again
    with pytest.raises(ValueError, match="init must name a dense run for the plan measured, got none"):
        measured.main([*small, "--preset", "tiny", "--out", "out/none"])
    with pytest.raises(ValueError, match="plan must be measured here, got arank"):
        measured.main([*small, *convert, "--plan", "arank", "--out", "out/none"])
