"""Section 12, test-time training: adapters in the forward pass, the loop of score and adapt, legality, edges, audit."""
import functools
import itertools
import json
import math
import os
import re
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import program
import pytest
import reference
import torch
from adaptation import (
    LENGTHS,
    RUN_LENGTHS,
    RUNS,
    SEQ_LEN,
    adapt_config,
    adapted_nats,
    bounds_of,
    make_learner,
    make_model,
    make_text,
    perturbed,
)
from helpers import random_batch, single_world, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import (
    GPT,
    TTT_TARGETS,
    Config,
    Ledger,
    Slots,
    UserError,
    World,
    adapted,
    audit,
    chunk_size,
    make_batch,
    make_segments,
    plan_chunks,
    plan_groups,
)

BLOCK_TARGETS = TTT_TARGETS[:-1]


# --- adapters in the forward pass
def adapter_sizes(config: Config, looping: bool) -> dict[str, tuple[int, int, int]]:
    """target -> (visits, inputs, outputs)."""
    width, kv, visits = config.model_dim, config.num_kv_heads * config.head_dim, len(reference.published_order(
        config, looping)[0] + reference.published_order(config, looping)[1])
    return {"q": (visits, width, width), "k": (visits, width, kv), "v": (visits, width, kv),
            "out": (visits, width, width), "mlp": (visits, width, width), "head": (1, width, config.vocab_size)}


def random_adapters(config: Config, documents: int, targets=TTT_TARGETS, rank: int = 3, seed: int = 0,
                    looping: bool = True) -> dict[str, torch.Tensor]:
    """TARGET_document_in, _out of documents, all different and large enough to matter."""
    generator, result = torch.Generator().manual_seed(seed), {}
    for target in targets:
        visits, inputs, outputs = adapter_sizes(config, looping)[target]
        for end, shape in (("in", (rank, inputs)), ("out", (outputs, rank))):
            result[f"{target}_document_{end}"] = 0.3 * torch.randn(documents, visits, *shape, generator=generator)
    return result


def document(adapters: dict[str, torch.Tensor], i: int) -> dict[str, torch.Tensor]:
    return {name: x[i:i + 1] for name, x in adapters.items()}


def one_row(model: GPT):
    """-> nats_of(ids, targets, adapters of one document, attention), as the slow versions take it."""
    def nats_of(ids, targets, adapters=None, attention=train_gpt.attention_sdpa):
        segments, model.attention = make_segments(np.array([0]), len(ids), len(ids), 0), attention
        nats = model(*make_batch(ids, targets, segments), {name: x[None] for name, x in (adapters or {}).items()})
        model.attention = train_gpt.attention_sdpa
        return nats
    return nats_of


def naive_nats(model: GPT, ids, targets, adapters: dict[str, torch.Tensor]) -> torch.Tensor:
    """The float64 reference with one document's adapters: alpha / rank is a factor of B."""
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    scale = model.config.ttt_lora_alpha / model.config.ttt_lora_rank
    own = {target: tuple(factor * adapters[f"{target}_document_{end}"][0].double() for end, factor in (
        ("in", 1.0), ("out", scale))) for target in TTT_TARGETS if f"{target}_document_in" in adapters}
    if "head" in own:
        own["head"] = tuple(x[0] for x in own["head"])
    return reference.forward(model.config, weights, ids, targets, [0], model.looping, own)


@torch.no_grad()
def test_adapters_of_q_k_v_are_low_rank_changes_of_the_matrices():
    config = tiny_config(num_loops=0, parallel_start_layer=2, ttt_lora_alpha=6.0, ttt_lora_rank=4)
    model, (ids, targets, _) = make_model(config), random_batch(0, 40, 40)
    segments, adapters = make_segments(np.array([0]), 40, 40, 0), random_adapters(config, 1, "qkv", looping=False)
    nats, plain = model(ids, targets, segments, adapters), model(ids, targets, segments)
    for target in "qkv":
        a, b = (adapters[f"{target}_document_{end}"][0] for end in ("in", "out"))
        getattr(model, f"{target}_proj").add_(6 / 4 * b @ a)
    assert torch.allclose(nats, model(ids, targets, segments), rtol=1e-4, atol=1e-5)
    assert (nats - plain).abs().median() > 0.02


@pytest.mark.parametrize("targets", [*[(target,) for target in TTT_TARGETS], TTT_TARGETS], ids="-".join)
@torch.no_grad()
def test_adapters_are_the_formula(targets):
    """Skips, a looped layer, whose visits have their own, lanes, and scales of outputs that are not one."""
    config = tiny_config()
    model, (ids, labels, _) = make_model(config), random_batch(1, 24, 24)
    adapters, segments = random_adapters(config, 1, targets), make_segments(np.array([0]), 24, 24, 0)
    nats, plain = model(ids, labels, segments, adapters), model(ids, labels, segments)
    assert torch.allclose(nats.double(), naive_nats(model, ids[0], labels[0], adapters), rtol=2e-4, atol=1e-4)
    assert (nats - plain).abs().median() > 0.02


@torch.no_grad()
def test_each_visit_of_a_looped_layer_has_adapters_of_its_own():
    config = tiny_config()
    model, (ids, labels, _) = make_model(config), random_batch(1, 24, 24)
    adapters, segments = random_adapters(config, 1, BLOCK_TARGETS), make_segments(np.array([0]), 24, 24, 0)
    visits = [visit.layer for visit in model.plans[True]]
    assert visits == [0, 1, 1, 2, 3] and len(model.plans[False]) == 4
    found = []
    for only in range(len(visits)):
        kept = {name: torch.where(torch.arange(len(visits)).view(1, -1, 1, 1) == only, x, 0)
                for name, x in adapters.items()}
        found.append(model(ids, labels, segments, kept))
    for i, nats in enumerate(found):
        assert all((nats - other).abs().max() > 0.01 for other in found[:i])


def side_by_side(documents: int, width: int):
    """-> a model, adapters of so many documents, and their ids, targets and segments, rows of `width` tokens."""
    config, total = tiny_config(), documents * width
    ids, labels, _ = random_batch(2, total, total)
    segments = make_segments(np.arange(documents) * width, total, width, 0)
    return make_model(config), random_adapters(config, documents), ids, labels, segments


@torch.no_grad()
def test_documents_side_by_side_do_not_touch_each_other():
    width = 24
    model, adapters, ids, labels, segments = side_by_side(3, width)
    together = model(ids, labels, segments, adapters).view(3, width)
    alone = make_segments(np.array([0]), width, width, 0)
    for i in range(3):
        row = slice(i * width, (i + 1) * width)
        assert torch.allclose(together[i], model(ids[:, row], labels[:, row], alone, document(adapters, i)), rtol=1e-4,
                              atol=1e-5)
    changed = {name: torch.stack((x[0], x[1] + 1, x[2])) for name, x in adapters.items()}
    again = model(ids, labels, segments, changed).view(3, width)
    assert torch.equal(again[[0, 2]], together[[0, 2]]) and not torch.allclose(again[1], together[1], rtol=0.01)


@torch.no_grad()
def test_only_the_rows_asked_for_reach_the_head():
    width = 24
    model, adapters, ids, labels, segments = side_by_side(2, width)
    whole = model(ids, labels, segments, adapters)
    rows = torch.tensor([3, 9, 20, 24, 0, 47])  # as many of each document; -1 = nobody's
    targets = labels[:, rows].clone()
    targets[0, 4] = -1
    some = model(ids, targets, segments, adapters, rows)
    expected = whole[rows].clone()
    expected[4] = 0
    # the fifth row belongs to the first document, and has the head of the second: nobody looks at it
    assert torch.allclose(some, expected, rtol=1e-4, atol=1e-5) and some[4] == 0


@torch.no_grad()
def test_depth_adapters_and_adapters_of_documents_add_up():
    config = tiny_config(depth_lora_rank=2)
    model, (ids, labels, _) = make_model(config), random_batch(4, 24, 24)
    adapters, segments = random_adapters(config, 1), make_segments(np.array([0]), 24, 24, 0)
    joined, scale = dict(adapters), config.ttt_lora_alpha / config.ttt_lora_rank
    for target in "qv":  # the model's own, as further ranks of the document's; 0 where the visit has none
        more = [getattr(model, f"{target}_adapter_{end}") for end in ("in", "out")]
        none = [torch.zeros_like(x[0]) for x in more]
        a, b = (torch.stack([x[visit.adapter] if visit.adapter >= 0 else zero for visit in model.plans[True]])
                for x, zero in zip(more, none))
        for end, x, dim in (("in", a, 2), ("out", b / scale, 3)):
            joined[f"{target}_document_{end}"] = torch.cat((adapters[f"{target}_document_{end}"], x[None]), dim)
    nats = model(ids, labels, segments, adapters)
    assert torch.allclose(nats.double(), naive_nats(model, ids[0], labels[0], joined), rtol=2e-4, atol=1e-4)
    assert (nats.double() - naive_nats(model, ids[0], labels[0], adapters)).abs().max() > 0.02


