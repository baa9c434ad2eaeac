"""A stream watched chunk by chunk is the whole sequence at once; with a window its memory has a bound."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Batch, Watch, collate, tiny, unit, watches
from torch import Tensor

from mod import MASKED, PADDING, Groups
from model import Cache, LayerCache, Output, Window, rope_frequencies, rotations


def by_stream(layers: int, pieces: list[tuple[Batch, Output]]) -> list[tuple[Tensor, Tensor]]:
    """What came of each stream, without padding: hidden states (T, D), and what each layer kept (L, T)"""
    streams = [[] for _ in pieces[0][0].seed]
    for batch, out in pieces:
        keep = torch.stack([out.keep.get(layer, batch.groups.real) for layer in range(layers)], dim=1)
        for stream, hidden, kept, real in zip(streams, out.hidden, keep, batch.groups.real, strict=True):
            stream.append((hidden[real], kept[:, real]))
    return [(torch.cat([h for h, _ in s]), torch.cat([k for _, k in s], dim=1)) for s in streams]


def at_once(watch: Watch) -> list[tuple[Tensor, Tensor]]:
    return by_stream(len(watch.model.layers), [(watch.whole(), watch.model(*watch.whole()))])


def chunked(watch: Watch, window: int | None = None, kind: type = Window) -> tuple[Cache, list]:
    """The cache after all chunks, and what came of each stream"""
    model, first, pieces = watch.model, 0, []
    cache = kind(model, len(watch.seed), window) if window else Cache(model, len(watch.seed))
    for chunk in watch.chunks:
        batch = collate(model, chunk, watch.seed, first)
        first = max(first, int(batch.groups.id.max()) + 1)
        pieces.append((batch, model(*batch, cache)))
    return cache, by_stream(len(model.layers), pieces)


def assert_same(some, others) -> None:
    for (hidden, keep), (other, other_keep) in zip(some, others, strict=True):
        torch.testing.assert_close(hidden, other, rtol=1e-9, atol=1e-9)
        assert torch.equal(keep, other_keep)


def held(cache: Cache, layer: int, b: int) -> list[int]:
    """The positions of a stream that a layer has in the cache, in the order of its rows"""
    rows = cache.layers[layer]
    return [at for at in rows.position[b, : rows.length].tolist() if at < PADDING]


@given(watches())
def test_chunks_of_any_streams_are_the_whole_sequences_at_once_and_alone(watch):
    cache, streams = chunked(watch)
    assert_same(streams, at_once(watch))
    for b, one in enumerate(streams):
        alone = watch._replace(chunks=[[c[b]] for c in watch.chunks if c[b]], seed=watch.seed[b : b + 1])
        if alone.chunks:
            assert_same(at_once(alone), [one])
        for layer, computed in enumerate(one[1]):
            assert held(cache, layer, b) == computed.nonzero()[:, 0].tolist()  # and nothing else
            if len(streams) == 1 and "assistant" in MASKED[watch.model.config.masked]:  # no room is lost
                assert cache.layers[layer].length == computed.sum()


@pytest.mark.parametrize(("window", "chunks", "complaint"), [
    (None, [[0, 0], [0]], "a chunk must not split a group, got 0 again"),
    (3, [[0, 0, -1], [-1], [0, -1]], "a chunk must not split a group, got 0 again"),
    (3, [[0, 0, 1, 1]], "with a window, a chunk must begin with its only frame"),
    (3, [[-1, -1, 0, 0]], "with a window, a chunk must begin with its only frame"),
    (3, [[0, 0, -1, 1, 1]], "with a window, a chunk must begin with its only frame")])
def test_a_chunk_that_splits_a_group_or_hides_a_frame_is_refused(window, chunks, complaint):
    model = tiny((1.0,), 0, "cpu")
    cache = Window(model, 2, window) if window else Cache(model, 2)
    *fine, wrong = (Groups.plan(torch.tensor([[-1] * len(id), id]), (1.0,)) for id in chunks)  # two streams
    for groups in fine:
        cache.advance(groups)
    with pytest.raises(ValueError, match=f"^{complaint}"):
        cache.advance(wrong)


class Hiding(LayerCache):
    """It hides from the queries what has left the window of its cache."""

    def append(self, k, v, position):
        k, v, at = super().append(k, v, position)
        stays = [[self.stays(b, p) for p in row] for b, row in enumerate(at.tolist())]
        if at.shape[1] == position.shape[1] and all(map(all, stays)):
            return k, v, at
        at = at.where(torch.tensor(stays, device=at.device), PADDING)
        none = torch.full_like(at[:, :1], PADDING)  # a row more: else it passes for a stream without a past
        return torch.cat([k, k[:, :, :1]], 2), torch.cat([v, v[:, :, :1]], 2), torch.cat([at, none], 1)


class Everything(Cache):
    """What a window should do, said slowly: it drops nothing and hides from the queries what has left."""

    def __init__(self, model, streams, window):
        super().__init__(model, streams)
        self.window, self.begins = window, [[] for _ in range(streams)]
        self.layers = [Hiding(layer.kv, layer.position) for layer in self.layers]
        for layer in self.layers:
            layer.stays = self.stays

    def advance(self, groups):
        start = super().advance(groups)
        for b in (groups.id >= 0).any(1).nonzero()[:, 0].tolist():
            self.begins[b].append(int(start[b]))
        return start

    def stays(self, b: int, position: int) -> bool:
        left = self.begins[b][: -self.window]
        return not left or not left[0] <= position < self.begins[b][-self.window]


@given(watches(together=True, max_chunks=10, masked="question+answer"), st.integers(1, 3))
def test_a_window_hides_all_but_the_first_text_and_the_last_frames(watch, window):
    cache, streams = chunked(watch, window)
    slow, expected = chunked(watch, window, Everything)
    assert_same(streams, expected)
    for b, (_, keep) in enumerate(streams):
        for layer, computed in enumerate(keep):
            assert held(cache, layer, b) == [t for t in computed.nonzero()[:, 0].tolist() if slow.stays(b, t)]


@settings(max_examples=5)
@given(watches(together=True, max_chunks=1, ratios=st.sampled_from([0.0, 0.5, 1.0]), masked="text"),
       st.integers(1, 3))
def test_the_memory_of_an_endless_stream_is_bounded(watch, window):
    B, c = len(watch.seed), watch.model.config
    chunks = [[[unit(c, False, 0)]] * B]
    for n in range(60):  # text in every other turn, for neighbours in turn: the others get filler rows beside it
        chunks.append([[unit(c, kind, n) for kind in [True, False][: 1 + (n + b) % 2]] for b in range(B)])
    cache, _ = chunked(watch._replace(chunks=chunks), window)
    most = 1 + window * (c.tokens_per_frame + 1)
    assert all(layer.length <= most for layer in cache.layers)
    room = 64 + 1 + (most + c.tokens_per_frame + 1) * 9 // 8  # a chunk more than what stays
    assert all(layer.position.shape[1] <= room for layer in cache.layers)
    assert cache.seen.flatten().tolist() == [1 + 60 * c.tokens_per_frame + 30] * B


@given(st.integers(0, 10**6), st.sampled_from([8, 64, 128]), st.sampled_from([1e4, 5e5]))
def test_rotations_are_exact_a_million_tokens_into_a_stream(position, head_dim, theta):
    frequency = rope_frequencies(head_dim, theta)
    cos, sin = rotations(torch.tensor([[position]]), frequency)[0, 0].tolist()
    for i in range(head_dim // 2):
        angle = position * theta ** (-2 * i / head_dim)
        assert abs(cos[i] - math.cos(angle)) < 1e-9 and abs(sin[i] - math.sin(angle)) < 1e-9
