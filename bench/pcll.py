"""The file of PR #532: a codebook for each tensor, Huffman codes of the indices, zstd over all. Written and read.

    python bench/pcll.py FILE          lists its tensors

Layout: zstd-22 of "PCLL", header length uint32 little-endian, JSON header {"version": 1, "tensors": {name: entry}},
payloads in a row. An entry has method, offset, shape, numel and dtype, and for small tensors
    passthrough        len; the values, float32 if they control something, else float16
and for those of over 65,536 values
    codebook_huffman   data_len, cb_len, ht_len, n_bits, n_levels, total_len; Huffman bits (most significant first, the
                       last byte filled with 0), centers in float16, the code as JSON {"index": "bits"}
An older writer of this program said "type" for "method". The published writer gives a tensor of one center an index
-999 as well, which is never used: {"7": "0", "-999": "1"}. Its codes are as long as Huffman's algorithm makes them, 18
to 20 bits where centers begin evenly spaced. The published reader goes through the bits one by one, as text; here a
table answers for a whole code at once.
"""
import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from packers import canonical_codes, code_lengths
from quantizers import Histogram, first_levels, k_means
from run_log import table

from train_gpt import UserError

MAGIC = b"PCLL"
SMALL = 65_536  # values up to which a tensor is kept as it is
LONGEST = 24  # bits of a code; with 7 in front of it, what four bytes hold


def levels_of(name: str) -> int:
    """How many centers a tensor has, by its name in #532's model."""
    if "mlp." in name:
        return 48
    return 80 if any(part in name for part in ("c_q", "c_k", "c_v")) else 64


def huffman_bits(codes: np.ndarray, levels: int) -> tuple[bytes, int, dict[str, str]]:
    """codes (n,) -> (their bits, how many, {index: its bits as text})."""
    lengths = code_lengths(np.bincount(codes, minlength=levels), LONGEST)
    values = canonical_codes(lengths)
    texts = {str(i): format(values[i], f"0{lengths[i]}b") for i in np.flatnonzero(lengths).tolist()}
    own = lengths[codes]
    within = np.arange(own.sum()) - np.repeat(np.cumsum(own) - own, own)
    bits = np.repeat(values[codes], own) >> (np.repeat(own, own) - 1 - within) & 1
    return np.packbits(bits.astype(np.uint8)).tobytes(), int(own.sum()), texts


def write_pcll(tensors: Mapping[str, np.ndarray], control: frozenset[str] = frozenset()) -> bytes:
    """{name: float values} -> the file. Names in `control` stay float32 where they are small."""
    entries, payloads, offset = {}, [], 0
    for name, values in tensors.items():
        entry: dict[str, Any] = {"offset": offset, "shape": list(values.shape), "numel": values.size,
                                 "dtype": str(values.dtype)}
        if values.size <= SMALL or values.ndim < 2:
            payload = np.ascontiguousarray(values, np.float32 if name in control else np.float16)
            entry |= {"method": "passthrough", "len": payload.nbytes, "dtype": str(payload.dtype)}
            payload = payload.tobytes()
        else:
            levels = levels_of(name)
            flat = torch.from_numpy(np.ascontiguousarray(values, np.float32)).flatten()
            histogram = Histogram.of(flat)
            centers, bounds = k_means(histogram, first_levels(histogram, "linear", levels, 0.0), 20)
            codes = torch.bucketize(flat, torch.tensor(bounds, dtype=torch.float32)).numpy()
            data, bits, texts = huffman_bits(codes, levels)
            book, text = np.pad(centers, (0, levels - len(centers)), "edge").tobytes(), json.dumps(texts).encode()
            payload = data + book + text
            entry |= {"method": "codebook_huffman", "data_len": len(data), "cb_len": len(book), "ht_len": len(text),
                      "n_bits": bits, "n_levels": levels, "total_len": len(payload)}
        entries[name] = entry
        payloads.append(payload)
        offset += len(payload)
    header = json.dumps({"version": 1, "tensors": entries}).encode()
    return zstandard.compress(b"".join([MAGIC, len(header).to_bytes(4, "little"), header, *payloads]), 22)