def test_adapted_adds_what_each_kind_makes_of_its_rows():
    both = {f"q_{kind}_{end}": torch.randn(*[2] * (kind == "document"), *shape)
            for kind in ("adapter", "document") for end, shape in (("in", (3, 8)), ("out", (5, 3)))}
    x, y = torch.randn(6, 8), torch.randn(6, 5)
    shared, own = x @ both["q_adapter_in"].T @ both["q_adapter_out"].T, torch.cat(
        [x[i:i + 3] @ both["q_document_in"][i // 3].T @ both["q_document_out"][i // 3].T for i in (0, 3)])
    assert torch.allclose(adapted(y, x, both, "q"), y + shared + own, rtol=1e-4, atol=1e-5)
    for kind, part in (("adapter", shared), ("document", own)):
        some = {name: value for name, value in both.items() if kind in name}
        assert torch.allclose(adapted(y, x, some, "q"), y + part, rtol=1e-4, atol=1e-5)
    assert adapted(y, x, both, "k") is y


@torch.no_grad()
def test_fresh_adapters_add_nothing():
    config = tiny_config()
    model, (ids, labels, _) = make_model(config), random_batch(4, 24, 24)
    segments, fresh = make_segments(np.array([0]), 24, 24, 0), random_adapters(config, 1)
    for name, x in fresh.items():
        if name.endswith("_out"):
            x.zero_()
    assert torch.equal(model(ids, labels, segments, fresh), model(ids, labels, segments))


@pytest.mark.parametrize("changes", [{}, {"num_loops": 0, "parallel_start_layer": 0}, {"embed_dim": 24},
                                     {"tie_embeddings": False}], ids=str)
def test_first_adapters_are_those_of_every_document(changes):
    """A in +-1 / sqrt(inputs), B = 0, whatever the number of documents; the shapes are those the model takes."""
    config, text = adapt_config(**changes), make_text((5, 5))
    slots = make_learner(config, text).slots_for(3, 8)
    adapters = {name: x.clone() for name, x in slots.adapters.items()}
    assert {name.split("_")[0] for name in adapters} == {*TTT_TARGETS} and not slots.optimizer.state
    for target, (visits, inputs, outputs) in adapter_sizes(config, bool(config.num_loops)).items():
        inputs = config.embed_dim or inputs if target == "head" else inputs
        a, b = (adapters[f"{target}_document_{end}"] for end in ("in", "out"))
        assert a.shape == (3, visits, 4, inputs) and b.shape == (3, visits, outputs, 4)
        assert torch.equal(a, a[:1].expand_as(a)) and not b.any()
        assert 0.8 * inputs ** -0.5 < a.abs().max() <= inputs ** -0.5 and abs(a.mean()) < 0.15 * inputs ** -0.5
        assert torch.equal(make_learner(config, text).slots_for(1, 8).adapters[f"{target}_document_in"][0], a[0])
    for value in slots.adapters.values():
        value.add_(1)
    slots.start()
    assert all(torch.equal(value, adapters[name]) for name, value in slots.adapters.items())
    assert np.isfinite(adapted_nats(config, text)).all()


# --- the loop of a document
@pytest.fixture
def equal_runs(monkeypatch):
    """DETERMINISTIC=1 in a test does not outlive it."""
    for name in ("CUBLAS_WORKSPACE_CONFIG", "TORCHINDUCTOR_DETERMINISTIC"):
        monkeypatch.setenv(name, "")  # and so remembered
    filled = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
    torch.utils.deterministic.fill_uninitialized_memory = filled


def test_equal_runs_are_a_setting(equal_runs):
    for on in (True, False):
        World.start(adapt_config(deterministic=on, device="cpu", train_batch_tokens=768), {})
        assert torch.are_deterministic_algorithms_enabled() == on
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert os.environ["TORCHINDUCTOR_DETERMINISTIC"] == f"{on:d}"


def texts_of(text, config: Config) -> list[torch.Tensor]:
    """Every document's tokens and the one behind it."""
    tokens = torch.from_numpy(text.val_tokens.astype(np.int64))
    return [tokens[a:b + 1] for a, b in bounds_of(text)]


def first_adapters(config: Config, text) -> dict[str, torch.Tensor]:
    """target -> A (visits, R, in)."""
    adapters = make_learner(config, text).slots_for(1, 8).adapters
    return {name.removesuffix("_document_in"): x[0] for name, x in adapters.items() if name.endswith("_in")}


def unadapted_nats(config: Config, text, model: GPT | None = None) -> np.ndarray:
    """Of the same contexts, chunk by chunk, by a model that learns nothing."""
    return adapted_nats(replace(config, ttt_lora_lr=0.0), text, model=model)


DOCUMENT_RUNS = {
    "adamw": {}, "momentum": {"ttt_beta1": 0.8, "ttt_beta2": 0.95, "ttt_weight_decay": 5.0},
    "sgd": {"ttt_optimizer": "sgd", "ttt_lora_lr": 0.2, "ttt_lora_alpha": 8.0},
    "some targets": {"ttt_targets": "head,k", "ttt_lora_lr": 0.03},
    "chunk of a row": {"ttt_chunk_size": SEQ_LEN}, "no loops": {"num_loops": 0},
    "nothing again": {"ttt_back_tokens": 0},
    "a row again": {"ttt_back_tokens": 99}, "small chunks": {"ttt_chunk_size": 3, "ttt_lora_lr": 0.003},
    "inputs": {"smear_gate": "static", "bigram_hash_buckets": 16, "bigram_hash_dim": 8, "value_residual": True},
    "gates": {"attn_gate": "output", "num_heads": 4, "num_kv_heads": 1, "gptj_block": True}}


@pytest.mark.parametrize("changes", DOCUMENT_RUNS.values(), ids=DOCUMENT_RUNS)
def test_documents_are_scored_and_learned_as_one_at_a_time(changes):
    config, text = adapt_config(**changes), make_text((1, 100, 33, 16, 2))
    assert config.ttt_lora_alpha != config.ttt_lora_rank
    nats_of, expected = one_row(make_model(config)), []
    for tokens in texts_of(text, config):
        expected += reference.adapt_document(config, nats_of, tokens, first_adapters(config, text),
                                             config.ttt_chunk_size)[0]
    nats, without = adapted_nats(config, text), unadapted_nats(config, text)
    assert np.allclose(nats, expected, rtol=2e-3, atol=2e-3)
    first = [b for a, b in bounds_of(text) if b - a <= config.ttt_chunk_size]  # learn nothing in their only chunk
    assert np.array_equal(nats[first[0] - 1:first[0]], without[first[0] - 1:first[0]])
    assert np.abs(nats - without).max() > 0.05 and np.median(np.abs(nats - expected)) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, *RUNS.values()], ids=str)
def test_a_gpu_adapts_as_a_cpu_does(changes, equal_runs):
    """Its CUDA graphs give what it gives without them; equal runs, equal numbers."""
    config, text = adapt_config(**changes), make_text()
    world, expected = World.start(replace(config, device="cuda", deterministic=True), {}), adapted_nats(config, text)
    torch.set_float32_matmul_precision("highest")  # what is normalized by AdamW makes much of little
    found = [adapted_nats(replace(config, cuda_graphs=graphs), text, world=replace(world, dtype=torch.float32),
                          model=make_model(config).cuda()) for graphs in (True, True, False)]
    assert np.array_equal(found[0], found[1]) and np.allclose(found[0], found[2], rtol=1e-5, atol=1e-5)
    assert np.median(np.abs(found[0] - expected)) < 1e-3 and np.allclose(found[0], expected, rtol=0.02, atol=0.02)
    half = adapted_nats(config, text, world=world, model=make_model(config, dtype=world.dtype).cuda())
    assert abs(half.mean() / expected.mean() - 1) < 0.02


def test_alpha_is_the_strength_of_adapters():
    """The same steps of B, four times as strong: not what another learning rate gives."""
    config, text = adapt_config(), make_text((100,))
    found = [adapted_nats(replace(config, **changes), text) for changes in
             ({}, {"ttt_lora_alpha": 24.0}, {"ttt_lora_lr": 0.04})]
    assert min(np.abs(a - b).max() for i, a in enumerate(found) for b in found[:i]) > 0.02


def test_a_chunk_is_at_most_a_row():
    """Longer ones would ask for targets that their row does not hold."""
    text = make_text((100, 9))
    found = [adapted_nats(adapt_config(**changes), text) for changes in (
        {"ttt_chunk_size": SEQ_LEN}, {"ttt_chunk_size": SEQ_LEN + 9}, {"ttt_chunk_schedule": "40@10,64@1000"})]
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


# --- all weights
def frozen_rows(config: Config) -> dict[str, list[int]]:
    """Rows of banks that belong to the first TTT_FREEZE_BLOCKS layers, for the parameters of adapt_config's model.

    Adapters of visits and skips belong to no layer.
    """
    layers, frozen = config.num_layers, config.ttt_freeze_blocks
    names = ("q_proj", "k_proj", "v_proj", "out_proj", "up_proj", "down_proj", "q_gain", "attn_scale", "mlp_scale",
             "resid_mix", "attn_gate")
    behind = [i - config.parallel_start_layer for i in range(config.parallel_start_layer, layers) if i < frozen]
    return {name: [*range(frozen)] for name in names} | dict.fromkeys(("lane_resid", "lane_mix"), behind)


def batches_of(config: Config, text, documents: list[int]) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Documents, cut into rows of EVAL_SEQ_LEN, in batches of at most GLOBAL_TTT_CHUNK_TOKENS targets."""
    tokens, batches = torch.from_numpy(text.val_tokens.astype(np.int64)), [[]]
    for a, b in (bounds_of(text)[i] for i in documents):
        for begin in range(a, b, config.eval_seq_len):
            end = min(begin + config.eval_seq_len, b)
            if batches[-1] and sum(len(ids) for ids, _ in batches[-1]) + end - begin > (
                    config.global_ttt_chunk_tokens or 32768):
                batches.append([])
            batches[-1].append((tokens[begin:end], tokens[begin + 1:end + 1]))
    return batches


def order_of(config: Config, text) -> list[int]:
    """Documents in the order of scoring."""
    lengths = [b - a for a, b in bounds_of(text)]
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i] * (config.ttt_order == "length"), i))


def stream_parts(config: Config, text) -> list[list[int]]:
    """Documents between two times that all weights learn: those that begin within so many tokens."""
    parts, begin, every = {}, 0, config.global_ttt_chunk_tokens
    for i in order_of(config, text):
        parts.setdefault(begin // every if every else i, []).append(i)
        begin += bounds_of(text)[i][1] - bounds_of(text)[i][0]
    return list(parts.values())


def naive_stream(config: Config, text) -> tuple[np.ndarray, GPT]:
    """Sliding windows of a part, one at a time; then steps of all weights on that part -> nats, the model."""
    model, tokens = make_model(config), torch.from_numpy(text.val_tokens.astype(np.int64))
    learner = reference.WeightLearner(config, dict(model.named_parameters()), frozen_rows(config), config.ttt_optimizer)
    nats, parts = np.full(len(tokens) - 1, np.nan), stream_parts(config, text)
    for k, part in enumerate(parts):
        for a, b in (bounds_of(text)[i] for i in part):
            for start, end, first in reference.sliding_windows(b - a, config.eval_seq_len, config.eval_stride):
                with torch.no_grad():
                    scored = one_row(model)(tokens[a + start:a + end], tokens[a + start + 1:a + end + 1])
                nats[a + first:a + end] = scored[first - start:].numpy()
        for batch in batches_of(config, text, part) * (k + 1 < len(parts)):
            for _ in range(config.global_ttt_epochs):
                learner.learn(one_row(model), batch, reference.half_cosine(k / (len(parts) - 1)))
    return nats, model


STREAM_RUNS = {
    "sgd": {"ttt_optimizer": "sgd", "global_ttt_lr": 0.05},
    "sgd in epochs": {"ttt_optimizer": "sgd", "global_ttt_epochs": 3, "global_ttt_momentum": 0.5,
                      "global_ttt_lr": 0.02},
    "sgd by documents": {"ttt_optimizer": "sgd", "global_ttt_chunk_tokens": 0, "global_ttt_lr": 0.05},
    "by length": {"ttt_optimizer": "sgd", "ttt_order": "length", "global_ttt_lr": 0.05, "global_ttt_chunk_tokens": 50},
    "no clip": {"ttt_optimizer": "sgd", "global_ttt_grad_clip": 0.0, "global_ttt_lr": 0.01},
    "adamw": {}, "adamw by documents": {"global_ttt_chunk_tokens": 0, "ttt_beta1": 0.9, "global_ttt_epochs": 2},
    "sgd frozen": {"ttt_optimizer": "sgd", "ttt_freeze_blocks": 2, "global_ttt_lr": 0.05},
    "adamw frozen": {"ttt_freeze_blocks": 2, "ttt_weight_decay": 5.0},
    "all layers frozen": {"ttt_freeze_blocks": 4, "depth_lora_rank": 2, "ttt_weight_decay": 5.0},
    "adapters of as many rows as layers": {"ttt_freeze_blocks": 1, "depth_lora_rank": 2, "num_layers": 3,
                                           "loop_start": 0, "loop_end": 0, "num_loops": 2, "parallel_start_layer": 2}}


@pytest.mark.parametrize("changes", STREAM_RUNS.values(), ids=STREAM_RUNS)
def test_the_stream_is_scored_and_learned_as_by_hand(changes):
    config, text = adapt_config(**{"ttt_strategy": "stream", **changes}), make_text((9, 1, 70, 40, 25, 60))
    expected, last = naive_stream(config, text)
    learner = make_learner(config, text)
    before = {name: p.clone() for name, p in learner.model.named_parameters()}
    ledger = learner.run()
    score = ledger.score(learner.world)
    assert np.allclose(ledger.nats, expected, rtol=2e-3, atol=2e-3)
    assert score.nats == pytest.approx(expected.sum(), rel=1e-4) and score.tokens == len(expected)
    assert np.abs(ledger.nats - adapted_nats(replace(config, global_ttt_lr=0.0), text)).max() > 0.05
    for name, p in learner.model.named_parameters():
        moved = (last.get_parameter(name) - before[name]).abs().max()
        assert (p - last.get_parameter(name)).abs().max() <= 0.05 * moved + 1e-6, name
        rows = frozen_rows(config).get(name, []) if config.ttt_freeze_blocks else []
        assert torch.equal(p[rows], before[name][rows])
        assert name == "skip_weight" or len(rows) == len(p) or not torch.equal(p, before[name]), name


def naive_phases(config: Config, text, ends: list[int]) -> np.ndarray:
    """Adapters of documents; between them, after so many documents, steps of all weights on all documents so far."""
    model, nats, documents, done = make_model(config), {}, texts_of(text, config), 0
    first, order = first_adapters(config, text), order_of(config, text)
    for end in [*ends, len(order)]:
        model.requires_grad_(False)
        for i in order[done:end]:
            nats[i], _ = reference.adapt_document(config, one_row(model), documents[i], first, config.ttt_chunk_size)
        done, batches = end, batches_of(config, text, order[:end]) * (end < len(order))
        learner = reference.WeightLearner(config, dict(model.named_parameters()), frozen_rows(config), "sgd")
        for i, batch in enumerate(batches):
            for _ in range(config.global_ttt_epochs):
                learner.learn(one_row(model), batch, reference.half_cosine(i / len(batches)))
    return np.array([x for i in range(len(order)) for x in nats[i]])


@pytest.mark.parametrize("changes, ends", [
    ({"phased_ttt_num_phases": 1, "phased_ttt_prefix_docs": 3}, [3]),
    ({"phased_ttt_num_phases": 3, "phased_ttt_prefix_docs": 4, "global_ttt_epochs": 2}, [1, 2, 4]),
    ({"phased_ttt_num_phases": 1, "phased_ttt_prefix_docs": 2, "ttt_order": "length", "ttt_optimizer": "adamw"}, [2]),
    ({"phased_ttt_num_phases": 2, "phased_ttt_prefix_docs": 4, "global_ttt_chunk_tokens": 8, "ttt_batch_size": 64},
     [2, 4]),  # more steps of all weights than chunks
    ({"phased_ttt_num_phases": 5, "phased_ttt_prefix_docs": 2}, [1, 2]),
    ({"phased_ttt_num_phases": 2, "phased_ttt_prefix_docs": 100}, [3]),  # all documents: nobody is left at the end
    ({"phased_ttt_num_phases": 2, "phased_ttt_prefix_docs": 0}, [])], ids=str)
def test_phases_are_scored_and_learned_as_by_hand(changes, ends):
    config = adapt_config(**{"ttt_optimizer": "sgd", "ttt_lora_lr": 0.1, "global_ttt_lr": 0.05, **changes})
    config, text = replace(config, ttt_lora_lr=0.01 if config.ttt_optimizer == "adamw" else 0.1), \
        make_text((9, 40, 1, 70, 33, 17))
    nats = adapted_nats(config, text)
    assert np.allclose(nats, naive_phases(config, text, ends), rtol=2e-3, atol=2e-3)
    without = adapted_nats(replace(config, phased_ttt_num_phases=0), text)
    assert (np.abs(nats - without).max() > 0.05) == bool(ends)


# --- the plan, and what scores do not depend on
@st.composite
def plan_cases(draw):
    lengths = draw(st.lists(st.one_of(st.integers(1, 150), st.just(1), st.integers(60, 70)), min_size=1, max_size=40))
    seq_len = draw(st.sampled_from([5, 16, 32]))
    documents = sorted(draw(st.sets(st.integers(0, len(lengths) - 1), min_size=1)))
    config = adapt_config(
        ttt_batch_size=draw(st.integers(1, 20)), ttt_chunk_size=draw(st.integers(1, 40)),
        ttt_chunk_schedule=draw(st.sampled_from(["", "4@10", "2@8,8@64"])), ttt_warm_start_a=draw(st.booleans()),
        ttt_order=draw(st.sampled_from(["stream", "length"])), eval_seq_len=seq_len, eval_stride=seq_len)
    return config, np.array(lengths), documents, draw(st.integers(1, 9))


def rank_of(rank: int, size: int) -> World:
    return World(rank, size, torch.device("cpu"), torch.float32)


@settings(deadline=None, max_examples=150)
@given(plan_cases())
def test_every_document_has_one_place_in_the_plan(case):
    config, lengths, documents, ranks = case
    shares = [plan_groups(config, lengths, documents, rank_of(rank, ranks)) for rank in range(ranks)]
    everything, = [plan_groups(config, lengths, documents, rank_of(0, 1))]
    assert sorted(i for group in everything for i in group) == documents
    assert [[everything[k] for k in range(rank, len(everything), ranks)] for rank in range(ranks)] == shares
    in_a_row = config.ttt_warm_start_a and config.ttt_order == "stream"
    for group in everything:
        longest = int(lengths[group].max())
        assert 1 <= len(group) <= config.ttt_batch_size and chunk_size(config, longest) <= config.eval_seq_len
        if longest > 2 * config.eval_seq_len and not in_a_row:
            assert len(group) <= max(config.ttt_batch_size // 8, 1)
    together = [i for group in everything for i in group]
    if in_a_row:
        assert together == documents
        return
    assert lengths[together].tolist() == sorted(lengths[documents], reverse=True)  # of similar length go together
    loads = [sum(int(lengths[group].max()) for group in share) for share in shares]
    assert max(loads) - min(loads) <= lengths[documents].max()


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 500), st.integers(1, 64), st.integers(1, 64))
def test_the_chunks_of_a_document(longest, size, row):
    """Each target is scored once, in order; chunks stay within rows; context is at hand, in order, and not scored."""
    size = min(size, row)
    chunks, done, begin, end = plan_chunks(longest, size, row), 0, 0, 0
    for start, place, scored in chunks:
        assert 0 <= place <= row - size and start % size == 0
        assert not place or (start - place, start) == (begin, end)  # the row goes on where it was
        begin, end = start - place, start + size
        assert scored == (start == done)
        if scored:
            assert start == 0 or place > 0 or row // 2 < size  # half a row, if that is a chunk
            done = start + size
    assert done - size < longest <= done
    assert [c for c in chunks if c[0] < row // size * size] [:row // size] == [
        (i, i, True) for i in range(0, min(longest, row // size * size), size)]
    again = sum(not scored for *_, scored in chunks)
    assert again <= len(chunks) - again


def test_chunks_follow_the_length_of_the_longest_document():
    config = adapt_config(ttt_chunk_schedule="4@10,8@64", ttt_chunk_size=16)
    assert [chunk_size(config, longest) for longest in (1, 10, 11, 64, 65, 150)] == [4, 4, 8, 8, 16, 16]


@pytest.mark.parametrize("changes", [{}, {"phased_ttt_num_phases": 2, "phased_ttt_prefix_docs": 5}], ids=str)
def test_scores_do_not_depend_on_the_neighbors(changes):
    text, base = make_text(), adapt_config(**changes)
    expected = adapted_nats(base, text)
    assert np.abs(expected - unadapted_nats(base, text)).max() > 0.1
    for size in (1, 64):
        assert np.allclose(adapted_nats(replace(base, ttt_batch_size=size), text), expected, rtol=2e-3, atol=2e-3)
    if not changes:
        assert np.allclose(adapted_nats(replace(base, ttt_order="length"), text), expected, rtol=2e-3, atol=2e-3)


def test_scores_do_not_depend_on_the_place_in_a_group():
    config, text = adapt_config(), make_text((9, 33, 1, 40))
    found = []
    for order in ([0, 1, 2, 3], [3, 2, 0, 1]):
        learner = make_learner(config, text)
        learner.score_group(order)
        found.append(learner.ledger.nats)
        assert (learner.ledger.times == 1).all()
    assert np.allclose(*found, rtol=2e-3, atol=2e-3)


def test_scores_do_not_depend_on_the_place_in_the_text():
    """All but those of the token behind a document, which is another one."""
    config, text = adapt_config(), make_text(SHORT)
    bounds, order = bounds_of(text), [3, 5, 0, 2, 4, 1]
    places = np.concatenate([np.arange(*bounds[i]) for i in order])
    moved = replace(text, val_tokens=np.append(text.val_tokens[places], text.val_tokens[-1]))
    nats, again = adapted_nats(config, text), np.zeros(len(places))
    again[places] = adapted_nats(config, moved)
    kept = np.setdiff1d(np.arange(len(nats)), [b - 1 for _, b in bounds])
    assert np.allclose(again[kept], nats[kept], rtol=2e-3, atol=2e-3)


class Thread(World):
    """A rank that is a thread of this process."""

    def join(self, barrier, slots):
        self.barrier, self.slots = barrier, slots
        return self

    def gather(self, value):
        self.slots[self.rank] = value
        self.barrier.wait()
        values = list(self.slots)
        self.barrier.wait()
        return values

    def sum(self, values):
        return np.sum(self.gather(values), 0).tolist()


def score_of_ranks(ledgers: list[Ledger]) -> list[train_gpt.Score]:
    """What each rank of a world says. AssertionError where any does."""
    size, device = len(ledgers), torch.device("cpu")
    barrier, slots = threading.Barrier(size), [None] * size

    def score(rank):
        try:
            return ledgers[rank].score(Thread(rank, size, device, torch.float32).join(barrier, slots))
        except AssertionError:
            barrier.abort()
            raise
    with ThreadPoolExecutor(size) as pool:
        found = [pool.submit(score, rank) for rank in range(size)]
    for error in (future.exception() for future in found):
        if isinstance(error, AssertionError):
            raise error
    return [future.result() for future in found]


@pytest.mark.parametrize("size", [2, 3, 40])
def test_any_number_of_ranks_scores_each_target_once(size):
    """Also more ranks than documents."""
    config, text = adapt_config(), make_text()
    learners = [make_learner(config, text, rank_of(rank, size)) for rank in range(size)]
    ledgers = [learner.run() for learner in learners]
    assert np.array_equal(sum(ledger.times.astype(int) for ledger in ledgers), np.ones(len(text.val_bytes)))
    nats = sum(ledger.nats for ledger in ledgers)
    assert np.allclose(nats, adapted_nats(config, text), rtol=2e-3, atol=2e-3)
    for score in score_of_ranks(ledgers):
        assert score.nats == pytest.approx(nats.sum()) and score.bytes == text.val_bytes.sum()
    groups = len(plan_groups(config, learners[0].lengths, range(len(LENGTHS)), rank_of(0, 1)))
    assert sum(learner.scored_chunks > 0 for learner in learners) == min(size, groups)


@pytest.fixture
def single():
    """What one process scores, for each of RUNS."""
    return {name: adapted_nats(adapt_config(**changes), make_text(RUN_LENGTHS)) for name, changes in RUNS.items()}


@pytest.fixture
def several(tmp_path):
    """The folder with what processes of worlds of two and of three scored."""
    done = program.run({"RESULTS": str(tmp_path), "PYTHONPATH": str(program.ROOT)},
                       script=program.ROOT / "tests" / "adaptation.py")
    assert done.returncode == 0, done.stderr
    return tmp_path


def test_ranks_learn_the_same_as_one(single, several):
    for size, (name, expected) in itertools.product((2, 3), single.items()):
        ranks = [np.load(several / f"{name}_{rank}_of_{size}.npz") for rank in range(size)]
        assert np.array_equal(sum(rank["times"].astype(int) for rank in ranks), np.ones(len(expected)))
        assert np.allclose(sum(rank["nats"] for rank in ranks), expected, rtol=3e-3, atol=3e-3), name
        assert sum(rank["times"].any() for rank in ranks) > 1
        for rank in ranks:
            assert rank["total"][1] == len(expected)
            assert rank["total"][0] == pytest.approx(expected.sum(), rel=1e-4)
    for size in (2, 3):
        found = [json.loads((several / f"audit_{rank}_of_{size}").read_text()) for rank in range(size)]
        assert found[0]["causal"] and found[0]["change_behind_nats"] > 0.01
        assert all(other == found[0] for other in found)


# --- the warm start
def test_a_warm_start_takes_the_inner_matrices_on():
    config, text = adapt_config(ttt_warm_start_a=True, ttt_batch_size=1), make_text((40, 9, 70, 33))
    first, nats_of, expected = first_adapters(config, text), one_row(make_model(config)), []
    for tokens in texts_of(text, config):
        nats, first = reference.adapt_document(config, nats_of, tokens, first, config.ttt_chunk_size)
        expected += nats
    nats = adapted_nats(config, text)
    assert np.allclose(nats, expected, rtol=2e-3, atol=2e-3)
    cold = adapted_nats(replace(config, ttt_warm_start_a=False), text)
    assert np.allclose(nats[:40], cold[:40], rtol=2e-3, atol=2e-3) and np.abs(nats[40:] - cold[40:]).max() > 0.03
    by_length = adapted_nats(replace(config, ttt_order="length"), text)
    assert np.abs(nats - by_length).max() > 0.03  # what is carried over follows the order
    assert np.allclose(by_length[49:119], cold[49:119], rtol=2e-3, atol=2e-3)  # the longest one comes first


# --- legality: what a score may depend on
SHORT = (9, 1, 60, 40, 33, 16)  # documents of a text that is scored many times
STRATEGIES = {
    "documents": {}, "sgd": {"ttt_optimizer": "sgd", "ttt_lora_lr": 0.1}, "long chunks": {"ttt_chunk_size": SEQ_LEN},
    "phases": {"phased_ttt_num_phases": 2, "phased_ttt_prefix_docs": 4},
    "phases by length": {"phased_ttt_num_phases": 1, "phased_ttt_prefix_docs": 3, "ttt_order": "length"},
    "warm start": {"ttt_warm_start_a": True, "ttt_batch_size": 1},
    "stream": {"ttt_strategy": "stream", "ttt_optimizer": "sgd", "global_ttt_lr": 0.05, "global_ttt_chunk_tokens": 40},
    "stream in epochs": {"ttt_strategy": "stream", "global_ttt_epochs": 2, "global_ttt_chunk_tokens": 40},
    "stream by length": {"ttt_strategy": "stream", "ttt_order": "length", "global_ttt_chunk_tokens": 70},
    "stream by documents": {"ttt_strategy": "stream", "global_ttt_chunk_tokens": 0}}


def steps_of(config: Config, text) -> list[list[int]]:
    """Documents in the order of scoring; those that are scored before anything is learned from them together."""
    if config.ttt_strategy == "stream":
        return stream_parts(config, text)
    order, prefix, phases = order_of(config, text), config.phased_ttt_prefix_docs, config.phased_ttt_num_phases
    ends = [prefix * (i + 1) // phases for i in range(phases)] if phases else []
    if config.ttt_warm_start_a:
        ends = [*range(config.ttt_batch_size, len(order), config.ttt_batch_size)]
    return [order[a:b] for a, b in zip([0, *ends], [*ends, len(order)])]


def may_change(config: Config, text, place: int) -> np.ndarray:
    """Targets (n,) whose nats may depend on token `place`, which is target place - 1."""
    may, bounds, steps = np.zeros(len(text.val_bytes), bool), bounds_of(text), steps_of(config, text)
    own = next(i for i, (a, b) in enumerate(bounds) if a <= place - 1 < b)
    may[place - 1:bounds[own][1]] = True
    for later in steps[next(k for k, step in enumerate(steps) if own in step) + 1:]:
        for i in later:
            may[slice(*bounds[i])] = True
    return may


def places_of(text) -> list[int]:
    """Tokens to change: early in the longest document, at both ends of a chunk, its last one, the last of all."""
    begin, end = bounds_of(text)[2]
    return [begin + 1, begin + 16, begin + 17, end - 1, len(text.val_tokens) - 1]


def leaks(config: Config, text, places, **options) -> list[int]:
    """Those of the places where another token changes what was scored before it, by a single bit or more."""
    before, found = adapted_nats(config, text, **options), []
    for place in places:
        after = adapted_nats(config, perturbed(text, place), **options)
        if not np.array_equal(after[~may_change(config, text, place)], before[~may_change(config, text, place)]):
            found.append(place)
    return found


@pytest.mark.parametrize("changes", STRATEGIES.values(), ids=STRATEGIES)
def test_no_score_depends_on_what_was_not_scored_before(changes):
    config, text = adapt_config(**changes), make_text(SHORT)
    before, bounds = adapted_nats(config, text), bounds_of(text)
    for place in places_of(text):
        after, may = adapted_nats(config, perturbed(text, place)), may_change(config, text, place)
        assert np.array_equal(after[~may], before[~may]), place
        assert after[place - 1] != before[place - 1]
        if place > places_of(text)[1]:
            continue
        # what may depend on it does: else nothing was learned, and all of this were easy
        found = {i for i, (a, b) in enumerate(bounds) if i != 2 and (after[a:b] != before[a:b]).any()}
        allowed = {i for i, (a, b) in enumerate(bounds) if i != 2 and may[a]}
        deaf = {i for i, (a, b) in enumerate(bounds) if b - a <= 16 and config.ttt_warm_start_a}  # B = 0 there
        assert allowed - deaf <= found <= allowed
        a, b = bounds[2]
        if config.ttt_strategy == "documents":  # learned within the document: the token itself is out of sight by then
            assert b - a > place - a + SEQ_LEN and after[b - 1] != before[b - 1]


class Hooked(train_gpt.TestTimeTrainer):
    """Knows the chunk that passes, and has slots of a kind of its own, which know their learner."""

    kind = Slots

    def __init__(self, *arguments):
        super().__init__(*arguments)

        @functools.cache
        def slots_for(count, size):
            slots = self.kind(self.config, self.model, count, size)
            slots.learner = self
            return slots
        self.slots_for = slots_for

    def tabulate(self, slots, group, start, place, scores):
        table, self.places = super().tabulate(slots, group, start, place, scores)
        self.last_slots, self.group, self.first, self.scores = slots, group, start, scores
        return table, self.places


class PeekingSlots(Slots):
    def score(self, table):
        peek = torch.cat((table[:, :-1], torch.ones_like(table[:, -1:])), 1)
        super().adapt(super().score(peek), peek)
        return super().score(table)


class Peeks(Hooked):
    """Trains on a chunk, then scores it."""

    kind = PeekingSlots


class CarryingSlots(Slots):
    def start(self):
        before = {name: x.clone() for name, x in self.adapters.items()}
        super().start()
        for name, x in self.adapters.items():
            x.copy_(before[name])


class Carries(Hooked):
    """Starts no document anew."""

    kind = CarryingSlots


class Rescores(Hooked):
    """Keeps what the adapters would have scored at the end."""

    better = False

    def score_group(self, group):
        super().score_group(group)
        slots, longest = self.last_slots, int(self.lengths[group].max())
        for chunk in plan_chunks(longest, slots.size, self.config.eval_seq_len):
            table, place = self.tabulate(slots, group, *chunk)
            nats = slots.score(table).detach().double().numpy()[place >= 0]
            place = place[place >= 0]
            self.ledger.nats[place] = np.minimum(nats, self.ledger.nats[place]) if self.better else nats


class BestOfTwo(Rescores):
    """The better of two passes, for each target."""

    better = True


class BlendingSlots(Slots):
    def adapt(self, nats, table):
        super().adapt(nats, table)
        for x in self.adapters.values():
            x.copy_(x.mean(0, keepdim=True).expand_as(x))


class Blends(Hooked):
    """One set of adapters for the documents of a group: each learns from all."""

    kind = BlendingSlots


class Crosses(train_gpt.TestTimeTrainer):
    """Contexts begin before BOS."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.bounds, self.lengths = self.bounds[[0, -1]], np.array([self.bounds[-1]])


class Early(train_gpt.TestTimeTrainer):
    """All weights learn from a part, then it is scored."""

    def score_windows(self, documents):
        self.learn(self.windows_of(documents), self.weight_optimizer(), 1.0)
        super().score_windows(documents)


STREAM = {"ttt_strategy": "stream", "global_ttt_chunk_tokens": 40}
LEAKS = {
    "train before score": (Peeks, {}), "carry": (Carries, {"ttt_batch_size": 1}), "rescore": (Rescores, {}),
    "best of two passes": (BestOfTwo, {}), "blend": (Blends, {}), "train before score, stream": (Early, STREAM),
    "epochs before score": (train_gpt.TestTimeTrainer, {**STREAM, "ttt_unsafe_multi_epoch": 1})}
CROSSINGS = {"state over BOS": (Crosses, {}), "state over BOS, stream": (Crosses, {"ttt_strategy": "stream"})}


@pytest.mark.parametrize("kind, changes", [*LEAKS.values(), *CROSSINGS.values()], ids=[*LEAKS, *CROSSINGS])
def test_planted_leaks_are_found(kind, changes):
    """The test above is no good if it does not see these."""
    config, text = adapt_config(**changes), make_text(SHORT)
    places = places_of(text)[1:4]
    assert leaks(config, text, places, kind=kind)
    assert not leaks(replace(config, ttt_unsafe_multi_epoch=0), text, places)


class WatchedSlots(Slots):
    def score(self, table):
        nats = super().score(table)
        self.learner.watch_score(nats)
        return nats

    def adapt(self, nats, table):
        self.learner.watch_adapt(nats, table[:, -1].tolist())
        super().adapt(nats, table)


class Watched(Hooked):
    """Writes down what is scored, and checks what is learned from."""

    kind = WatchedSlots

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.scored_places, self.last, self.steps, self.learned = np.zeros(len(self.ledger.times), int), None, 0, []

    def watch_score(self, nats):
        slots, place = self.last_slots, self.places
        assert nats.shape == place.shape == (slots.count * slots.size,) and nats.requires_grad
        rows = place.reshape(slots.count, slots.size)
        for i, row in zip(self.group, rows):  # the chunk, and nothing else
            a, b = (min(self.bounds[i] + x, self.bounds[i + 1]) for x in (self.first, self.first + slots.size))
            a = a if self.scores else b
            assert row.tolist() == [*range(a, b)] + [-1] * (slots.size - b + a)
        assert (rows[len(self.group):] == -1).all()
        self.scored_places[place[place >= 0]] += 1
        self.last = nats

    def watch_adapt(self, scored, learns):
        rows = self.places.reshape(self.last_slots.count, -1)
        assert scored is self.last and (self.ledger.times[self.places[self.places >= 0]] == 1).all()
        for i, row, learn in zip(self.group, rows, learns):  # unless it is the last chunk, or was scored before
            more = self.scored_places[self.bounds[i]:self.bounds[i + 1]].sum() < self.lengths[i]
            assert learn == (more and self.scores) and (not learn or (self.scored_places[row] == 1).all())
        assert not any(learns[len(self.group):])
        self.last, self.steps = None, self.steps + 1  # and not twice

    def learn(self, rows, optimizer, lr_scale):
        for start, end, _ in rows:
            assert (self.ledger.times[start:end] == 1).all()
            self.learned.append((int(start), int(end)))
        super().learn(rows, optimizer, lr_scale)


@pytest.mark.parametrize("changes", STRATEGIES.values(), ids=STRATEGIES)
def test_nothing_is_learned_from_what_has_no_score(changes):
    config, text = adapt_config(**changes), make_text(SHORT)
    learner = make_learner(config, text, kind=Watched)
    score = learner.run().score(learner.world)
    assert (learner.ledger.times == 1).all() and score.tokens == len(text.val_bytes)
    steps = steps_of(config, text)[:-1]  # never from the last
    if config.ttt_strategy == "documents":
        assert (learner.scored_places == 1).all() and learner.steps == learner.learned_chunks > 0
        assert learner.learned_chunks < learner.scored_chunks
        expected = [step for k in range(len(steps)) for step in steps[:k + 1]] if config.phased_ttt_num_phases else []
    else:
        assert learner.steps == 0 and learner.scored_chunks == len(steps) + 1
        expected = steps
    batches = [rows for documents in (expected if config.ttt_strategy == "stream" else phases_of(expected, steps))
               for rows in train_gpt.batch_windows(learner.windows_of(documents), config.global_ttt_chunk_tokens
                                                   or 32768)]
    assert learner.learned == [(a, b) for rows in batches for _ in range(config.global_ttt_epochs)
                               for a, b, _ in rows.tolist()]
    pieces = [piece for step in expected for i in step for piece in pieces_in(*bounds_of(text)[i])]
    assert sorted({*learner.learned}) == sorted({*pieces})


def phases_of(flat: list[list[int]], steps: list[list[int]]) -> list[list[int]]:
    """A prefix that grows."""
    return [[i for step in steps[:k + 1] for i in step] for k in range(len(steps))] if flat else []


def pieces_in(first: int, last: int) -> list[tuple[int, int]]:
    return [(a, min(a + SEQ_LEN, last)) for a in range(first, last, SEQ_LEN)]


def test_an_unsafe_run_is_caught_learning_early():
    learner = make_learner(adapt_config(ttt_strategy="stream", ttt_unsafe_multi_epoch=1), make_text(SHORT),
                           kind=Watched)
    with pytest.raises(AssertionError):
        learner.run()


def test_no_chunk_is_learned_from_twice():
    learner = make_learner(adapt_config(), make_text((40, 33)))
    slots = learner.slots_for(2, 16)
    table, _ = learner.tabulate(slots, [0, 1], 0, 0, True)
    assert table[:, -1].tolist() == [1, 1]
    scored = slots.score(table)
    slots.adapt(scored, table)
    with pytest.raises(RuntimeError, match="second time"):  # its graph is gone
        slots.adapt(scored, table)
    learner.scored_chunks = -1
    with pytest.raises(AssertionError):  # less is scored than learned from
        learner.score_group([0, 1])


def test_all_weights_learn_from_no_more_than_is_scored():
    learner = make_learner(adapt_config(), make_text((40, 33)))
    with pytest.raises(AssertionError):
        learner.learn_from(np.array([0]), learner.weight_optimizer(), 0.0, 1.0)
    learner.unscored -= 40
    learner.learn_from(np.array([0]), learner.weight_optimizer(), 0.0, 1.0)


# --- the ledger
def filled(text, places) -> Ledger:
    ledger = Ledger(text)
    for place in places:
        ledger.add(np.array([place, -1]), np.array([0.5, 9.0]))
    return ledger


def test_the_ledger_sums_every_target_once():
    text = make_text((5, 3, 1))
    score = filled(text, [8, 0, 1, 2, 3, 4, 5, 7, 6]).score(single_world())
    assert (score.nats, score.tokens, score.bytes) == (4.5, 9, int(text.val_bytes.sum())) and score.seconds > 0


@pytest.mark.parametrize("places, wrong", [
    ([*range(9), 4], 1), ([*range(8)], 1), ([*range(8), 3], 2), ([0, 0, *range(2, 9)], 2), ([], 9),
    ([*range(9)] * 2, 9)])
def test_the_ledger_refuses_what_is_not_once(places, wrong):
    with pytest.raises(AssertionError, match=f"{wrong} of 9 targets not scored exactly once"):
        filled(make_text((5, 3, 1)), places).score(single_world())


def test_the_ledger_refuses_bytes_that_are_counted_twice():
    """A target whose bytes count in one rank, and another target in another: as many targets, as many bytes or not."""
    text = make_text((5, 3, 1))
    first, others = (3, 4), [i for i in range(9) if text.val_bytes[i] == text.val_bytes[3] and i != 3]
    assert len(others) > 0 and text.val_bytes[4] != text.val_bytes[3]
    for lost in (first[1], others[0]):  # different bytes, and the same
        ledgers = [filled(text, [i for i in range(9) if i not in (lost, 0)]), filled(text, [0, 3])]
        with pytest.raises(AssertionError, match="2 of 9 targets"):
            score_of_ranks(ledgers)
    with pytest.raises(AssertionError, match="1 of 9 targets"):  # twice in one rank
        score_of_ranks([filled(text, [*range(4), 2]), filled(text, range(4, 9))])
    assert {score.nats for score in score_of_ranks([filled(text, range(4)), filled(text, range(4, 9))])} == {4.5}


class Twice(train_gpt.TestTimeTrainer):
    """Scores a group again, and adds that."""

    def score_group(self, group):
        super().score_group(group)
        super().score_group(group)


class Chooses(train_gpt.TestTimeTrainer):
    """Leaves out a document that costs much, and counts another one for it."""

    def score_documents(self, documents):
        super().score_documents(documents[1:])
        super().score_documents(documents[1:2])


@pytest.mark.parametrize("kind", [Twice, Chooses])
def test_scores_that_are_not_once_are_refused(kind):
    ledger = make_learner(adapt_config(), make_text((20, 20, 9)), kind=kind).run()
    with pytest.raises(AssertionError, match="not scored exactly once"):
        ledger.score(single_world())


# --- edges
@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (150,), (16,), (17, 1), (33, 32, 31)], ids=str)
@pytest.mark.parametrize("head", [False, True])
def test_documents_of_any_length(lengths, head):
    """Longer than any row, of one token, of whole chunks, and one that begins before the first BOS."""
    config, text, expected = adapt_config(), make_text(lengths), []
    if head:
        text = replace(text, val_tokens=text.val_tokens[1:], val_bytes=text.val_bytes[1:])
        if len(text.val_bytes) == 0:
            return
    for tokens in texts_of(text, config):
        expected += reference.adapt_document(config, one_row(make_model(config)), tokens, first_adapters(config, text),
                                             config.ttt_chunk_size)[0]
    ledger = make_learner(config, text).run()
    assert ledger.score(single_world()).tokens == len(text.val_bytes)
    assert np.allclose(ledger.nats, expected, rtol=2e-3, atol=2e-3)


