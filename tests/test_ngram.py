"""The n-gram smoothing of section 11: counts against dictionaries, causality, and probabilities that sum to 1."""
import lzma
import math
import sys

import numpy as np
import program
import pytest
import reference
import torch
from helpers import write_shard
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import BOS, NGRAM_ORDERS, ngram_counts, smoothed

sys.path.insert(0, str(program.ROOT / "bench"))
import ngram as bench


def counts_of(tokens: np.ndarray, orders, device: str = "cpu") -> dict[int, np.ndarray]:
    """Order -> (3, n - 1) seen, hits and kinds of each target; 0 where nothing was seen."""
    result = {}
    for order, at, *counts in ngram_counts(torch.from_numpy(tokens.astype(np.int64)).to(device), orders):
        out = np.zeros((3, max(len(tokens) - 1, 0)), np.int64)
        out[:, at.cpu().numpy() - 1] = torch.stack(counts).cpu().numpy()
        result[order] = out
    return result


def expected(tokens: np.ndarray, order: int) -> np.ndarray:
    return np.array(reference.ngram_counts(tokens, order), np.int64).reshape(-1, 3).T


def zipf_text(random: np.random.Generator, length: int, vocab_size: int) -> np.ndarray:
    """Zipf tokens, half of them in copies of earlier stretches, a few with one token changed."""
    parts, size = [np.minimum(random.zipf(1.3, 500), vocab_size - 1)], 500
    while size < length:
        text, count = np.concatenate(parts), int(random.integers(1, 200))
        start = int(random.integers(0, max(len(text) - count, 1)))
        part = text[start:start + count].copy() if random.random() < 0.5 else np.minimum(random.zipf(1.3, count), 99)
        part[0] = BOS if random.random() < 0.2 else part[0]
        parts, size = [text, part], len(text) + len(part)
    return np.concatenate(parts)[:length].astype(np.uint16)


@st.composite
def texts(draw) -> np.ndarray:
    """Of few letters, which repeat themselves, from none to longer than any order."""
    letters = draw(st.sampled_from([[0], [0, 1], [BOS, 2, 3], [7, 8191, 65535]]))
    return np.array(draw(st.lists(st.sampled_from(letters), max_size=120)), np.uint16)


# --- counts
@settings(deadline=None, max_examples=300)
@given(texts(), st.sampled_from([(4,), (2, 3, 4, 5), (2, 5, 8, 16), NGRAM_ORDERS]))
def test_counts_are_those_of_the_dictionaries(tokens, orders):
    counts = counts_of(tokens, orders)
    assert list(counts) == list(orders)
    assert all(np.array_equal(counts[order], expected(tokens, order)) for order in orders)


@pytest.mark.parametrize("kind", ["two letters", "random", "Zipf", "one letter"])
def test_counts_of_50000_tokens(kind):
    random = np.random.default_rng(5)
    size = {"one letter": 1, "two letters": 2, "random": 8192}.get(kind)
    tokens = random.integers(0, size, 50_000).astype(np.uint16) if size else zipf_text(random, 50_000, 8192)
    for order, counts in counts_of(tokens, NGRAM_ORDERS).items():
        assert np.array_equal(counts, expected(tokens, order))
        assert (counts[0] > 0).any() == (kind != "random")


def test_counts_where_one_context_has_almost_a_block_of_rows():
    """With this seed a group starts 2^16 rows behind that context's, and the token behind both is the same."""
    random = np.random.default_rng(9)
    tokens = np.concatenate([random.integers(0, 2, 5_000), np.full(63_000, 5), random.integers(5, 10, 9_000)])
    for order, counts in counts_of(tokens.astype(np.uint16), (2, *NGRAM_ORDERS)).items():
        assert np.array_equal(counts, expected(tokens, order))


@pytest.mark.gpu
@pytest.mark.parametrize("length", [0, 1, 5, 300_000])
def test_a_gpu_counts_as_a_cpu_does(length):
    text = zipf_text(np.random.default_rng(0), 300_000, 500)[:length]
    wanted = counts_of(text, NGRAM_ORDERS)
    for deterministic in (True, False):  # the audit's way, and the score's
        torch.use_deterministic_algorithms(deterministic)
        found = counts_of(text, NGRAM_ORDERS, "cuda")
        assert found.keys() == wanted.keys() and all(np.array_equal(found[order], wanted[order]) for order in wanted)


def test_counts_of_real_text(corpus_dir):
    data = lzma.decompress((corpus_dir / "fineweb_val_000000.bin.xz").read_bytes())
    tokens = np.frombuffer(data, "<u2", offset=1024)[:100_000]
    for order, counts in counts_of(tokens, NGRAM_ORDERS).items():
        assert np.array_equal(counts, expected(tokens, order))


@settings(deadline=None, max_examples=100)
@given(texts(), st.data())
def test_a_token_changes_no_count_before_it(tokens, data):
    if len(tokens) < 2:
        return
    place = data.draw(st.integers(1, len(tokens) - 1))
    changed = tokens.copy()
    changed[place:] = data.draw(st.lists(st.integers(0, 9), min_size=len(tokens) - place, max_size=len(tokens) - place))
    for order in (2, 4, 8):
        whole, other, short = (counts_of(x, [order])[order] for x in (tokens, changed, tokens[:place]))
        assert np.array_equal(whole[:, :place - 1], other[:, :place - 1])
        assert np.array_equal(whole[[0, 2], :place], other[[0, 2], :place])  # at it, what is known before it
        assert np.array_equal(whole[:, :place - 1], short)


