"""bench/packers.py and bench/pcll.py: lossless, optimal, canonical; damaged data is refused."""
# pyright: reportMissingImports=false
import io
import itertools
import json
import random
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Sequence

import brotli
import numpy as np
import program
import pytest
import torch
import zstandard
from helpers import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import UserError

sys.path.insert(0, str(program.ROOT / "bench"))
import packers
import pcll
from packers import PUBLISHED_CODECS, canonical_codes, code_lengths

HERE = [*packers.present(PUBLISHED_CODECS)]
HARD = [b"", b"\0", b"\1\xff\0" * 333, b"\x80\0\x7f",
        b"\xff" * 100_000, bytes(range(256)) * 70, b"\1\0" * 9000, bytes([0] * 8191 + [1]), b"ab" * 4096]


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


@pytest.mark.parametrize("codec", ["huffman", "radix", "bitmask"])
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


# --- ternary
def test_bitmask_by_hand():
    """Nine codes: the mask 01101001 1, then the signs + - + - -, each from the highest bit on."""
    codes = np.array([0, 1, -1, 0, 1, 0, 0, -1, -1], np.int8)
    packed = packers.bitmask_encode(codes.tobytes())
    assert packed == (9).to_bytes(8, "little") + bytes([0, 0b01101001, 0b10000000, 0b01011000])
    assert packers.bitmask_decode(packed) == codes.tobytes()


def test_ternary_codes_take_the_bits_that_are_published():
    """A trit is a fifth of a byte; the mask takes a bit, and a sign one where it is not 0; the entropy is less."""
    codes = np.random.default_rng(0).choice([-1, 0, 1], 100_000, p=[0.3, 0.4, 0.3]).astype(np.int8)
    bits = {name: 8 * len(packers.PUBLISHED_CODECS[name].encode(codes.tobytes())) / codes.size
            for name in ("radix", "bitmask", "radix_lzma", "bitmask_lzma")}
    entropy = -sum(p * np.log2(p) for p in (0.3, 0.4, 0.3))
    assert bits["radix"] == pytest.approx(1.6, abs=2e-3) and bits["bitmask"] == pytest.approx(1.6, abs=5e-3)
    assert entropy < 8 * len(train_gpt.CODECS["rans"].encode(codes.tobytes())) / codes.size < min(bits.values())


# --- lrzip
def test_lrzip_is_left_out_where_it_is_missing_and_refused_where_it_was_asked_for(registries, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="lrzip: no such program; install it"):
        PUBLISHED_CODECS["lrzip"].encode(b"data")
    for asked in (["lrzip"], ["rans", "pergroup"]):
        with pytest.raises(UserError, match="lrzip: no such program; install it"):
            packers.register(asked)
    assert "huffman" not in train_gpt.CODECS
    packers.register(["rans", "huffman", "*"])
    assert "huffman" in train_gpt.CODECS and "lrzip" not in train_gpt.CODECS
    assert [*packers.present(packers.PER_GROUP)] == ["pergroup_lzma"]
    assert "huffman" in train_gpt.CHOICES["compressor"] and "lrzip" not in train_gpt.CHOICES["compressor"]