class PoisonedSlots(Slots):
    def score(self, table):
        nats, learner = super().score(table), self.learner
        if learner.document in learner.group and learner.scores and learner.first // self.size in learner.steps:
            mask = torch.arange(len(nats)) // self.size == learner.group.index(learner.document)
            nats.register_hook(lambda grad: torch.where(mask, learner.value, grad))
        return nats


class Poisoned(Hooked):
    """The gradients of one document are no numbers, in some steps."""

    kind, document, steps, value = PoisonedSlots, 3, range(100), math.nan


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_document_whose_gradients_are_no_numbers_rests(value):
    config, text = adapt_config(ttt_beta1=0.5), make_text(SHORT)
    healthy, without = adapted_nats(config, text), unadapted_nats(config, text)
    own = slice(*bounds_of(text)[3])
    always = adapted_nats(config, text, kind=type("Always", (Poisoned,), {"value": value}))
    assert np.array_equal(np.delete(always, own), np.delete(healthy, own))
    assert np.allclose(always[own], without[own], rtol=1e-5)  # A decays; B stays 0
    once = adapted_nats(config, text, kind=type("Once", (Poisoned,), {"value": value, "steps": [1]}))
    assert np.array_equal(np.delete(once, own), np.delete(healthy, own))
    first, second, third = (slice(own.start + i, own.start + i + 16) for i in (0, 16, 32))
    third = slice(third.start, own.stop)
    assert np.array_equal(once[first], healthy[first]) and np.array_equal(once[second], healthy[second])
    assert np.isfinite(once).all() and not np.array_equal(once[third], healthy[third])
    assert not np.allclose(once[third], without[third], rtol=1e-3)  # what was learned before stays


