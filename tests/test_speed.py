"""What --profile counts is so, --compile changes nothing, and no step waits for the device."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from strategies import tiny
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import eval as evaluation
import mod
import model as models
import train

CPU, CFG, TOKENIZER = torch.device("cpu"), train.TrainConfig(), data.Tokenizer()
KEEPS = [(1.0, 1.0), (1.0, 0.2), (0.0, 0.5)]


def small(keep: tuple[float, ...], **sizes) -> models.Config:
    return models.Config(num_hidden_layers=len(keep), keep=keep, vocab_size=len(TOKENIZER), pool=2, **sizes)


def a_step(c: models.Config, frames: int = 4, number: int = 0):
    """A batch of the world, and everything that a step on it needs"""
    samples = data.World(c.image_size, frames).batch(0, number, 3)
    batch = data.collate(samples, c.tokens_per_frame, TOKENIZER, mod.MASKED[c.masked])
    return batch, train.make_ready(batch, c, 1.0, CPU)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize(("lora_rank", "checkpointing"), [(0, False), (4, False), (4, True)])
def test_the_flops_of_a_step_are_those_that_torch_counts(keep, lora_rank, checkpointing):
    c = small(keep, lora_rank=lora_rank, lora_dropout=0.0)
    batch, ready = a_step(c)
    net = models.build(c).float()
    net.gradient_checkpointing = checkpointing
    optimizers = train.make_optimizers(net, CFG)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        train.train_step(train.batch_loss, net, optimizers, CFG, ready, 0)
    width = mod.Groups.plan(batch.group, keep, batch.real).width
    attention = mod.flops(c, [batch.tokens.shape[1] if r == 1 else width[r] for r in keep])["attention"]
    formula = evaluation.step_flops(c, batch, optimizers, checkpointing)
    formula += 3 * (3 + checkpointing) * attention  # which this kernel does not halve
    assert formula == pytest.approx(counter.get_total_flops(), rel=0.03)  # the first layers pass nothing on


@pytest.mark.parametrize("keep", KEEPS)
def test_the_memory_counted_is_that_of_a_real_step_and_no_step_waits_for_the_device(keep):
    c = small(keep)
    batch, ready = a_step(c)
    counted = evaluation.count_memory(c, batch)  # with fake tensors, of which no value can be asked
    net = models.build(c)
    optimizers = train.make_optimizers(net, CFG)
    step = partial(train.train_step, train.batch_loss, net, optimizers, CFG, ready)
    real = evaluation.count_peak(lambda: [step(n) for n in (0, 1)], net.parameters())
    assert counted == pytest.approx(real, rel=0.02)
    with pytest.raises(RuntimeError), FakeTensorMode():
        torch.ones(1).item()


def test_a_peak_is_of_what_is_alive_together():
    x, held = torch.zeros(1000), torch.zeros(500)  # of 4 bytes a number
    assert evaluation.count_peak(lambda: [x.exp(), x.sin()], [held]) == 4 * 3500
    assert evaluation.count_peak(lambda: [x.exp().sum(), x.sin().sum()], [held]) == 4 * 2502
    assert evaluation.count_peak(lambda: x.exp_().view(10, 100).T, [x]) == 4 * 1000


def test_gradient_checkpointing_changes_the_memory_and_nothing_else():
    c = small((1.0, 0.2) * 3, lora_rank=4, lora_dropout=0.5)
    batch, ready = a_step(c, 40)
    net, grads = models.build(c), []
    for net.gradient_checkpointing in (False, True):
        torch.manual_seed(0)
        train.batch_loss(net, ready, torch.ones(2), 0.01).sum().backward()
        grads.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
        net.zero_grad()
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    assert evaluation.count_memory(c, batch, True) < 0.7 * evaluation.count_memory(c, batch)


def test_a_compiled_step_is_one_graph_the_same_step_and_is_compiled_no_more_once_lengths_have_varied():
    c = small((1.0, 0.2), gate="unit")
    plain, net = models.build(c).double(), models.build(c).double()
    compiled, graphs = torch.compile(train.batch_loss, backend="aot_eager", fullgraph=True), []
    for number in range(4):
        _, ready = a_step(c, 4, number)
        losses = [loss_of(m, ready, torch.ones(2), 0.01).sum()
                  for loss_of, m in ((train.batch_loss, plain), (compiled, net))]
        for loss in losses:
            loss.backward()
        assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-12)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[2] == graphs[-1] > 0
    for p, q in zip(plain.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9)


def test_attention_takes_the_rows_of_any_kernel(monkeypatch):
    """Those of CUDA come with heads and rows the other way round in memory."""
    net = tiny((1.0, 0.5), 0, "cpu", vocab_size=len(TOKENIZER))
    frames, kernel, said = torch.randint(256, (2, 5, 1, 3, 8, 8)).byte(), F.scaled_dot_product_attention, []
    for wrapped in (kernel, lambda *a, **k: kernel(*a, **k).transpose(1, 2).contiguous().transpose(1, 2)):
        monkeypatch.setattr(F, "scaled_dot_product_attention", wrapped)
        watcher = evaluation.Watcher(net, TOKENIZER, torch.zeros(2).long())
        said.append([watcher.feed([watcher.layout([], 1)] * 2, frames[:, n]) for n in range(5)])
    assert all(torch.equal(a, b) for a, b in zip(*said, strict=True))


def test_a_compiled_stream_is_one_graph_a_chunk_and_is_compiled_no_more_while_the_cache_grows(monkeypatch):
    net = tiny((1.0, 0.2), 0, "cpu", vocab_size=len(TOKENIZER))
    again = tiny((1.0, 0.2), 0, "cpu", vocab_size=len(TOKENIZER))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    evaluation.compile_layers(again)
    watchers, graphs = [evaluation.Watcher(m, TOKENIZER, torch.zeros(2).long()) for m in (net, again)], []
    for frame in torch.randint(256, (24, 2, 1, 3, 8, 8)).byte():
        a, b = (w.feed([w.layout([], 1)] * 2, frame) for w in watchers)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        a, b = (w.feed([[[5], [-1], [-100]]] * 2) for w in watchers)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[16] == graphs[-1] > 0 and watchers[0].cache.rows[0][0].shape[2] > 128


def test_a_profile_is_measured_written_and_shown(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(evaluation.PROFILES, "tiny", ([(1, 4, 2)], [(1, 4)], [1, 2], [30], [1, 2]))
    evaluation.main(["--profile", "--device", "cpu"])
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
    assert [len(evaluation.table(report, names).splitlines()) for names in ([], ["stream"])] == [4, 4]
    with pytest.raises(ValueError, match="preset must be one of tiny, llama3-8b to be profiled, got deep"):
        evaluation.main(["--profile", "--preset", "deep"])


def test_what_is_made_ahead_comes_in_order_and_its_error_comes_too():
    assert list(train.ahead(lambda step: step * step, range(3, 6))) == [9, 16, 25]
    assert list(train.ahead(lambda step: step, [])) == []
    batches = train.ahead(lambda step: 1 / step, [1, 0])
    assert next(batches) == 1
    with pytest.raises(ZeroDivisionError):
        next(batches)


def test_the_large_presets_learn_by_adapters_beside_frozen_bfloat16():
    c = replace(models.LARGE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, keep=(0.5, 1.0),
                num_attention_heads=2, num_key_value_heads=1, head_dim=16, vision_hidden_size=16,
                vision_layers=1, vision_heads=2, vision_intermediate_size=16, vocab_size=len(TOKENIZER))
    net = models.build(c)
    types = {name: (p.dtype, p.requires_grad) for name, p in net.named_parameters()}
    assert types["layers.0.mlp.up_proj.weight"] == types["embed_tokens.weight"] == (torch.bfloat16, False)
    assert types["layers.0.mlp.up_proj.lora_A"] == types["routers.0.weight"] == (torch.float32, True)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    _, ready = a_step(c)
    optimizers = train.make_optimizers(net, CFG)
    assert len(optimizers) == 1  # AdamW
    for step in (30, 31):
        train.train_step(train.batch_loss, net, optimizers, CFG, ready, step)
    changed = {name for name, t in net.state_dict().items() if not torch.equal(t, before[name])}
    assert changed >= {"layers.0.mlp.up_proj.lora_A", "lm_head.lora_B", "routers.0.weight"}
    assert not any(c.frozen(name) for name in changed)
