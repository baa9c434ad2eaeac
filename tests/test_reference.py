"""The fast path gives what a slow loop from the equation gives, token by token: values and gradients."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, integers, normal, tiny, watches

from mod import Groups, capacity, random_score
from model import LEARNED

WEIGHT = {"sigmoid": lambda s: 1 / (1 + torch.exp(-s)), "linear": lambda s: s,
          "unit": lambda s: 2 / (1 + torch.exp(-s))}


def norm(layer, x):
    return x / (x.square().mean() + layer.eps).sqrt() * layer.weight


def turned(vector, position, theta):
    """RoPE of one head of one token: the pair (i, i + d/2) turns by position * theta ** (-2i / d)"""
    half = len(vector) // 2
    angle = vector.new_tensor([position * theta ** (-i / half) for i in range(half)])
    a, b = vector[:half], vector[half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])


def block_of(block, c, rows: dict[int, torch.Tensor], value_weight: dict) -> dict[int, torch.Tensor]:
    """Rows by position -> the same after the block: each token sees itself and the earlier of those listed"""
    a, d, shared = block.self_attn, c.head_dim, c.num_attention_heads // c.num_key_value_heads
    keys, values, out = {}, {}, {}
    for t, x in rows.items():
        normed = norm(block.input_layernorm, x)
        keys[t] = [turned(k, t, c.rope_theta) for k in (a.k_proj.weight @ normed).split(d)]
        values[t] = (value_weight[t] * (a.v_proj.weight @ normed)).split(d)
        heads = []
        for h, q in enumerate((a.q_proj.weight @ normed).split(d)):
            q, seen = turned(q, t, c.rope_theta), [j for j in rows if j <= t]
            share = torch.stack([q @ keys[j][h // shared] / math.sqrt(d) for j in seen]).exp()
            mixed = zip(share / share.sum(), seen, strict=True)
            heads.append(sum(w * values[j][h // shared] for w, j in mixed))
        x = x + a.o_proj.weight @ torch.cat(heads)
        normed, m = norm(block.post_attention_layernorm, x), block.mlp
        gate = m.gate_proj.weight @ normed
        out[t] = x + m.down_proj.weight @ (gate / (1 + torch.exp(-gate)) * (m.up_proj.weight @ normed))
    return out


def scores_of(model, layer, x, tokens, seed):
    """The scores of the tokens of one group: a list of tensors of one element"""
    c, n = model.config, len(tokens)
    if c.router in LEARNED and c.keep[layer] > 0:
        weight = model.routers["shared" if c.router == "shared" else str(layer)].weight
        rms = {t: x[t].square().mean().sqrt() if c.router_norm else 1 for t in tokens}
        return [(weight * x[t]).sum() / rms[t] for t in tokens]
    if c.router == "random":
        return [random_score(torch.tensor([[t]]), layer, torch.tensor([seed])) for t in tokens]
    assert c.router == "uniform" or c.keep[layer] == 0  # another router needs a branch above
    k = capacity(n, c.keep[layer])
    return [torch.tensor(i in [math.ceil(m * n / k) for m in range(k)]).int() for i in range(n)]


def reference(model, tokens, frames, group, late, seed):
    """One stream, its tokens as lists -> hidden states and the kept tokens of each layer"""
    c = model.config
    encode, project = model.vision_model, model.multi_modal_projector
    vision = iter([row for frame in frames for row in project(encode(frame[None]))[0]])
    x = [next(vision) if t < 0 else model.embed_tokens.weight[t] for t in tokens]
    kept_in = []
    for layer, (block, r) in enumerate(zip(model.layers, c.keep, strict=True)):
        weight = {t: 1.0 for t, g in enumerate(group) if g < 0 or r == 1}
        for g in set(group) - {-1} if r < 1 else ():
            members = [t for t, other in enumerate(group) if other == g]
            score = scores_of(model, layer, x, members, seed)
            order = sorted(range(len(members)), key=lambda i: (-score[i].item(), i))
            for i in order[: capacity(len(members), r)]:
                if not late[members[i]] or score[i] >= 0:
                    learned = c.router in LEARNED
                    weight[members[i]] = WEIGHT[c.gate](score[i]) if learned else 1.0
        value_weight = weight if c.weigh == "update+values" else dict.fromkeys(weight, 1.0)
        update = block_of(block, c, {t: x[t] for t in sorted(weight)}, value_weight)
        x = [x[t] + weight[t] * (update[t] - x[t]) if t in weight else x[t] for t in range(len(x))]
        kept_in.append([t in weight for t in range(len(x))])
    return torch.stack(x), kept_in


@given(watches(max_streams=2, max_chunks=2), SEEDS, st.booleans())
def test_the_fast_path_is_the_slow_loop_in_value_and_in_gradient(watch, seed, mixed):
    model, batch = watch.model.requires_grad_(True), watch.whole()
    if mixed:  # as gamma-MoD does: text and vision in groups of any tokens, whatever their order
        real = batch.groups.real.cpu()
        groups = Groups.plan(integers(seed, -1, 3, *real.shape).where(real, -1), model.config.keep, real)
        batch = batch._replace(groups=groups.to(batch.tokens.device))
    fast, loss, expected = model(*batch), 0, 0
    probe = normal(seed, *fast.hidden.shape).to(fast.hidden)
    for b, units in enumerate(watch.streams()):
        n, F = int(batch.groups.real[b].sum()), sum(len(u.pixels) for u in units)
        if n == 0:
            continue
        known = (t[b, :n].tolist() for t in (batch.groups.id, batch.groups.late))
        hidden, kept = reference(model, batch.tokens[b, :n].tolist(), batch.frames[b, :F], *known,
                                 int(watch.seed[b]))
        torch.testing.assert_close(fast.hidden[b, :n], hidden, rtol=1e-9, atol=1e-9)
        for layer, keep in fast.keep.items():
            assert keep[b, :n].tolist() == kept[layer]
        loss, expected = loss + (fast.hidden * probe)[b, :n].sum(), expected + (hidden * probe[b, :n]).sum()
    parameters = list(model.parameters())
    fast, slow = (torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
                  for value in (loss, expected))
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def linear(layer, x):
    return layer.weight @ x + layer.bias


def layer_norm(layer, x):
    return (x - x.mean()) / (x.var(correction=0) + layer.eps).sqrt() * layer.weight + layer.bias


def encoder_block(block, x):
    """Rows of CLS and patches -> the same after a block in which each sees all"""
    normed, out = [layer_norm(block.layer_norm1, row) for row in x], []
    q, k, v = ([linear(block.self_attn[f"{name}_proj"], row).chunk(block.heads) for row in normed] for name in "qkv")
    for t, row in enumerate(x):
        heads = []
        for h in range(block.heads):
            share = torch.stack([q[t][h] @ key[h] / math.sqrt(len(key[h])) for key in k]).exp()
            heads.append(sum(w * value[h] for w, value in zip(share / share.sum(), v, strict=True)))
        row = row + linear(block.self_attn["out_proj"], torch.cat(heads))
        hidden = linear(block.mlp.fc1, layer_norm(block.layer_norm2, row))
        out.append(row + linear(block.mlp.fc2, hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2))
    return out


def test_the_encoder_is_a_transformer_over_cls_and_patches_at_their_places_and_the_projector_an_mlp():
    model = tiny((1.0,), 0, "cpu", vision_layers=2)
    vision, P = model.vision_model, model.config.patch_size
    for seed, p in enumerate(model.parameters()):
        p.add_(normal(seed, *p.shape) / 3)  # norms and biases too
    frame = integers(0, 0, 256, 3, 2 * P, 2 * P).byte()
    e, pixels = vision.embeddings, frame.double() / 127.5 - 1
    x = [e.class_embedding]
    for top, left in ((0, 0), (0, P), (P, 0), (P, P)):
        x.append((e.patch_embedding.weight * pixels[:, top : top + P, left : left + P]).sum((1, 2, 3)))
    x = [layer_norm(vision.pre_layrnorm, row + place) for row, place in zip(x, e.position_embedding.weight, strict=True)]
    for block in vision.encoder["layers"]:
        x = encoder_block(block, x)
    x = torch.stack([layer_norm(vision.post_layernorm, row) for row in x])
    torch.testing.assert_close(vision(frame[None])[0], x, rtol=1e-9, atol=1e-9)
    first, second = model.multi_modal_projector.linear_1, model.multi_modal_projector.linear_2
    hidden = [linear(first, row) for row in x]
    hidden = [linear(second, row * (1 + torch.erf(row / math.sqrt(2))) / 2) for row in hidden]
    for frames in (frame[None, None], x[None, None]):  # pixels, or the features of a frozen encoder
        embedded = model.embed(torch.tensor([[-1] * 5]), frames)[0]
        torch.testing.assert_close(embedded, torch.stack(hidden), rtol=1e-9, atol=1e-9)
