"""Section 12, test-time training: adapters in the forward pass, the loop of score and adapt, its legality, its edges."""
import contextlib
import copy
import math
import signal
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
    BOS,
    GPT,
    TTT_TARGETS,
    Config,
    Ledger,
    UserError,
    World,
    low_rank,
    make_batch,
    make_segments,
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
    """TARGET_in, TARGET_out of documents, all different and large enough to matter."""
    generator, result = torch.Generator().manual_seed(seed), {}
    for target in targets:
        visits, inputs, outputs = adapter_sizes(config, looping)[target]
        result[f"{target}_in"] = 0.3 * torch.randn(documents, visits, rank, inputs, generator=generator)
        result[f"{target}_out"] = 0.3 * torch.randn(documents, visits, outputs, rank, generator=generator)
    return result


def document(adapters: dict[str, torch.Tensor], i: int) -> dict[str, torch.Tensor]:
    return {name: x[i:i + 1] for name, x in adapters.items()}


def one_row(model: GPT):
    """-> nats_of(ids, targets, adapters of one document or None), as the slow versions take it."""
    def nats_of(ids, targets, adapters=None):
        segments = make_segments(np.array([0]), len(ids), len(ids), 0)
        own = {name: x[None] for name, x in adapters.items()} if adapters else None
        return model(*make_batch(ids, targets, segments), own)
    return nats_of


def naive_nats(model: GPT, ids, targets, adapters: dict[str, torch.Tensor]) -> torch.Tensor:
    """The float64 reference with one document's adapters."""
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    own = {target: tuple(adapters[f"{target}_{end}"][0].double() for end in ("in", "out")) for target in TTT_TARGETS
           if f"{target}_in" in adapters}
    if "head" in own:
        own["head"] = tuple(x[0] for x in own["head"])
    return reference.forward(model.config, weights, ids, targets, [0], model.looping, own)


@torch.no_grad()
def test_adapters_of_q_k_v_are_low_rank_changes_of_the_matrices():
    config = tiny_config(num_loops=0, parallel_start_layer=2)
    model, (ids, targets, _) = make_model(config), random_batch(0, 40, 40)
    segments, adapters = make_segments(np.array([0]), 40, 40, 0), random_adapters(config, 1, "qkv", looping=False)
    adapted = model(ids, targets, segments, adapters)
    plain = model(ids, targets, segments)
    for target in "qkv":
        getattr(model, f"{target}_proj").add_(adapters[f"{target}_out"][0] @ adapters[f"{target}_in"][0])
    assert torch.allclose(adapted, model(ids, targets, segments), rtol=1e-4, atol=1e-5)
    assert (adapted - plain).abs().median() > 0.02


@pytest.mark.parametrize("targets", [*[(target,) for target in TTT_TARGETS], TTT_TARGETS], ids="-".join)
@torch.no_grad()
def test_adapters_are_the_formula(targets):
    """Skips, a looped layer, whose visits have their own, lanes, and scales of outputs that are not one."""
    config = tiny_config()
    model, (ids, labels, _) = make_model(config), random_batch(1, 24, 24)
    adapters, segments = random_adapters(config, 1, targets), make_segments(np.array([0]), 24, 24, 0)
    adapted, plain = model(ids, labels, segments, adapters), model(ids, labels, segments)
    assert torch.allclose(adapted.double(), naive_nats(model, ids[0], labels[0], adapters), rtol=2e-4, atol=1e-4)
    assert (adapted - plain).abs().median() > 0.02


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