class BrokenSlots(Slots):
    def adapt(self, nats, table):
        super().adapt(nats, table)
        if self.learner.document in self.learner.group:
            self.adapters["v_document_out"][self.learner.group.index(self.learner.document)] = math.nan


class Broken(Hooked):
    """The adapters of one document are no numbers from its second chunk on."""

    kind, document = BrokenSlots, 3


def test_targets_that_adapters_give_no_number_are_scored_without():
    config, text = adapt_config(), make_text(SHORT)
    healthy, (a, b) = adapted_nats(config, text), bounds_of(text)[3]
    learner = make_learner(config, text, kind=Broken)
    score, nats = learner.run().score(learner.world), learner.ledger.nats
    assert np.isfinite(nats).all() and score.tokens == len(nats) and score.nats == pytest.approx(nats.sum())
    assert np.array_equal(np.delete(nats, slice(a + 16, b)), np.delete(healthy, slice(a + 16, b)))
    plain = make_learner(config, text)
    plain.evaluator.score_rows(plain.model, plain.windows_of([3]), plain.ledger)
    assert np.allclose(nats[a + 16:b], plain.ledger.nats[a + 16:b], rtol=1e-5)
    assert learner.evaluator.log.lines[:-2] == [
        f"adaptation: {b - a - 16} targets were scored without adapters"]
    # and that depends on what comes before each target only
    place = a + 25
    changed = adapted_nats(config, perturbed(text, place), kind=Broken)
    assert np.array_equal(changed[:place - 1], nats[:place - 1]) and np.array_equal(changed[b:], nats[b:])


