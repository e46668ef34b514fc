"""The n-gram tilt of section 11: hints against dictionaries, causality, and probabilities that sum to 1."""
import inspect
import lzma
import math
import sys

import numpy as np
import program
import pytest
import reference
import torch
from helpers import randomize, tiny_config, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import BOS, GPT, make_batch, make_segments, ngram_hints, run_places, tilt

sys.path.insert(0, str(program.ROOT / "bench"))
import tilt as bench

ORDER = 16


def expected(tokens: np.ndarray, order: int) -> np.ndarray:
    """The reference's hints (3, n - 1), all 0 where it has none."""
    hints = np.array(reference.ngram_hints(tokens, order), np.int64).reshape(-1, 3)
    return np.where(hints[:, 2:] > 0, hints, 0).T


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
def cases(draw) -> tuple[np.ndarray, int]:
    """(tokens, order): texts of few letters, which repeat themselves, from none to longer than the order."""
    letters = draw(st.sampled_from([[0], [0, 1], [BOS, 2, 3], [7, 8191, 65535]]))
    tokens = draw(st.lists(st.sampled_from(letters), max_size=120))
    return np.array(tokens, np.uint16), draw(st.sampled_from([2, 3, 4, 5, 8, 16]))


# --- hints
@settings(deadline=None, max_examples=300)
@given(cases())
def test_hints_are_those_of_the_dictionaries(case):
    tokens, order = case
    hints = ngram_hints(tokens, order)
    assert hints.dtype == np.int32 and hints.shape == (3, max(len(tokens) - 1, 0))
    assert np.array_equal(hints, expected(tokens, order))


@pytest.mark.parametrize("kind", ["two letters", "random", "Zipf", "one letter"])
@pytest.mark.parametrize("order", [2, 5, ORDER])
def test_hints_of_100000_tokens(kind, order):
    random = np.random.default_rng(order)
    size = {"one letter": 1, "two letters": 2, "random": 8192}.get(kind)
    tokens = random.integers(0, size, 100_000).astype(np.uint16) if size else zipf_text(random, 100_000, 8192)
    hints = ngram_hints(tokens, order)
    assert np.array_equal(hints, expected(tokens, order))
    assert (hints[2] > 0).any() == (kind != "random" or order == 2)


def test_hints_of_real_text(corpus_dir):
    data = lzma.decompress((corpus_dir / "fineweb_val_000000.bin.xz").read_bytes())
    tokens = np.frombuffer(data, "<u2", offset=1024)[:300_000]
    hints = ngram_hints(tokens, ORDER)
    assert np.array_equal(hints, expected(tokens, ORDER)) and (hints[2] > 0).sum() > 100


@pytest.mark.parametrize("factor", ["0", "1", "1 << 60"])
def test_no_hint_depends_on_the_hash(factor):
    """With hashes that are all 0, the sum of the tokens, or their last one's lowest bits."""
    source, names = inspect.getsource(ngram_hints), dict(vars(train_gpt))
    assert source.count("0xD1342543DE82EF95") == 1
    exec(source.replace("0xD1342543DE82EF95", factor), names)
    tokens = np.concatenate([zipf_text(np.random.default_rng(6), 20_000, 8192),
                             np.random.default_rng(7).integers(0, 2, 20_000).astype(np.uint16)])
    for order in (2, 5, ORDER):
        assert np.array_equal(names["ngram_hints"](tokens, order), expected(tokens, order))


@settings(deadline=None, max_examples=100)
@given(cases(), st.data())
def test_a_target_changes_no_hint_at_it_or_before(case, data):
    tokens, order = case
    if len(tokens) < 2:
        return
    place = data.draw(st.integers(1, len(tokens) - 1))
    changed = tokens.copy()
    changed[place:] = data.draw(st.lists(st.integers(0, 9), min_size=len(tokens) - place, max_size=len(tokens) - place))
    assert np.array_equal(ngram_hints(tokens, order)[:, :place], ngram_hints(changed, order)[:, :place])
    assert np.array_equal(ngram_hints(tokens, order)[:, :place - 1], ngram_hints(tokens[:place], order))


def test_a_change_within_blocks_of_the_hash_changes_no_earlier_hint():
    tokens = zipf_text(np.random.default_rng(1), 3 * 2 ** 15, 8192)
    changed, hints = tokens.copy(), ngram_hints(tokens, 6)
    for place in (2 ** 15 - 1, 2 ** 15, 2 ** 16 + 4):
        changed[place] ^= 1
        other = ngram_hints(changed, 6)
        assert np.array_equal(hints[:, :place], other[:, :place]) and not np.array_equal(hints, other)
        changed[place] ^= 1


