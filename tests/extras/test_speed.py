"""What a profile counts is so, it times the step of train.py, and no step waits for the device."""

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from strategies import tiny
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import train
from data import Tokenizer, collate
from eval import Watcher
from extras import speed
from extras.cost import SIZES, flops, muon_matrices, step_flops
from extras.memory import count_memory, count_peak, new_model, one_step, with_adapters
from extras.pretrained import PretrainedConfig
from extras.tables import table
from mod import Groups
from model import Config, prepare

CPU, CFG, TOKENIZER = torch.device("cpu"), train.TrainConfig(), Tokenizer()
RESULTS = Path(__file__).parents[2] / "results"
KEPT = json.loads((RESULTS / "profile-tiny-cpu.json").read_text())
KEEPS = [(1.0, 1.0), (1.0, 0.2), (0.0, 0.5)]


def small(keep: tuple[float, ...], lora_rank: int = 0, lora_dropout: float = 0.0) -> Config:
    layers = len(keep)
    config = Config(num_hidden_layers=layers, keep=keep, vocab_size=len(TOKENIZER), pool=2)
    if not lora_rank:
        return config
    return PretrainedConfig(**asdict(config), lora_rank=lora_rank, lora_dropout=lora_dropout)


def a_batch(c: Config, frames: int = 4) -> data.Batch:
    samples = data.World(c.image_size, frames).batch(0, 0, 3)
    return collate(samples, c, TOKENIZER)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize(("lora_rank", "checkpointing"), [(0, False), (4, False), (4, True)])
def test_the_flops_of_a_step_are_those_that_torch_counts(keep, lora_rank, checkpointing):
    c = small(keep, lora_rank)
    batch = a_batch(c)
    net = new_model(c, CPU, checkpointing).float()
    optimizers = train.make_optimizers(net, CFG)
    inputs = prepare(batch, c, CPU)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        one_step(net, optimizers, inputs)
    width = Groups.plan(batch.group, keep, batch.real).max_kept
    tokens = [batch.tokens.shape[1] if r == 1 else width[r] for r in keep]
    formula = step_flops(c, batch, muon_matrices(net), lora_rank, checkpointing=checkpointing)
    # This kernel does not halve attention.
    formula += 3 * (3 + checkpointing) * flops(c, tokens)["attention"]
    # The first layers pass no gradient on.
    assert formula == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize("keep", KEEPS)
def test_the_memory_counted_is_that_of_a_real_step_and_no_step_waits_for_the_device(keep):
    c = small(keep)
    batch = a_batch(c)
    counted = count_memory(c, batch)  # with fake tensors, of which no value can be asked
    net = new_model(c, CPU)
    step = partial(one_step, net, train.make_optimizers(net, CFG), prepare(batch, c, CPU))
    real = count_peak(lambda: [step(), step()], net.parameters())
    assert counted == pytest.approx(real, rel=0.02)
    with pytest.raises(RuntimeError), FakeTensorMode():
        torch.ones(1).item()


def test_a_peak_is_of_what_is_alive_together():
    x, held = torch.zeros(1000), torch.zeros(500)  # of 4 bytes a number
    assert count_peak(lambda: [x.exp(), x.sin()], [held]) == 4 * 3500
    assert count_peak(lambda: [x.exp().sum(), x.sin().sum()], [held]) == 4 * 2502
    assert count_peak(lambda: x.exp_().view(10, 100).T, [x]) == 4 * 1000


def test_the_step_that_is_measured_is_that_of_training_bit_for_bit(tmp_path):
    cfg = replace(CFG, out=str(tmp_path / "run"), steps=1, batch=3, device="cpu")
    learnt, stepped = train.build(cfg), train.build(cfg)
    source = train.open_source(cfg, learnt)
    cfg.folder.mkdir()
    train.learn(cfg, learnt, source)
    batch = collate(source.batch(cfg.seed, 0, cfg.batch), stepped.config, TOKENIZER)
    optimizers = train.make_optimizers(stepped, cfg)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] *= train.learning_rate(0, cfg.steps)
    before = {name: t.clone() for name, t in stepped.state_dict().items()}
    one_step(stepped, optimizers, prepare(batch, stepped.config, CPU))
    for name, t in stepped.state_dict().items():
        assert torch.equal(t, learnt.state_dict()[name]), name
        assert not torch.equal(t, before[name]) or name.startswith("vision_model."), name


def test_gradient_checkpointing_changes_the_memory_and_nothing_else():
    c = small((1.0, 0.2) * 3, lora_rank=4, lora_dropout=0.5)
    batch = a_batch(c, 40)
    net, grads = new_model(c, CPU), []
    for net.gradient_checkpointing in (False, True):
        torch.manual_seed(0)
        train.batch_loss(net, prepare(batch, c, CPU), 1.0, 0.01).sum().backward()
        grads.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
        net.zero_grad()
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    assert count_memory(c, batch, True) < 0.7 * count_memory(c, batch)


