"""Slow, obviously right versions, in float64 and plain loops, written from the published description of R0427."""
import itertools
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


def forward(config, w: dict[str, Tensor], ids: Tensor, targets: Tensor, starts: list[int], looping: bool,
            adapters: dict[str, tuple[Tensor, Tensor]] | None = None) -> Tensor:
    """Weights w (float64), ids (T,), targets (T,) -> nats (T,).

    adapters, section 6c: target -> (A (visits, R, in), B (visits, out, R)), or (R, in), (out, R) for the head.
    """
    heads, kv, c = config.num_heads, config.num_kv_heads, config.sparse_attn_gate_scale
    tokens, window = len(ids), config.gate_window
    position = [t - max(s for s in starts if s <= t) for t in range(tokens)]

    def low(target: str, n: Tensor, step: int | None) -> Tensor | float:
        if target not in (adapters or {}):
            return 0.0
        a, b = (x if step is None else x[step] for x in adapters[target])
        return torch.stack([b @ (a @ row) for row in n])

    def attend(i: int, n: Tensor, step: int) -> Tensor:
        q, k, v = ((n @ w[f"{name}_proj"][i].T + low(name, n, step)).view(tokens, count, -1) for name, count in
                   (("q", heads), ("k", kv), ("v", kv)))
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
        return y.reshape(tokens, -1) @ w["out_proj"][i].T + low("out", n, step)

    def feed_forward(i: int, n: Tensor, step: int) -> Tensor:
        z = n @ w["up_proj"][i].T
        return torch.maximum(z, config.leaky_relu_slope * z) ** 2 @ w["down_proj"][i].T + low("mlp", n, step)

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
            h = u + w["attn_scale"][i] * attend(i, scale * rms(u), step)
            x = h + w["mlp_scale"][i] * feed_forward(i, scale * rms(h), step)
        else:
            p = i - config.parallel_start_layer
            first, second = lanes
            o_a = w["attn_scale"][i] * attend(i, scale * rms(a * first + b * x0), step)
            o_m = w["mlp_scale"][i] * feed_forward(i, scale * rms(second), step)
            rho, pi = w["lane_resid"][p], w["lane_mix"][p]
            lanes = [rho[d] * lane + pi[0, d] * o_a + pi[1, d] * o_m for d, lane in enumerate(lanes)]
        if j < 0:
            stack.append(x)
    if lanes:
        x = (lanes[0] + lanes[1]) / 2
    logits = rms(x) @ w["embedding"].T + low("head", rms(x), None)
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


# --- test-time training, section 6; nats_of(ids (T,), targets (T,), adapters or None) -> nats (T,) of one document
class HandWritten:
    """AdamW or SGD with momentum, one tensor at a time."""

    def __init__(self, config, values: dict[str, Tensor], kind: str):
        self.config, self.values, self.kind, self.steps = config, values, kind, 0
        self.first = {name: torch.zeros_like(x) for name, x in values.items()}
        self.second = {name: torch.zeros_like(x) for name, x in values.items()}

    @torch.no_grad()
    def step(self, grads: dict[str, Tensor], lr: dict[str, float]) -> None:
        config, self.steps = self.config, self.steps + 1
        for name, x in self.values.items():
            g = grads[name]
            if self.kind == "sgd":
                self.first[name] = config.global_ttt_momentum * self.first[name] + g
                x -= lr[name] * self.first[name]
                continue
            self.first[name] = config.ttt_beta1 * self.first[name] + (1 - config.ttt_beta1) * g
            self.second[name] = config.ttt_beta2 * self.second[name] + (1 - config.ttt_beta2) * g * g
            mean = self.first[name] / (1 - config.ttt_beta1 ** self.steps)
            root = torch.sqrt(self.second[name] / (1 - config.ttt_beta2 ** self.steps))
            x *= 1 - lr[name] * config.ttt_weight_decay
            x -= lr[name] * mean / (root + 1e-10)