def test_the_first_of_equal_counts_stays_and_a_higher_one_takes_over():
    a, b, x = 5, 6, 9
    tokens = np.array([a, x, b, x, b, x, a, x, a, x, a], np.uint16)  # x is followed by b, b, a, a, a
    hints = ngram_hints(tokens, 2)[:, 1::2]  # targets behind x
    assert hints.T.tolist() == [[0, 0, 0], [b, 1, 1], [b, 2, 2], [b, 2, 3], [b, 2, 4]]
    assert ngram_hints(np.append(tokens, np.uint16([x, a])), 2)[:, -1].tolist() == [a, 3, 5]


def test_contexts_hold_bos_like_any_token():
    piece = [4, 5, BOS, 6]
    tokens = np.array([*piece, 7, *piece, 7, 4, 5, 6, 7], np.uint16)
    hints = ngram_hints(tokens, 5)
    assert hints[:, 8].tolist() == [7, 1, 1]  # behind 4 5 BOS 6
    assert hints[2, -1] == 0  # and not behind 7 4 5 6


@pytest.mark.parametrize("length", [0, 1, 2, ORDER - 1, ORDER, ORDER + 1])
def test_short_texts(length):
    """The first context with a target before it has ORDER tokens before its own target."""
    hints = ngram_hints(np.full(length, 3, np.uint16), ORDER)
    assert hints.shape == (3, max(length - 1, 0))
    assert hints[2].tolist() == [0] * min(hints.shape[1], ORDER - 1) + [1] * (length > ORDER)


def test_a_place_in_a_run():
    rows = np.array([[1, 2], [1, 2], [1, 3], [2, 3], [2, 3], [2, 3]])
    assert run_places(rows).tolist() == [0, 1, 0, 0, 1, 2]
    assert run_places(rows[:0]).tolist() == []


# --- tilt
@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2 ** 32 - 1), st.integers(1, 50), st.integers(0, 50), st.floats(0.1, 30))
def test_tilted_probabilities_are_the_mixture_and_sum_to_1(seed, best, misses, sharpness):
    """For every token of the vocabulary as the target."""
    random, vocab_size = np.random.default_rng(seed), 40
    logits = sharpness * random.standard_normal(vocab_size)
    nats = -(logits - logits.max() - math.log(np.exp(logits - logits.max()).sum()))
    hint, seen = int(random.integers(vocab_size)), best + misses
    hints = np.array([[hint], [best], [seen]], np.int32).repeat(vocab_size, 1)
    p = np.exp(-tilt(nats, hints, np.arange(vocab_size)))
    assert p.sum() == pytest.approx(1, abs=1e-12)
    assert p == pytest.approx((1 - best / (seen + 2)) * np.exp(-nats) + best / (seen + 2) * np.eye(vocab_size)[hint])


def test_without_a_hint_nothing_changes():
    nats = np.abs(np.random.default_rng(0).standard_normal(100)) * 20
    targets = np.arange(100) % 3  # some are token 0, which is what no hint looks like
    assert np.array_equal(tilt(nats, np.zeros((3, 100), np.int32), targets), nats)


def test_what_a_hint_can_cost_and_gain():
    """A miss costs -ln(1 - w), no matter how sure the model is; a sure hint is worth any surprise."""
    hints = np.array([[4, 4, 4], [1, 1, 98], [1, 1, 98]], np.int32)
    nats = np.array([0.0, 700.0, 700.0])
    assert tilt(nats, hints, np.array([5, 4, 4])) == pytest.approx([math.log(1.5), math.log(3), math.log(100 / 98)])
    assert tilt(nats, hints, np.array([4, 4, 4]))[0] == 0


def test_tilt_of_a_text_gains_where_it_repeats_itself():
    """A uniform model of text with copies: less nats in all, none changed where no hint is."""
    tokens = zipf_text(np.random.default_rng(2), 20_000, 8192)
    hints, nats = ngram_hints(tokens, ORDER), np.full(len(tokens) - 1, math.log(8192))
    tilted = tilt(nats, hints, tokens[1:])
    assert np.array_equal(tilted != nats, hints[2] > 0) and tilted.sum() < 0.9 * nats.sum()