def test_lrzip_where_it_is(registries, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/lrzip")
    packers.register(["lrzip"])
    assert "lrzip" in train_gpt.CODECS and [*packers.present(packers.PER_GROUP)] == ["pergroup", "pergroup_lzma"]


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


# --- pergroup
def matrices(layers: int = 11) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors as R0427 names them: int8 matrices, scales, a correction, what is kept as it is."""
    random, tensors, tags = np.random.default_rng(0), {}, {}
    shapes = {"attn.c_q": (12, 10), "attn.c_k": (6, 10), "attn.c_v": (6, 10), "attn.proj": (10, 12), "mlp.fc": (20, 10),
              "mlp.proj": (10, 20)}
    blocks = {f"blocks.{i}.{part}": shape for part, shape in shapes.items() for i in range(layers)}
    for name, shape in {"tok_emb": (40, 10), **blocks}.items():
        tensors[f"{name}.weight.q"] = torch.from_numpy(random.integers(-31, 32, shape).astype(np.int8))
        tensors[f"{name}.weight.scale"] = torch.from_numpy(random.random(shape[0]).astype(np.float16))
        tags[f"{name}.weight"] = "gptq (int6)"
    tensors["tok_emb.weight.lqA_a"] = torch.ones(40, 4, dtype=torch.int8)  # int8, but of no group
    tensors["smear"], tags["smear"] = torch.ones(10, dtype=torch.float16), "passthrough"
    return tensors, tags


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("codec", ["zlib", "lzma", "brotli", "zstd"])
@pytest.mark.parametrize("layers", [0, 1, 11])
def test_pergroup_is_lossless(codec, layers):
    tensors, tags = matrices(layers)
    pair = packers.per_group(train_gpt.CODECS[codec])
    found, names = pair.decode(pair.encode(tensors, tags))
    assert equal(found, tensors) and names == tags
    some = {name: x for name, x in tensors.items() if not re.search(r"tok_emb|mlp\.fc|blocks\.[03]\.", name)}
    found, names = pair.decode(pair.encode(some, tags := {name: "" for name in tags if f"{name}.q" in some}))
    assert equal(found, some) and names == tags  # groups that are empty, layers that are missing


def test_pergroup_has_the_published_layout():
    tensors, tags = matrices()
    data = packers.pergroup_encode(bytes, tensors, tags)
    assert data[:8] == b"PGRP" + bytes([9, 0, 0, 0])
    lengths = np.frombuffer(data, "<u4", 9, 8).tolist()
    streams = [data[44 + sum(lengths[:i]):44 + sum(lengths[:i + 1])] for i in range(9)]
    assert lengths[:7] == [400, 660, 1320, 660, 1320, 2200, 2200] and sum(lengths) + 44 == len(data)
    rest = torch.load(io.BytesIO(brotli.decompress(streams[7])), weights_only=True)
    assert rest.keys() == {"r", "m", "s"} and rest["m"] == tags and len(rest["r"]) == len(tensors) - 67
    assert rest["s"]["mlp.proj.weight.q"] == [[10, 20]] * 11 and rest["s"]["tok_emb.weight.q"] == [[40, 10]]
    orders = np.frombuffer(brotli.decompress(streams[8]), "<u2")
    assert len(orders) == 40 + 11 * 12 + 11 * 20  # of embedding, queries and the MLP's first matrices, by layer
    tenth = tensors["blocks.10.attn.proj.weight.q"].numpy()
    assert streams[4][-120:] == tenth.T.tobytes()  # after the ninth, not after the first
    order = orders[40 + 24:40 + 36]
    assert streams[2][240:360] == tensors["blocks.2.attn.c_q.weight.q"].numpy()[order].T.tobytes() and order[0] == 0


def test_pergroup_refuses():
    data, plain = packers.pergroup_encode(zlib.compress, *matrices(1)), packers.per_group(train_gpt.CODECS["zlib"])
    broken = data[:50] + b"\xff" * 9 + data[59:]
    for damaged, complaint in ((b"PGRX" + data[4:], "begins with b'PGRX"), (data[:20], "begins with"),
                               (data[:-1], "file is damaged"), (broken, "cannot be decoded"),
                               (data[:-300] + bytes(300), "cannot be decoded")):
        with pytest.raises(UserError, match=complaint):
            plain.decode(damaged)


def test_pergroup_takes_what_the_program_quantizes():
    """Banks are cut into layers with the published names, also where layers have quantizers of their own."""
    config = tiny_config(quant_overrides="up_proj:1=rtn,k_proj:-1=fp16", matrix_quantizer="rtn")
    shapes = train_gpt.param_shapes(config)
    weights = {name: torch.randn(shape, generator=torch.Generator().manual_seed(0)) for name, shape in shapes.items()}
    quantized = train_gpt.quantize(config, weights)
    tensors, tags = packers.published_names(quantized, shapes)
    for name, bank, layer in (("mlp.fc", "up_proj", 2), ("attn.c_q", "q_proj", 3), ("attn.proj", "out_proj", 0)):
        codes = np.concatenate([arrays["codes"] for piece, (_, arrays) in quantized.items()
                                if piece.partition(":")[0] == bank])
        rows = shapes[bank][1]
        assert np.array_equal(tensors[f"blocks.{layer}.{name}.weight.q"], codes[rows * layer:rows * (layer + 1)])
    assert "blocks.3.attn.c_k.weight.q" not in tensors and "k_proj:3.values" in tensors
    pair = packers.PER_GROUP["pergroup_lzma"]
    found, names = pair.decode(pair.encode(tensors, tags))
    assert equal(found, tensors) and names == tags
    total = sum(array.size for _, arrays in quantized.values() for array in arrays.values())
    assert sum(x.numel() for x in tensors.values()) == total


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