class Remembered:
    """Attention over a row whose first tokens keep the keys and values of the passes before; a loop over visits."""

    def __init__(self):
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def attention(self, first: int):
        """-> an attention: tokens before `first` of the row have the keys and values that they had."""
        visits = itertools.count()

        def attend(q: Tensor, k: Tensor, v: Tensor, _) -> Tensor:
            visit = next(visits)
            if first:
                k, v = (torch.cat((old[:first], x[first:])) for old, x in zip(self.kept[visit], (k, v)))
            self.kept[visit] = k.detach(), v.detach()
            group, length = q.size(1) // k.size(1), len(q)
            scores = torch.einsum("qhe,khe->hqk", q, k.repeat_interleave(group, 1)) / math.sqrt(q.size(-1))
            scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf)
            return torch.einsum("hqk,khe->qhe", scores.softmax(-1), v.repeat_interleave(group, 1))
        return attend


def adapt_document(config, nats_of, document: Tensor, first: dict[str, Tensor], chunk: int) -> tuple[list[float], dict]:
    """A document's tokens and the one behind it, the first A of every target -> (nats of every target, last A).

    Chunk by chunk: score, then one step on the mean of the chunk's nats. The whole row passes through the model each
    time, but what lies before the chunk and the tokens right before it is attended to as it was.
    """
    length, nats, values = len(document) - 1, [], {}
    for target, a in first.items():
        outputs = {"k": config.num_kv_heads * config.head_dim, "v": config.num_kv_heads * config.head_dim,
                   "head": config.vocab_size}.get(target, config.model_dim)
        values[f"{target}_document_in"] = a.clone()
        values[f"{target}_document_out"] = torch.zeros(len(a), outputs, config.ttt_lora_rank)
    optimizer, lr = HandWritten(config, values, config.ttt_optimizer), dict.fromkeys(values, config.ttt_lora_lr)
    row, memory, back = 0, Remembered(), min(config.ttt_back_tokens, config.eval_seq_len - chunk)

    def passed(begin: int, end: int, leaves: dict[str, Tensor]) -> Tensor:
        attention = memory.attention(max(begin - back - row, 0))
        return nats_of(document[row:end], document[row + 1:end + 1], leaves, attention)[begin - row:]

    for begin in range(0, length, chunk):
        end = min(begin + chunk, length)
        leaves = {name: x.clone().requires_grad_() for name, x in values.items()}
        if begin + chunk - row > config.eval_seq_len:
            row, memory = begin - config.eval_seq_len // 2 // chunk * chunk, Remembered()
            for earlier in range(row, begin, chunk):
                passed(earlier, earlier + chunk, leaves)
        scored = passed(begin, end, leaves)
        nats += scored.tolist()
        if end < length:
            scored.mean().backward()
            optimizer.step({name: x.grad for name, x in leaves.items()}, lr)
    return nats, {target: values[f"{target}_document_in"] for target in first}


class WeightLearner:
    """All weights of a model learn from pieces of text: one step for the mean over all targets of the pieces."""

    def __init__(self, config, params: dict[str, Tensor], frozen: dict[str, list[int]], kind: str):
        self.config, self.params, self.frozen, self.kind = config, params, frozen, kind
        self.optimizer = HandWritten(config, params, kind)

    def learn(self, nats_of, pieces: list[tuple[Tensor, Tensor]], lr_scale: float) -> None:
        """pieces: (ids (T,), targets (T,)), each a context of its own."""
        config, grads, frozen = self.config, {}, {}
        for p in self.params.values():
            p.requires_grad_(True).grad = None
        (sum(nats_of(ids, targets).sum() for ids, targets in pieces) / sum(len(ids) for ids, _ in pieces)).backward()
        for name, p in self.params.items():
            grads[name] = torch.zeros_like(p) if p.grad is None else p.grad
            grads[name][self.frozen.get(name, [])] = 0
            frozen[name] = p.detach()[self.frozen.get(name, [])].clone()
            p.requires_grad_(False)
        total = math.sqrt(sum((g * g).sum().item() for g in grads.values()))
        if config.global_ttt_grad_clip and total > config.global_ttt_grad_clip:
            grads = {name: g * config.global_ttt_grad_clip / total for name, g in grads.items()}
        factors = {"out_proj": 3, "down_proj": 3, "up_proj": 0.5} if self.kind == "adamw" else {}
        self.optimizer.step(grads, {name: config.global_ttt_lr * factors.get(name, 1) * lr_scale for name in grads})
        for name, rows in frozen.items():
            self.params[name][self.frozen.get(name, [])] = rows


