"""bench/packers.py and bench/pcll.py: lossless, optimal, canonical; damaged data is refused."""
# pyright: reportMissingImports=false
import itertools
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import program
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import UserError

sys.path.insert(0, str(program.ROOT / "bench"))
import packers
import pcll
from packers import PUBLISHED_CODECS, canonical_codes, code_lengths

HERE = [name for name in PUBLISHED_CODECS if name != "lrzip" or shutil.which("lrzip")]
HARD = [b"", b"\0", b"\xff" * 100_000, bytes(range(256)) * 70, b"\1\0" * 9000, bytes([0] * 8191 + [1]), b"ab" * 4096]


@pytest.mark.parametrize("codec", HERE)
@settings(deadline=None, max_examples=15)
@given(st.one_of(st.binary(max_size=300), st.sampled_from(HARD)), st.sampled_from([None, *train_gpt.CODECS]))
def test_codecs_and_pipelines_are_lossless(codec, data, then):
    packed = PUBLISHED_CODECS[codec].encode(data)
    if then:
        packed = train_gpt.CODECS[then].decode(train_gpt.CODECS[then].encode(packed))
    assert PUBLISHED_CODECS[codec].decode(packed) == data and (data or not packed)


def test_huffman_of_many_blocks_is_near_the_entropy():
    codes = np.clip(np.random.default_rng(0).normal(0, 2.2, 1_200_000).round(), -127, 127).astype(np.int8)
    share = np.unique(codes, return_counts=True)[1] / codes.size
    entropy = -(share * np.log2(share)).sum() * codes.size / 8
    packed = packers.huffman_encode(codes.tobytes())
    assert entropy < len(packed) < 1.02 * entropy and packers.huffman_decode(packed) == codes.tobytes()


# --- the code
@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=40), st.integers(6, 15))
def test_code_lengths_are_those_of_a_full_code(counts, longest):
    lengths = code_lengths(np.array(counts), longest)
    used = np.flatnonzero(counts)
    assert set(np.flatnonzero(lengths)) == set(used) and lengths.max(initial=0) <= longest
    if len(used) > 1:
        assert sum(2.0 ** -int(n) for n in lengths[used]) == 1
        assert all(lengths[a] >= lengths[b] for a, b in itertools.permutations(used, 2) if counts[a] < counts[b])


@pytest.mark.parametrize("longest", [3, 4])
def test_code_lengths_are_the_best_of_all(longest):
    """Against every choice of lengths that leaves room for a prefix code."""
    for seed in range(20):
        counts = [random.Random(seed * 10 + i).choice([1, 2, 5, 40, 300]) for i in range(5)]
        best = min(sum(c * n for c, n in zip(counts, lengths))
                   for lengths in itertools.product(range(1, longest + 1), repeat=5)
                   if sum(2.0 ** -n for n in lengths) <= 1)
        assert int((code_lengths(np.array(counts), longest) * counts).sum()) == best
    assert code_lengths(np.array([2 ** i for i in range(12)]), longest + 1).max() == longest + 1
    with pytest.raises(ValueError, match="no code of at most 3 bits"):
        code_lengths(np.ones(9), 3)


def test_codes_are_canonical_and_no_code_begins_another():
    lengths = code_lengths(np.array([1, 0, 9, 4, 4, 30, 2]))
    texts = {i: format(code, f"0{n}b") for i, (code, n) in enumerate(zip(canonical_codes(lengths), lengths)) if n}
    assert sorted(texts, key=lambda i: (len(texts[i]), i)) == sorted(texts, key=lambda i: texts[i])
    assert not any(a != b and b.startswith(a) for a in texts.values() for b in texts.values())


@pytest.mark.parametrize("codec", ["huffman", "radix"])
def test_damaged_data_is_refused(codec):
    data = bytes([0, 1, 1, 2] * 3000) + bytes([3, 9])
    packed = PUBLISHED_CODECS[codec].encode(data)
    for damaged in (packed[:5], packed[:9], packed[:-1], packed + b"\0", packed[:12]):
        with pytest.raises(UserError, match=codec):
            PUBLISHED_CODECS[codec].decode(damaged)
    flips = 0
    for place in range(10, 20):  # lengths, or the alphabet: refused, or at least other data, and never an endless loop
        changed = packed[:place] + bytes([packed[place] ^ 4]) + packed[place + 1:]
        try:
            flips += PUBLISHED_CODECS[codec].decode(changed) != data
        except UserError:
            flips += 1
    assert flips == 10