def test_the_published_tilt_sums_to_1_and_has_a_gate():
    """The twin that bench/tilt.py compares with."""
    p = np.random.default_rng(3).dirichlet(np.ones(20))
    tilted = [math.exp(-reference.boosted_nats(-math.log(x), -math.log(p[7]), i == 7, 4, 5)) for i, x in enumerate(p)]
    assert sum(tilted) == pytest.approx(1) and tilted[7] > p[7]
    assert reference.boosted_nats(1.5, 0.5, True, 3, 4) == reference.boosted_nats(1.5, 0.5, True, 0, 0) == 1.5


# --- bench/tilt.py
def test_forms_of_the_bench():
    """The published one is the reference's; all are the identity or sum to 1 as they should."""
    random = np.random.default_rng(4)
    p = random.dirichlet(np.ones(30))
    for best, seen in ((1, 1), (4, 5), (3, 4), (1, 9)):
        hints = np.array([[7], [best], [seen]], np.int32).repeat(30, 1)
        tilted = bench.forms(-np.log(p), np.full(30, -math.log(p[7])), hints, np.arange(30))
        assert all(np.exp(-nats).sum() == pytest.approx(1) for nats in tilted.values())
        published = [reference.boosted_nats(-math.log(x), -math.log(p[7]), i == 7, best, seen) for i, x in enumerate(p)]
        assert tilted["published: boost e^2.625"] == pytest.approx(published)
        assert (tilted["boost, seen twice"] == -np.log(p)).all() == (seen == 1 or best < 0.8 * seen)


def test_bench_scores_hints_as_the_evaluation_scores_targets(tmp_path, capsys):
    """Where windows are scored, each target's nats are those of the whole document; hints are scored in their place."""
    config = tiny_config(eval_seq_len=64)
    model = GPT(config, torch.float32)
    model.init_weights(0)
    randomize(model, 0)
    random = np.random.default_rng(5)
    text = random.integers(2, 64, 25)
    tokens = np.concatenate([np.append(BOS, text), np.append(BOS, text)]).astype(np.uint16)
    hints = ngram_hints(tokens, 5)
    nats, hint_nats = bench.score_hints(model, True, tokens, hints, 16, 64)
    assert np.isnan(nats[:25]).all() and not np.isnan(nats[26:]).any()
    segments = make_segments(np.array([0, 26]), 51, 64, 0)
    expected_nats = model(*make_batch(tokens[:-1], tokens[1:], segments)).detach().double().numpy()
    assert nats[26:] == pytest.approx(expected_nats[26:], abs=1e-4)
    assert hint_nats[30:] == pytest.approx(nats[30:], abs=1e-6)  # the hints are right there
    write_shard(tmp_path / "a.bin", tokens)
    assert bench.main([str(tmp_path / "a.bin"), "--orders", "5,16"]) == 0
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[3].split("|")]
    assert cells[1] == "5" and cells[4] == str((hints[2] > 0).sum())
    assert bench.main([str(tmp_path / "b.bin")]) == 2
    assert "b.bin" in capsys.readouterr().err


# --- the whole program
@pytest.mark.parametrize("mode", ["packed", "sliding", "adapted"])
def test_the_program_tilts_the_scores_of_each_way_to_score(tmp_path, mode):
    data = program.write_data(tmp_path / "data")
    done = program.run(program.settings(data, tmp_path / "logs", EVAL_MODE=mode, NGRAM_ORDER=3, AUDIT=1,
                                        TTT_LORA_RANK=2, TTT_BATCH_SIZE=4))
    assert (done.returncode, done.stderr) == (0, "")
    result = program.result_of(done.stdout)
    assert list(result["stages"]) == ["raw", "averaged", "quantized", mode, "tilted"]
    assert result["official_stage"] == "tilted" and result["val_loss"] != result["stages"][mode]["val_loss"]
    assert result["stages"]["tilted"]["tokens"] == result["audit"]["targets"]
    assert result["legal"] and result["audit"]["causal"] and result["audit"]["change_before_nats"] == 0


def test_a_ledger_tilts_what_this_rank_scored():
    tokens = np.array([BOS, 5, 6, 7, 5, 6, 7, 5, 6, 7], np.uint16)
    ledger = train_gpt.Ledger(train_gpt.Dataset(None, tokens, np.ones(9, np.int64), "", "", 0, 0))
    ledger.add(np.array([4, 5, 6]), np.array([1.0, 2.0, 3.0]))
    ledger.tilt(3)
    assert ledger.nats[[0, 1, 2, 3, 7, 8]].tolist() == [0] * 6
    assert np.allclose(ledger.nats[4:7], tilt(np.array([1.0, 2.0, 3.0]), ngram_hints(tokens, 3)[:, 4:7], tokens[5:8]))
    assert ledger.nats[5] < 2.0
