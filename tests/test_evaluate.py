"""Section 11, evaluate: windows, batches, the score against a naive one, memory, ranks, and causality."""
import contextlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import QuietLog, randomize, single_world, tiny_config, tiny_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import bits_per_byte, sliding_windows

from train_gpt import (
    BOS,
    GPT,
    Evaluator,
    Score,
    World,
    batch_windows,
    document_bounds,
    make_batch,
    make_segments,
    open_dataset,
    score_windows,
    windows,
)

SEQ_LEN, STRIDE = 32, 8


# --- windows
@st.composite
def window_cases(draw) -> tuple[int, int, int]:
    """(length, seq_len, stride) with the corners more often than by chance."""
    seq_len = draw(st.integers(1, 40))
    stride = draw(st.one_of(st.integers(1, seq_len), st.just(seq_len), st.just(1)))
    length = draw(st.one_of(
        st.integers(1, 200), st.integers(1, seq_len), st.just(seq_len), st.just(seq_len - stride + 1),
        st.integers(0, 5).map(lambda n: n * stride + 1), st.integers(0, 5).map(lambda n: seq_len + n * stride),
        st.integers(0, 5).map(lambda n: seq_len + n * stride + 1)))
    return length, seq_len, stride


@settings(deadline=None, max_examples=300)
@given(window_cases())
def test_windows_score_each_token_once_with_enough_context(case):
    length, seq_len, stride = case
    found = windows(length, seq_len, stride)
    scored = [token for _, end, first in found for token in range(first, end)]
    assert scored == list(range(length))
    for i, (start, end, first) in enumerate(found):
        assert 0 <= start <= first < end <= length and end - start <= seq_len
        assert first - start >= seq_len - stride if i else start == first == 0
        assert end == min(start + seq_len, length)
    if stride == seq_len:
        assert all(start == first for start, _, first in found)


@settings(deadline=None, max_examples=200)
@given(window_cases())
def test_windows_are_the_published_ones(case):
    assert [tuple(map(int, row)) for row in sliding_windows(*case)] == windows(*case)


@pytest.mark.parametrize("length, expected", [
    (1, [(0, 1, 0)]), (1984, [(0, 1984, 0)]), (1985, [(0, 1985, 0), (64, 1985, 2048)][:1]), (2048, [(0, 2048, 0)]),
    (2049, [(0, 2048, 0), (64, 2049, 2048)]), (2113, [(0, 2048, 0), (64, 2112, 2048), (128, 2113, 2112)])])
def test_windows_of_the_published_settings(length, expected):
    assert windows(length, 2048, 64) == expected


def texts() -> st.SearchStrategy[np.ndarray]:
    """Token arrays of documents, with or without a head before the first BOS."""
    documents = st.lists(st.integers(1, 60), min_size=1, max_size=8)

    def build(lengths: list[int], head: int) -> np.ndarray:
        return np.array([2] * head + [token for n in lengths for token in [BOS] + [3] * (n - 1)], np.uint16)
    return st.builds(build, documents, st.integers(0, 30))


@settings(deadline=None, max_examples=100)
@given(texts(), st.integers(1, 20), st.data())
def test_score_windows_stay_inside_documents(ids, seq_len, data):
    stride = data.draw(st.integers(1, seq_len))
    rows = score_windows(ids, seq_len, stride, True)
    assert [token for _, end, first in rows for token in range(first, end)] == list(range(len(ids)))
    for start, end, _ in rows:
        assert not (ids[start + 1:end] == BOS).any() and end - start <= seq_len
    bounds = document_bounds(ids).tolist()
    expected = [(a + s, a + e, a + f) for a, b in zip(bounds, bounds[1:]) for s, e, f in
                sliding_windows(b - a, seq_len, stride)]
    assert rows.tolist() == [list(row) for row in expected]
    plain = score_windows(ids, seq_len, stride, False)
    assert plain.tolist() == [list(row) for row in sliding_windows(len(ids), seq_len, stride)]


