"""Slow, obviously right versions, in float64 and plain loops, written from the published description of R0427."""
import math

import torch
from torch import Tensor

EPS = 1.1920929e-07
BOS = 1


def rms(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS)


def rotate(x: Tensor, position: int, dims: int, base: float) -> Tensor:
    """One head's vector (E,) at a position: pairs (j, j + dims/2) of the first dims channels turn."""
    out, half = x.clone(), dims // 2
    for j in range(half):
        angle = position * base ** (-2 * j / dims)
        a, b = x[j], x[j + half]
        out[j] = a * math.cos(angle) + b * math.sin(angle)
        out[j + half] = -a * math.sin(angle) + b * math.cos(angle)
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, starts: list[int]) -> Tensor:
    """q (T, H, E), k, v (T, K, E) -> (T, H, E): causal softmax attention within segments that begin at `starts`."""
    tokens, heads, width = q.shape
    group = heads // k.shape[1]
    out = torch.zeros_like(q)
    for t in range(tokens):
        first = max(s for s in starts if s <= t)
        for h in range(heads):
            scores = k[first:t + 1, h // group] @ q[t, h] / math.sqrt(width)
            out[t, h] = torch.softmax(scores, 0) @ v[first:t + 1, h // group]
    return out


def attention_gradients(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, starts: list[int]) -> tuple[Tensor, ...]:
    """Gradients of sum(attention x dy), by the formulas of softmax attention."""
    tokens, heads, width = q.shape
    group = heads // k.shape[1]
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for t in range(tokens):
        first = max(s for s in starts if s <= t)
        for h in range(heads):
            keys, values = k[first:t + 1, h // group], v[first:t + 1, h // group]
            p = torch.softmax(keys @ q[t, h] / math.sqrt(width), 0)
            dp = values @ dy[t, h]
            ds = p * (dp - p @ dp) / math.sqrt(width)
            dq[t, h] = ds @ keys
            dk[first:t + 1, h // group] += ds[:, None] * q[t, h]
            dv[first:t + 1, h // group] += p[:, None] * dy[t, h]
    return dq, dk, dv


def exclude_own_value(y: Tensor, v: Tensor) -> Tensor:
    """XSA: y (T, H, E) without its component along the token's own value v (T, K, E)."""
    out, group = y.clone(), y.shape[1] // v.shape[1]
    for t in range(y.shape[0]):
        for h in range(y.shape[1]):
            own = v[t, h // group]
            unit = own / own.norm().clamp_min(1e-12)
            out[t, h] = y[t, h] - (y[t, h] @ unit) * unit
    return out


def published_order(config, looping: bool) -> tuple[list[int], list[int]]:
    """(encoder layers, decoder layers) as in section 1.8: loops repeat in place, the split is at half."""
    order = []
    for layer in range(config.num_layers):
        order.append(layer)
        if looping and config.num_loops and layer == config.loop_end:
            order += list(range(config.loop_start, config.loop_end + 1)) * config.num_loops
    half = len(order) // 2
    return order[:half], order[half:]


def skip_row(config, layer: int, occurrence: int) -> int:
    """Rows are numbered along the looped decoder, then along the plain one, without repeats."""
    seen = []
    for looping in (True, False):
        encoder, decoder = published_order(config, looping)
        for j in range(len(encoder)):
            key = decoder[j], decoder[:j].count(decoder[j])
            if key not in seen:
                seen.append(key)
    return seen.index((layer, occurrence))


def forward(config, w: dict[str, Tensor], ids: Tensor, targets: Tensor, starts: list[int], looping: bool) -> Tensor:
    """Weights w (float64), ids (T,), targets (T,) -> nats (T,)."""
    heads, kv, c = config.num_heads, config.num_kv_heads, config.sparse_attn_gate_scale
    tokens, window = len(ids), config.gate_window
    position = [t - max(s for s in starts if s <= t) for t in range(tokens)]

    def attend(i: int, n: Tensor) -> Tensor:
        q, k, v = ((n @ w[name][i].T).view(tokens, count, -1) for name, count in
                   (("q_proj", heads), ("k_proj", kv), ("v_proj", kv)))
        q, k = rms(q), rms(k)
        for t in range(tokens):
            for x in (q, k):
                for h in range(x.shape[1]):
                    x[t, h] = rotate(x[t, h], position[t], config.rope_dims, config.rope_base)
        y = attention(q * w["q_gain"][i][None, :, None], k, v, starts)
        if i >= config.num_layers - config.xsa_last_n:
            y = exclude_own_value(y, v)
        if c:
            y = y * torch.sigmoid(c * (n[:, :window] @ w["attn_gate"][i].T))[:, :, None]
        return y.reshape(tokens, -1) @ w["out_proj"][i].T

    def feed_forward(i: int, n: Tensor) -> Tensor:
        z = n @ w["up_proj"][i].T
        return torch.maximum(z, config.leaky_relu_slope * z) ** 2 @ w["down_proj"][i].T

    e = w["embedding"][ids]
    x = e.clone()
    if config.smear_gate == "input":
        for t in range(1, tokens):
            if ids[t] != BOS and position[t] != 0:
                x[t] = e[t] + w["smear_scale"] * torch.sigmoid(w["smear_gate"] @ e[t, :window]) * e[t - 1]
    x = rms(x)
    x0 = x
    encoder, decoder = published_order(config, looping)
    stack, lanes = [], None
    for step, i in enumerate(encoder + decoder):
        scale = 1 / math.sqrt(i + 1) if config.ln_scale else 1.0
        if lanes is None and config.parallel_start_layer and i >= config.parallel_start_layer:
            lanes = [x, x]
        j = step - len(encoder)
        if j >= 0 and stack:
            row = skip_row(config, i, decoder[:j].count(i))
            kept, into = w["skip_weight"][row] * stack.pop(), lanes[0] if lanes else x
            if config.skip_gates_enabled:
                gate = torch.sigmoid(w["skip_gate"][row])
                into = gate * into + (1 - gate) * kept
            else:
                into = into + kept
            if lanes:
                lanes[0] = into
            else:
                x = into
        a, b = w["resid_mix"][i]
        if lanes is None:
            u = a * x + b * x0
            h = u + w["attn_scale"][i] * attend(i, scale * rms(u))
            x = h + w["mlp_scale"][i] * feed_forward(i, scale * rms(h))
        else:
            p = i - config.parallel_start_layer
            first, second = lanes
            o_a = w["attn_scale"][i] * attend(i, scale * rms(a * first + b * x0))
            o_m = w["mlp_scale"][i] * feed_forward(i, scale * rms(second))
            rho, pi = w["lane_resid"][p], w["lane_mix"][p]
            lanes = [rho[d] * lane + pi[0, d] * o_a + pi[1, d] * o_m for d, lane in enumerate(lanes)]
        if j < 0:
            stack.append(x)
    if lanes:
        x = (lanes[0] + lanes[1]) / 2
    logits = rms(x) @ w["embedding"].T
    logits = config.logit_softcap * torch.tanh(logits / config.logit_softcap)
    return -torch.log_softmax(logits, -1)[torch.arange(tokens), targets]


def newton_schulz(matrix: Tensor, coefficients) -> Tensor:
    """One matrix of any shape, in its own dtype."""
    transposed = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if transposed else matrix
    x = x / (torch.sqrt((x * x).sum()) + 1e-7)
    for a, b, c in coefficients:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x.T if transposed else x


def muon_step(weight: Tensor, grad: Tensor, buffer: Tensor, momentum: float, lr: float, weight_decay: float,
              coefficients, row_normalize: bool) -> tuple[Tensor, Tensor]:
    """One matrix -> (new weight, new momentum buffer), section 2.3."""
    buffer = momentum * buffer + grad
    update = grad + momentum * buffer
    if row_normalize:
        update = torch.stack([row / max(row.norm().item(), 1e-7) for row in update])
    kappa = math.sqrt(max(1.0, weight.shape[0] / weight.shape[1]))
    return weight * (1 - lr * weight_decay) - lr * kappa * newton_schulz(update, coefficients), buffer


def bits_per_byte(nats: float, num_bytes: int) -> float:
    return nats / (math.log(2) * num_bytes)


def sliding_windows(length: int, seq_len: int, stride: int) -> list[tuple[int, int, int]]:
    """The 2026-04-05 rule with window 0 always kept -> (start, end, first scored)."""
    context, rows, start = seq_len - stride, [], 0
    while start == 0 or start + context < length:
        rows.append((start, min(start + seq_len, length), start + context if start else 0))
        start += stride
    return rows
