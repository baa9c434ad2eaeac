"""A stream watched chunk by chunk is the whole sequence at once; with a window its memory has a bound."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import DEVICES, Batch, Watch, collate, tiny, unit, watches
from torch import Tensor

from mod import MASKED, PADDING, Groups
from model import Cache, Output, rotations


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


def chunked(watch: Watch, cache: Cache | None = None) -> list[tuple[Tensor, Tensor]]:
    cache, first, pieces = cache or new_cache(watch), 0, []
    for chunk in watch.chunks:
        batch = collate(watch.model, chunk, watch.seed, first)
        first = max(first, int(batch.groups.id.max()) + 1)
        pieces.append((batch, watch.model(*batch, cache)))
    return by_stream(len(watch.model.layers), pieces)


def new_cache(watch: Watch, window: int | None = None, kind: type = Cache) -> Cache:
    return kind(watch.model.config, len(watch.seed), window, watch.model.lm_head.weight.device)


def assert_same(some, others) -> None:
    for (hidden, keep), (other, other_keep) in zip(some, others, strict=True):
        torch.testing.assert_close(hidden, other, rtol=1e-9, atol=1e-9)
        assert torch.equal(keep, other_keep)


def held(cache: Cache, layer: int, b: int) -> list[int]:
    """The positions of a stream that a layer has in the cache, in the order of its rows"""
    rows = cache.rows[layer][2][b, 0, : cache.length[layer], 0].tolist() if cache.rows[layer] else []
    return [at for at in rows if at < PADDING]


@given(watches())
def test_chunks_of_any_streams_are_the_whole_sequence_at_once(watch):
    assert_same(chunked(watch), at_once(watch))


@given(watches(together=True, max_chunks=6))
def test_streams_that_advance_together_are_each_what_they_are_alone(watch):
    together = chunked(watch)
    for b, one in enumerate(together):
        alone = Watch(watch.model, [[c[b]] for c in watch.chunks if c[b]], watch.seed[b : b + 1])
        for way in (chunked, at_once) if alone.chunks else ():
            assert_same(way(alone), [one])


@given(watches())
def test_each_layer_holds_the_tokens_that_it_computed_and_no_other(watch):
    cache = new_cache(watch)
    for b, (_, keep) in enumerate(chunked(watch, cache)):
        for layer, computed in enumerate(keep):
            assert held(cache, layer, b) == computed.nonzero()[:, 0].tolist()
            if len(watch.seed) == 1 and "assistant" in MASKED[watch.model.config.masked]:  # no room is lost
                assert cache.length[layer] == computed.sum()


@given(watches(max_chunks=2, masked="text"), st.integers(1, 4))
def test_a_chunk_that_splits_a_frame_is_refused(watch, cut):
    whole, cache = watch.whole(), new_cache(watch)
    assume((whole.groups.id[0] >= 0).any())
    at = int((whole.groups.id[0] >= 0).int().argmax()) + min(cut, watch.model.config.tokens_per_frame - 1)
    with pytest.raises(ValueError, match=r"^a chunk must not split a group, got \d+ again$"):
        for part in (slice(0, at), slice(at, None)):
            groups = Groups.plan(whole.groups.id[:, part].cpu(), watch.model.config.keep)
            watch.model(whole.tokens[:, part], whole.frames, groups.to(whole.seed.device), whole.seed, cache)


# --- the window ---------------------------------------------------------------------------------------------


class Everything(Cache):
    """What a window should do, said slowly: it drops nothing and hides from the queries what has left."""

    def __init__(self, config, streams, window, device):
        super().__init__(config, streams, None, device)
        self.window, self.begins = window, [[] for _ in range(streams)]

    def advance(self, groups):
        start = super().advance(groups)
        for b, id in enumerate(groups.id):
            if (id >= 0).any():
                self.begins[b].append(int(start[b]))
        return start

    def stays(self, b: int, position: int) -> bool:
        begins = self.begins[b]
        full = len(begins) > self.window
        return not full or not begins[0] <= position < begins[-self.window]

    def append(self, layer, k, v, position):
        k, v, at = super().append(layer, k, v, position)
        stays = [[self.stays(b, p) for p in row] for b, row in enumerate(at[:, 0, :, 0].tolist())]
        return [k, v, at.where(torch.tensor(stays, device=at.device)[:, None, :, None], PADDING)]


@given(watches(together=True, max_chunks=10, masked="question+answer"), st.integers(1, 3))
def test_a_window_hides_all_but_the_first_text_and_the_last_frames(watch, window):
    cache, slow = new_cache(watch, window), new_cache(watch, window, Everything)
    streams = chunked(watch, slow)
    assert_same(chunked(watch, cache), streams)
    for b, (_, keep) in enumerate(streams):
        for layer, computed in enumerate(keep):
            assert held(cache, layer, b) == [t for t in computed.nonzero()[:, 0].tolist() if slow.stays(b, t)]


@settings(max_examples=5)
@given(watches(together=True, max_chunks=1, ratios=st.sampled_from([0.0, 0.5, 1.0]), masked="text"),
       st.integers(1, 3))
def test_the_memory_of_an_endless_stream_is_bounded(watch, window):
    B, c, cache = len(watch.seed), watch.model.config, new_cache(watch, window)
    turns = [[unit(c, is_frame, n) for is_frame in (True, False)] for n in range(60)]
    chunked(watch._replace(chunks=[[[unit(c, False, 0)]] * B] + [[turn] * B for turn in turns]), cache)
    most = 1 + window * (c.tokens_per_frame + 1)
    assert all(length <= most for length in cache.length)
    assert all(rows[0].shape[2] <= max(64, 2 * most) for rows in cache.rows if rows)
    assert cache.seen.flatten().tolist() == [1 + 60 * (c.tokens_per_frame + 1)] * B


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kinds", [[True, True], [False, True], [True, False, True]])
def test_with_a_window_a_chunk_begins_with_its_only_frame(device, kinds):
    model = tiny((1.0, 0.5), 0, device)
    batch = collate(model, [[unit(model.config, kind, n) for n, kind in enumerate(kinds)]], torch.tensor([0]))
    with pytest.raises(ValueError, match=r"^with a window, a chunk must begin with its only frame"):
        model(*batch, Cache(model.config, 1, 3, device))


@given(st.integers(0, 10**6), st.sampled_from([8, 64, 128]), st.sampled_from([1e4, 5e5]))
def test_rotations_are_exact_a_million_tokens_into_a_stream(position, head_dim, theta):
    cos, sin = rotations(torch.tensor([[position]]), head_dim, theta)[0, 0].tolist()
    for i in range(head_dim // 2):
        angle = position * theta ** (-2 * i / head_dim)
        assert abs(cos[i] - math.cos(angle)) < 1e-9 and abs(sin[i] - math.sin(angle)) < 1e-9
