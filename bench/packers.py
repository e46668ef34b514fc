"""Published ways to pack bytes, to be compared with the program's range coder (bench/compression.py --published).

PUBLISHED_CODECS holds pairs like those of train_gpt.CODECS, bytes -> bytes. PER_GROUP holds R0427's container of
matrices (COMPRESSOR=pergroup), ({name: tensor}, {name: tag}) -> bytes -> the same, by any compressor of bytes. What
calls lrzip is there only where its binary is; register() refuses it at once where that is missing and lrzip was asked
for by name.
"""
import functools
import heapq
import io
import lzma
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import brotli
import numpy as np
import torch
from torch import Tensor

import train_gpt
from train_gpt import Arrays, Pair, UserError

LONGEST = 15  # bits of a code
BLOCK = 8192  # symbols that start at a byte of their own, so that many blocks can be decoded side by side


# --- Huffman
def code_lengths(counts: np.ndarray, longest: int = LONGEST) -> np.ndarray:
    """counts (n,) -> (n,) lengths of the best prefix code with at most `longest` bits; 0 for what does not occur.

    Package-merge (Larmore and Hirschberg 1990). A single symbol gets one bit. ValueError for more than 2^longest.
    """
    used = [(int(counts[i]), (i,)) for i in np.flatnonzero(counts).tolist()]
    lengths = np.zeros(len(counts), np.int64)
    if len(used) > 1 << longest:
        raise ValueError(f"{len(used)} symbols have no code of at most {longest} bits")
    if len(used) < 2:
        lengths[[i for _, (i,) in used]] = 1
        return lengths
    used.sort()
    packages: list[tuple[int, tuple[int, ...]]] = []
    for _ in range(longest):
        merged = list(heapq.merge(used, packages, key=lambda item: item[0]))
        packages = [(a + b, x + y) for (a, x), (b, y) in zip(merged[::2], merged[1::2])]
    for _, symbols in packages[:len(used) - 1]:
        for symbol in symbols:
            lengths[symbol] += 1
    return lengths


def canonical_codes(lengths: np.ndarray) -> np.ndarray:
    """lengths (n,) -> (n,) codes: shorter ones first, then by symbol, each the one before plus 1."""
    codes, code, last = np.zeros(len(lengths), np.int64), 0, 0
    for symbol in sorted(np.flatnonzero(lengths), key=lambda i: (lengths[i], i)):
        code = code << int(lengths[symbol]) - last
        codes[symbol], last = code, int(lengths[symbol])
        code += 1
    return codes


def decoding_table(lengths: np.ndarray, longest: int = LONGEST) -> tuple[np.ndarray, np.ndarray]:
    """-> symbol and length of the code at the head of each word of `longest` bits. UserError if they are no code."""
    kraft = sum(1 << longest - int(n) for n in lengths if n)
    single = np.count_nonzero(lengths) == 1
    if (lengths > longest).any() or kraft != (1 << longest) >> single or (single and lengths.max() != 1):
        raise UserError("huffman: the code lengths are those of no code; the data is damaged")
    order = sorted(np.flatnonzero(lengths), key=lambda i: (lengths[i], i))
    times = [1 << longest - int(lengths[i]) for i in order]
    symbol = np.repeat(np.array(order, np.uint8), times)
    length = np.repeat(lengths[order], times)
    return np.resize(symbol, 1 << longest), np.resize(length, 1 << longest)


