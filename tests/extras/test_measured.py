"""The plan `measured` routes the layers that cost least, and says how far ARank agrees."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, integers

import data
import train
from data import collate
from eval import rank_layers
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
    costs = layer_costs(routed, batches, 0.2, sigma=0.3)
    for b, batch in enumerate(batches):
        losses = []
        for keep in ((1.0, 1.0, 1.0), (0.2, 1.0, 1.0), (1.0, 0.2, 1.0), (1.0, 1.0, 0.2)):
            alone = dense.rerouted(replace(routed.config, keep=keep), 1).double()
            alone.load_state_dict({name: t for name, t in routed.state_dict().items() if name in alone.state_dict()})
            inputs = prepare(batch, alone.config, torch.device("cpu"))
            losses.append(train.batch_loss(alone, inputs, 0.3, 0.0)[0].item())
        assert costs[b].tolist() == pytest.approx([loss - losses[0] for loss in losses[1:]], abs=1e-12)
    assert routed.config.keep == (0.2,) * 3 and costs.unique().numel() == 9
    losses = losses_of(routed, batches, one_by_one(3, 0.2))
    assert torch.equal(losses[:, 0], losses_of(routed, batches, [(1.0,) * 3], sigma=1.0)[:, 0])


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


class Dropping(VideoLM):
    """A model that loses half of its last hidden state while it trains"""

    def forward(self, *given):
        out = super().forward(*given)
        return out._replace(hidden=F.dropout(out.hidden, 0.5, self.training))


def test_the_costs_and_places_printed_are_those_of_a_model_of_the_flags_on_the_first_samples_of_training(capsys, monkeypatch):
    assert measured.SAMPLES == rank_layers.__defaults__[0]  # as of the plan arank
    monkeypatch.setattr(measured, "SAMPLES", 3)
    config = Config(vocab_size=len(TOKENIZER), image_size=16, pool=2, num_hidden_layers=5, keep=(1.0,) * 5)
    dense = initialise(Dropping(config), 0)
    for block in dense.layers:  # what a layer adds shall be seen
        block.self_attn.o_proj.weight.data *= 4
        block.mlp.down_proj.weight.data *= 4
    chosen = {"router": "shared", "gate": "sigmoid", "weigh": "update+values", "masked": "question"}
    cfg = train.TrainConfig(task="vqa", init="dense", seed=3, keep=0.5, sigma=0.25, dense_layers=2, **chosen)
    with pytest.raises(ValueError, match="dense_layers must be at most 5, got 9"):
        measured.keep_by_cost(replace(cfg, dense_layers=9), dense)
    assert not capsys.readouterr().out  # before anything is measured
    keep = measured.keep_by_cost(cfg, dense)
    table = capsys.readouterr().out.split("(place 1: the first to be routed)\n")[1].splitlines()[:5]
    routed = dense.rerouted(replace(dense.config, keep=(0.5,) * 5, router_norm=True, **chosen), 3).eval()
    batches = [collate([sample], routed.config, TOKENIZER) for sample in WORLD.batch(0, 0, 3)]
    costs = layer_costs(routed, batches, 0.5, 0.25).mean(0).tolist()
    ranks = rank_layers(dense, WORLD, 3)
    for layer, line in enumerate(table):
        of_rank, of_cost = (1 + sorted(values).index(values[layer]) for values in (ranks, costs))
        assert line.split() == [f"{layer}", f"{ranks[layer]:.1f}", f"{of_rank}", f"{costs[layer]:.4f}", f"{of_cost}"]
    assert keep == tuple(0.5 if cost in sorted(costs)[:3] else 1.0 for cost in costs)


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