def read_bits(data: bytes, count: int, bits: int, texts: Mapping[str, str]) -> np.ndarray:
    """The inverse of huffman_bits -> codes (count,). UserError where the bits are not `count` of these codes."""
    longest = max(map(len, texts.values()), default=0)
    if not 0 < longest <= LONGEST or any(not text or set(text) - {"0", "1"} for text in texts.values()):
        raise UserError(f"pcll: a code is empty, or longer than {LONGEST} bits")
    symbol, length = np.zeros(1 << longest, np.int32), np.zeros(1 << longest, np.uint8)
    for index, text in texts.items():
        first = int(text, 2) << longest - len(text)
        span = slice(first, first + (1 << longest - len(text)))
        if length[span].any():
            raise UserError(f"pcll: the code {text} begins another, or another begins it; the file is damaged")
        symbol[span], length[span] = int(index), len(text)
    stream, mask = np.frombuffer(data + bytes(5), np.uint8).astype(np.uint32), (1 << longest) - 1
    words = stream[:-4] << 24 | stream[1:-3] << 16 | stream[2:-2] << 8 | stream[3:-1]  # 32 bits from each byte on
    places, place = np.empty(count, np.int64), 0
    steps = np.stack([length[words >> 32 - longest - shift & mask] for shift in range(8)], 1).reshape(-1).tobytes()
    for i in range(count):
        places[i] = place
        if place >= bits or not steps[place]:
            raise UserError(f"pcll: the bits end after {i} of {count} codes; the file is damaged")
        place += steps[place]
    if place != bits:
        raise UserError(f"pcll: {bits - place} bits are left behind {count} codes; the file is damaged")
    return symbol[words[places >> 3] >> (32 - longest - (places & 7)).astype(np.uint32) & mask]


def read_header(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The file -> (its entries, its payloads). UserError for what is no such file."""
    try:
        data = zstandard.ZstdDecompressor().decompress(data)
    except zstandard.ZstdError as error:
        raise UserError(f"pcll: no zstd data ({error})") from None
    if data[:4] != MAGIC:
        raise UserError(f"pcll: begins with {data[:4]!r}, not with {MAGIC!r}")
    end = 8 + int.from_bytes(data[4:8], "little")
    try:
        header = json.loads(data[8:end])
        version = header["version"]
        entries = {name: {"method": entry.get("type"), **entry} for name, entry in header["tensors"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError("pcll: its header is damaged") from None
    if version != 1:
        raise UserError(f"pcll: version {version}, this reader knows 1")
    return entries, data[end:]


def read_pcll(data: bytes) -> dict[str, np.ndarray]:
    """The file -> {name: values}, float32 of codebooks. UserError for what is no such file."""
    entries, payloads = read_header(data)
    result = {}
    for name, entry in entries.items():
        try:
            whole = payloads[entry["offset"]:entry["offset"] + entry.get("total_len", entry.get("len", 0))]
            if len(whole) != entry.get("total_len", entry.get("len")):
                raise UserError(f"pcll: {name} is truncated")
            if entry["method"] == "passthrough":
                result[name] = np.frombuffer(whole, entry["dtype"]).reshape(entry["shape"]).copy()
                continue
            split = entry["data_len"], entry["data_len"] + entry["cb_len"]
            centers = np.frombuffer(whole[split[0]:split[1]], np.float16).astype(np.float32)
            codes = read_bits(whole[:split[0]], int(np.prod(entry["shape"])), entry["n_bits"],
                              json.loads(whole[split[1]:]))
            if codes.min(initial=0) < 0:
                raise UserError(f"pcll: {name}: its bits say index {codes.min()}, which has no center")
            result[name] = centers[codes].reshape(entry["shape"])
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"pcll: {name}: its entry is damaged ({error})") from None
    return result


def main(arguments: list[str] | None = None) -> int:
    """Command line -> exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    path = parser.parse_args(arguments).file
    try:
        entries, _ = read_header(path.read_bytes())
    except (UserError, OSError) as error:
        print(f"error: {path}: {error}", file=sys.stderr)
        return 2
    print(table(["tensor", "method", "shape", "levels", "bytes"], [
        [name, str(entry["method"]), "x".join(map(str, entry.get("shape", []))), str(entry.get("n_levels", "")),
         f"{entry.get('total_len', entry.get('len', 0)):,}"] for name, entry in entries.items()]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