# --- lrzip
def test_lrzip_is_asked_for_by_name(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="lrzip: no such program; install it"):
        PUBLISHED_CODECS["lrzip"].encode(b"data")
    monkeypatch.setattr(train_gpt, "CODECS", dict(train_gpt.CODECS))
    monkeypatch.setattr(train_gpt, "SIDE_CODECS", dict(train_gpt.SIDE_CODECS))
    monkeypatch.setattr(train_gpt, "CHOICES", dict(train_gpt.CHOICES))
    packers.register()
    assert "huffman" in train_gpt.CODECS and "lrzip" not in train_gpt.CODECS
    assert train_gpt.Config(compressor="huffman").compressor == "huffman"


def test_rows_are_sorted_by_likeness_and_come_back():
    codes = np.random.default_rng(0).integers(-3, 4, (20, 6)).astype(np.int8)
    order, turned = packers.sort_rows(codes)
    left, place = set(range(1, 20)), 0
    for i in order[1:].tolist():  # by hand
        distance = {j: sum(abs(int(a) - int(b)) for a, b in zip(codes[place], codes[j])) for j in left}
        assert distance[i] == min(distance.values())
        left, place = left - {i}, i
    assert turned.shape == (6, 20) and np.array_equal(packers.unsort_rows(order, turned), codes)
    for shape in ((1, 4), (0, 4)):
        small = np.zeros(shape, np.int8)
        assert np.array_equal(packers.unsort_rows(*packers.sort_rows(small)), small)


# --- PCLL
def test_pcll_round_trip():
    generator = np.random.default_rng(0)
    tensors = {"blocks.0.mlp.fc.weight": generator.normal(size=(300, 300)).astype(np.float32),
               "blocks.0.attn.c_q.weight": generator.normal(size=(300, 300)).astype(np.float32),
               "tok_emb.weight": generator.normal(size=(400, 200)).astype(np.float32),
               "blocks.0.attn_scale": generator.normal(size=70_000).astype(np.float32),
               "small": generator.normal(size=(4, 4)).astype(np.float32)}
    data = pcll.write_pcll(tensors, frozenset({"small"}))
    found, entries = pcll.read_pcll(data), pcll.read_header(data)[0]
    assert list(found) == list(tensors) and all(found[name].shape == x.shape for name, x in tensors.items())
    assert np.array_equal(found["small"], tensors["small"]) and found["small"].dtype == np.float32
    assert np.array_equal(found["blocks.0.attn_scale"], tensors["blocks.0.attn_scale"].astype(np.float16))
    for name, levels in (("blocks.0.mlp.fc.weight", 48), ("blocks.0.attn.c_q.weight", 80), ("tok_emb.weight", 64)):
        assert entries[name]["n_levels"] == levels and len(np.unique(found[name])) <= levels
        values, centers = tensors[name].ravel(), np.unique(found[name])
        nearest = centers[np.abs(values[:, None] - centers).argmin(1)]
        assert np.abs(nearest - found[name].ravel()).max() < 0.02 and (found[name] - tensors[name]).std() < 0.1


CODE = {"0": "01", "1": "1"}


def by_hand(key="method", codes: Sequence[str] = "101", code=CODE, book: Sequence[float] = (-2.0, 0.5), **changes) \
        -> bytes:
    """One tensor, of as many values as there are codes: 1 0 1 as bits 1 01 1 of {0: 01, 1: 1}."""
    text, bits = json.dumps(code).encode(), "".join(code[i] for i in codes)
    data = bytes(int(bits[i:i + 8].ljust(8, "0"), 2) for i in range(0, len(bits), 8))
    payload = data + np.array(book, np.float16).tobytes() + text
    entry = {key: "codebook_huffman", "offset": 0, "data_len": len(data), "cb_len": 2 * len(book), "ht_len": len(text),
             "n_bits": len(bits), "n_levels": len(book), "shape": [len(codes)], "numel": len(codes),
             "dtype": "float32", "total_len": len(payload)} | changes
    header = json.dumps({"version": changes.pop("version", 1), "tensors": {"a": entry}}).encode()
    return zstandard.compress(b"PCLL" + len(header).to_bytes(4, "little") + header + payload)