def test_steps_of_all_weights_that_are_no_numbers_are_left_out():
    config, text = adapt_config(**STRATEGIES["stream"]), make_text(SHORT)
    learner, healthy = make_learner(config, text), adapted_nats(config, text)
    original = learner.learn

    def learn(rows, optimizer, lr_scale):
        if rows[0, 0] == 0:  # the first chunk
            forward, learner.model.nats = learner.model.nats, lambda *x: forward(*x) * math.nan
            original(rows, optimizer, lr_scale)
            learner.model.nats = forward
            assert all(torch.equal(p, before[name]) for name, p in learner.model.named_parameters())
        else:
            original(rows, optimizer, lr_scale)
    before = {name: p.clone() for name, p in learner.model.named_parameters()}
    learner.learn = learn
    learner.run()
    nats, behind = learner.ledger.nats, bounds_of(text)[stream_parts(config, text)[1][0]][0]
    assert np.isfinite(nats).all() and np.array_equal(nats[:behind], healthy[:behind])
    assert np.abs(nats - healthy).max() > 1e-3 and not torch.equal(learner.model.q_proj, before["q_proj"])


def test_a_model_without_numbers_is_no_score():
    config, text = adapt_config(), make_text(SHORT)
    model = make_model(config)
    torch.nn.init.constant_(model.out_proj, math.nan)
    learner = make_learner(config, text, model=model)
    with pytest.raises(UserError, match="final_adapted: nan nats"):
        learner.evaluator.keep("adapted", learner.run().score(learner.world))