def huffman_encode(data: bytes) -> bytes:
    """Canonical Huffman code with at most 15 bits.

    Layout, little-endian: number of bytes uint64, first symbol and number of symbols - 1 uint8, their lengths uint8,
    bytes of each block of 8,192 symbols uint16, the blocks, most significant bit first.
    """
    if not data:
        return b""
    symbols = np.frombuffer(data, np.uint8)
    first, last = int(symbols.min()), int(symbols.max())
    lengths = code_lengths(np.bincount(symbols - first))
    codes = canonical_codes(lengths)
    sizes, payload = [], []
    for start in range(0, len(symbols), 128 * BLOCK):
        part = symbols[start:start + 128 * BLOCK] - first
        own = lengths[part]
        block = np.arange(len(part)) // BLOCK
        size = -(-np.bincount(block, own).astype(np.int64) // 8)
        ends = np.cumsum(own)
        before = np.concatenate(([0], ends[BLOCK - 1::BLOCK]))[block]  # bits of the part in front of the block
        begin = ends - own - before + 8 * (np.cumsum(size) - size)[block]
        within = np.arange(ends[-1]) - np.repeat(ends - own, own)
        bits = np.zeros(8 * int(size.sum()), np.uint8)
        bits[np.repeat(begin, own) + within] = np.repeat(codes[part], own) >> (np.repeat(own, own) - 1 - within) & 1
        sizes.append(size.astype("<u2"))
        payload.append(np.packbits(bits).tobytes())
    head = struct.pack("<QBB", len(data), first, last - first) + lengths.astype(np.uint8).tobytes()
    return b"".join([head, np.concatenate(sizes).tobytes(), *payload])


def huffman_decode(data: bytes) -> bytes:
    """The inverse of huffman_encode, all blocks at once, a symbol of each after the other. UserError for damage."""
    if not data:
        return b""
    try:
        count, first, number = struct.unpack("<QBB", data[:10])
        lengths = np.frombuffer(data, np.uint8, number + 1, 10).astype(np.int64)
        blocks = -(-count // BLOCK)
        sizes = np.frombuffer(data, "<u2", blocks, 11 + number).astype(np.int64)
    except (struct.error, ValueError):
        raise UserError("huffman: the data is truncated") from None
    start = 11 + number + 2 * blocks
    if not count or start + int(sizes.sum()) != len(data):
        raise UserError(f"huffman: {len(data)} bytes where {start + int(sizes.sum())} should be; the data is damaged")
    symbol, length = decoding_table(lengths)
    stream = np.frombuffer(data[start:] + bytes(4), np.uint8).astype(np.int64)
    words = stream[:-3] << 16 | stream[1:-2] << 8 | stream[2:-1]  # 24 bits from each byte on
    places, ends = 8 * (np.cumsum(sizes) - sizes), 8 * np.cumsum(sizes)
    result = np.empty((BLOCK, blocks), np.uint8)
    for i in range(min(BLOCK, count)):
        live = slice(None) if i < (count - 1) % BLOCK + 1 else slice(blocks - 1)  # the last block may be short
        place = np.minimum(places[live], 8 * len(words) - 8)
        head = words[place >> 3] >> 24 - LONGEST - (place & 7) & (1 << LONGEST) - 1
        result[i, live], places[live] = symbol[head], place + length[head]
    if (-(-places // 8) != ends // 8).any():
        raise UserError("huffman: a block does not end where it should; the data is damaged")
    return (result.T.reshape(-1)[:count] + np.uint8(first)).tobytes()


# --- digits
def radix_encode(data: bytes) -> bytes:
    """k distinct bytes as digits of base k, as many in a byte as fit: 8 bits, 5 trits (ternary record), one if k > 16.

    Layout: number of bytes uint64 little-endian, k - 1, the k bytes in order, the digits, the first one the lowest.
    """
    if not data:
        return b""
    alphabet, digits = np.unique(np.frombuffer(data, np.uint8), return_inverse=True)
    base = len(alphabet)
    fit = digits_in_byte(base)
    rows = np.resize(digits, -(-len(digits) // fit) * fit if base > 1 else 0).reshape(-1, fit)
    packed = (rows * base ** np.arange(fit)).sum(1).astype(np.uint8)
    return struct.pack("<QB", len(data), base - 1) + alphabet.tobytes() + packed.tobytes()


def radix_decode(data: bytes) -> bytes:
    """The inverse of radix_encode. UserError for damage."""
    if not data:
        return b""
    if len(data) < 9 or len(data) < 10 + data[8]:
        raise UserError("radix: the data is truncated")
    count, base = struct.unpack("<QB", data[:9])
    base, fit = base + 1, digits_in_byte(base + 1)
    alphabet, packed = (np.frombuffer(x, np.uint8) for x in (data[9:9 + base], data[9 + base:]))
    if len(packed) != (-(-count // fit) if base > 1 else 0) or (packed.size and int(packed.max()) >= base ** fit):
        raise UserError(f"radix: {len(packed)} bytes of digits for {count} bytes; the data is damaged")
    if base == 1:
        return alphabet.tobytes() * count
    digits = packed[:, None].astype(np.int64) // base ** np.arange(fit) % base
    return alphabet[digits.reshape(-1)[:count]].tobytes()


def digits_in_byte(base: int) -> int:
    """How many digits of this base a byte holds."""
    fit = 1
    while fit < 8 and base ** (fit + 1) <= 256:
        fit += 1
    return fit


# --- zeros and signs
def bitmask_encode(data: bytes) -> bytes:
    """A bit for each byte, whether it is not 0, and one for the sign of those (ternary record of 2026-03-24).

    Layout: number of bytes uint64 little-endian, 0, the mask, the signs (1 is minus), bits from the highest on. Where
    others than -1, 0 and 1 occur: 1, the mask, and what is not 0 as it is.
    """
    if not data:
        return b""
    codes = np.frombuffer(data, np.int8)
    rest = codes[codes != 0]
    wide = bool((np.abs(rest.astype(np.int16)) > 1).any())
    packed = rest.tobytes() if wide else np.packbits(rest < 0).tobytes()
    return struct.pack("<QB", len(data), wide) + np.packbits(codes != 0).tobytes() + packed


def bitmask_decode(data: bytes) -> bytes:
    """The inverse of bitmask_encode. UserError for damage."""
    if not data:
        return b""
    if len(data) < 9:
        raise UserError("bitmask: the data is truncated")
    count, wide = struct.unpack("<QB", data[:9])
    split = 9 + -(-count // 8)
    mask = np.unpackbits(np.frombuffer(data[9:split], np.uint8))[:count].astype(bool)
    used = int(mask.sum())
    if len(mask) != count or wide > 1 or len(data) != split + (used if wide else -(-used // 8)):
        raise UserError(f"bitmask: {len(data)} bytes do not hold {count}; the data is damaged")
    codes, packed = np.zeros(count, np.int8), np.frombuffer(data[split:], np.uint8)
    codes[mask] = packed.view(np.int8) if wide else 1 - 2 * np.unpackbits(packed)[:used].astype(np.int8)
    return codes.tobytes()


def then_lzma(codec: Pair) -> Pair:
    """Digits or masks are packed once more: the ternary record keeps the smaller of radix and bitmask after LZMA-9."""
    return Pair(lambda data: lzma.compress(codec.encode(data), preset=9) if data else b"",
                lambda data: codec.decode(lzma.decompress(data)) if data else b"")


# --- lrzip
def check_lrzip() -> None:
    """UserError where the binary is missing."""
    if not shutil.which("lrzip"):
        raise UserError("lrzip: no such program; install it (apt install lrzip), or leave this codec out")


def call_lrzip(data: bytes, *options: str) -> bytes:
    """lrzip on a temporary file. UserError where it is missing or fails."""
    check_lrzip()
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in.lrz"), Path(folder, "out")
        source.write_bytes(data)
        done = subprocess.run(["lrzip", *options, "-q", "-f", "-o", target, source], capture_output=True, check=False)
        if done.returncode:
            raise UserError(f"lrzip {' '.join(options)}: exit {done.returncode}, {done.stderr.decode()[-200:]}")
        return target.read_bytes()


def lrzip_encode(data: bytes) -> bytes:
    """ZPAQ, level 9; an empty stream stays empty."""
    return call_lrzip(data, "-z", "-L", "9") if data else b""


def lrzip_decode(data: bytes) -> bytes:
    """The inverse of lrzip_encode."""
    return call_lrzip(data, "-d") if data else b""


def sort_rows(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """codes (rows, columns) int8 -> (permutation (rows,), transposed sorted codes (columns, rows)).

    Each row is followed by the nearest one left, by the sum of absolute differences, from row 0 on (R0427).
    """
    wide = codes.astype(np.int16)
    left, order = np.arange(1, len(codes)), [0]
    while len(left):
        place = int(np.abs(wide[left] - wide[order[-1]]).sum(1, dtype=np.int64).argmin())
        order.append(int(left[place]))
        left = np.delete(left, place)
    permutation = np.array(order[:len(codes)], np.int64)
    return permutation, np.ascontiguousarray(codes[permutation].T)


def unsort_rows(permutation: np.ndarray, transposed: np.ndarray) -> np.ndarray:
    """The inverse of sort_rows."""
    codes = np.empty(transposed.T.shape, transposed.dtype)
    codes[permutation] = transposed.T
    return codes


# --- R0427's COMPRESSOR=pergroup
GROUPS = ("tok_emb.weight.q", "attn.c_k.weight.q", "attn.c_q.weight.q", "attn.c_v.weight.q", "attn.proj.weight.q",
          "mlp.fc.weight.q", "mlp.proj.weight.q")  # in the file's order
SORTED = {"tok_emb.weight.q", "attn.c_q.weight.q", "mlp.fc.weight.q"}  # whose rows are sorted by likeness
BANKS = {"q_proj": "attn.c_q", "k_proj": "attn.c_k", "v_proj": "attn.c_v", "out_proj": "attn.proj", "up_proj": "mlp.fc",
         "down_proj": "mlp.proj"}


def members(names: Iterable[str]) -> list[list[str]]:
    """Names of matrices -> those of each group, by layer: blocks.<layer>.<group>, and tok_emb by itself."""
    found: list[list[tuple[int, str]]] = [[] for _ in GROUPS]
    for name in names:
        block = re.match(r"blocks\.(\d+)\.", name)
        part = name[block.end():] if block else name
        if part in GROUPS and bool(block) == (part != GROUPS[0]):
            found[GROUPS.index(part)].append((int(block[1]) if block else 0, name))
    return [[name for _, name in sorted(group)] for group in found]


def pergroup_encode(compress: Callable[[bytes], bytes], tensors: Mapping[str, Tensor], tags: Mapping[str, str]) \
        -> bytes:
    """int8 matrices by kind, their rows sorted by likeness, transposed, each kind compressed (R0427, PR #1934).

    tensors: {name: on the CPU}; a matrix is called like its entry in `tags`, and ".q". Layout, little-endian: "PGRP",
    9, nine lengths uint32; a stream for each of GROUPS, empty where there is none; what else there is, as torch.save of
    {"r": tensors, "m": tags, "s": {group: shapes}} by brotli; the order of the rows of the SORTED, uint16, by brotli.
    """
    groups = members(name for name, x in tensors.items() if x.dtype == torch.int8 and x.ndim == 2)
    streams, orders, taken = [], [], {name for names in groups for name in names}
    assert taken <= {f"{name}.q" for name in tags}
    for part, names in zip(GROUPS, groups):
        streams.append(b"")
        for name in names:
            codes = tensors[name].numpy()
            if part in SORTED:
                order, turned = sort_rows(codes)
                orders.append(order.astype("<u2").tobytes())
            else:
                turned = codes.T
            streams[-1] += turned.tobytes()  # in C order
    rest = {"r": {name: x for name, x in tensors.items() if name not in taken}, "m": dict(tags),
            "s": {part: [list(tensors[name].shape) for name in names] for part, names in zip(GROUPS, groups)}}
    torch.save(rest, file := io.BytesIO())
    with ThreadPoolExecutor() as pool:
        packed = [*pool.map(lambda stream: compress(stream) if stream else b"", streams)]
    for data in (file.getvalue(), b"".join(orders)):
        packed.append(brotli.compress(data, quality=11, lgwin=24) if data else b"")
    return b"PGRP" + struct.pack(f"<{1 + len(packed)}I", len(packed), *map(len, packed)) + b"".join(packed)


def pergroup_decode(decompress: Callable[[bytes], bytes], data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The inverse of pergroup_encode -> tensors, tags. UserError for what is no such file."""
    count = len(GROUPS) + 2
    if data[:4] != b"PGRP" or data[4:8] != count.to_bytes(4, "little") or len(data) < 8 + 4 * count:
        raise UserError(f"pergroup: begins with {data[:8]!r}, not with b'PGRP' and {count}")
    file, lengths = io.BytesIO(data[8 + 4 * count:]), struct.unpack(f"<{count}I", data[8:8 + 4 * count])
    *streams, side, orders = [file.read(length) for length in lengths]
    if 8 + 4 * count + sum(lengths) != len(data):
        raise UserError(f"pergroup: {len(data)} bytes, its streams have {sum(lengths)}; the file is damaged")
    try:
        rest = torch.load(io.BytesIO(brotli.decompress(side)), weights_only=True)
        tensors, tags, shapes = rest["r"], rest["m"], rest["s"]
        with ThreadPoolExecutor() as pool:
            files = [*map(io.BytesIO, pool.map(lambda stream: decompress(stream) if stream else b"", streams))]
        permutations = io.BytesIO(brotli.decompress(orders) if orders else b"")
        groups = members(name for name in (f"{name}.q" for name in tags) if name not in tensors)
        for part, names, file in zip(GROUPS, groups, files):
            for name, (rows, columns) in zip(names, shapes[part], strict=True):
                turned = np.frombuffer(file.read(rows * columns), np.int8).reshape(columns, rows)
                codes = turned.T.copy()
                if part in SORTED:
                    codes = unsort_rows(np.frombuffer(permutations.read(2 * rows), "<u2"), turned)
                tensors[name] = torch.from_numpy(codes)
    except Exception as error:  # whatever decompressors and unpicklers can make of a broken file
        raise UserError(f"pergroup: cannot be decoded ({train_gpt.first_line(error):.120})") from None
    return tensors, tags


def published_names(quantized: Mapping[str, tuple[str, Arrays]], shapes: Mapping[str, Sequence[int]]) \
        -> tuple[dict[str, Tensor], dict[str, str]]:
    """What train_gpt.quantize made, shapes of the parameters -> tensors and tags for pergroup_encode.

    The matrices of a bank go under the published names of their layers; all else stays under its own.
    """
    tensors, tags = {}, {}
    for piece, (quantizer, arrays) in quantized.items():
        bank, _, first = piece.partition(":")
        for key, array in arrays.items():
            if key != "codes" or bank not in {*BANKS, "embedding"}:
                tensors[f"{piece}.{key}"] = torch.from_numpy(array)
                continue
            for i, part in enumerate(array.reshape(-1, shapes[bank][-2], array.shape[1])):
                name = f"blocks.{int(first or 0) + i}.{BANKS[bank]}.weight" if bank in BANKS else "tok_emb.weight"
                tensors[f"{name}.q"], tags[name] = torch.from_numpy(part), quantizer
    return tensors, tags


def per_group(codec: Pair) -> Pair:
    """(tensors, tags) -> bytes, bytes -> (tensors, tags), with this compressor of bytes."""
    return Pair(functools.partial(pergroup_encode, codec.encode), functools.partial(pergroup_decode, codec.decode))


LRZIP, RADIX, BITMASK = (Pair(lrzip_encode, lrzip_decode), Pair(radix_encode, radix_decode),
                         Pair(bitmask_encode, bitmask_decode))
PUBLISHED_CODECS: Mapping[str, Pair] = {
    "huffman": Pair(huffman_encode, huffman_decode), "radix": RADIX, "bitmask": BITMASK,
    "radix_lzma": then_lzma(RADIX), "bitmask_lzma": then_lzma(BITMASK), "lrzip": LRZIP}
PER_GROUP: Mapping[str, Pair] = {"pergroup": per_group(LRZIP), "pergroup_lzma": per_group(train_gpt.CODECS["lzma"])}
NEED_LRZIP = {"lrzip", "pergroup"}


def present(codecs: Mapping[str, Pair]) -> dict[str, Pair]:
    """Those that this machine can run."""
    return {name: codec for name, codec in codecs.items() if name not in NEED_LRZIP or shutil.which("lrzip")}


def register(asked: Collection[str] = ()) -> None:
    """Makes those that this machine has known to the program, as values of COMPRESSOR; brotli packs the float16s.

    UserError where one of those asked for by name needs lrzip and the binary is missing.
    """
    if NEED_LRZIP & {*asked}:
        check_lrzip()
    here = present(PUBLISHED_CODECS)
    train_gpt.CODECS.update(here)
    train_gpt.SIDE_CODECS.update(dict.fromkeys(here, "brotli"))
    train_gpt.CHOICES["compressor"] = tuple(dict.fromkeys((*train_gpt.CHOICES["compressor"], *here)))