@settings(deadline=None, max_examples=100)
@given(texts(), st.integers(1, 20), st.integers(0, 100))
def test_batch_windows_keep_order_and_size(ids, seq_len, extra):
    rows, tokens = score_windows(ids, seq_len, max(seq_len // 2, 1), True), seq_len + extra
    groups = batch_windows(rows, tokens)
    assert np.array_equal(np.concatenate(groups), rows)
    sizes = [int((group[:, 1] - group[:, 0]).sum()) for group in groups]
    assert max(sizes) <= tokens and min(map(len, groups)) > 0
    for size, following in zip(sizes, groups[1:]):
        assert size + following[0, 1] - following[0, 0] > tokens  # the next window did not fit
    assert batch_windows(rows[:0], tokens) == []


# --- Score
def test_score_is_the_one_definition_of_bits_per_byte():
    score = Score(nats=1234.5, tokens=600, bytes=1500, seconds=1.23456)
    assert score.val_loss == 1234.5 / 600
    assert score.val_bpb == pytest.approx(bits_per_byte(1234.5, 1500), rel=1e-15)
    assert score.val_bpb == pytest.approx(1234.5 / math.log(2) / 1500, rel=1e-15)
    assert math.isfinite(Score(1.0, 1, 0, 0.0).val_bpb)


# --- Evaluator
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    tiny_dataset(path)
    return path


@pytest.fixture(scope="module")
def config(folder):
    return tiny_config(vocab_size=64, data_path=str(folder), eval_seq_len=SEQ_LEN, eval_stride=STRIDE,
                       val_batch_tokens=256)


@pytest.fixture(scope="module")
def dataset(config):
    """The data set with few validation tokens, for speed."""
    whole = open_dataset(config, single_world())
    count = min(len(whole.val_tokens), 500)
    return replace(whole, val_tokens=whole.val_tokens[:count], val_bytes=whole.val_bytes[:count - 1])


def random_model(config, dtype: torch.dtype = torch.float32) -> GPT:
    """A GPT with loops and no weight that is zero."""
    model = GPT(config, dtype)
    model.init_weights(0)
    randomize(model, 3)
    model.looping = True
    return model.to(dtype)


@pytest.fixture(scope="module")
def model(config):
    return random_model(config)


def evaluator(config, dataset, compiled: bool = False, world=None) -> Evaluator:
    return Evaluator(config, world or single_world(), QuietLog(), dataset, compiled)


def naive_nats(config, dataset, model, stride: int) -> np.ndarray:
    """Nats of every target: document by document, window by window, one forward pass each."""
    ids, targets = dataset.val_tokens[:-1], dataset.val_tokens[1:]
    starts = [i for i in range(len(ids)) if i == 0 or (ids[i] == BOS and config.document_mask)]
    nats = np.full(len(ids), np.nan)
    for a, b in zip(starts, [*starts[1:], len(ids)]):
        for start, end, first in sliding_windows(b - a, config.eval_seq_len, stride):
            window = slice(a + start, a + end)
            segments = make_segments(np.array([0]), end - start, end - start, 0)
            with torch.no_grad():
                result = model(*make_batch(ids[window], targets[window], segments)).double().numpy()
            assert np.isnan(nats[a + first:a + end]).all()
            nats[a + first:a + end] = result[first - start:]
    return nats


def captured_nats(judge: Evaluator, model, stride: int) -> tuple[Score, np.ndarray]:
    """-> (score, nats of every target as the evaluator got them)."""
    nats, places, build = np.full(len(judge.dataset.val_bytes), np.nan), [], judge.build

    def remember(*arguments):
        batch, place = build(*arguments)
        places.append(place)
        return batch, place

    def forward(*batch):
        result, place = model(*batch), places[-1]
        assert result.shape == place.shape and np.isnan(nats[place[place >= 0]]).all()
        nats[place[place >= 0]] = result.double().numpy()[place >= 0]
        return result
    judge.build = remember
    return judge.score(forward, stride), nats


@pytest.mark.parametrize("stride", [SEQ_LEN, STRIDE], ids=["packed", "sliding"])
@pytest.mark.parametrize("mask", [True, False], ids=["documents", "rows"])
def test_score_is_the_naive_one(config, dataset, model, stride, mask):
    config = replace(config, document_mask=mask)
    naive = naive_nats(config, dataset, model, stride)
    score, nats = captured_nats(evaluator(config, dataset), model, stride)
    assert np.allclose(nats, naive, rtol=1e-4, atol=1e-5)
    assert score.nats == pytest.approx(naive.sum(), rel=1e-6) and score.nats == pytest.approx(nats.sum(), rel=1e-12)
    assert score.tokens == len(dataset.val_tokens) - 1 == len(naive)
    assert score.bytes == int(dataset.val_bytes.sum()) > 0 and score.seconds > 0
    assert score.val_bpb == pytest.approx(bits_per_byte(float(naive.sum()), score.bytes), rel=1e-6)


def test_sliding_and_packed_and_rows_differ(config, dataset, model):
    """Else the comparison above would not tell them apart."""
    scores = [evaluator(replace(config, document_mask=mask), dataset).score(model, stride).nats
              for mask in (True, False) for stride in (SEQ_LEN, STRIDE)]
    assert len({round(nats, 2) for nats in scores}) == 4


@pytest.mark.parametrize("stride", [SEQ_LEN, STRIDE])
def test_score_does_not_depend_on_the_batch_size(config, dataset, stride):
    model = random_model(config, torch.float64)
    scores = [evaluator(replace(config, val_batch_tokens=tokens), dataset).score(model, stride).nats
              for tokens in (1, SEQ_LEN, 100, 257, 100_000)]
    assert scores == pytest.approx([scores[0]] * len(scores), rel=1e-9)


@pytest.mark.parametrize("tokens", [SEQ_LEN, 100, 256, 2048])
@pytest.mark.parametrize("stride", [SEQ_LEN, STRIDE])
def test_padding_of_the_compiled_path_is_not_scored(config, dataset, model, stride, tokens):
    """Batches have one shape, whatever is in them, and give the same score."""
    config, shapes = replace(config, val_batch_tokens=tokens), set()
    expected = evaluator(config, dataset).score(model, stride)

    def forward(ids, targets, segments):
        shapes.add((ids.shape, targets.shape, segments.boundaries.shape, segments.positions.shape, segments.max_length,
                    ids.stride(), targets.stride()))
        bounds = segments.boundaries.tolist()
        assert bounds == sorted(bounds) and bounds[-1] == ids.numel() and segments.max_length == SEQ_LEN
        return model(ids, targets, segments)
    score = evaluator(config, dataset, compiled=True).score(forward, stride)
    assert score.nats == pytest.approx(expected.nats, rel=1e-6)
    assert (score.tokens, score.bytes) == (expected.tokens, expected.bytes)
    assert len(shapes) == 1 and next(iter(shapes))[0] == (1, max(tokens, SEQ_LEN))


# --- memory
@pytest.mark.parametrize("compiled", [False, True])
def test_out_of_memory_halves_the_batches_and_keeps_the_score(config, dataset, model, capsys, compiled):
    config = replace(config, val_batch_tokens=400)
    expected, sizes = evaluator(config, dataset).score(model, STRIDE), []

    def forward(ids, targets, segments):
        sizes.append(ids.numel())
        if ids.numel() > 120 and len(sizes) > 2:  # two batches pass before memory runs out
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return model(ids, targets, segments)
    judge = evaluator(config, dataset, compiled)
    score = judge.score(forward, STRIDE)
    assert score.nats == pytest.approx(expected.nats, rel=1e-6)
    assert (score.tokens, score.bytes) == (expected.tokens, expected.bytes)
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"rank 0: out of memory, now scores {n} tokens" for n in (200, 100)]
    assert judge.batch_tokens == 100 and max(sizes[5:]) <= 100 < sizes[0]
    assert judge.score(forward, SEQ_LEN).tokens == expected.tokens and not capsys.readouterr().out  # it remembers


def test_out_of_memory_at_the_smallest_batch_is_final(config, dataset, capsys):
    def forward(ids, targets, segments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
    judge = evaluator(replace(config, val_batch_tokens=200), dataset)
    with pytest.raises(torch.OutOfMemoryError):
        judge.score(forward, SEQ_LEN)
    assert judge.batch_tokens == SEQ_LEN
    assert [line.split()[7] for line in capsys.readouterr().out.splitlines()] == ["100", "50", "32"]


# --- ranks
class Part(World):
    """A rank of a world whose ranks run one after the other: what they share is kept in `shared`, by call."""

    def __init__(self, rank: int, size: int, shared: dict):
        super().__init__(rank, size, torch.device("cpu"), torch.float32)
        self.shared = shared

    def sum(self, values):
        return np.sum(self.shared.setdefault("sum", []) + [values], 0).tolist()

    def gather(self, value):
        self.shared.setdefault("gather", []).append(value)
        return self.shared["gather"]


@pytest.mark.parametrize("size", [2, 3, 40])
def test_ranks_together_score_each_target_once(config, dataset, model, size):
    config = replace(config, val_batch_tokens=256 * size, document_mask=size != 40)
    stride, shared, nats = SEQ_LEN if size == 40 else STRIDE, {}, np.zeros(len(dataset.val_bytes))
    for rank in range(size):
        judge = evaluator(config, dataset, world=Part(rank, size, shared))
        ledger = judge.score_all(model, stride)
        assert ledger.times.max() <= 1
        nats += ledger.nats
        if rank < size - 1:  # the others have not scored yet; of 40 some never do
            with pytest.raises(AssertionError, match="not scored exactly once") if size < 40 else \
                    contextlib.suppress(AssertionError):
                ledger.score(judge.world)
    assert ledger.score(judge.world).tokens == len(nats)
    assert nats.sum() == pytest.approx(evaluator(config, dataset).score(model, stride).nats, rel=1e-6)


def test_a_target_that_is_lost_or_repeated_is_noticed(config, dataset, model):
    for place in (3, len(dataset.val_bytes) - 1):
        for times in (0, 2):
            judge = evaluator(config, dataset)
            ledger = judge.score_all(model, SEQ_LEN)
            ledger.times[place] = times
            with pytest.raises(AssertionError, match=f"1 of {len(dataset.val_bytes)} targets"):
                ledger.score(judge.world)
    shared = {"gather": [np.packbits(np.arange(len(dataset.val_bytes)) == 5)]}  # another rank has scored this one too
    judge = evaluator(config, dataset)
    with pytest.raises(AssertionError, match=f"1 of {len(dataset.val_bytes)} targets"):
        judge.score_all(model, SEQ_LEN).score(Part(1, 2, shared))


# --- causality
@pytest.mark.parametrize("stride", [SEQ_LEN, STRIDE])
@pytest.mark.parametrize("mask", [True, False])
def test_a_later_token_changes_nothing_before_it(config, dataset, model, stride, mask):
    """Target i = token i + 1: with another token p, the nats of all targets before p - 1 stay bit for bit."""
    config = replace(config, document_mask=mask)
    before = captured_nats(evaluator(config, dataset), model, stride)[1]
    bounds = document_bounds(dataset.val_tokens).tolist()
    middle = [p for p in range(150, 350) if dataset.val_tokens[p] != BOS and dataset.val_tokens[p + 1] != BOS]
    for p in middle[:2] + middle[-2:] + [len(dataset.val_tokens) - 1]:
        tokens = dataset.val_tokens.copy()
        tokens[p] = 2 + (int(tokens[p]) - 1) % 62
        assert tokens[p] not in (BOS, dataset.val_tokens[p])
        after = captured_nats(evaluator(config, replace(dataset, val_tokens=tokens)), model, stride)[1]
        assert np.array_equal(after[:p - 1], before[:p - 1])
        assert after[p - 1] != before[p - 1]
        if p + 1 < len(tokens):
            assert after[p] != before[p]  # the token is context for the next target
        if mask:  # and for none of the following documents
            following = next(bound for bound in bounds if bound > p)
            assert np.array_equal(after[following:], before[following:])


# --- stages
def test_stages_are_kept_and_logged(config, dataset, model):
    judge = evaluator(config, dataset)
    judge.keep("quantized", judge.score(model, SEQ_LEN))
    judge.keep("sliding", judge.score(model, STRIDE))
    assert list(judge.stages) == ["quantized", "sliding"]
    for (name, score), line in zip(judge.stages.items(), judge.log.lines):
        numbers = f"val_loss:{score.val_loss:.8f} val_bpb:{score.val_bpb:.8f}"
        assert line.startswith(f"final_{name}_exact {numbers} eval_time:")
    assert judge.stages["sliding"].nats != judge.stages["quantized"].nats


def test_nobody_keeps_gradients(config, dataset, model):
    seen = []

    def forward(*batch):
        seen.append(torch.is_grad_enabled())
        return model(*batch)
    evaluator(config, dataset).score(forward, SEQ_LEN)
    assert seen and not any(seen) and torch.is_grad_enabled()
