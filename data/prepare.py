"""Any text -> SentencePiece BPE tokenizer + token shards in the published format + manifest.json.

    sources -> scan (hash every document) -> split -> tokenizer -> encode, check decode(encode(x)) == x -> shards

    python data/prepare.py stdlib --name stdlib --vocab-size 1024 --val-docs 60
    python data/prepare.py docs.jsonl.zst --name mine --tokenizer some.model --val-first 50000
    python data/prepare.py docs_selected.jsonl --like fineweb --vocab-size 8192 --caseops

The same request gives the same bytes whatever --workers is, also when it was killed and started again. The texts are
read three times (scan, tokenizer sample, encode) and never held in memory: what grows with the corpus is 24 bytes a
document, and 60 while the split is made (FineWeb's 15 million: 0.9 GB). Layouts: data/README.md.
"""
import argparse
import array
import collections
import contextlib
import dataclasses
import errno
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import InvalidStateError, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import caseops
import numpy as np
import sentencepiece as spm
import zstandard

VERSION = 2  # of manifest.json and of everything below that decides the output bytes
MAGIC, HEADER_INTS, BOS_ID = 20240520, 256, 1  # shard header: magic, version 1, count, zeros (int32)
MAX_VOCAB_SIZE = 65_535  # token ids are stored as uint16
BYTE260 = "byte260"  # the tokenizer whose token is 4 + the byte, in the place of a model file
CASEOPS, PUBLISHED_CASEOPS = "caseops", "_lossless_caps_caseops_v1_reserved"  # in names: ours, and what it stands for
FINEWEB_VAL_DOCS = 50_000  # of docs_selected.jsonl, in all published data; 40,000 of them in training is issue 2127
MIN_VOCAB_SIZE = 4 + 256 + 2  # pad, bos, eos, unk; the bytes; space and newline
SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.zst")
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}
SPACE_MARK = "\u2581"  # what SentencePiece writes for a space: a text that holds the mark itself cannot round-trip
CHUNK_CHARS = 4_000  # the tokenizer trains on pieces of text of this length: pieces may cross spaces and line ends
BATCH_BYTES, BATCHES_AHEAD = 1 << 18, 4  # text per task of a worker; tasks in flight per worker
MAX_LOSSY_FRACTION = 0.01  # of the documents may fail the round trip of a tokenizer that was given
MAX_REPORTED = 20  # printed lines about single documents
TRAIN, VAL, DUPLICATE = 0, 1, 2  # side of a document


class InputError(ValueError):
    """A mistake of the user, told in one line: what, its value, the remedy."""