@pytest.mark.parametrize("changes", [{}, {"phased_ttt_num_phases": 2, "phased_ttt_prefix_docs": 4},
                                     {"ttt_strategy": "stream"}], ids=str)
def test_a_budget_that_is_over_leaves_the_scoring(changes):
    config, text = adapt_config(**changes), make_text(SHORT)
    learner = make_learner(config, text, started=-1e9)
    before = {name: p.clone() for name, p in learner.model.named_parameters()}
    score = learner.run().score(learner.world)
    assert score.tokens == len(text.val_bytes) and learner.learned_chunks == 0
    assert all(torch.equal(p, before[name]) for name, p in learner.model.named_parameters())
    evaluator, streams = make_learner(config, text).evaluator, config.ttt_strategy == "stream"
    plain = evaluator.score_all(make_model(config), config.eval_stride if streams else config.eval_seq_len)
    assert np.allclose(learner.ledger.nats, plain.nats, rtol=1e-4, atol=1e-5)
    if not changes:
        assert learner.skipped == len(plan_groups(config, learner.lengths, range(len(SHORT)), single_world()))
    assert learner.skipped > 0 and (streams or learner.scored_chunks == 0)


class ClockedSlots(Slots):
    def score(self, table):
        Clocked.now += table.numel()
        return super().score(table)


class Clocked(Hooked):
    """Scoring a chunk takes a second per number of its table, anything else no time."""

    kind, now = ClockedSlots, 0.0


@pytest.mark.parametrize("plain_seconds", [0, 200])
def test_a_budget_cuts_the_chunks_that_do_not_fit(monkeypatch, plain_seconds):
    """It keeps what scoring the text takes, if nothing learns; what has no time left is scored without adapters."""
    text, config = make_text(LENGTHS), adapt_config(ttt_batch_size=2)
    groups = plan_groups(config, np.array(LENGTHS), range(len(LENGTHS)), single_world())
    table = 2 * (16 + 5 + 2 + 16 + 2)  # of two documents
    whole = sum(len(plan_chunks(max(LENGTHS[i] for i in group), 16, SEQ_LEN)) * (table if len(group) > 1 else table / 2)
                for group in groups)
    healthy, without, adapted = adapted_nats(config, text), unadapted_nats(config, text), []
    for budget in (100.0, 800.0, 1500.0, 1e9):
        Clocked.now, budget = 0.0, budget + plain_seconds
        monkeypatch.setattr(train_gpt.time, "perf_counter", lambda: Clocked.now)
        learner = make_learner(replace(config, eval_budget_seconds=budget), text, kind=Clocked)
        learner.plain_seconds = plain_seconds / sum(LENGTHS)
        learner.run()
        monkeypatch.undo()
        assert (learner.ledger.times == 1).all() and Clocked.now <= min(budget - plain_seconds, whole)
        assert bool(learner.skipped) == (budget < 1e9) == (Clocked.now < whole)
        changed = 0
        for a, b in bounds_of(text):
            same = np.isclose(learner.ledger.nats[a:b], healthy[a:b], rtol=1e-6)
            kept = int(np.argmin(same)) if not same.all() else b - a  # in time, and from here on plain
            assert kept == b - a or kept % config.ttt_chunk_size == 0 or not kept
            assert b - a > SEQ_LEN or np.allclose(learner.ledger.nats[a + kept:b], without[a + kept:b], rtol=1e-4)
            changed += b - a - kept
        adapted.append(len(healthy) - changed)
    assert adapted == sorted(adapted) and adapted[-1] == len(healthy) and len({*adapted}) == 4