def half_cosine(share: float) -> float:
    return (1 + math.cos(math.pi * share)) / 2


# --- the options of the model, token by token and head by head; p (T,): each token's place in its segment
def frequencies(config, training: bool) -> list[float]:
    """Angle per place of each rotated pair, with NTK-aware scaling or YaRN's ramp."""
    longer = 1.0 if training else max(config.eval_seq_len / config.train_seq_len, 1.0)
    stretch, dims, result = config.rope_stretch or longer, config.rope_dims, []
    for j in range(dims // 2):
        if config.rope_scaling == "ntk":
            result.append((config.rope_base * stretch ** (dims / (dims - 2))) ** (-2 * j / dims))
            continue
        angle = config.rope_base ** (-2 * j / dims)
        if config.rope_scaling == "yarn":
            ramp = min(max((2 * j / dims - 0.25) / 0.75, 0.0), 1.0)
            angle = angle / (1 + ramp * (stretch - 1))
        result.append(angle)
    return result


def turned(x: Tensor, place: int, angles: list[float]) -> Tensor:
    """One head's vector (E,) at a place."""
    half, out = len(angles), list(x)
    for j, angle in enumerate(angles):
        a, b, c, s = x[j], x[j + half], math.cos(place * angle), math.sin(place * angle)
        out[j], out[j + half] = a * c + b * s, b * c - a * s
    return torch.stack(out)


def bigram_bucket(kind: str, buckets: int, previous: int | None, current: int) -> int:
    """Row of the table for a pair of tokens; previous is None at the start of a segment."""
    if kind == "92821":
        return (92821 * (previous or 0) + current) % buckets
    if kind == "36313":
        return buckets - 1 if previous is None else ((36313 * current) ^ (27191 * previous)) % (buckets - 1)
    if kind == "1000003":
        return (1000003 * (current if previous is None else previous) + current) % buckets
    return (31 * (previous or 0) + current) % buckets


def mean_so_far(x: Tensor, place: list[int]) -> Tensor:
    """x (T, D) -> mean of each segment up to each token."""
    return torch.stack([x[t - p:t + 1].mean(0) for t, p in enumerate(place)])


def option_embedding(config, w: dict[str, Tensor], ids: Tensor, place: list[int]) -> Tensor:
    """Token ids (T,) -> the normalized stream (T, D) that blocks read."""
    e, x = [], []
    for t, token in enumerate(ids.tolist()):
        e.append(w["embedding"][token])
        if config.bigram_hash_buckets:
            row = bigram_bucket(config.bigram_hash, config.bigram_hash_buckets,
                                int(ids[t - 1]) if place[t] else None, token)
            pair = w["bigram_proj"][0] @ w["bigram_table"][row]
            e[t] = e[t] + (w["bigram_scale"] * pair if config.bigram_hash == "36313" else pair)
    for t, token in enumerate(ids.tolist()):
        smeared = e[t]
        if place[t] and token != BOS and config.smear_gate == "input":
            smeared = e[t] + w["smear_scale"] * torch.sigmoid(w["smear_gate"] @ e[t][:config.gate_window]) * e[t - 1]
        if place[t] and token != BOS and config.smear_gate == "static":
            own = torch.sigmoid(w["static_smear"])
            smeared = own * e[t] + (1 - own) * e[t - 1]
        x.append(w["embed_in"][0] @ smeared if config.embed_dim else smeared)
    return rms(torch.stack(x))


def option_attention(config, w: dict[str, Tensor], i: int, adapter: int, n: Tensor, place: list[int],
                     first: Tensor | None, angles: list[float]) -> tuple[Tensor, Tensor]:
    """Layer i, its normalized input n (T, D), the first layer's values -> output (T, D), its own values (T, K, E)."""
    heads, kv, width, tokens = config.num_heads, config.num_kv_heads, config.head_dim, len(n)
    q, k, v = [], [], []
    for t in range(tokens):
        low = {x: w[f"{x}_adapter_out"][adapter] @ (w[f"{x}_adapter_in"][adapter] @ n[t]) if adapter >= 0 else 0.0
               for x in "qv"}
        q.append((w["q_proj"][i] @ n[t] + low["q"]).view(heads, width))
        k.append((w["k_proj"][i] @ n[t]).view(kv, width))
        v.append((w["v_proj"][i] @ n[t] + low["v"]).view(kv, width))
    last_loop = config.loop_end if config.num_loops else 0
    if config.value_residual and i > last_loop:
        a, b = w["value_mix"][i - last_loop - 1]
        v = [a * first[t] + b * v[t] for t in range(tokens)]
    q = [torch.stack([w["q_gain"][i][h] * turned(rms(q[t][h]), place[t], angles) for h in range(heads)])
         for t in range(tokens)]
    k = [torch.stack([turned(rms(k[t][h]), place[t], angles) for h in range(kv)]) for t in range(tokens)]
    out = []
    for t in range(tokens):
        row = []
        for h in range(heads):
            g, begin = h // (heads // kv), t - place[t]
            share = torch.softmax(torch.stack([q[t][h] @ k[u][g] for u in range(begin, t + 1)]) / math.sqrt(width), 0)
            y, own = sum(share[u - begin] * v[u][g] for u in range(begin, t + 1)), v[t][g] / v[t][g].norm()
            if i >= config.num_layers - config.xsa_last_n:
                y = y - (y @ own) * own
            if config.attn_gate == "dense":
                y = y * torch.sigmoid(w["attn_gate"][i][h] @ n[t] + w["attn_gate_bias"][i][h])
            elif config.attn_gate == "output":
                y = y * 2 * torch.sigmoid(w["attn_gate"][i][h] @ n[t][:config.gate_window])
            elif config.sparse_attn_gate_scale:
                y = y * torch.sigmoid(config.sparse_attn_gate_scale
                                      * (w["attn_gate"][i][h] @ n[t][:config.gate_window]))
            row.append(y)
        y = torch.cat(row)
        out.append(w["out_proj"][i] @ (rms(y) if config.projection_norm else y))
    return torch.stack(out), torch.stack(v)


def option_mlp(config, w: dict[str, Tensor], i: int, n: Tensor) -> Tensor:
    """Layer i, its normalized input n (T, D) -> output (T, D)."""
    out, hidden = [], config.mlp_hidden or int(config.mlp_mult * config.model_dim)
    for row in n:
        z = w["up_proj"][i] @ row
        if config.mlp_activation == "swiglu":
            gate, up = z[:hidden], z[hidden:]
            z = gate / (1 + torch.exp(-gate)) * up
        else:
            z = torch.maximum(z, config.leaky_relu_slope * z) ** 2
        out.append(w["down_proj"][i] @ (rms(z) if config.projection_norm else z))
    return torch.stack(out)


def option_logits(config, w: dict[str, Tensor], x: Tensor) -> Tensor:
    """The stream (T, D) behind the last block -> capped logits (T, V)."""
    x, cap = rms(x), config.logit_softcap
    if config.embed_dim:
        x = x @ w["embed_out"][0].T
    logits = x @ (w["embedding"] if config.tie_embeddings else w["head"]).T
    if config.vocab_bias:
        logits = logits + w["vocab_bias"]
    if config.softcap_type == "poly5":
        u = (logits / cap).clamp(-2, 2)
        return cap * (u - u ** 3 / 3 + u ** 5 / 15).clamp(-1, 1)
    if config.softcap_type == "two_sided":
        above, below = cap * torch.exp(w["softcap_scale"])
        return torch.where(logits >= 0, above * torch.tanh(logits / above), below * torch.tanh(logits / below))
    return cap * torch.tanh(logits / cap)


def option_features(config, w: dict[str, Tensor], ids: Tensor, place: list[int], looping: bool,
                    training: bool) -> Tensor:
    """Weights w (float64), ids (T,) -> the stream (T, D) behind the last block."""
    angles, x0 = frequencies(config, training), option_embedding(config, w, ids, place)
    encoder, decoder = published_order(config, looping)
    x, second, stack, first, order = x0, None, [], None, encoder + decoder
    for step, i in enumerate(order):
        scale = 1 / math.sqrt(i + 1) if config.ln_scale else 1.0
        if second is None and config.parallel_start_layer and i >= config.parallel_start_layer:
            second = x
        j = step - len(encoder)
        if j >= 0 and stack:
            row = skip_row(config, i, decoder[:j].count(i))
            kept = w["skip_weight"][row] * stack.pop()
            if config.skip_gates_enabled:
                gate = torch.sigmoid(w["skip_gate"][row])
                x = gate * x + (1 - gate) * kept
            else:
                x = x + kept
        if config.smear_gate == "mean":
            x = x + torch.tanh(w["mean_smear"][i]) * (mean_so_far(x, place) - x)
        looped = config.num_loops and config.depth_lora_rank and config.loop_start <= i <= config.loop_end
        adapter = order[:step].count(i) * (config.loop_end - config.loop_start + 1) + i - config.loop_start
        a, b = w["resid_mix"][i]
        u = a * x + b * x0
        n = scale * rms(u)
        o_a, v = option_attention(config, w, i, adapter if looped else -1, n, place, first, angles)
        o_a, first = w["attn_scale"][i] * o_a, v if first is None else first
        if second is None:
            n = n if config.gptj_block else scale * rms(u + o_a)
            x = u + o_a + w["mlp_scale"][i] * option_mlp(config, w, i, n)
        else:
            o_m = w["mlp_scale"][i] * option_mlp(config, w, i, scale * rms(second))
            rho, pi = w["lane_resid"][i - config.parallel_start_layer], w["lane_mix"][i - config.parallel_start_layer]
            x, second = (rho[d] * lane + pi[0, d] * o_a + pi[1, d] * o_m for d, lane in enumerate((x, second)))
        if j < 0:
            stack.append(x)
    return x if second is None else (x + second) / 2


def option_nats(config, w: dict[str, Tensor], ids: Tensor, targets: Tensor, place: list[int], looping: bool,
                training: bool) -> Tensor:
    """targets (T, C), -1 = none -> nats (T, C)."""
    logits = option_logits(config, w, option_features(config, w, ids, place, looping, training))
    result = []
    for t, row in enumerate(targets.tolist()):
        log_sum = torch.log(torch.exp(logits[t]).sum())
        nats = [log_sum - logits[t][y] if y >= 0 else 0 * log_sum for y in row]
        result.append(torch.stack([nats[0] + config.z_loss * log_sum ** 2 * training, *nats[1:]]))
    return torch.stack(result)


def ngram_counts(tokens, order: int) -> list[tuple[int, int, int]]:
    """With dictionaries whose keys are the tokens themselves: for each target (times its context was seen, times this
    target followed it, number of different tokens that did), looked up before the target is entered."""
    tokens, length = [int(token) for token in tokens], order - 1
    contexts: dict[tuple, dict[int, int]] = {}
    counts = []
    for t in range(1, len(tokens)):
        followers = contexts.setdefault(tuple(tokens[t - length:t]), {}) if t >= length else {}
        counts.append((sum(followers.values()), followers.get(tokens[t], 0), len(followers)))
        followers[tokens[t]] = followers.get(tokens[t], 0) + 1
    return counts


def smoothed_distribution(p, tokens, place: int, orders):
    """The whole distribution (V,) at a place: p, then for each order (counts + a p) / (their sum + a)."""
    for order in orders:
        followers = [0] * len(p)
        for t in range(order - 1, place):
            if place >= order - 1 and list(tokens[t - order + 1:t]) == list(tokens[place - order + 1:place]):
                followers[int(tokens[t])] += 1
        prior = 8000 / order ** 3 * sum(count > 0 for count in followers) ** 1.5
        if sum(followers):
            p = [(count + prior * x) / (sum(followers) + prior) for count, x in zip(followers, p)]
    return p