@pytest.mark.parametrize("key", ["method", "type"])  # as published; as an older writer of ours
def test_pcll_reads_a_file_made_by_hand(key):
    assert pcll.read_pcll(by_hand(key))["a"].tolist() == [0.5, -2.0, 0.5]


def test_pcll_reads_what_is_published_for_one_center():
    """An index -999 that no value has."""
    code = {"1": "0", "-999": "1"}
    assert pcll.read_pcll(by_hand(codes="1111", code=code))["a"].tolist() == [0.5] * 4
    with pytest.raises(UserError, match="a: its bits say index -999, which has no center"):
        pcll.read_pcll(by_hand(codes=["1", "-999"], code=code))


@pytest.mark.parametrize("longest", [16, 17, 20, 24])
def test_pcll_reads_long_codes(longest):
    """A code of each length: i zeros and a one, and only zeros."""
    code = {str(i): "0" * i + "1" for i in range(longest)} | {str(longest): "0" * longest}
    order = [*range(longest + 1), longest, longest, 0, longest - 1, *reversed(range(longest + 1))]
    found = pcll.read_pcll(by_hand(codes=[str(i) for i in order], code=code, book=range(longest + 1)))
    assert found["a"].tolist() == order


def test_pcll_writes_long_codes():
    """Fibonacci's numbers as counts make Huffman's longest code."""
    counts = [1, 1]
    while len(counts) < 21:
        counts.append(counts[-1] + counts[-2])
    codes = np.random.default_rng(0).permutation(np.repeat(np.arange(21), counts))
    data, bits, texts = pcll.huffman_bits(codes, 21)
    assert max(map(len, texts.values())) == 20
    assert np.array_equal(pcll.read_bits(data, len(codes), bits, texts), codes)


def test_pcll_entries_have_the_published_keys():
    rare = np.random.default_rng(0).standard_t(3, size=(300, 300)).astype(np.float32)
    data = zstandard.decompress(pcll.write_pcll({"mlp.fc": rare, "gain": rare[0]}))
    header = json.loads(data[8:8 + int.from_bytes(data[4:8], "little")])
    common = {"method", "offset", "shape", "dtype", "numel"}
    assert header["version"] == 1
    assert set(header["tensors"]["gain"]) == common | {"len"}
    assert set(header["tensors"]["mlp.fc"]) == common | {
        "data_len", "cb_len", "ht_len", "n_bits", "n_levels", "total_len"}
    assert [(entry["method"], entry["numel"]) for entry in header["tensors"].values()] == [
        ("codebook_huffman", 90_000), ("passthrough", 300)]


@pytest.mark.parametrize("data, complaint", [
    (b"no zstd", "no zstd data"), (zstandard.compress(b"PCLX" + bytes(8)), "begins with b'PCLX'"),
    (zstandard.compress(b"PCLL" + bytes(4)), "header is damaged"), (by_hand(version=2), "version 2"),
    (by_hand(n_bits=3), "end after"), (by_hand(n_bits=6), "2 bits are left"), (by_hand(shape=[5]), "end after"),
    (by_hand(total_len=999), "a is truncated"), (by_hand(data_len="x"), "entry is damaged"),
    (by_hand(ht_len=0, data_len=4), "damaged"), (by_hand(code={"0": "01", "1": "0"}), "code 0 begins another"),
    (by_hand(code={"0": "01", "1": ""}), "code is empty"), (by_hand(code={"0": "0", "1": "1" * 25}), "than 24 bits"),
    (by_hand(codes="1", code={"1": "0", "x": "1"}), "entry is damaged"), (by_hand(book=[1.0]), "entry is damaged")])
def test_pcll_refuses(data, complaint):
    with pytest.raises(UserError, match=complaint):
        pcll.read_pcll(data)


def test_pcll_lists_a_file(tmp_path):
    path = tmp_path / "model.pcll"
    path.write_bytes(by_hand())
    listed = subprocess.run([sys.executable, program.ROOT / "bench/pcll.py", path], capture_output=True, text=True,
                            check=True).stdout
    assert "codebook_huffman" in listed and "| a " in listed
    refused = subprocess.run([sys.executable, program.ROOT / "bench/pcll.py", tmp_path / "none"], check=False,
                             capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.startswith("error: ")
