"""The plan measured: route the layers whose routing costs the least loss.

    python -m extras.measured --init out/dense --keep 0.5 --out out/measured

It stands beside gamma-MoD's arank. Each layer is routed alone in turn, with the
router of the flags as it starts, on the 50 samples that arank looks at. The
loss that this adds is the layer's cost: L + 1 forward passes a sample.
As many layers stay dense as with arank, those that cost most. Both orders are
printed, and their correlation.

All flags of train.py but --plan are there too.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

import data
import train
from data import Batch, collate
from eval import bar, rank_layers
from mod import rank_placement
from model import VideoLM, load, parse, prepare, run_main
from train import TrainConfig, batch_loss, open_source, route

SAMPLES = 50  # as of the plan arank


@torch.no_grad()
def losses_of(
    model: VideoLM,
    batches: list[Batch],
    placements: Sequence[tuple[float, ...]],
    sigma: float = 1.0,
) -> Tensor:
    """The streaming loss of each batch under each placement -> (batches, placements) float64

    model: has a router, if learned, in each layer that a placement routes
    sigma: weight of a decision to speak, against a reply token
    """
    config, device, losses = model.config, model.norm.weight.device, []
    for batch in bar(batches, "measuring"):
        for keep in placements:
            model.config = replace(config, keep=keep)
            inputs = prepare(batch, model.config, device)
            losses.append(float(batch_loss(model, inputs, sigma, 0.0)[0]))
    model.config = config
    return torch.tensor(losses, dtype=torch.float64).view(len(batches), len(placements))


def one_by_one(layers: int, keep_ratio: float) -> list[tuple[float, ...]]:
    """The dense placement, and for each layer the one that routes it alone"""
    dense = (1.0,) * layers
    placements = [dense]
    for layer in range(layers):
        placements.append((*dense[:layer], keep_ratio, *dense[layer + 1 :]))
    return placements


def layer_costs(
    model: VideoLM, batches: list[Batch], keep_ratio: float, sigma: float = 1.0
) -> Tensor:
    """(batches, L) float64, the loss that routing one layer alone adds

    model: as of `losses_of`, with all layers routed;  sigma: as there
    """
    losses = losses_of(model, batches, one_by_one(len(model.layers), keep_ratio), sigma)
    return losses[:, 1:] - losses[:, :1]


def keep_by_cost(cfg: TrainConfig, dense: VideoLM) -> tuple[float, ...]:
    """The placement of the plan measured: the layers that cost most stay dense."""
    unknown = [0.0] * len(dense.layers)
    rank_placement(unknown, cfg.keep, cfg.dense_layers)  # refuses before it is all measured
    source = open_source(cfg, dense)
    ranks = rank_layers(dense, source, SAMPLES)
    config = route(replace(cfg, plan="all"), dense.config, dense)
    routed = dense.rerouted(config, cfg.seed).to(dense.norm.weight.device).eval()
    tokenizer = data.tokenizer_for(config)
    batches = [collate([s], config, tokenizer) for s in source.batch(0, 0, SAMPLES)]
    costs = layer_costs(routed, batches, cfg.keep, cfg.sigma).mean(0).tolist()
    print_orders(ranks, costs, cfg.keep)
    return rank_placement(costs, cfg.keep, cfg.dense_layers)


def print_orders(ranks: list[float], costs: list[float], keep_ratio: float) -> None:
    """Rank and cost of each layer, its place in both orders, and how these agree"""
    print(f"cost: what routing the layer alone at keep {keep_ratio:g} adds to the loss")
    print("layer    ARank  place      cost  place   (place 1: the first to be routed)")
    by_rank = places_of(ranks).tolist()
    by_cost = places_of(costs).tolist()
    for layer, (rank, cost) in enumerate(zip(ranks, costs, strict=True)):
        of_rank = f"{rank:8.1f} {by_rank[layer] + 1:6.0f}"
        of_cost = f"{cost:9.4f} {by_cost[layer] + 1:6.0f}"
        print(f"{layer:5} {of_rank} {of_cost}")
    print(f"Spearman's correlation of the two orders: {spearman(ranks, costs):.2f}")


def places_of(values: Sequence[float]) -> Tensor:
    """The place of each value in their order, from 0; equal ones share the mean of their places"""
    x = torch.tensor(values, dtype=torch.float64)
    below = (x[:, None] > x).sum(1)
    same = (x[:, None] == x).sum(1)
    return below + (same - 1) / 2


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation, from -1 to 1; NaN where one of the two is constant"""
    both = torch.stack([places_of(a), places_of(b)])
    return float(torch.corrcoef(both)[0, 1])


train.MEASURED["measured"] = keep_by_cost


def main(argv: list[str] | None = None) -> None:
    cfg, given = parse(TrainConfig, argv, __doc__)
    if "plan" in given and cfg.plan != "measured":
        raise ValueError(f"plan must be measured here, got {cfg.plan}")
    cfg = train.settings(replace(cfg, plan="measured"), given | {"plan"})
    train.run(cfg, load(cfg.folder) if cfg.resume else train.build(cfg))


if __name__ == "__main__":
    run_main(main)