def test_the_large_presets_learn_by_adapters_beside_frozen_bfloat16():
    c = with_adapters(
        replace(
            SIZES["llama3-8b"],
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            keep=(0.5, 1.0),
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            vision_hidden_size=16,
            vision_layers=1,
            vision_heads=2,
            vision_intermediate_size=16,
            vocab_size=len(TOKENIZER),
        )
    )
    net = new_model(c, CPU)
    types = {name: (p.dtype, p.requires_grad) for name, p in net.named_parameters()}
    assert types["layers.0.mlp.up_proj.weight"] == (torch.bfloat16, False)
    assert types["embed_tokens.weight"] == (torch.bfloat16, False)
    assert types["layers.0.mlp.up_proj.lora_A"] == (torch.float32, True)
    assert types["routers.0.weight"] == (torch.float32, True)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    optimizers = train.make_optimizers(net, CFG)
    assert len(optimizers) == 1  # AdamW
    for _ in range(2):
        one_step(net, optimizers, prepare(a_batch(c), c, CPU))
    changed = {name for name, t in net.state_dict().items() if not torch.equal(t, before[name])}
    assert changed >= {"layers.0.mlp.up_proj.lora_A", "lm_head.lora_B", "routers.0.weight"}
    assert all(types[name][1] for name in changed)


def test_a_preloaded_cache_is_as_long_as_that_of_a_stream_which_was_watched():
    net = tiny((1.0, 0.2, 0.0), 0, "cpu", vocab_size=len(TOKENIZER))
    watched, loaded = [Watcher(net, TOKENIZER, torch.zeros(2).long()) for _ in range(2)]
    frames = torch.randint(256, (2, 30, 3, 8, 8)).byte()
    watched.feed([watched.layout([], 30)] * 2, frames)
    speed.preload(loaded, 30)
    assert torch.equal(watched.computed(), loaded.computed())
    assert torch.equal(watched.cache.seen, loaded.cache.seen)
    for layer in (*watched.cache.layers, *loaded.cache.layers):
        assert int(layer.position[:, : layer.length].max()) < int(watched.cache.seen.min())
    for watcher in (watched, loaded):  # the next frame comes behind it, in a group of its own
        watcher.feed([watcher.layout([], 1)] * 2, frames[:, :1])
    assert torch.equal(watched.computed(), loaded.computed())
    assert torch.equal(watched.cache.last_group, loaded.cache.last_group)


def test_a_profile_is_measured_written_and_shown(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    plan = speed.Plan([(1, 4, 2)], [(1, 4)], [1, 2], [30], [1, 2])
    monkeypatch.setitem(speed.PLANS, "tiny", plan)
    speed.main(["--device", "cpu"])
    out = capsys.readouterr().out.splitlines()
    assert max(map(len, out[:-1])) <= 80
    head = next(n for n, line in enumerate(out) if line.startswith("work"))
    work = ["train", "prefill", *["stream"] * 4, "train", "prefill"]  # with two remarks
    assert [line.split()[0] for line in out[head + 1 :] if line[0] != " "][:-1] == work
    report = json.loads((tmp_path / "out" / "profile-tiny-cpu.json").read_text())
    assert report["ceiling"]["flops"] > 0 and not any(row["recompiled"] for row in report["rows"])
    for row in report["rows"]:
        assert 0 < row["implied"] < 1 and row["mod"]["flops"] < row["dense"]["flops"]
        assert row["mod"]["seconds"] > 0 and row["dense"]["of_ceiling"] > 0
    assert [len(table(report, names).splitlines()) for names in ([], ["stream"])] == [4, 4]


def test_a_compiled_profile_compiles_nothing_while_it_measures(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setitem(speed.PLANS, "tiny", speed.Plan([(1, 4, 2)], [], [1], [600], [1]))
    graphs = counters["stats"]["unique_graphs"]
    speed.main(["--device", "cpu", "--compile"])
    report = json.loads((tmp_path / "out" / "profile-tiny-cpu.json").read_text())
    assert report["compiled"] and [row["recompiled"] for row in report["rows"]] == [False, False]
    assert counters["stats"]["unique_graphs"] >= graphs + 4  # a step and a frame, dense and MoD
    assert report.keys() >= KEPT.keys() - {"device", "torch"}
    for row, kept in zip(report["rows"], [KEPT["rows"][0], KEPT["rows"][-1]], strict=True):
        assert list(row) == list(kept) and row["dense"].keys() == kept["dense"].keys()


def test_a_preset_that_is_not_profiled_is_refused():
    with pytest.raises(ValueError, match="one of tiny, llama3-8b to be profiled, got deep"):
        speed.main(["--preset", "deep"])
