"""--compile changes nothing, and attention takes what any kernel returns."""

import pytest
import torch
import torch.nn.functional as F
from strategies import tiny
from torch._dynamo.utils import counters

import data
import train
from data import Row, Tokenizer, collate
from eval import Watcher
from model import Config, VideoLM, initialise, prepare

CPU, TOKENIZER = torch.device("cpu"), Tokenizer()


def test_a_compiled_step_is_one_graph_and_is_compiled_no_more_once_lengths_have_varied():
    sizes = Config(
        num_hidden_layers=2, keep=(1.0, 0.2), gate="unit", vocab_size=len(TOKENIZER), pool=2
    )
    plain = initialise(VideoLM(sizes), 0).double()
    net = initialise(VideoLM(sizes), 0).double()
    compiled = torch.compile(train.batch_loss, backend="aot_eager", fullgraph=True)
    world, graphs = data.World(sizes.image_size, 4), []
    for number in range(4):
        samples = world.batch(0, number, 3)
        inputs = prepare(collate(samples, sizes, TOKENIZER), sizes, CPU)
        losses = []
        for loss_of, model in ((train.batch_loss, plain), (compiled, net)):
            loss = loss_of(model, inputs, 1.0, 0.01).sum()
            loss.backward()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], abs=1e-12)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[2] == graphs[-1] > 0
    for p, q in zip(plain.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9)


def test_a_compiled_stream_is_one_graph_a_chunk_and_is_compiled_no_more_while_the_cache_grows():
    plain = tiny((1.0, 0.2), 0, "cpu", vocab_size=len(TOKENIZER))
    net = tiny((1.0, 0.2), 0, "cpu", vocab_size=len(TOKENIZER))
    net.run_layers = torch.compile(net.run_layers, fullgraph=True, dynamic=True, backend="eager")
    watchers = [Watcher(model, TOKENIZER, torch.zeros(2).long()) for model in (plain, net)]
    graphs = []
    for frame in torch.randint(256, (40, 2, 1, 3, 8, 8)).byte():
        logits = [w.feed([w.layout([], 1)] * 2, frame) for w in watchers]
        torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-9)
        logits = [w.feed([Row([5], [-1], [data.NO_TARGET])] * 2) for w in watchers]
        torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-9)
        graphs.append(counters["stats"]["unique_graphs"])
    # From the tenth frame on both layers grow, together and apart, and a layer is just full.
    assert graphs[16] == graphs[-1] > 0
    dense, routed = watchers[1].cache.layers
    assert dense.length == 40 * 7 and routed.length == 40 * 3 + 1  # the first token never skips
    assert dense.position.shape[1] > routed.position.shape[1] > 64


def test_attention_takes_the_rows_of_any_kernel(monkeypatch):
    """Those of CUDA come with heads and rows the other way round in memory."""
    net = tiny((1.0, 0.5), 0, "cpu", vocab_size=len(TOKENIZER))
    frames = torch.randint(256, (2, 5, 1, 3, 8, 8)).byte()
    kernel = F.scaled_dot_product_attention

    def other_layout(*args, **kwargs):
        return kernel(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    said = []
    for wrapped in (kernel, other_layout):
        monkeypatch.setattr(F, "scaled_dot_product_attention", wrapped)
        watcher = Watcher(net, TOKENIZER, torch.zeros(2).long())
        said.append([watcher.feed([watcher.layout([], 1)] * 2, frames[:, n]) for n in range(5)])
    assert all(torch.equal(a, b) for a, b in zip(*said, strict=True))