def test_the_time_of_plain_scoring_is_that_of_the_stage_before():
    text = make_text(SHORT)
    evaluator = make_learner(adapt_config(), text).evaluator
    evaluator.keep("quantized", train_gpt.Score(1.0, len(text.val_bytes), 9, 80.0))
    learner = train_gpt.TestTimeTrainer(evaluator.config, evaluator, make_model(evaluator.config), 0.0)
    assert learner.plain_seconds * learner.unscored == pytest.approx(80.0)
    learner.run()
    assert learner.unscored == 0


def test_a_budget_of_a_stream_keeps_the_time_to_score_the_rest(monkeypatch):
    """Here a target takes a second, and a step of all weights fifty."""
    config, text, clock = adapt_config(**STRATEGIES["stream"]), make_text(SHORT), [0.0]
    learned = []
    for budget in (150.0, 265.0, 315.0, 1e9):
        clock[0] = 0.0
        monkeypatch.setattr(train_gpt.time, "perf_counter", lambda: clock[0])
        learner = make_learner(replace(config, eval_budget_seconds=budget), text)
        score_rows, learn = learner.evaluator.score_rows, learner.learn

        def scored(forward, rows, ledger, score_rows=score_rows):
            clock[0] += (rows[:, 1] - rows[:, 2]).sum()
            score_rows(forward, rows, ledger)

        def stepped(*arguments, learn=learn):
            clock[0] += 50.0
            learn(*arguments)
        learner.evaluator.score_rows, learner.learn = scored, stepped
        learner.run()
        monkeypatch.undo()
        learned.append((clock[0] - 159) / 50)
        assert (learner.ledger.times == 1).all() and learner.learned_chunks == learned[-1]
        assert bool(learner.skipped) == (budget < 1e9)
        assert clock[0] <= max(budget + 50, 159)  # a step more: its time is not known before
    assert learned[0] == 0 and learned == sorted(learned) and len({*learned}) > 2


# --- settings
@pytest.mark.parametrize("variables, words", [
    ({"TTT_TARGETS": "q,w"}, ["TTT_TARGETS=q,w", "'q', 'k', 'v', 'out', 'mlp', 'head'", "each once"]),
    ({"TTT_TARGETS": "q,q"}, ["TTT_TARGETS=q,q", "each once"]),
    ({"TTT_TARGETS": ""}, ["TTT_TARGETS="]),
    ({"TTT_CHUNK_SCHEDULE": "8"}, ["TTT_CHUNK_SCHEDULE=8", "must look like"]),
    ({"TTT_CHUNK_SCHEDULE": "0@10"}, ["TTT_CHUNK_SCHEDULE=0@10", "whole tokens", "8@256"]),
    ({"TTT_CHUNK_SCHEDULE": "2.5@10"}, ["TTT_CHUNK_SCHEDULE=2.5@10", "whole tokens"]),
    ({"TTT_CHUNK_SCHEDULE": "8@0"}, ["TTT_CHUNK_SCHEDULE=8@0"]),
    ({"TTT_CHUNK_SCHEDULE": "nan@10"}, ["TTT_CHUNK_SCHEDULE=nan@10"]),
    ({"TTT_CHUNK_SCHEDULE": "inf@10"}, ["TTT_CHUNK_SCHEDULE=inf@10"]),
    ({"TTT_FREEZE_BLOCKS": "12"}, ["TTT_FREEZE_BLOCKS=12", "NUM_LAYERS=11"]),
    ({"EVAL_MODE": "adapted", "SMEAR_GATE": "mean"}, ["EVAL_MODE=adapted", "SMEAR_GATE=mean", "TTT_STRATEGY=stream"]),
    ({"GLOBAL_TTT_CHUNK_TOKENS": "0"}, ["GLOBAL_TTT_CHUNK_TOKENS=0", "TTT_STRATEGY=stream"]),
    ({"TTT_UNSAFE_MULTI_EPOCH": "1"}, ["TTT_UNSAFE_MULTI_EPOCH=1", "TTT_STRATEGY=stream"]),
    ({"TTT_STRATEGY": "phases"}, ["TTT_STRATEGY=phases", "documents, stream"]),
    ({"TTT_ORDER": "random"}, ["TTT_ORDER=random", "stream, length"]),
    ({"TTT_OPTIMIZER": "adam"}, ["TTT_OPTIMIZER=adam", "adamw, sgd"]),
    ({"TTT_BATCH_SIZE": "0"}, ["TTT_BATCH_SIZE=0"]), ({"TTT_CHUNK_SIZE": "0"}, ["TTT_CHUNK_SIZE=0"]),
    ({"TTT_LORA_RANK": "0"}, ["TTT_LORA_RANK=0"]), ({"TTT_LORA_ALPHA": "0"}, ["TTT_LORA_ALPHA=0"]),
    ({"EVAL_BUDGET_SECONDS": "0"}, ["EVAL_BUDGET_SECONDS=0"]), ({"TTT_BETA2": "1"}, ["TTT_BETA2=1"]),
    ({"PHASED_TTT_NUM_PHASES": "-1"}, ["PHASED_TTT_NUM_PHASES=-1"]), ({"GLOBAL_TTT_LR": "nan"}, ["GLOBAL_TTT_LR=nan"]),
    ({"TTT_MOMENTUM": "0.9", "GLOBAL_TTT_MOMENTUM": "0.8"}, ["TTT_MOMENTUM=0.9", "GLOBAL_TTT_MOMENTUM=0.8"]),
    ({"EVAL_MODE": "ttt"}, ["EVAL_MODE=ttt", "adapted"])], ids=str)
def test_settings_that_make_no_sense_are_refused(variables, words):
    with pytest.raises(UserError) as caught:
        Config.from_env(variables)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


# --- the audit
def audited(config: Config, text=None, model=GPT) -> dict:
    """What the audit says of a text and models that are made anew."""
    def make():
        made = make_model(config)
        made.__class__ = model
        return made
    return audit(config, make_learner(config, text or make_text(SHORT)).evaluator, make)


@pytest.mark.parametrize("changes", [
    {}, {"ttt_order": "length"}, {"phased_ttt_num_phases": 2, "phased_ttt_prefix_docs": 4}, {"ttt_strategy": "stream"},
    {"eval_mode": "packed"}, {"eval_mode": "sliding", "ngram_order": 4}, {"eval_budget_seconds": 1e-9},
    {"ngram_order": 4}], ids=str)
def test_the_audit_of_an_honest_run(changes):
    text = make_text(SHORT)
    found = audited(adapt_config(**changes), text)
    assert found["sample_tokens"] == len(text.val_tokens) and found["changed_token"] >= 2
    assert (found["causal"], found["noise_nats"], found["change_before_nats"]) == (True, 0, 0)
    assert found["change_behind_nats"] > 0.01 and found["probability_error"] < 1e-5


@pytest.mark.parametrize("kind, changes", LEAKS.values(), ids=LEAKS)
def test_the_audit_finds_planted_leaks(kind, changes, monkeypatch):
    """One place is changed, which the seed chooses: the leak must reach back from it."""
    found = []
    monkeypatch.setattr(train_gpt, "TestTimeTrainer", kind)
    for seed in range(4):
        found.append(audited(adapt_config(**changes, seed=seed)))
        if not found[-1]["causal"]:
            break
    assert not found[-1]["causal"] and found[-1]["change_before_nats"] > found[-1]["noise_nats"] == 0


def test_the_audit_is_of_what_chance_does(monkeypatch):
    """Scores that differ from run to run are no leak, but seen."""
    class NoisySlots(Slots):
        def score(self, table):
            return super().score(table) + next(noise)

    class Noisy(Hooked):
        kind = NoisySlots
    noise = iter(np.random.default_rng(0).normal(size=1000).tolist())
    monkeypatch.setattr(train_gpt, "TestTimeTrainer", Noisy)
    assert audited(adapt_config())["noise_nats"] > 0.01


class Unnormalized(GPT):
    """Expert logits are added to log probabilities, and nothing is divided again."""

    def nats(self, features, targets, adapters=train_gpt.EMPTY):
        return super().nats(features, targets, adapters) - 0.01 * (targets % 3 == 0)


class Hinted(GPT):
    """A normalized blend with a hint, but only where the target is what the hint says."""

    def nats(self, features, targets, adapters=train_gpt.EMPTY):
        nats, hint = super().nats(features, targets, adapters), 7
        return torch.where(targets == hint, -torch.log(0.99 * torch.exp(-nats) + 0.01), nats)


class Blended(GPT):
    """The same blend for every target."""

    def nats(self, features, targets, adapters=train_gpt.EMPTY):
        return -torch.log(0.99 * torch.exp(-super().nats(features, targets, adapters)) + 0.01 * (targets == 7))


@pytest.mark.parametrize("mode", ["packed", "sliding", "adapted"])
def test_the_audit_finds_what_is_no_probability(mode):
    config = adapt_config(eval_mode=mode)
    assert audited(config, model=Blended)["probability_error"] < 1e-5
    for model in (Unnormalized, Hinted):
        found = audited(config, model=model)
        assert found["probability_error"] > 1e-4 and found["causal"]


@pytest.mark.parametrize("leak", [lambda nats, seen, hits: torch.where(seen > 0, nats / 2, nats),
                                  lambda nats, seen, hits: torch.where(hits > 0, nats / 2, nats)], ids=["all", "hits"])
def test_the_audit_finds_counts_that_are_no_probability(leak, monkeypatch):
    """Smoothing whose shares do not sum to 1, or that is applied where the target is what the counts say."""
    config, text = adapt_config(ngram_order=4), make_text(SHORT)
    monkeypatch.setattr(train_gpt, "smoothed", lambda nats, order, seen, hits, kinds: leak(nats, seen, hits))
    assert audited(config, text)["probability_error"] > 1e-4


class Smears(GPT):
    """A token is smeared into the next one, whatever document that is of."""

    def embed(self, ids, segments):
        x = super().embed(ids, segments)
        return x + 0.1 * x.roll(1, 0)


def test_the_audit_finds_state_that_crosses_documents():
    assert not audited(adapt_config(eval_mode="packed"), model=Smears)["causal"]