# ------------------------------------------------------------------------------------------------ files and progress
def write_atomic(path: Path, *parts: Any) -> None:
    """Writes the joined parts (bytes or buffers) to `path`: whole or not at all (temporary name, then rename)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    with open(temporary, "wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: object) -> None:
    write_atomic(path, json.dumps(value, indent=1).encode() + b"\n")


def file_sha256(path: Path) -> str | None:
    """Hex digest of a file's bytes; None where it is absent."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def make_bar(stage: str, total_bytes: int) -> Any:
    """tqdm's bar on a terminal; None elsewhere or without tqdm."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total_bytes, desc=stage, unit="B", unit_scale=True)


class Progress:
    """Progress of one stage over the bytes of the source files: a bar, or about ten plain lines."""

    def __init__(self, stage: str, total_bytes: int):
        self.stage, self.total_bytes, self.done_bytes, self.tenths = stage, max(total_bytes, 1), 0, 0
        self.bar = make_bar(stage, total_bytes)

    def reach(self, done_bytes: int) -> None:
        tenths = done_bytes * 10 // self.total_bytes
        if self.bar is not None:
            self.bar.update(done_bytes - self.done_bytes)
        elif tenths > self.tenths:
            print(f"{self.stage}: {tenths * 10} % of {self.total_bytes:,} bytes read", flush=True)
        self.done_bytes, self.tenths = done_bytes, tenths

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


# ------------------------------------------------------------------------------------------------ sources -> documents
@dataclasses.dataclass(frozen=True)
class Source:
    """One positional argument: a name for messages and the manifest, and its files in reading order."""

    name: str
    files: tuple[Path, ...]


def walk(root: Path, suffixes: tuple[str, ...]) -> tuple[Path, ...]:
    """The files below `root` with one of the suffixes, sorted by relative POSIX path."""
    def refuse(error: OSError) -> None:  # os.walk would skip the folder and say nothing
        raise error

    found = []
    for folder, names, files in os.walk(root, onerror=refuse):
        names[:] = [name for name in names if name not in SKIPPED_FOLDERS]
        found += [Path(folder, name) for name in files if name.endswith(suffixes)]
    return tuple(sorted(found, key=lambda path: path.relative_to(root).as_posix()))


def find_source(argument: str) -> Source:
    """`stdlib`, a folder or a file -> Source. InputError for what is missing, unsupported or unreadable."""
    path = Path(argument)
    try:
        if argument == "stdlib":
            source = Source("stdlib", walk(Path(sysconfig.get_path("stdlib")), (".py",)))
        elif path.is_dir():
            source = Source(path.resolve().name, walk(path, SUFFIXES))
        elif not path.exists():
            raise InputError(f"source {argument}: no such file or folder; give 'stdlib' or an existing path")
        elif not path.name.endswith(SUFFIXES):
            raise InputError(f"source {argument}: unsupported extension; use one of {' '.join(SUFFIXES)} or a folder")
        else:
            source = Source(path.name, (path,))
        for file in source.files:  # now, not in the middle of an hour's work
            if not file.is_file():
                raise InputError(f"{file}: neither a file nor a link to one; remove it from the source")
            if not os.access(file, os.R_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
    except OSError as error:
        raise InputError(f"source {argument}: {error.filename}: {error.strerror}; make it readable or take it out of "
                         "the source") from None
    return source


def parse_line(line: bytes, where: str, text_key: str) -> bytes | None:
    """One line of .jsonl -> the UTF-8 text under `text_key`; None where it is not valid UTF-8."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        return None
    except (ValueError, RecursionError) as error:
        problem = str(error).replace(" line 1", "")
        raise InputError(f"{where}: malformed JSON ({problem}); repair or remove this line") from None
    text = record.get(text_key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise InputError(f"{where}: no text under the key '{text_key}'; name the right one with --text-key")
    try:
        return text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return None


def zstd_lines(raw: io.RawIOBase) -> Iterator[bytes]:
    """The lines of all frames. ZstdError for a frame that ends early, which zstandard's own reader lets pass."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame, rest = None, b""
    while data := raw.read(1 << 18):
        while data:
            frame = frame or decompressor.decompressobj()
            *lines, rest = (rest + frame.decompress(data)).split(b"\n")
            yield from lines
            data, frame = frame.unused_data, None if frame.eof else frame
    if frame:
        raise zstandard.ZstdError("it ends within a frame")
    yield rest


def read_file(path: Path, text_key: str) -> Iterator[tuple[bytes | None, int]]:
    """Yields (UTF-8 text or None where it is not valid UTF-8, bytes of the file read so far) for each document."""
    with open(path, "rb", buffering=0) as raw:
        if not path.name.endswith((".jsonl", ".jsonl.zst")):
            text = raw.readall()
            try:
                text.decode()
            except UnicodeDecodeError:
                text = None
            yield text, raw.tell()
            return
        try:
            lines = zstd_lines(raw) if path.name.endswith(".zst") else io.BufferedReader(raw, 1 << 20)
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield parse_line(line, f"{path}: line {number}", text_key), raw.tell()
        except zstandard.ZstdError as error:
            raise InputError(f"{path}: not a whole zstd file ({error}); fetch or compress it again") from None


class Document(NamedTuple):
    number: int  # in reading order, over the documents that are neither empty nor dropped as not UTF-8
    source: int
    path: Path
    text: bytes
    counted: bool = False  # bytes per token are wanted


def read_documents(sources: list[Source], config: argparse.Namespace, stage: str,
                   dropped: collections.Counter[str] | None = None) -> Iterator[Document]:
    """Yields every document in order, with a progress bar; counts `empty` and `not_utf8` ones in `dropped`."""
    dropped = collections.Counter() if dropped is None else dropped
    files = [(number, path) for number, source in enumerate(sources) for path in source.files]
    progress = Progress(stage, sum(path.stat().st_size for _, path in files))
    index, before_bytes = 0, 0
    with contextlib.closing(progress):
        for number, path in files:
            for text, position in read_file(path, config.text_key):
                progress.reach(min(before_bytes + position, progress.total_bytes))
                if not text:
                    dropped["not_utf8" if text is None else "empty"] += 1
                    continue
                if index == config.max_docs:
                    return
                yield Document(index, number, path, text)
                index += 1
            before_bytes += path.stat().st_size
            progress.reach(min(before_bytes, progress.total_bytes))


# ------------------------------------------------------------------------------------------------ scan and split
@dataclasses.dataclass
class Scan:
    """What one pass over the documents leaves in memory: 24 bytes for each."""

    keys: np.ndarray  # (documents, 2) uint64: the first half of the document's key
    sizes: np.ndarray  # (documents,) int64, UTF-8 bytes
    sources: list[dict[str, Any]]  # for the manifest
    dropped: collections.Counter[str]


def document_key(text: bytes, seed: int) -> bytes:
    """32 bytes that order the documents at random, but equally wherever they stand; equal for equal texts."""
    return hashlib.sha256(f"{seed}:".encode() + hashlib.sha256(text).digest()).digest()


def key_words(key: bytes) -> tuple[int, int]:
    """The half of a document's key that is kept: numbers in its order. Among 2^32 documents two share one by 2^-64."""
    return int.from_bytes(key[:8], "big"), int.from_bytes(key[8:16], "big")


def scan(sources: list[Source], config: argparse.Namespace) -> Scan:
    """First pass. InputError where there is no document."""
    keys, sizes, dropped = array.array("Q"), array.array("q"), collections.Counter({"not_utf8": 0, "empty": 0})
    counts = [[0, 0] for _ in sources]
    hashes = [hashlib.sha256() for _ in sources]
    for document in read_documents(sources, config, "scan", dropped):
        key = document_key(document.text, config.seed)
        keys.extend(key_words(key))
        sizes.append(len(document.text))
        counts[document.source][0] += 1
        counts[document.source][1] += len(document.text)
        hashes[document.source].update(key)
    if not sizes:
        names = " ".join(config.sources)
        raise InputError(f"sources {names}: no documents ({dropped['empty']} empty, {dropped['not_utf8']} not UTF-8); "
                         f"give 'stdlib' or {' '.join(SUFFIXES)} files with text")
    rows = [{"name": source.name, "files": len(source.files), "documents": count, "bytes": size,
             "sha256_keys": h.hexdigest()}
            for source, (count, size), h in zip(sources, counts, hashes, strict=True)]
    return Scan(np.frombuffer(keys, np.uint64).reshape(-1, 2), np.frombuffer(sizes, np.int64), rows, dropped)


def read_again(sources: list[Source], config: argparse.Namespace, stage: str, scanned: Scan) -> Iterator[Document]:
    """The documents of the scan once more. InputError where they are others now: the split would not hold."""
    remedy = "changed while it was read; start again when nothing writes to it"
    number = -1
    for document in read_documents(sources, config, stage):
        number = document.number
        key = document_key(document.text, config.seed)
        if number >= len(scanned.sizes) or tuple(scanned.keys[number].tolist()) != key_words(key):
            raise InputError(f"{document.path}: {remedy}")
        yield document
    if number + 1 != len(scanned.sizes):
        raise InputError(f"{' '.join(config.sources)}: {remedy}")


def split(keys: np.ndarray, config: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Decides the side of every document.

    keys (documents, 2) -> sides (documents,) uint8 of TRAIN, VAL, DUPLICATE (an equal text is in val), and the first
    copy of every text in the order of the keys. --val-docs and --val-fraction take the texts with the smallest keys,
    one copy each; --val-first takes the first documents as they are. InputError where one side would be empty.
    """
    order = np.lexsort(keys.T[::-1])  # stable: equal texts stay in reading order
    is_first, ordered = np.ones(len(keys), bool), keys[order]
    is_first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    del ordered
    firsts = order[is_first]
    group = np.empty(len(keys), np.int64)  # rank of the document's text among the different texts
    group[order] = np.cumsum(is_first) - 1
    del order
    options = ((name, getattr(config, name)) for name in ("val_docs", "val_first", "val_fraction"))
    option, value = next(pair for pair in options if pair[1] is not None)
    count = max(1, math.floor(value * len(firsts) + 0.5)) if option == "val_fraction" else value
    chosen = np.arange(min(count, len(keys))) if option == "val_first" else firsts[:count]
    in_val = np.zeros(len(firsts), bool)
    in_val[group[chosen]] = True
    sides = np.where(in_val[group], np.uint8(DUPLICATE), np.uint8(TRAIN))
    sides[chosen] = VAL
    if count >= len(keys if option == "val_first" else firsts) or not (sides == TRAIN).any():
        raise InputError(f"--{option.replace('_', '-')} {value}: no training text is left of {len(keys)} documents "
                         f"({len(firsts)} different); give more documents, or take fewer for validation without --like")
    return sides, firsts


# ------------------------------------------------------------------------------------------------ tokenizer
def sample_texts(sources: list[Source], config: argparse.Namespace, scanned: Scan, sides: np.ndarray,
                 firsts: np.ndarray) -> list[str]:
    """Training documents for the tokenizer, at random by their keys: at most tokenizer_sample_bytes, at least one."""
    candidates = firsts[sides[firsts] == TRAIN]
    count = int(np.searchsorted(np.cumsum(scanned.sizes[candidates]), config.tokenizer_sample_bytes, "right"))
    wanted, texts = set(candidates[:max(count, 1)].tolist()), []
    for document in read_documents(sources, config, "tokenizer sample"):
        if document.number in wanted:
            texts.append(transform(document.text.decode(), config.caseops))
            if len(texts) == len(wanted):
                break
    return texts


def transform(text: str, mode: str | None) -> str:
    """What the tokenizer is given: the text, or its CaseOps form."""
    return caseops.encode(text, mode) if mode else text


def training_chunks(texts: Iterable[str]) -> Iterator[str]:
    """Cuts texts into chunks that the trainer takes whole: it skips long lines, NUL and its own two marks."""
    for text in texts:
        for part in re.split(f"[\0{SPACE_MARK}\u2585]+", text):
            yield from (part[i:i + CHUNK_CHARS] for i in range(0, len(part), CHUNK_CHARS))


TRAINER = {  # the model file records num_threads: a constant keeps its bytes the same
    "model_type": "bpe", "byte_fallback": True, "split_digits": True, "add_dummy_prefix": False, "pad_id": 0,
    "bos_id": BOS_ID, "eos_id": 2, "unk_id": 3, "num_threads": 1, "minloglevel": 2}
LOSSLESS = {  # pieces may cross spaces, line ends and scripts ("):\n        self."): 5 to 9 % fewer tokens on Python
    "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True,
    "split_by_whitespace": False, "split_by_unicode_script": False, "max_sentencepiece_length": 32,
    "max_sentence_length": 8 * CHUNK_CHARS, "required_chars": f"{SPACE_MARK}\n"}
LIKE_FINEWEB = {  # as read from the published models: NFKC, and every run of white space becomes one space
    "normalization_rule_name": "nmt_nfkc", "max_sentence_length": 8 * CHUNK_CHARS}


def train_tokenizer(texts: list[str], config: argparse.Namespace) -> bytes:
    """BPE with byte fallback -> bytes of a SentencePiece model; one that keeps every character, unless --like fineweb.

    InputError where the text is too small or has too many characters for the vocabulary.
    """
    model, vocab_size = io.BytesIO(), config.vocab_size
    try:
        spm.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
            sentence_iterator=training_chunks(texts), model_writer=model, vocab_size=vocab_size,
            character_coverage=config.character_coverage, **TRAINER, **(LIKE_FINEWEB if config.like else LOSSLESS),
            user_defined_symbols=list(caseops.OPERATORS) if config.caseops else [])
    except RuntimeError as error:
        what, problem, size = f"--vocab-size {vocab_size}", str(error), sum(map(len, texts))
        if limit := re.search(r"value <= (\d+)", problem):
            remedy = f"too large for {size:,} characters of training text; take at most {limit[1]} or give more text"
        elif limit := re.search(r"\d+ vs (\d+)", problem):
            remedy = f"too small for the characters of the text; take at least {limit[1]} or lower --character-coverage"
        else:
            remedy = f"the tokenizer cannot be trained on {size:,} characters ({problem[-80:].strip()}); give more text"
        raise InputError(f"{what}: {remedy}") from None
    return model.getvalue()


def protobuf(field: int, value: int | bytes) -> bytes:
    """One field of a protocol buffer message; numbers below 128 times 128 only."""
    def number(n: int) -> bytes:
        return bytes([n]) if n < 128 else bytes([n & 127 | 128, n >> 7])
    return number(field << 3) + number(value) if isinstance(value, int) else \
        number(field << 3 | 2) + number(len(value)) + value


def byte260_model() -> bytes:
    """The published byte vocabulary (pad 0, bos 1, eos 2, unk 3, then 4 + byte) as a SentencePiece model.

    All pieces are bytes and spaces are not escaped, so that any text is spelled in its UTF-8 bytes, and trainer and
    tools need to know nothing of it. SentencePiece's own trainer makes no model without characters. Field numbers are
    those of sentencepiece_model.proto.
    """
    control, unknown, byte = 3, 2, 6
    names = [(b"<pad>", control), (b"<s>", control), (b"</s>", control), (b"<unk>", unknown)]
    names += [(b"<0x%02X>" % i, byte) for i in range(256)]
    pieces = [protobuf(1, protobuf(1, name) + protobuf(3, kind)) for name, kind in names]
    model_type, vocab_size, byte_fallback, bpe = 3, 4, 35, 2
    trainer = [(model_type, bpe), (vocab_size, len(names)), (byte_fallback, 1), (40, 3), (41, BOS_ID), (42, 2), (43, 0)]
    dummy_prefix, extra_whitespaces, escape_whitespaces = 3, 4, 5
    normalizer = [(1, b"identity"), (dummy_prefix, 0), (extra_whitespaces, 0), (escape_whitespaces, 0)]
    return b"".join([*pieces, protobuf(2, b"".join(protobuf(*item) for item in trainer)),
                     protobuf(3, b"".join(protobuf(*item) for item in normalizer))])


def given_model(config: argparse.Namespace) -> bytes | None:
    """The model of --tokenizer; None where one is to be trained."""
    if config.tokenizer is None:
        return None
    return byte260_model() if config.tokenizer == BYTE260 else Path(config.tokenizer).read_bytes()


def load_tokenizer(model: bytes, where: str, mode: str | None = None) -> spm.SentencePieceProcessor:
    """InputError for a file that is no model or does not suit the shard format, any text, or CaseOps."""
    try:
        tokenizer = spm.SentencePieceProcessor()
        tokenizer.LoadFromSerializedProto(model)  # unlike the constructor, it complains about an empty file
    except RuntimeError:
        raise InputError(f"--tokenizer {where}: not a SentencePiece model; give a .model file") from None
    size = tokenizer.vocab_size()
    if size > MAX_VOCAB_SIZE or tokenizer.bos_id() != BOS_ID:
        raise InputError(f"--tokenizer {where}: vocabulary {size}, BOS id {tokenizer.bos_id()}; "
                         f"shards need at most {MAX_VOCAB_SIZE} pieces (uint16) and BOS id {BOS_ID}")
    if (count := sum(map(tokenizer.IsByte, range(size)))) != 256:
        raise InputError(f"--tokenizer {where}: has {count} byte pieces: it would lose characters that are not in its "
                         "vocabulary, and their bytes; take one that was trained with byte_fallback")
    if mode and not caseops.has_operators(tokenizer):
        raise InputError(f"--tokenizer {where}: has no pieces for the operators of --caseops {mode}; take a CaseOps "
                         "tokenizer, or leave --caseops away")
    return tokenizer


# ------------------------------------------------------------------------------------------------ encode in parallel
@functools.lru_cache(maxsize=1)
def cached_tokenizer(path: str, sha256: str) -> spm.SentencePieceProcessor:
    assert file_sha256(Path(path)) == sha256, path
    return load_tokenizer(Path(path).read_bytes(), path)


class Encoded(NamedTuple):
    tokens: np.ndarray  # (n,) uint16, BOS first
    counts: np.ndarray | None  # (n,) bytes of text of each token, for documents that want them
    reason: str | None  # why the tokens do not give the text back


def encode_document(tokenizer: spm.SentencePieceProcessor, document: Document, mode: str | None,
                    check: bool) -> Encoded:
    text, reason, counts = document.text.decode(), None, None
    given = transform(text, mode)
    if document.counted:
        ids, found = caseops.tokens_and_bytes(tokenizer, given)
        counts = np.concatenate(([0], found)).astype(np.uint16)
    else:
        ids = tokenizer.encode(given)  # pyright: ignore[reportAttributeAccessIssue]
    tokens = np.array([BOS_ID, *ids], np.uint16)
    if check:
        back = tokenizer.decode(tokens[1:].tolist())  # pyright: ignore[reportAttributeAccessIssue]
        back = caseops.decode(back, strict=False) if mode else back
        if back != text:
            place = next((i for i, (a, b) in enumerate(zip(text, back)) if a != b), min(len(text), len(back)))
            reason = "the tokenizer changes the text"
            if text[place:place + 1] == SPACE_MARK:
                reason = "the text holds U+2581, SentencePiece's mark for a space"
    return Encoded(tokens, counts, reason)


def encode_batch(path: str, sha256: str, mode: str | None, check: bool, batch: list[Document]) -> list[Encoded]:
    """Runs in a worker. `check` compares decode(encode(x)) with x."""
    tokenizer = cached_tokenizer(path, sha256)
    return [encode_document(tokenizer, document, mode, check) for document in batch]


def start_worker() -> None:
    """A worker leaves Ctrl-C to its parent and ends when its parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def map_ordered(function: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[tuple[Any, Any]]:
    """Yields (item, function(item)) in the order of the items, a bounded number of them ahead in worker processes."""
    if workers == 1:
        yield from ((item, function(item)) for item in items)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker)
    pending, latest = collections.deque(), collections.deque(maxlen=workers * BATCHES_AHEAD + 2)

    def give_up(_: Any) -> None:
        """The pool's thread may trip over a task that arrives while it tells the others that a worker died."""
        for future in tuple(latest):
            with contextlib.suppress(InvalidStateError):
                future.set_exception(BrokenProcessPool("a worker process died"))

    hook, threading.excepthook = threading.excepthook, give_up
    try:
        for item in items:
            try:
                future = pool.submit(function, item)
            except (OSError, ValueError):  # a worker died while another was started: the pool closed its pipes before
                future = pool.submit(function, item)  # it could say so; now it does. Any other reason is met again.
            pending.append((item, future))
            latest.append(future)
            if len(pending) > workers * BATCHES_AHEAD:
                item, future = pending.popleft()
                yield item, future.result()
        for item, future in pending:
            yield item, future.result()
    except BrokenProcessPool:
        for process in multiprocessing.active_children():  # the pool forgets, and then waits for, one that just started
            process.kill()
        raise
    finally:
        threading.excepthook = hook
        pool.shutdown(cancel_futures=True)


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Groups documents into lists of about BATCH_BYTES of text."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ------------------------------------------------------------------------------------------------ shards and state
def shard_parts(parts: list[np.ndarray]) -> list[Any]:
    """Pieces of a shard's numbers -> the buffers of its file, which are not copied."""
    header = np.zeros(HEADER_INTS, "<i4")
    header[:3] = MAGIC, 1, sum(map(len, parts))
    return [header.data, *(np.ascontiguousarray(part, "<u2").data for part in parts)]


class ShardWriter:
    """Cuts the tokens of one side into shards of `shard_tokens`; each file appears whole, under its final name.

    Where documents come with counts of bytes, each shard has a sidecar of the same form that holds them.
    """

    def __init__(self, folder: Path, side: str, shard_tokens: int, shards: list[dict[str, Any]]):
        self.folder, self.side, self.shard_tokens, self.shards = folder, side, shard_tokens, shards
        self.parts: list[np.ndarray] = []
        self.count_parts: list[np.ndarray] = []
        self.pending_tokens = 0
        self.sha256_text = hashlib.sha256()
        self.totals = {"documents": 0, "tokens": 0, "bytes": 0}
        # Finished shards hold all documents of this side before `document`, and the first `used_tokens` of it.
        self.document, self.used_tokens = (shards[-1]["document"], shards[-1]["used_tokens"]) if shards else (0, 0)

    def count(self, text: bytes) -> None:
        self.sha256_text.update(text)
        self.totals["documents"] += 1
        self.totals["bytes"] += len(text)

    def add(self, index: int, encoded: Encoded) -> bool:
        """Appends document `index`; True when a shard was finished."""
        used = self.used_tokens if index == self.document else 0
        finished = False
        while used < len(encoded.tokens):
            end = used + self.shard_tokens - self.pending_tokens
            self.parts.append(encoded.tokens[used:end])
            if encoded.counts is not None:
                self.count_parts.append(encoded.counts[used:end])
            self.pending_tokens += len(self.parts[-1])
            used += len(self.parts[-1])
            if self.pending_tokens == self.shard_tokens:
                self.flush(index, used)
                finished = True
        return finished

    def write(self, kind: str, parts: list[np.ndarray]) -> dict[str, Any]:
        """One file -> its name and SHA-256."""
        name, buffers = f"fineweb_{self.side}_{kind}{len(self.shards):06d}.bin", shard_parts(parts)
        write_atomic(self.folder / name, *buffers)
        sha256 = hashlib.sha256()
        for buffer in buffers:
            sha256.update(buffer)
        return {"file": name, "sha256": sha256.hexdigest()}

    def flush(self, index: int, used_tokens: int) -> None:
        """Writes what is pending as the next shard; what follows starts at token `used_tokens` of document `index`."""
        if not self.pending_tokens:
            return
        shard: dict[str, Any] = {"tokens": self.pending_tokens, "document": index, "used_tokens": used_tokens}
        if self.count_parts:
            counted = sum(int(part.sum(dtype=np.int64)) for part in self.count_parts)
            shard["sidecar"] = {**self.write("bytes_", self.count_parts), "bytes": counted}
        self.shards.append({**self.write("", self.parts), **shard})
        self.parts, self.count_parts, self.pending_tokens = [], [], 0

    def summary(self) -> dict[str, Any]:
        self.totals["tokens"] = sum(shard["tokens"] for shard in self.shards)
        shards = [{key: shard[key] for key in ("file", "tokens", "sha256", "sidecar") if key in shard}
                  for shard in self.shards]
        return {**self.totals, "sha256_text": self.sha256_text.hexdigest(), "shards": shards}


class Job:
    """One dataset folder: where its files are and how far the request has come (state file, then manifest)."""

    def __init__(self, config: argparse.Namespace, request: str):
        self.folder = Path(config.out) / "datasets" / config.name
        self.model_path = Path(config.out) / "tokenizers" / f"{config.tokenizer_name}.model"
        self.manifest_path, self.state_path = self.folder / "manifest.json", self.folder / "prepare_state.json"
        self.request = request
        self.state = self.new_state()

    def new_state(self) -> dict[str, Any]:
        return {"request": self.request, "sources": None, "tokenizer": None, "train": [], "val": [], "failed": {}}

    def open(self, force: bool) -> bool:
        """True where the request is already complete and intact; else takes over what is finished.

        InputError where the folder or the tokenizer's name belongs to something else and not `force`.
        """
        manifest, state = self.read(self.manifest_path), self.read(self.state_path)
        found = manifest or state or {}
        ours = found.get("request") == self.request
        taken = [path for path in [self.model_path, *self.folder.glob("[!.]*")] if path.exists()]
        if taken and not ours and not force:
            raise InputError(f"{taken[0]}: exists and belongs to another request; take another --name, or --force")
        if ours and manifest and self.is_intact(manifest["tokenizer"]["sha256"], manifest):
            self.state_path.unlink(missing_ok=True)  # it stays after a kill between manifest and end
            return True
        if ours and state and not manifest and self.is_intact(state["tokenizer"], state):
            self.state = {**self.new_state(), **state}
            return False
        if ours:
            print("some finished files are damaged or missing: starting over", flush=True)
        self.clear()
        if taken:  # in this order a kill leaves nothing that belongs to no request
            self.save()
        self.manifest_path.unlink(missing_ok=True)
        return False

    def expect(self, sources: list[dict[str, Any]]) -> None:
        """Starts over where what is finished was made from other texts; the request knows names and sizes only."""
        if self.state["tokenizer"] and self.state["sources"] != sources:
            print("the sources changed since the last start: starting over", flush=True)
            self.clear()
            self.state = self.new_state()
        self.state["sources"] = sources

    def clear(self) -> None:
        for path in self.folder.glob("*fineweb_*"):
            path.unlink()

    @staticmethod
    def read(path: Path) -> dict[str, Any] | None:
        try:
            value = json.loads(path.read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return value if isinstance(value, dict) else None  # another program's file

    def is_intact(self, tokenizer: str | None, found: dict[str, Any]) -> bool:
        """The tokenizer and all finished shards of a manifest or a state have the recorded hashes."""
        shards = [shard for side in ("train", "val")
                  for shard in (found[side]["shards"] if isinstance(found[side], dict) else found[side])]
        files = shards + [shard["sidecar"] for shard in shards if "sidecar" in shard]
        return (tokenizer is None or file_sha256(self.model_path) == tokenizer) and all(
            file_sha256(self.folder / file["file"]) == file["sha256"] for file in files)

    def save(self) -> None:
        write_json(self.state_path, self.state)


# ------------------------------------------------------------------------------------------------ the pipeline
def request_of(config: argparse.Namespace, sources: list[Source]) -> str:
    """SHA-256 over everything that decides the output: options, tokenizer, names and sizes of the source files."""
    options = {name: value for name, value in vars(config).items() if name not in ("workers", "force", "out")}
    model = given_model(config)
    options["tokenizer"] = None if model is None else hashlib.sha256(model).hexdigest()
    files = [[str(path), path.stat().st_size] for source in sources for path in source.files]
    versions = [VERSION, spm.__version__, platform.python_version()]
    return hashlib.sha256(json.dumps([versions, options, files], sort_keys=True).encode()).hexdigest()


def make_tokenizer(config: argparse.Namespace, job: Job,
                   read_sample: Callable[[], list[str]]) -> spm.SentencePieceProcessor:
    """The given, the already trained or a newly trained tokenizer; its file is at job.model_path afterwards."""
    if job.state["tokenizer"] is None:
        model = given_model(config)
        if model is None:
            start, texts = time.perf_counter(), read_sample()
            model = train_tokenizer(texts, config)
            print(f"tokenizer: {config.vocab_size} pieces from {len(texts):,} documents, "
                  f"{time.perf_counter() - start:.0f} seconds", flush=True)
        tokenizer = load_tokenizer(model, str(config.tokenizer or job.model_path), config.caseops)
        job.save()
        write_atomic(job.model_path, model)
        job.state["tokenizer"] = hashlib.sha256(model).hexdigest()
        job.save()
        return tokenizer
    return load_tokenizer(job.model_path.read_bytes(), str(job.model_path))


def encode(config: argparse.Namespace, job: Job, sources: list[Source], scanned: Scan,
           sides: np.ndarray) -> dict[str, ShardWriter]:
    """Last pass: documents -> shards of both sides. Drops and counts documents that do not survive the round trip."""
    writers = {side: ShardWriter(job.folder, side, config.shard_tokens, job.state[side]) for side in ("train", "val")}
    failed: dict[str, str] = job.state["failed"]  # document index -> reason
    work = functools.partial(encode_batch, str(job.model_path), job.state["tokenizer"], config.caseops,
                             not config.allow_lossy)

    def needed() -> Iterator[Document]:
        for document in read_again(sources, config, "encode", scanned):
            if sides[document.number] == DUPLICATE:
                continue
            in_val = bool(sides[document.number] == VAL)
            writer = writers["val" if in_val else "train"]
            if document.number < writer.document:  # finished shards hold it
                if str(document.number) not in failed:
                    writer.count(document.text)
            else:
                yield document._replace(counted=in_val and config.caseops is not None)

    if finished := sum(len(writer.shards) for writer in writers.values()):
        print(f"resumed: {finished} shards were finished", flush=True)
    for batch, results in map_ordered(work, batches(needed()), config.workers):
        for document, encoded in zip(batch, results, strict=True):
            writer = writers["val" if sides[document.number] == VAL else "train"]
            if encoded.reason:
                if str(document.number) not in failed and len(failed) < MAX_REPORTED:
                    print(f"dropped {document.path}: {encoded.reason}", flush=True)
                failed[str(document.number)] = encoded.reason
                continue
            writer.count(document.text)
            if writer.add(document.number, encoded):
                job.save()
    return writers


def write_manifest(config: argparse.Namespace, job: Job, scanned: Scan, sides: np.ndarray, vocab_size: int,
                   writers: dict[str, ShardWriter]) -> dict[str, Any]:
    """Checks what was made and says it in manifest.json; from then on the dataset is complete."""
    failed: dict[str, str] = job.state["failed"]
    limit = MAX_LOSSY_FRACTION * len(sides)
    if config.tokenizer and len(failed) > limit:
        raise InputError(f"--tokenizer {config.tokenizer}: changes {len(failed):,} of {len(sides):,} documents (does "
                         "it normalize?); take a lossless one, or --allow-lossy --force to keep them as encoded")
    for side, writer in writers.items():
        writer.flush(len(sides), 0)
        if not writer.totals["documents"]:
            raise InputError(f"--name {config.name}: no document is left for {side}: all failed the round trip; "
                             "see the reasons above")
    dropped = {**scanned.dropped, "duplicates_of_validation": int((sides == DUPLICATE).sum()),
               "failed_round_trip": len(failed)}
    options = {name: getattr(config, name) for name in (
        "vocab_size", "val_docs", "val_fraction", "val_first", "shard_tokens", "tokenizer_sample_bytes",
        "character_coverage", "max_docs", "text_key", "seed", "allow_lossy", "caseops", "like")}
    manifest = {
        "version": VERSION, "name": config.name, "request": job.request,
        "tokenizer": {"file": job.model_path.name, "sha256": job.state["tokenizer"], "vocab_size": vocab_size,
                      "trained_here": config.tokenizer is None},
        "sources": scanned.sources, "dropped": dropped, "options": options,
        **{side: writer.summary() for side, writer in writers.items()}}
    write_json(job.manifest_path, manifest)
    job.state_path.unlink(missing_ok=True)
    return manifest


def prepare(config: argparse.Namespace) -> None:
    """Sources -> tokenizer, shards, manifest. InputError for what the user can repair."""
    sources = [find_source(argument) for argument in config.sources]
    if not config.name:
        name_like_fineweb(config)
    job = Job(config, request_of(config, sources))
    if job.open(config.force):
        print(f"{job.folder}: complete already, nothing to do")
        return
    scanned = scan(sources, config)
    job.expect(scanned.sources)
    sides, firsts = split(scanned.keys, config)
    tokenizer = make_tokenizer(config, job, lambda: sample_texts(sources, config, scanned, sides, firsts))
    writers = encode(config, job, sources, scanned, sides)
    manifest = write_manifest(config, job, scanned, sides, tokenizer.vocab_size(), writers)
    for side in ("train", "val"):
        totals = manifest[side]
        print(f"{side}: {totals['documents']:,} documents, {totals['bytes']:,} bytes, {totals['tokens']:,} tokens "
              f"({totals['bytes'] / totals['tokens']:.3f} bytes a token) in {len(totals['shards'])} shards")
    print(f"dropped: {json.dumps(manifest['dropped'])}")
    print(f"train with: DATA_PATH={job.folder} TOKENIZER_PATH={job.model_path} VOCAB_SIZE={tokenizer.vocab_size()}")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def fraction(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise ValueError
    return value


class Parser(argparse.ArgumentParser):
    """Complains in the form of all other errors."""

    def error(self, message: str) -> Any:
        print(f"error: {message}; see --help", file=sys.stderr)
        raise SystemExit(2)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="stdlib, a .txt .md .jsonl .jsonl.zst file, or a folder of them")
    add("--name", help="of the dataset: OUT/datasets/NAME and OUT/tokenizers/NAME.model; with --like fineweb it may be "
        "left away for the published names")
    add("--out", default="data", help="folder of datasets/ and tokenizers/ (default: %(default)s)")
    add("--vocab-size", type=positive, default=1024, help="pieces of the trained tokenizer (default: %(default)s)")
    add("--tokenizer", help="take this SentencePiece model instead of training one; byte260 = one token a byte")
    add("--caseops", nargs="?", const="plain", choices=caseops.MODES,
        help="lower case with operators for capitals, and a byte sidecar for validation: plain is the published form "
        "(default without a value), fused has the operators before the space")
    add("--like", choices=("fineweb",), help="as the published data were made: the first 50,000 documents are "
        "validation, the tokenizer normalizes (NFKC, one space for all white space), published names")
    sides = parser.add_mutually_exclusive_group()
    sides.add_argument("--val-docs", type=positive, help="documents for validation, at random by their hash")
    sides.add_argument("--val-fraction", type=fraction, help="the same as a share of the documents (default: 0.01)")
    sides.add_argument("--val-first", type=positive, help="the first documents are validation, as in FineWeb's split")
    add("--shard-tokens", type=positive, default=100_000_000, help="tokens of a shard (default: %(default)s)")
    add("--workers", type=positive, default=os.cpu_count() or 1, help="processes (default: all cores)")
    add("--tokenizer-sample-bytes", type=positive,
        help="text that the tokenizer is trained on (default: 8,000,000; with --like fineweb 100,000,000)")
    add("--character-coverage", type=float, help="share of the characters that get a piece; others are spelled in "
        "bytes (default: 0.9999; with --like fineweb 0.999)")
    add("--max-docs", type=positive, help="stop after so many documents")
    add("--text-key", default="text", help="key of the text in a line of .jsonl (default: %(default)s)")
    add("--seed", type=int, default=1337, help="of the split (default: %(default)s)")
    add("--allow-lossy", action="store_true", help="keep documents that the tokenizer changes")
    add("--force", action="store_true", help="replace another dataset of this name")
    return complete(parser.parse_args(arguments), parser)


def complete(config: argparse.Namespace, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Fills in what other options decide, and refuses what does not fit together."""
    like = config.like
    option = next((name for name in ("docs", "fraction", "first") if vars(config)[f"val_{name}"]), None)
    if like and option:
        parser.error(f"--val-{option}: --like fineweb takes the first {FINEWEB_VAL_DOCS:,} documents; leave one away")
    if like:
        config.val_first, config.allow_lossy = FINEWEB_VAL_DOCS, True
    elif not option:
        config.val_fraction = 0.01
    config.tokenizer_sample_bytes = config.tokenizer_sample_bytes or (100_000_000 if like else 8_000_000)
    if config.character_coverage is None:
        config.character_coverage = 0.999 if like else 0.9999
    if not 0.98 <= config.character_coverage <= 1:
        parser.error(f"--character-coverage {config.character_coverage}: must be 0.98 to 1")
    if config.tokenizer not in (None, BYTE260) and not Path(config.tokenizer).is_file():
        parser.error(f"--tokenizer {config.tokenizer}: no such file")
    if config.tokenizer is None and not MIN_VOCAB_SIZE <= config.vocab_size <= MAX_VOCAB_SIZE:
        parser.error(f"--vocab-size {config.vocab_size}: must be {MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE}")
    if not config.name and not like:
        parser.error("--name: give the dataset a name")
    if config.name and not re.fullmatch(r"[\w-][\w.-]*", config.name):
        parser.error(f"--name {config.name}: letters, digits, '.', '_' and '-' only, and no '.' at the start")
    config.tokenizer_name = config.name
    return config


def name_like_fineweb(config: argparse.Namespace) -> None:
    """The published names, which are the trainer's defaults where there is one for the kind of data."""
    model = given_model(config)
    suffix = {None: "", "plain": f"_{CASEOPS}", "fused": f"_{CASEOPS}_fused"}[config.caseops]
    if model is not None:
        config.vocab_size = load_tokenizer(model, config.tokenizer, config.caseops).vocab_size()
    byte = config.tokenizer == BYTE260
    config.name = f"fineweb10B_{BYTE260 if byte else f'sp{config.vocab_size}'}{suffix}"
    config.tokenizer_name = f"fineweb_{BYTE260 if byte else f'{config.vocab_size}_bpe'}{suffix}"


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 a mistake of the user or of the disk, 130 interrupted."""
    config = parse_arguments(arguments)
    try:
        prepare(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        reason = error.strerror or error
        print(f"error: {error.filename or config.out}: {reason}; free space or the permission, or take another --out",
              file=sys.stderr)
        return 2
    except BrokenProcessPool:
        print("error: a worker process died (out of memory?); take fewer --workers and start again", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues with what is finished", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold anything  # pyright: ignore
    sys.exit(main())