@torch.no_grad()
def test_documents_side_by_side_do_not_touch_each_other():
    config, width = tiny_config(), 24
    model, adapters = make_model(config), random_adapters(config, 3)
    ids, labels, _ = random_batch(2, 3 * width, 3 * width)
    segments = make_segments(np.arange(3) * width, 3 * width, width, 0)
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
    config, width = tiny_config(), 24
    model, adapters = make_model(config), random_adapters(config, 2)
    ids, labels, _ = random_batch(2, 2 * width, 2 * width)
    segments = make_segments(np.arange(2) * width, 2 * width, width, 0)
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
    joined = dict(adapters)
    for target in "qv":  # the model's own, as further ranks of the document's; 0 where the visit has none
        more = [getattr(model, f"{target}_adapter_{end}") for end in ("in", "out")]
        none = [torch.zeros_like(x[0]) for x in more]
        a, b = (torch.stack([x[visit.adapter] if visit.adapter >= 0 else zero for visit in model.plans[True]])
                for x, zero in zip(more, none))
        joined[f"{target}_in"] = torch.cat((adapters[f"{target}_in"], a[None]), 2)
        joined[f"{target}_out"] = torch.cat((adapters[f"{target}_out"], b[None]), 3)
    nats = model(ids, labels, segments, adapters)
    assert torch.allclose(nats.double(), naive_nats(model, ids[0], labels[0], joined), rtol=2e-4, atol=1e-4)
    assert (nats.double() - naive_nats(model, ids[0], labels[0], adapters)).abs().max() > 0.02
    both = {f"q_{kind}_{end}": torch.randn(*[2] * (kind == "document"), *shape)
            for kind in ("adapter", "document") for end, shape in (("in", (3, 8)), ("out", (5, 3)))}
    x = torch.randn(6, 8)
    parts = [x @ both["q_adapter_in"].T @ both["q_adapter_out"].T, torch.cat(
        [x[i:i + 3] @ both["q_document_in"][i // 3].T @ both["q_document_out"][i // 3].T for i in (0, 3)])]
    assert torch.allclose(low_rank(x, both, "q"), parts[0] + parts[1], rtol=1e-4, atol=1e-5)
    assert low_rank(x, both, "k") is None


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
    learner = make_learner(config, text)
    adapters, _ = learner.fresh_adapters(3)
    assert {name.split("_")[0] for name in adapters} == {*TTT_TARGETS}
    for target, (visits, inputs, outputs) in adapter_sizes(config, bool(config.num_loops)).items():
        inputs = config.embed_dim or inputs if target == "head" else inputs
        a, b = adapters[f"{target}_in"].detach(), adapters[f"{target}_out"].detach()
        assert a.shape == (3, visits, 4, inputs) and b.shape == (3, visits, outputs, 4)
        assert torch.equal(a, a[:1].expand_as(a)) and not b.any()
        assert 0.8 * inputs ** -0.5 < a.abs().max() <= inputs ** -0.5 and abs(a.mean()) < 0.15 * inputs ** -0.5
        assert torch.equal(learner.fresh_adapters(1)[0][f"{target}_in"][0], a[0])
    with torch.no_grad():
        for value in adapters.values():
            value.add_(1)
    again, optimizer = learner.fresh_adapters(3)
    assert again["q_in"] is adapters["q_in"] and not again["q_out"].any() and not optimizer.state
    assert torch.equal(again["q_in"][0], learner.fresh_adapters(1)[0]["q_in"][0])
    assert np.isfinite(adapted_nats(config, text)).all()


# --- the loop of a document
def texts_of(text, config: Config) -> list[torch.Tensor]:
    """Every document's tokens and the one behind it."""
    tokens = torch.from_numpy(text.val_tokens.astype(np.int64))
    return [tokens[a:b + 1] for a, b in bounds_of(text)]


def first_adapters(config: Config, text) -> dict[str, torch.Tensor]:
    """target -> A (visits, R, in)."""
    adapters, _ = make_learner(config, text).fresh_adapters(1)
    return {name.removesuffix("_in"): x[0].detach().clone() for name, x in adapters.items() if name.endswith("_in")}


def unadapted_nats(config: Config, text, model: GPT | None = None) -> np.ndarray:
    """Of the same contexts, chunk by chunk, by a model that learns nothing."""
    return adapted_nats(replace(config, ttt_lora_lr=0.0), text, model=model)


DOCUMENT_RUNS = {
    "adamw": {}, "momentum": {"ttt_beta1": 0.8, "ttt_beta2": 0.95, "ttt_weight_decay": 5.0},
    "sgd": {"ttt_optimizer": "sgd", "ttt_lora_lr": 0.2, "ttt_lora_alpha": 8.0},
    "some targets": {"ttt_targets": "head,k", "ttt_lora_lr": 0.03},
    "chunk of a row": {"ttt_chunk_size": SEQ_LEN}, "no loops": {"num_loops": 0}}


@pytest.mark.parametrize("changes", DOCUMENT_RUNS.values(), ids=DOCUMENT_RUNS)
def test_documents_are_scored_and_learned_as_one_at_a_time(changes):
    """alpha / rank is a factor of B in the reference, and inside B, learning rate and decay in the program."""
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
    """Rows of banks that belong to the first TTT_FREEZE_BLOCKS layers, for the parameters of adapt_config's model."""
    layers, frozen = config.num_layers, config.ttt_freeze_blocks
    rows = {name: [*range(frozen)] for name in ("q_proj", "k_proj", "v_proj", "out_proj", "up_proj", "down_proj",
                                                "q_gain", "attn_scale", "mlp_scale", "resid_mix", "attn_gate")}
    behind = [i - config.parallel_start_layer for i in range(config.parallel_start_layer, layers) if i < frozen]
    looped = config.loop_end - config.loop_start + 1
    adapters = [i for i in range(looped * (config.num_loops + 1)) if config.loop_start + i % looped < frozen]
    names = [f"{target}_adapter_{end}" for target in "qv" for end in ("in", "out")] * bool(config.depth_lora_rank)
    return rows | dict.fromkeys(("lane_resid", "lane_mix"), behind) | dict.fromkeys(names, adapters)


def pieces_of(config: Config, text, first: int, last: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Targets first to last, cut at documents and at rows of EVAL_SEQ_LEN within them."""
    tokens, pieces = torch.from_numpy(text.val_tokens.astype(np.int64)), []
    for a, b in bounds_of(text):
        for start in range(a, b, config.eval_seq_len):
            begin, end = max(start, first), min(start + config.eval_seq_len, b, last)
            if begin < end:
                pieces.append((tokens[begin:end], tokens[begin + 1:end + 1]))
    return pieces


def naive_stream(config: Config, text) -> tuple[np.ndarray, GPT]:
    """Sliding windows of a chunk, one at a time; then steps of all weights on that chunk -> nats, the model."""
    model, tokens = make_model(config), torch.from_numpy(text.val_tokens.astype(np.int64))
    learner = reference.WeightLearner(config, dict(model.named_parameters()), frozen_rows(config))
    nats, total, every = np.full(len(tokens) - 1, np.nan), len(tokens) - 1, config.global_ttt_chunk_tokens
    ends = [*range(every, total, every), total] if every else [b for _, b in bounds_of(text)]
    windows = [(a + start, a + end, a + first) for a, b in bounds_of(text)
               for start, end, first in reference.sliding_windows(b - a, config.eval_seq_len, config.eval_stride)]
    for i, end in enumerate(ends):
        begin = ends[i - 1] if i else 0
        for start, stop, first in windows:
            if begin <= first < end:
                with torch.no_grad():
                    scored = one_row(model)(tokens[start:stop], tokens[start + 1:stop + 1])
                nats[first:stop] = scored[first - start:].numpy()
        for _ in range(config.global_ttt_epochs * (end < total)):
            learner.learn(one_row(model), pieces_of(config, text, begin, end),
                          reference.half_cosine(i / (len(ends) - 1)))
    return nats, model


STREAM_RUNS = {
    "sgd": {"ttt_optimizer": "sgd", "global_ttt_lr": 0.05},
    "sgd in epochs": {"ttt_optimizer": "sgd", "global_ttt_epochs": 3, "global_ttt_momentum": 0.5,
                      "global_ttt_lr": 0.02},
    "sgd by documents": {"ttt_optimizer": "sgd", "global_ttt_chunk_tokens": 0, "global_ttt_lr": 0.05},
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
    score = learner.run()
    assert np.allclose(learner.ledger.nats, expected, rtol=2e-3, atol=2e-3)
    assert score.nats == pytest.approx(expected.sum(), rel=1e-4) and score.tokens == len(expected)
    plain = make_learner(replace(config, global_ttt_lr=0.0), text)
    plain.run()
    assert np.abs(learner.ledger.nats - plain.ledger.nats).max() > 0.05
    for name, p in learner.model.named_parameters():
        moved = (last.get_parameter(name) - before[name]).abs().max()
        assert (p - last.get_parameter(name)).abs().max() <= 0.05 * moved + 1e-6, name
        rows = frozen_rows(config).get(name, []) if config.ttt_freeze_blocks else []
        assert torch.equal(p[rows], before[name][rows])
        assert name == "skip_weight" or len(rows) == len(p) or not torch.equal(p, before[name]), name


def naive_phases(config: Config, text, order: list[int], ends: list[int]) -> np.ndarray:
    """Adapters of documents; between them, after so many documents, steps of all weights on all documents so far."""
    model, nats, documents, done = make_model(config), {}, texts_of(text, config), 0
    first = first_adapters(config, text)
    for end in [*ends, len(order)]:
        model.requires_grad_(False)
        for i in order[done:end]:
            nats[i], _ = reference.adapt_document(config, one_row(model), documents[i], first, config.ttt_chunk_size)
        done, chunks = end, [[]]
        for i in order[:end]:
            a, b = bounds_of(text)[i]
            for piece in pieces_of(config, text, a, b):
                if chunks[-1] and sum(len(ids) for ids, _ in [*chunks[-1], piece]) > config.global_ttt_chunk_tokens:
                    chunks.append([])
                chunks[-1].append(piece)
        learner = reference.WeightLearner(config, dict(model.named_parameters()), frozen_rows(config))
        for i, pieces in enumerate(chunks):
            for _ in range(config.global_ttt_epochs * (end < len(order))):
                learner.learn(one_row(model), pieces, reference.half_cosine(i / len(chunks)))
    return np.array([x for i in range(len(order)) for x in nats[i]])


@pytest.mark.parametrize("changes, ends", [
    ({"phased_ttt_num_phases": 1, "phased_ttt_prefix_docs": 3}, [3]),
    ({"phased_ttt_num_phases": 3, "phased_ttt_prefix_docs": 4, "global_ttt_epochs": 2}, [1, 2, 4]),
    ({"phased_ttt_num_phases": 1, "phased_ttt_prefix_docs": 2, "ttt_order": "length", "ttt_optimizer": "adamw",
      "global_ttt_lr": 0.003}, [2]),
    ({"phased_ttt_num_phases": 5, "phased_ttt_prefix_docs": 2}, [1, 2]),
    ({"phased_ttt_num_phases": 2, "phased_ttt_prefix_docs": 100}, [3]),  # all documents: nobody is left at the end
    ({"phased_ttt_num_phases": 2, "phased_ttt_prefix_docs": 0}, [])], ids=str)
def test_phases_are_scored_and_learned_as_by_hand(changes, ends):
    config = adapt_config(**{"ttt_optimizer": "sgd", "ttt_lora_lr": 0.1, "global_ttt_lr": 0.05, **changes})
    config, text = replace(config, ttt_lora_lr=0.01 if config.ttt_optimizer == "adamw" else 0.1), \
        make_text((9, 40, 1, 70, 33, 17))
    lengths = [b - a for a, b in bounds_of(text)]
    order = sorted(range(6), key=lambda i: (-lengths[i], i)) if config.ttt_order == "length" else list(range(6))
    nats = adapted_nats(config, text)
    assert np.allclose(nats, naive_phases(config, text, order, ends), rtol=2e-3, atol=2e-3)
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


@settings(deadline=None, max_examples=300)
@given(plan_cases())
def test_every_document_has_one_place_in_the_plan(case):
    config, lengths, documents, ranks = case
    shares = plan_groups(config, lengths, documents, ranks)
    planned = [i for share in shares for group in share for i in group.documents]
    assert len(shares) == ranks and sorted(planned) == documents
    in_a_row = config.ttt_warm_start_a and config.ttt_order == "stream"
    loads = [sum(group.tokens for group in share) for share in shares]
    for share, load in zip(shares, loads):
        if in_a_row:
            assert [i for group in share for i in group.documents] == sorted(i for g in share for i in g.documents)
        else:
            sizes = [group.tokens for group in share]
            assert sizes == sorted(sizes, reverse=True)
        assert not share or load - share[-1].tokens <= min(loads)  # the last one went to who had least
    everything = [group for share in shares for group in share]
    for group in everything:
        longest = int(lengths[list(group.documents)].max())
        assert 1 <= len(group.documents) <= config.ttt_batch_size and group.chunk <= config.eval_seq_len
        assert (group.steps - 1) * group.chunk < longest <= group.steps * group.chunk
        assert group.tokens > 0
        if longest > 2 * config.eval_seq_len and not in_a_row:
            assert len(group.documents) <= max(config.ttt_batch_size // 8, 1)
    if not in_a_row:  # documents of similar length go together, and the longest begin
        ordered = sorted(everything, key=lambda g: -int(lengths[list(g.documents)].max()))
        together = [lengths[i] for group in ordered for i in group.documents]
        assert together == sorted(together, reverse=True)


def test_chunks_follow_the_length_of_the_longest_document():
    config = adapt_config(ttt_chunk_schedule="4@10,8@64", ttt_chunk_size=16, ttt_batch_size=2)
    groups = plan_groups(config, np.array([10, 1, 64, 11, 150, 65]), range(6), 1)[0]
    assert sorted((sorted(group.documents), group.chunk) for group in groups) == \
        [([0, 1], 4), ([2, 3], 8), ([4], 16), ([5], 16)]


@pytest.mark.parametrize("changes", [{}, {"ttt_batch_size": 16}, {"eval_seq_len": 30, "ttt_chunk_size": 7}], ids=str)
def test_the_plan_knows_the_tokens_of_each_group(changes):
    """The projected seconds are as good as these."""
    config, text = adapt_config(**changes), make_text((9, 1, 30, 12, 1, 33, 100))
    learner = make_learner(config, text)
    for group in plan_groups(config, learner.lengths, range(7), 1)[0]:
        assert group.tokens == sum(learner.chunk(group, step).batch.ids.numel() for step in range(group.steps))


@pytest.mark.parametrize("changes", [{}, {"phased_ttt_num_phases": 2, "phased_ttt_prefix_docs": 5}], ids=str)
def test_scores_do_not_depend_on_the_neighbors(changes):
    text, base = make_text(), adapt_config(**changes)
    expected = adapted_nats(base, text)
    assert np.abs(expected - unadapted_nats(base, text)).max() > 0.1
    for size in (1, 3, 64):
        assert np.allclose(adapted_nats(replace(base, ttt_batch_size=size), text), expected, rtol=2e-3, atol=2e-3)
    if not changes:
        assert np.allclose(adapted_nats(replace(base, ttt_order="length"), text), expected, rtol=2e-3, atol=2e-3)


def test_scores_do_not_depend_on_the_place_in_a_group():
    config, text = adapt_config(), make_text((9, 33, 1, 40))
    found = []
    for order in ((0, 1, 2, 3), (3, 2, 0, 1)):
        learner = make_learner(config, text)
        learner.score_group(train_gpt.Group(order, 16, 3, 0))
        found.append(learner.ledger.nats)
        assert (learner.ledger.times == 1).all()
    assert np.allclose(*found, rtol=2e-3, atol=2e-3)


class Apart(World):
    """A rank of a world whose ranks run one after the other: sums are of the ranks that ran, and never checked."""

    def __init__(self, rank: int, size: int, sums: list[np.ndarray]):
        super().__init__(rank, size, torch.device("cpu"), torch.float32)
        self.sums = sums

    def sum(self, values, operation=None):
        self.sums.append(np.array(values))
        return np.sum(self.sums, 0).tolist()


@pytest.mark.parametrize("size", [2, 3, 40])
def test_any_number_of_ranks_scores_each_target_once(size):
    """Also more ranks than documents."""
    config, text, sums = adapt_config(), make_text(), []
    learners = [make_learner(config, text, Apart(rank, size, sums)) for rank in range(size)]
    for learner in learners[:-1]:
        with contextlib.suppress(AssertionError):  # the sums are those of the ranks so far
            learner.run()
    score = learners[-1].run()
    assert np.array_equal(sum(learner.ledger.times.astype(int) for learner in learners), np.ones(len(text.val_bytes)))
    nats = sum(learner.ledger.nats for learner in learners)
    assert np.allclose(nats, adapted_nats(config, text), rtol=2e-3, atol=2e-3)
    assert score.nats == pytest.approx(nats.sum()) and score.bytes == text.val_bytes.sum()
    assert sum(learner.scored_chunks > 0 for learner in learners) == min(size, len(plan_groups(
        config, learners[0].lengths, range(len(LENGTHS)), 1)[0]))


@pytest.fixture(scope="module")
def single():
    """What one process scores, for each of RUNS."""
    return {name: adapted_nats(adapt_config(**changes), make_text(RUN_LENGTHS)) for name, changes in RUNS.items()}


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """The folder with what processes of worlds of two and of three scored."""
    folder = tmp_path_factory.mktemp("ranks")
    done = program.run({"RESULTS": str(folder), "PYTHONPATH": str(program.ROOT)},
                       script=program.ROOT / "tests" / "adaptation.py")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_learn_the_same_as_one(single, several, size):
    for name, expected in single.items():
        ranks = [np.load(several / f"{name}_{rank}_of_{size}.npz") for rank in range(size)]
        assert np.array_equal(sum(rank["times"].astype(int) for rank in ranks), np.ones(len(expected)))
        assert np.allclose(sum(rank["nats"] for rank in ranks), expected, rtol=3e-3, atol=3e-3), name
        assert sum(rank["times"].any() for rank in ranks) > 1
        for rank in ranks:
            assert rank["total"][1] == len(expected)
            assert rank["total"][0] == pytest.approx(expected.sum(), rel=1e-4)


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
    "stream by documents": {"ttt_strategy": "stream", "global_ttt_chunk_tokens": 0}}


def steps_of(config: Config, text) -> list[list[int]]:
    """Documents in the order of scoring; those that are scored before anything is learned from them together."""
    lengths = [b - a for a, b in bounds_of(text)]
    order = list(range(len(lengths)))
    if config.ttt_order == "length":
        order.sort(key=lambda i: (-lengths[i], i))
    prefix, phases = config.phased_ttt_prefix_docs, config.phased_ttt_num_phases
    ends = [prefix * (i + 1) // phases for i in range(phases)] if phases else []
    if config.ttt_warm_start_a:
        ends = [*range(config.ttt_batch_size, len(order), config.ttt_batch_size)]
    return [order[a:b] for a, b in zip([0, *ends], [*ends, len(order)])]


def may_change(config: Config, text, place: int) -> np.ndarray:
    """Targets (n,) whose nats may depend on token `place`, which is target place - 1."""
    if config.ttt_strategy == "stream":
        return np.arange(len(text.val_bytes)) >= place - 1
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
        deaf = {i for i, (a, b) in enumerate(bounds) if b - a <= 16 and config.ttt_warm_start_a}  # B = 0 in a first chunk
        assert allowed - deaf <= found <= allowed
        a, b = bounds[2]
        if config.global_ttt_chunk_tokens:  # learned within the document: the token itself is out of sight by then
            assert b - a > place - a + SEQ_LEN and after[b - 1] != before[b - 1]


class Peeks(train_gpt.TestTimeTrainer):
    """Trains on a chunk, then scores it."""

    def score(self, chunk, adapters):
        _, optimizer = self.adapters[len(adapters["q_in"])]
        super().score(chunk, adapters).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return super().score(chunk, adapters)


class Carries(train_gpt.TestTimeTrainer):
    """Starts no document anew."""

    def fresh_adapters(self, documents):
        return self.adapters.get(documents) or super().fresh_adapters(documents)


class Hindsight(train_gpt.TestTimeTrainer):
    """Keeps what the adapters would have scored at the end."""

    def score_group(self, group):
        super().score_group(group)
        adapters, _ = self.adapters[len(group.documents)]
        for step in range(group.steps):
            chunk = self.chunk(group, step)
            nats = self.score(chunk, adapters).detach().double().numpy()
            self.ledger.nats[chunk.place[chunk.place >= 0]] = nats[chunk.place >= 0]


class Blends(train_gpt.TestTimeTrainer):
    """One set of adapters for the documents of a group: each learns from all."""

    def adapt(self, scored, weights, optimizer):
        super().adapt(scored, weights, optimizer)
        with torch.no_grad():
            for settings in optimizer.param_groups:
                for p in settings["params"]:
                    p.copy_(p.mean(0, keepdim=True).expand_as(p))


@pytest.mark.parametrize("kind, changes", [
    (Peeks, {}), (Carries, {"ttt_batch_size": 1}), (Hindsight, {}), (Blends, {}),
    (train_gpt.TestTimeTrainer, {"ttt_strategy": "stream", "ttt_unsafe_multi_epoch": 1})], ids=str)
def test_planted_leaks_are_found(kind, changes):
    """The test above is no good if it does not see these."""
    config, text = adapt_config(**changes), make_text(SHORT)
    places = places_of(text)[1:4]
    assert leaks(config, text, places, kind=kind)
    assert not leaks(replace(config, ttt_unsafe_multi_epoch=0), text, places)


class Watched(train_gpt.TestTimeTrainer):
    """Writes down what is scored, and checks what is learned from."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.scored_places, self.last, self.steps, self.learned = np.zeros(len(self.ledger.times), int), None, 0, []

    def score(self, chunk, adapters):
        assert self.last is None or self.last[0].grad_fn is not None
        self.last = super().score(chunk, adapters), chunk
        self.scored_places[chunk.place[chunk.place >= 0]] += 1
        return self.last[0]

    def adapt(self, scored, weights, optimizer):
        result, chunk = self.last
        places, shares = chunk.place.reshape(len(chunk.rows) // self.group.chunk, -1), weights.view(
            -1, self.group.chunk).numpy()
        assert scored is result and weights is chunk.weights
        assert (shares[places < 0] == 0).all() and (self.scored_places[places[shares > 0]] == 1).all()
        for i, row in zip(self.group.documents, places):  # the mean, unless it is the document's last chunk
            more = self.scored_places[self.bounds[i]:self.bounds[i + 1]].sum() < self.lengths[i]
            mean = (row >= 0) / max((row >= 0).sum(), 1) * more
            assert np.allclose(shares[self.group.documents.index(i)], mean, rtol=1e-6)
        assert self.learned_chunks < self.scored_chunks
        super().adapt(scored, weights, optimizer)
        assert self.learned_chunks <= self.scored_chunks
        self.steps += 1

    def score_group(self, group):
        self.group = group
        super().score_group(group)

    def learn(self, rows, optimizer, lr_scale):
        for start, end, _ in rows:
            assert (self.ledger.times[start:end] == 1).all()
            self.learned.append((int(start), int(end)))
        super().learn(rows, optimizer, lr_scale)


@pytest.mark.parametrize("changes", STRATEGIES.values(), ids=STRATEGIES)
def test_nothing_is_learned_from_what_has_no_score(changes):
    config, text = adapt_config(**changes), make_text(SHORT)
    learner = make_learner(config, text, kind=Watched)
    score = learner.run()
    assert (learner.ledger.times == 1).all() and score.tokens == len(text.val_bytes)
    bounds = bounds_of(text)
    if config.ttt_strategy == "documents":
        assert (learner.scored_places == 1).all()
        assert learner.steps == learner.learned_chunks > 0
        assert learner.learned_chunks < learner.scored_chunks
        steps = steps_of(config, text)[:-1] if config.phased_ttt_num_phases else []
        expected = [i for k in range(len(steps)) for step in steps[:k + 1] for i in step]  # a prefix that grows
        expected = [piece for i in expected for piece in pieces_in(*bounds[i])]
    else:
        assert learner.steps == 0
        every = config.global_ttt_chunk_tokens
        ends = [*range(every, bounds[-1][1], every), bounds[-1][1]] if every else [b for _, b in bounds]
        expected = []
        for first, last in zip([0, *ends], ends[:-1]):  # never from the last chunk
            inside = [(max(a, first), min(b, last)) for document in bounds for a, b in pieces_in(*document)]
            expected += [(a, b) for a, b in inside if a < b] * config.global_ttt_epochs
    assert learner.learned == expected


def pieces_in(first: int, last: int) -> list[tuple[int, int]]:
    return [(a, min(a + SEQ_LEN, last)) for a in range(first, last, SEQ_LEN)]


def test_an_unsafe_run_is_caught_learning_early():
    learner = make_learner(adapt_config(ttt_strategy="stream", ttt_unsafe_multi_epoch=1), make_text(SHORT),
                           kind=Watched)
    with pytest.raises(AssertionError):
        learner.run()


def test_no_chunk_is_learned_from_twice():
    learner = make_learner(adapt_config(), make_text((40, 33)))
    adapters, optimizer = learner.fresh_adapters(2)
    group = train_gpt.Group((0, 1), 16, 3, 0)
    chunk = learner.chunk(group, 0)
    scored = learner.score(chunk, adapters)
    with pytest.raises(AssertionError):  # nothing is scored yet
        learner.adapt(scored, chunk.weights, optimizer)
    learner.scored_chunks = 1
    learner.adapt(scored, chunk.weights, optimizer)
    with pytest.raises(AssertionError):
        learner.adapt(learner.score(chunk, adapters), chunk.weights, optimizer)
    assert learner.learned_chunks == 1


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


@pytest.mark.parametrize("places", [[*range(9), 4], [*range(8)], [*range(8), 3], [0, 0, *range(2, 9)], [], [*range(9)] * 2])
def test_the_ledger_refuses_what_is_not_once(places):
    with pytest.raises(AssertionError, match=f"{len(places)} scores of 9 targets"):
        filled(make_text((5, 3, 1)), places).score(single_world())


def test_the_ledger_refuses_bytes_that_are_counted_twice():
    """A target whose bytes count in one rank, and another target in another: as many targets, as many bytes or not."""
    text = make_text((5, 3, 1))
    first, others = (3, 4), [i for i in range(9) if text.val_bytes[i] == text.val_bytes[3] and i != 3]
    assert len(others) > 0 and text.val_bytes[4] != text.val_bytes[3]
    for lost in (first[1], others[0]):  # different bytes, and the same
        sums = []
        with contextlib.suppress(AssertionError):
            filled(text, [i for i in range(9) if i not in (lost, 0)]).score(Apart(0, 2, sums))
        with pytest.raises(AssertionError, match="9 scores of 9 targets"):
            filled(text, [0, 3]).score(Apart(1, 2, sums))


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
    learner = make_learner(config, text)
    assert learner.run().tokens == len(text.val_bytes)
    assert np.allclose(learner.ledger.nats, expected, rtol=2e-3, atol=2e-3)


class Poisoned(train_gpt.TestTimeTrainer):
    """The gradients of one document are no numbers, in some steps."""

    document, steps, value = 3, range(100), math.nan

    def score_group(self, group):
        self.group, self.step = group, 0
        super().score_group(group)

    def score(self, chunk, adapters):
        nats = super().score(chunk, adapters)
        if self.document in self.group.documents and self.step in self.steps:
            i, size = self.group.documents.index(self.document), self.group.chunk
            mask = torch.arange(len(nats)) // size == i
            nats.register_hook(lambda grad: torch.where(mask, self.value, grad))
        self.step += 1
        return nats


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


class Broken(train_gpt.TestTimeTrainer):
    """The adapters of one document are no numbers from its second chunk on."""

    document = 3

    def score_group(self, group):
        self.group = group
        super().score_group(group)

    def adapt(self, scored, weights, optimizer):
        super().adapt(scored, weights, optimizer)
        if self.document in self.group.documents:
            adapters, _ = self.adapters[len(self.group.documents)]
            with torch.no_grad():
                adapters["v_out"][self.group.documents.index(self.document)] = math.nan


def test_targets_that_adapters_give_no_number_are_scored_without():
    config, text = adapt_config(), make_text(SHORT)
    healthy, (a, b) = adapted_nats(config, text), bounds_of(text)[3]
    learner = make_learner(config, text, kind=Broken)
    score = learner.run()
    nats = learner.ledger.nats
    assert np.isfinite(nats).all() and score.tokens == len(nats) and score.nats == pytest.approx(nats.sum())
    assert np.array_equal(np.delete(nats, slice(a + 16, b)), np.delete(healthy, slice(a + 16, b)))
    plain = make_learner(config, text)
    plain.evaluator.score_rows(plain.model, plain.windows_of(3), plain.ledger)
    assert np.allclose(nats[a + 16:b], plain.ledger.nats[a + 16:b], rtol=1e-5)
    assert learner.evaluator.log.lines == [f"adaptation: {b - a - 16} targets had no number, scored without adapters"]
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
    nats, every = learner.ledger.nats, config.global_ttt_chunk_tokens
    assert np.isfinite(nats).all() and np.array_equal(nats[:every], healthy[:every])
    assert np.abs(nats - healthy).max() > 1e-3 and not torch.equal(learner.model.q_proj, before["q_proj"])


@pytest.mark.parametrize("changes", [{}, {"phased_ttt_num_phases": 2, "phased_ttt_prefix_docs": 4},
                                     {"ttt_strategy": "stream"}], ids=str)
def test_a_budget_that_is_over_leaves_the_scoring(changes):
    config, text = adapt_config(**changes), make_text(SHORT)
    learner = make_learner(config, text, started=-1e9)
    before = {name: p.clone() for name, p in learner.model.named_parameters()}
    score = learner.run()
    assert score.tokens == len(text.val_bytes) and (learner.ledger.times == 1).all()
    assert learner.learned_chunks == learner.scored_chunks == 0
    assert all(torch.equal(p, before[name]) for name, p in learner.model.named_parameters())
    plain = make_learner(config, text)
    stride = config.eval_stride if config.ttt_strategy == "stream" else config.eval_seq_len
    assert score.nats == pytest.approx(plain.evaluator.score(plain.model, stride).nats, rel=1e-5)
    if not changes:
        assert learner.skipped_groups == len(plan_groups(config, learner.lengths, range(len(SHORT)), 1)[0])
    assert learner.skipped_groups > 0


class Clocked(train_gpt.TestTimeTrainer):
    """Scoring a chunk takes a second per token of its rows, anything else no time."""

    now = 0.0

    def score(self, chunk, adapters):
        Clocked.now += chunk.batch.ids.numel()
        return super().score(chunk, adapters)

    def score_group(self, group):
        super().score_group(group)
        self.adapted = [*getattr(self, "adapted", []), group]


def test_a_budget_cuts_the_groups_that_do_not_fit(monkeypatch):
    text = make_text(LENGTHS)
    config = adapt_config(ttt_batch_size=2)
    everything = plan_groups(config, np.array(LENGTHS), range(len(LENGTHS)), 1)[0]
    healthy = adapted_nats(config, text)
    for budget in (everything[0].tokens + 1.0, 700.0, 1e9):
        Clocked.now = 0.0
        monkeypatch.setattr(train_gpt.time, "perf_counter", lambda: Clocked.now)
        learner = make_learner(replace(config, eval_budget_seconds=budget), text, kind=Clocked)
        learner.run()
        monkeypatch.undo()
        assert (learner.ledger.times == 1).all() and Clocked.now <= budget
        assert Clocked.now == sum(group.tokens for group in learner.adapted)
        left = [group for group in everything if group not in learner.adapted]
        assert learner.skipped_groups == len(left) and bool(left) == (budget < 1e9)
        assert all(Clocked.now + group.tokens > budget for group in left[-1:]) or not left
        for group in everything:
            for i in group.documents:
                a, b = bounds_of(text)[i]
                same = np.array_equal(learner.ledger.nats[a:b], healthy[a:b])
                assert same if group in learner.adapted else not same or b - a <= config.ttt_chunk_size


def test_a_budget_of_a_stream_keeps_the_time_to_score_the_rest(monkeypatch):
    """Here a target takes a second, and a step of all weights fifty."""
    config, text, clock = adapt_config(**STRATEGIES["stream"]), make_text(SHORT), [0.0]
    learned = []
    for budget in (150.0, 215.0, 290.0, 1e9):
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
        assert (learner.ledger.times == 1).all() and learner.skipped_groups == 3 - learned[-1]
        assert clock[0] <= budget + 60  # a step more, and what rows of chunks differ by
    assert learned[0] == 0 and learned[-1] == 3 and learned == sorted(learned) and len({*learned}) > 2


# --- settings
@pytest.mark.parametrize("variables, words", [
    ({"TTT_TARGETS": "q,w"}, ["TTT_TARGETS=q,w", "q,k,v,out,mlp,head"]),
    ({"TTT_TARGETS": "q,q"}, ["TTT_TARGETS=q,q", "each once"]),
    ({"TTT_TARGETS": ""}, ["TTT_TARGETS="]),
    ({"TTT_CHUNK_SCHEDULE": "8"}, ["TTT_CHUNK_SCHEDULE=8", "must look like"]),
    ({"TTT_CHUNK_SCHEDULE": "0@10"}, ["TTT_CHUNK_SCHEDULE=0@10", "whole tokens above 0", "8@256,24@2000"]),
    ({"TTT_CHUNK_SCHEDULE": "2.5@10"}, ["TTT_CHUNK_SCHEDULE=2.5@10", "whole tokens above 0"]),
    ({"TTT_CHUNK_SCHEDULE": "8@0"}, ["TTT_CHUNK_SCHEDULE=8@0", "above 0"]),
    ({"TTT_FREEZE_BLOCKS": "12"}, ["TTT_FREEZE_BLOCKS=12", "NUM_LAYERS=11"]),
    ({"GLOBAL_TTT_CHUNK_TOKENS": "0"}, ["GLOBAL_TTT_CHUNK_TOKENS=0", "TTT_STRATEGY=documents"]),
    ({"TTT_UNSAFE_MULTI_EPOCH": "1"}, ["TTT_UNSAFE_MULTI_EPOCH=1", "TTT_STRATEGY=documents"]),
    ({"TTT_STRATEGY": "phases"}, ["TTT_STRATEGY=phases", "documents, stream"]),
    ({"TTT_ORDER": "random"}, ["TTT_ORDER=random", "stream, length"]),
    ({"TTT_OPTIMIZER": "adam"}, ["TTT_OPTIMIZER=adam", "adamw, sgd"]),
    ({"TTT_BATCH_SIZE": "0"}, ["TTT_BATCH_SIZE=0"]), ({"TTT_CHUNK_SIZE": "0"}, ["TTT_CHUNK_SIZE=0"]),
    ({"TTT_LORA_RANK": "0"}, ["TTT_LORA_RANK=0"]), ({"TTT_LORA_ALPHA": "0"}, ["TTT_LORA_ALPHA=0"]),
    ({"EVAL_BUDGET_SECONDS": "0"}, ["EVAL_BUDGET_SECONDS=0"]), ({"TTT_BETA2": "1"}, ["TTT_BETA2=1"]),
    ({"PHASED_TTT_NUM_PHASES": "-1"}, ["PHASED_TTT_NUM_PHASES=-1"]), ({"GLOBAL_TTT_LR": "nan"}, ["GLOBAL_TTT_LR=nan"]),
    ({"TTT_MOMENTUM": "0.9"}, ["TTT_MOMENTUM", "GLOBAL_TTT_MOMENTUM"]),
    ({"EVAL_MODE": "ttt"}, ["EVAL_MODE=ttt", "adapted"])], ids=str)
def test_settings_that_make_no_sense_are_refused(variables, words):
    with pytest.raises(UserError) as caught:
        Config.from_env(variables)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


# --- whole programs
ADAPTED = {"EVAL_MODE": "adapted", "TTT_LORA_RANK": 4, "TTT_LORA_ALPHA": 8, "TTT_LORA_LR": 0.003, "TTT_CHUNK_SIZE": 16,
           "TTT_BATCH_SIZE": 4, "GLOBAL_TTT_CHUNK_TOKENS": 256, "PHASED_TTT_PREFIX_DOCS": 6}


def test_the_program_adapts(tmp_path):
    data = program.write_data(tmp_path / "data")
    done = program.run(program.settings(data, tmp_path / "logs", **ADAPTED))
    assert (done.returncode, done.stderr) == (0, "")
    result = program.result_of(done.stdout)
    adapted, plain = result["stages"]["adapted"], result["stages"]["quantized"]
    assert list(result["stages"]) == ["raw", "averaged", "quantized", "adapted"]
    assert result["official_stage"] == "adapted" and result["val_bpb"] == adapted["val_bpb"] < plain["val_bpb"]
    assert (adapted["tokens"], adapted["bytes"]) == (plain["tokens"], plain["bytes"]) == (1499, plain["bytes"])
    assert result["legal"] and result["audit"]["scored_targets"] == result["audit"]["targets"] == 1499
    line, = (line for line in done.stdout.splitlines() if line.startswith("adaptation "))
    values = dict(word.split(":") for word in line.split()[1:])
    assert int(values["scored_chunks"]) > int(values["learned_chunks"]) > 0
    assert (values["groups_without"], values["legal"]) == ("0", "1")
    assert f"final_adapted_exact val_loss:{adapted['val_loss']:.8f}" in done.stdout
    assert adapted["seconds"] <= result["eval_seconds"] < 100


def test_a_run_that_learns_before_it_scores_is_not_legal(tmp_path, capsys):
    data, handlers = program.write_data(tmp_path / "data"), [(n, signal.getsignal(n)) for n in (signal.SIGINT,
                                                                                              signal.SIGTERM)]
    try:
        for epochs in (0, 2):
            code = train_gpt.main(program.settings(
                data, tmp_path / "logs", **ADAPTED, TTT_STRATEGY="stream", TTT_UNSAFE_MULTI_EPOCH=epochs,
                GLOBAL_TTT_LR=0.003, RUN_ID=f"run{epochs}"))
            output = capsys.readouterr().out
            result = program.result_of(output)
            assert code == 0 and result["legal"] == (epochs == 0)
            line, = (line for line in output.splitlines() if line.startswith("adaptation "))
            assert line.endswith(f"legal:{int(epochs == 0)}")
            assert result["stages"]["adapted"]["tokens"] == 1499
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)