class LearnsAhead(train_gpt.TestTimeTrainer):
    """Each part teaches what the rest holds."""

    def learn_from(self, documents, *rest):
        ahead = np.arange(documents[-1] + 1, len(self.lengths))
        self.unscored -= int(self.lengths[ahead].sum())
        super().learn_from(np.concatenate((documents, ahead)), *rest)


def test_the_audit_sees_all_weights_learn_in_its_short_sample(monkeypatch):
    """With the published 32,768 tokens a step there would be one part of the sample, and nobody would learn."""
    monkeypatch.setattr(train_gpt, "TestTimeTrainer", LearnsAhead)
    text = make_text((60,) * 60)
    found = [audited(adapt_config(ttt_strategy="stream", global_ttt_chunk_tokens=32768, global_ttt_lr=0.1, seed=seed),
                     text)["causal"] for seed in range(4)]
    assert not all(found)


class Looks(GPT):
    """Attention sees the next token."""

    def embed(self, ids, segments):
        x = super().embed(ids, segments)
        return x + 0.1 * x.roll(-1, 0)


@pytest.mark.parametrize("mode", ["packed", "sliding", "adapted"])
def test_the_audit_finds_a_model_that_looks_ahead(mode):
    assert not audited(adapt_config(eval_mode=mode), model=Looks)["causal"]


@pytest.mark.parametrize("lengths", [(1,), (2,), (1, 1, 1), (3, 1)], ids=str)
def test_the_audit_of_texts_with_hardly_a_token(lengths):
    found = audited(adapt_config(), make_text(lengths))
    assert found["causal"] and found["probability_error"] < 1e-5 and found["sample_tokens"] == sum(lengths) + 1


# --- whole programs
ADAPTED = {"EVAL_MODE": "adapted", "TTT_LORA_RANK": 4, "TTT_LORA_ALPHA": 8, "TTT_LORA_LR": 0.003, "TTT_CHUNK_SIZE": 32,
           "TTT_BATCH_SIZE": 4, "GLOBAL_TTT_CHUNK_TOKENS": 256, "PHASED_TTT_PREFIX_DOCS": 6, "EVAL_SEQ_LEN": 64,
           "EVAL_STRIDE": 16}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one process: (finished process, folder)."""
    folder = tmp_path_factory.mktemp("trained")
    done = program.run(program.settings(program.write_data(folder / "data"), folder / "logs", **ADAPTED, AUDIT=1))
    assert (done.returncode, done.stderr) == (0, "")
    return done, folder


@pytest.fixture
def scored(trained, tmp_path, capsys):
    """scored(**changes) -> (exit code, stdout, stderr): main, in this process, scores the artifact of that run."""
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    precision = torch.get_float32_matmul_precision()

    def call(**changes) -> tuple[int, str, str]:
        capsys.readouterr()
        variables = program.settings(trained[1] / "data", tmp_path / "logs", **{
            **ADAPTED, "EVAL_ONLY": trained[1] / "logs" / "run.artifact", **changes})
        return train_gpt.main(variables), *capsys.readouterr()

    yield call
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(False)
    for number, handler in handlers:
        signal.signal(number, handler)


def adaptation_of(output: str) -> dict[str, str]:
    """The numbers of the line about adaptation."""
    line, = (line for line in output.splitlines() if line.startswith("adaptation "))
    return dict(word.split(":") for word in line.split()[1:])


def test_the_program_adapts(trained):
    done, _ = trained
    result = program.result_of(done.stdout)
    found, plain, audit = result["stages"]["adapted"], result["stages"]["quantized"], result["audit"]
    assert list(result["stages"]) == ["raw", "averaged", "quantized", "adapted"]
    assert result["official_stage"] == "adapted" and result["val_bpb"] == found["val_bpb"] < plain["val_bpb"]
    assert (found["tokens"], found["bytes"]) == (plain["tokens"], plain["bytes"]) == (1499, plain["bytes"])
    assert result["legal"] and audit["scored_targets"] == audit["targets"] == 1499
    values = adaptation_of(done.stdout)
    assert list(values) == ["scored_chunks", "learned_chunks", "skipped", "legal"]
    assert int(values["scored_chunks"]) > int(values["learned_chunks"]) > 0
    assert (values["skipped"], values["legal"]) == ("0", "1")
    shares = [[float(x) for x in re.findall(r"[a-z]:([0-9.]+)", line)] for line in done.stdout.splitlines()
              if line.startswith("adapted share:")]
    assert len(shares) == 4 and all(share[2] >= share[1] for share in shares)  # three phases, and what is behind them
    assert 0 < shares[0][0] < shares[1][0] < shares[2][0] < shares[3][0] == 1 and shares[3][1] == shares[3][2]
    assert f"final_adapted_exact val_loss:{found['val_loss']:.8f}" in done.stdout
    assert found["seconds"] <= result["eval_seconds"] < 100
    assert audit["causal"] is True and audit["noise_nats"] == audit["change_before_nats"] == 0
    assert audit["change_behind_nats"] > 0 and 0 <= audit["probability_error"] < 1e-4
    assert audit["sample_tokens"] == 1500 and 2 <= audit["changed_token"] < 1500


def test_a_fresh_process_scores_the_artifact_to_the_same_number(trained):
    """It is told nothing of the model."""
    done, folder = trained
    model = {"NUM_LAYERS", "MODEL_DIM", "NUM_HEADS", "NUM_KV_HEADS", "MLP_MULT", "ROPE_DIMS", "XSA_LAST_N",
             "PARALLEL_START_LAYER", "LOOP_START", "LOOP_END", "NUM_LOOPS", "VOCAB_SIZE"}
    variables = program.settings(folder / "data", folder / "logs", **ADAPTED, RUN_ID="again",
                                 EVAL_ONLY=folder / "logs" / "run.artifact")
    again = program.run({name: value for name, value in variables.items() if name not in model})
    assert (again.returncode, again.stderr) == (0, "")
    before, result = program.result_of(done.stdout), program.result_of(again.stdout)
    assert list(result["stages"]) == ["quantized", "adapted"] and result["legal"]
    for stage in result["stages"]:
        assert {**result["stages"][stage], "seconds": 0} == {**before["stages"][stage], "seconds": 0}
    for name in ("val_bpb", "val_loss", "artifact_bytes", "submission_bytes", "data_fingerprint", "num_params"):
        assert result[name] == before[name]
    assert result["steps"] == result["train_seconds"] == 0 and "causal" not in result["audit"]
    assert sorted(path.name for path in (folder / "logs").iterdir() if "again" in path.name) == ["again.txt"]


@pytest.mark.parametrize("changes, words", [
    ({"NUM_LAYERS": 5}, ["NUM_LAYERS=4, not 5", "leave it out"]), ({"NUM_LOOPS": 0}, ["NUM_LOOPS=1, not 0"]),
    ({"LOGIT_SOFTCAP": 20}, ["LOGIT_SOFTCAP=30.0, not 20"]),
    ({"EVAL_ONLY": "nowhere.artifact"}, ["nowhere.artifact", "No such file"])], ids=str)
def test_what_contradicts_the_artifact_is_refused(scored, changes, words):
    code, _, errors = scored(**changes)
    assert code == 2 and all(word in errors for word in words) and errors.count("\n") == 1


def test_a_budget_too_small_to_score_at_all(scored):
    """Everything is scored, and nothing learns."""
    code, output, _ = scored(EVAL_BUDGET_SECONDS=1e-6)
    result, values = program.result_of(output), adaptation_of(output)
    assert code == 0 and result["legal"]
    assert (values["scored_chunks"], values["learned_chunks"]) == ("0", "0") and int(values["skipped"]) > 0
    assert result["val_loss"] == pytest.approx(result["stages"]["quantized"]["val_loss"], rel=1e-6)


def test_a_run_that_learns_before_it_scores_is_not_legal(scored):
    scores = []
    for epochs in (0, 2):
        code, output, _ = scored(TTT_STRATEGY="stream", TTT_UNSAFE_MULTI_EPOCH=epochs, GLOBAL_TTT_LR=0.003,
                                 AUDIT=epochs > 0)
        result = program.result_of(output)
        assert code == 0 and result["legal"] == (epochs == 0) == (adaptation_of(output)["legal"] == "1")
        assert result["stages"]["adapted"]["tokens"] == 1499
        scores.append(result["val_bpb"])
    assert scores[1] < scores[0] and result["audit"]["causal"] is False


def test_a_leak_makes_a_run_illegal(scored, monkeypatch):
    monkeypatch.setattr(train_gpt, "TestTimeTrainer", Peeks)
    code, output, _ = scored(AUDIT=1, SEED=1)  # of 32 places in a chunk, one is its first
    result = program.result_of(output)
    assert code == 0 and result["audit"]["causal"] is False and result["legal"] is False
    assert adaptation_of(output)["legal"] == "1"  # that line only says what was asked for


def test_a_head_without_norm_makes_a_run_illegal(scored, monkeypatch):
    original = GPT.nats
    monkeypatch.setattr(GPT, "nats", lambda self, *arguments: 0.99 * original(self, *arguments))
    code, output, _ = scored(AUDIT=1, EVAL_MODE="packed")
    result = program.result_of(output)
    assert code == 0 and result["audit"]["causal"] and result["audit"]["probability_error"] > 1e-4
    assert result["legal"] is False


@pytest.mark.parametrize("tokens, words", [
    ([], "holds no tokens"), ([1], "holds no target to score"), ([1, 5], None), ([1, 1], None), ([5, 5, 1], None)])
def test_validation_sets_with_hardly_a_token(trained, scored, tmp_path, tokens, words):
    data = tmp_path / "small"
    shutil.copytree(trained[1] / "data", data)
    program.write_tokens(data / "fineweb_val_000000.bin", np.array(tokens, int))
    program.write_tokens(data / "fineweb_val_bytes_000000.bin", np.where(np.array(tokens, int) == 1, 0, 1))
    code, output, errors = scored(DATA_PATH=data, AUDIT=1)
    if words:
        assert code == 2 and words in errors and errors.count("\n") == 1
    else:
        result = program.result_of(output)
        assert code == 0 and result["legal"] and result["stages"]["adapted"]["tokens"] == len(tokens) - 1