def test_contexts_hold_bos_like_any_token():
    piece = [4, 5, BOS, 6]
    counts = counts_of(np.array([*piece, 7, *piece, 7, 4, 5, 6, 7], np.uint16), [5])[5]
    assert counts[:, 8].tolist() == [1, 1, 1]  # behind 4 5 BOS 6
    assert counts[0, -1] == 0  # and not behind 7 4 5 6


# --- probabilities
@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2 ** 32 - 1), st.floats(0.1, 20))
def test_smoothed_probabilities_are_the_references_and_sum_to_1(seed, sharpness):
    """At the last place of a text, for every token of the vocabulary as the target."""
    random, size = np.random.default_rng(seed), 5
    tokens = random.integers(0, size, 60)
    logits = sharpness * random.standard_normal(size)
    p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    found = []
    for target in range(size):
        nats = torch.tensor([-math.log(max(p[target], 1e-300))], dtype=torch.float64)
        for order, at, *counts in ngram_counts(torch.from_numpy(np.append(tokens, target)), NGRAM_ORDERS):
            last = at == len(tokens)
            if last.any():
                nats = smoothed(nats, order, *(x[last] for x in counts))
        found.append(math.exp(-nats.item()))
    assert sum(found) == pytest.approx(1, abs=1e-9)
    assert found == pytest.approx(reference.smoothed_distribution(p, np.append(tokens, 0), len(tokens), NGRAM_ORDERS))


def test_where_nothing_was_seen_nothing_changes():
    nats, none = torch.rand(10, dtype=torch.float64) * 700, torch.zeros(10, dtype=torch.int64)
    assert torch.equal(smoothed(nats, 4, none, none, none), nats)


def test_no_surprise_is_too_large():
    one = torch.ones(1, dtype=torch.int64)
    nats = torch.tensor([5000.0], dtype=torch.float64)
    assert smoothed(nats, 20, one, one, one).item() == pytest.approx(math.log(2))
    assert smoothed(nats, 20, one, 0 * one, one).item() == pytest.approx(5000 + math.log(2))


def test_a_ledger_smooths_what_this_rank_scored_and_gains_where_the_text_repeats_itself():
    tokens = np.tile(np.arange(BOS, 40), 5).astype(np.uint16)
    stream, sizes = train_gpt.TokenStream([]), np.ones(len(tokens) - 1, np.int64)
    ledger = train_gpt.Ledger(train_gpt.Dataset(stream, tokens, sizes, "", "", 0, 0))
    mine = np.arange(30, len(tokens) - 1, 2)
    ledger.add(mine, np.full(len(mine), 4.0))
    ledger.smooth(16, torch.device("cpu"))
    assert not ledger.nats[np.setdiff1d(np.arange(len(tokens) - 1), mine)].any()
    assert (ledger.nats[mine[mine < 38]] == 4).all() and (ledger.nats[mine[mine > 60]] < 4).all()
    other = train_gpt.Ledger(ledger.dataset)
    other.add(mine, np.full(len(mine), 4.0))
    other.smooth(5, torch.device("cpu"))
    assert other.nats.sum() > ledger.nats.sum()


# --- bench/ngram.py
def test_bench_reports_each_order_and_the_gain(tmp_path, capsys):
    tokens = zipf_text(np.random.default_rng(4), 3000, 64)
    write_shard(tmp_path / "a.bin", tokens)
    np.save(tmp_path / "nats.npy", np.full(len(tokens) - 1, 4.0))
    assert bench.main([str(tmp_path / "a.bin"), "--orders", "4,16", "--nats", str(tmp_path / "nats.npy")]) == 0
    rows = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()[3:]]
    assert [row[1] for row in rows] == ["4", "16"]
    assert [row[2] for row in rows] == [f"{(counts_of(tokens, [x])[x][0] > 0).sum():,}" for x in (4, 16)]
    assert 0 < float(rows[0][4]) < float(rows[1][4])
    assert bench.main([str(tmp_path / "b.bin")]) == 2
    assert "b.bin" in capsys.readouterr().err


# --- the whole program
@pytest.mark.parametrize("mode", ["packed", "sliding", "adapted"])
def test_the_program_smooths_the_scores_of_each_way_to_score(tmp_path, mode):
    data = program.write_data(tmp_path / "data")
    done = program.run(program.settings(data, tmp_path / "logs", EVAL_MODE=mode, NGRAM_ORDER=4, AUDIT=1,
                                        TTT_LORA_RANK=2, TTT_BATCH_SIZE=4))
    assert (done.returncode, done.stderr) == (0, "")
    result = program.result_of(done.stdout)
    assert list(result["stages"]) == ["raw", "averaged", "quantized", mode, "smoothed"]
    assert result["official_stage"] == "smoothed" and result["val_loss"] != result["stages"][mode]["val_loss"]
    assert result["stages"]["smoothed"]["tokens"] == result["audit"]["targets"]
    assert result["legal"] and result["audit"]["causal"] and result["audit"]["change_before_nats"] == 0
