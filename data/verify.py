"""Checks everything about a dataset that can be checked, and prints the fingerprint that the trainer will print.

    python data/verify.py data/datasets/mine                 # headers, manifest, tokenizer, bytes, split
    python data/verify.py data/datasets/mine --full          # and decodes and encodes again every document

With manifest.json (data/prepare.py writes it) all counts and hashes are compared with it; without, what the shards and
the tokenizer say of each other is. Reading and judging is the trainer's own (open_dataset of train_gpt.py).
Exit code: 0 all is well, 2 something is not.
"""
from __future__ import annotations

import argparse
import array
import functools
import hashlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import caseops
import numpy as np
import prepare

if TYPE_CHECKING or __name__ != "__mp_main__":  # a worker does without: torch costs it seconds and 200 MB
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import train_gpt

WINDOW = 32  # tokens of a stretch that is looked up in training: about a hundred characters, a long line
MIN_DISTINCT = 16  # different tokens in a stretch that is worth looking up: rulers and tables of numbers are not
CHUNK_TOKENS = 1 << 22  # of training that are hashed at a time
BATCH_TOKENS = 1 << 16  # of documents per task of a worker
MAX_WRONG_COUNTS = 0.001  # of a sidecar's counts may differ from the pieces: normalization makes letters of others
MAX_STRANGE = 0.01  # of the documents may be encoded to other tokens after a normalizing tokenizer
MAX_UNLIKE = 0.01  # of the bytes may be missing in what a normalizing tokenizer decodes: white space, mostly


class Report:
    """Prints what was found; faults are kept for the end."""

    def __init__(self) -> None:
        self.faults: list[str] = []

    def say(self, name: str, text: str) -> None:
        print(f"{name + ':':<12} {text}", flush=True)

    def fault(self, text: str) -> None:
        self.faults.append(text)
        self.say("fault", text)


# ------------------------------------------------------------------------------------------------ files and manifest
class Files(NamedTuple):
    folder: Path
    train: list[Path]
    val: list[Path]
    sidecar: list[Path]
    manifest: dict[str, Any] | None
    listed: dict[str, tuple[str, int]]  # by the manifest: file name -> sha256, tokens

    @property
    def lossless(self) -> bool:
        """The tokens give the text back, by the manifest."""
        return self.manifest is not None and not self.manifest["options"]["allow_lossy"]


def listed_files(manifest: dict[str, Any]) -> dict[str, tuple[str, int]]:
    """Manifest -> the files it names. KeyError or TypeError for another program's."""
    if not isinstance(manifest["options"]["allow_lossy"], bool) or not isinstance(manifest["tokenizer"]["file"], str):
        raise TypeError
    listed = {}
    for side in ("train", "val"):
        for shard in manifest[side]["shards"]:
            for file in (shard, *([shard["sidecar"]] if "sidecar" in shard else [])):
                listed[file["file"]] = file["sha256"], shard["tokens"]
    return listed


def find_files(folder: Path) -> Files:
    """UserError where there is no dataset; InputError for a manifest that cannot be read."""
    if not folder.is_dir():
        raise prepare.InputError(f"{folder}: no such folder; give the folder of fineweb_train_*.bin")
    path, manifest, listed = folder / "manifest.json", None, {}
    if path.exists():
        manifest = prepare.Job.read(path)
        try:
            listed = listed_files(manifest or {})
        except (KeyError, TypeError):
            raise prepare.InputError(f"{path}: not a manifest of data/prepare.py; remove it or make the data again"
                                     ) from None
    return Files(folder, *train_gpt.find_shards(folder), manifest, listed)


def check_headers(files: Files, report: Report) -> None:
    """Every header and size, and that no number is missing between the first and the last."""
    for kind, paths in (("train", files.train), ("val", files.val), ("sidecar", files.sidecar)):
        tokens = sum(len(train_gpt.read_shard(path)) for path in paths)
        if paths:
            report.say("headers", f"{kind}: {len(paths)} files, {tokens:,} numbers")
        numbers = [int(found[1]) for path in paths if (found := re.search(r"_(\d+)\.bin$", path.name))]
        if numbers != list(range(len(paths))):
            report.fault(f"{files.folder}: the {len(paths)} {kind} shards are not numbered 0 to {len(paths) - 1}: "
                         "fetch or make what is missing")


def check_manifest(files: Files, report: Report) -> None:
    """Names, counts and hashes of all files against the manifest."""
    listed, before = dict(files.listed), len(report.faults)
    for path in (*files.train, *files.val, *files.sidecar):
        sha256, tokens = listed.pop(path.name, (None, 0))
        if sha256 is None:
            report.fault(f"{path}: not in manifest.json; remove the file or make the data again")
        elif len(train_gpt.read_shard(path)) != tokens:
            report.fault(f"{path}: {len(train_gpt.read_shard(path)):,} tokens, manifest.json says {tokens:,}")
        elif prepare.file_sha256(path) != sha256:
            report.fault(f"{path}: its hash is not that of manifest.json: altered; make it again")
    for name in listed:
        report.fault(f"{files.folder / name}: in manifest.json, but missing; fetch or make it again")
    if len(report.faults) == before:
        count = len(files.train) + len(files.val) + len(files.sidecar)
        report.say("manifest", f"names, counts and hashes of {count} files agree")


def find_tokenizer(files: Files, option: Path | None) -> Path:
    """--tokenizer, or the manifest's, or the published name, beside the dataset. InputError where there is none."""
    folder, name = files.folder.resolve().parent.parent / "tokenizers", files.folder.name
    names = [files.manifest["tokenizer"]["file"]] if files.manifest else [f"{name.replace('10B', '')}.model"]  # byte260
    if not files.manifest and (found := re.fullmatch(r"fineweb10B_sp(\d+)(\w*)", name)):
        published = found[2].replace(f"_{prepare.CASEOPS}", prepare.PUBLISHED_CASEOPS)
        names = [f"fineweb_{found[1]}_bpe{suffix}.model" for suffix in (found[2], published)]
    paths = [option] if option else [folder / name for name in names]
    for path in paths:
        if path.is_file():
            return path
    raise prepare.InputError(f"{paths[-1]}: no tokenizer found; name the one of these shards with --tokenizer")


# ------------------------------------------------------------------------------------------------ documents
def documents(stream: train_gpt.TokenStream) -> Iterator[np.ndarray]:
    """The documents of all shards in a row, each (n,) uint16 with its BOS."""
    rest: list[np.ndarray] = []
    for shard in stream.shards:
        for start in range(0, len(shard), CHUNK_TOKENS):
            ids = np.array(shard[start:start + CHUNK_TOKENS])
            bounds = np.flatnonzero(ids == train_gpt.BOS)
            if not len(bounds):
                rest.append(ids)
                continue
            head = np.concatenate([*rest, ids[:bounds[0]]])
            if len(head):
                yield head
            *whole, tail = np.split(ids, bounds)[1:]
            yield from whole
            rest = [tail]
    if rest:
        yield np.concatenate(rest)


def batches(items: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    batch, size = [], 0
    for item in items:
        batch.append(item)
        size += len(item)
        if size >= BATCH_TOKENS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class Reading(NamedTuple):
    """What one document says when it is decoded."""

    text: bytes
    table_bytes: int  # by the table of pieces, or the bytes themselves for a CaseOps tokenizer
    strange: bool  # the text would be encoded to other tokens


def read_batch(path: str, sha256: str, count: np.ndarray, space: np.ndarray, mode: str | None,
               batch: list[np.ndarray]) -> list[Reading]:
    """Runs in a worker: documents -> texts and what the tokenizer says of them; count, space from byte_table."""
    tokenizer: Any = prepare.cached_tokenizer(path, sha256)
    result = []
    for ids in batch:
        tokens = ids[int(ids[0] == prepare.BOS_ID):].tolist()
        decoded = tokenizer.decode(tokens)
        text = caseops.decode(decoded, strict=False) if mode else decoded
        size = len(text.encode())
        if not mode and tokens:
            drops_space = bool(space[tokens[0]]) and not decoded.startswith(" ")
            size = int(count[tokens].sum() + space[tokens].sum()) - drops_space
        again = tokenizer.encode(prepare.transform(text, mode))
        result.append(Reading(text.encode(), size, again != tokens))
    return result


def find_mode(files: Files, tokenizer: Any, val: train_gpt.TokenStream, read: Any) -> str | None:
    """How capitals are written: by the manifest, else as the first documents are encoded to their own tokens."""
    if files.manifest is not None:
        return files.manifest["options"].get("caseops")
    if not files.sidecar or not caseops.has_operators(tokenizer):
        return None
    sample = [ids for ids, _ in zip(documents(val), range(20))]
    strange = {mode: sum(found.strange for found in read(mode, sample)) for mode in caseops.MODES}
    return min(strange, key=lambda mode: strange[mode])


def check_documents(files: Files, side: str, stream: train_gpt.TokenStream, work: Any, workers: int,
                    report: Report) -> array.array[int]:
    """Decodes every document of a side -> bytes of each text. Faults where tables, tokens or manifest say otherwise."""
    sizes, strange, wrong, first, sha256 = array.array("q"), 0, 0, "", hashlib.sha256()
    progress, done = prepare.Progress(f"decode {side}", 2 * len(stream)), 0
    for batch, readings in prepare.map_ordered(work, batches(documents(stream)), workers):
        for reading in readings:
            sha256.update(reading.text)
            strange += reading.strange
            if reading.table_bytes != len(reading.text):
                first = first or (f"document {len(sizes)}: {reading.table_bytes} bytes by the table of pieces, "
                                  f"{len(reading.text)} decoded")
                wrong += 1
            sizes.append(len(reading.text))
        done += 2 * sum(map(len, batch))
        progress.reach(done)
    progress.close()
    report.say("decoded", f"{side}: {len(sizes):,} documents, {sum(sizes):,} bytes; {strange:,} are encoded to other "
               "tokens")
    remedy = "the tokenizer is not that of the shards"
    if wrong:
        report.fault(f"{side}: {first} (and {wrong - 1:,} more documents); {remedy}")
    if strange > (0 if files.lossless else MAX_STRANGE * len(sizes)):
        report.fault(f"{side}: {strange:,} of {len(sizes):,} documents are encoded to other tokens; {remedy}")
    if files.manifest and files.manifest[side]["documents"] != len(sizes):
        report.fault(f"{side}: {len(sizes):,} documents, manifest.json says {files.manifest[side]['documents']:,}; "
                     "make the data again")
    if files.lossless and files.manifest and sha256.hexdigest() != files.manifest[side]["sha256_text"]:
        report.fault(f"{side}: the decoded text is not that of manifest.json (sha256_text); make the data again")
    return sizes


# ------------------------------------------------------------------------------------------------ bytes
def wrong_counts(tokens: np.ndarray, counts: np.ndarray, tokenizer: Any) -> np.ndarray:
    """Tokens (n + 1,), bytes of those behind the first (n,) -> places of counts that are not those of the pieces.

    Pieces with a space may count more. Bytes that spell a character count at its last one only, and are left out.
    """
    count, space, silent = train_gpt.byte_table(tokenizer)
    size = tokenizer.vocab_size()
    byte = np.array([tokenizer.is_byte(i) for i in range(size)])
    operators = [tokenizer.piece_to_id(char) for char in caseops.OPERATORS]
    before, tokens = tokens[:-1], tokens[1:]
    natural = np.where(silent, 0, count + space)[tokens]
    if caseops.has_operators(tokenizer):
        escaped = (before == operators[-1]) & np.isin(tokens, operators)
        natural[np.isin(tokens, operators) & ~escaped] = 0
        natural[escaped & (counts == 0)] = 0  # of ESCAPE ESCAPE only the second one stands for itself
    right = np.where(space[tokens], counts >= natural, counts == natural)
    return np.flatnonzero(~right & ~byte[tokens])


def check_bytes(files: Files, data: train_gpt.Dataset, tokenizer: Any, sizes: array.array[int] | None,
                report: Report) -> None:
    """Bytes of the validation text: those that are scored against the manifest, the pieces and the decoded text."""
    bounds, total = train_gpt.document_bounds(data.val_tokens), int(data.val_bytes.sum())
    source = "sidecar" if files.sidecar else "table of pieces"
    report.say("bytes", f"{total:,} of {len(bounds) - 1:,} validation documents by the {source}")
    if files.sidecar:
        check_sidecar(files, data, tokenizer, report)
    manifest = files.manifest
    if manifest is not None and (manifest["val"]["documents"] != len(bounds) - 1
                                 or (files.lossless and manifest["val"]["bytes"] != total)):
        report.fault(f"{files.folder / 'manifest.json'}: says {manifest['val']['documents']:,} validation documents "
                     f"with {manifest['val']['bytes']:,} bytes; make the data again")
    if sizes is None or not files.sidecar:
        return
    scored = np.add.reduceat(data.val_bytes, np.maximum(bounds[:-1] - 1, 0))  # from BOS, which counts nothing, on
    different = np.flatnonzero(scored != np.array(sizes))
    if len(different) and files.lossless:
        i = int(different[0])
        report.fault(f"{files.sidecar[0]}: document {i} has {scored[i]:,} bytes, decoded {sizes[i]:,}; make it again")
    elif abs(total - sum(sizes)) > MAX_UNLIKE * sum(sizes):
        report.fault(f"{files.sidecar[0]}: counts {total:,} bytes, decoded {sum(sizes):,}; it is not of this text")
    elif len(different):
        report.say("bytes", f"{len(different):,} documents decode to other sizes, {sum(sizes):,} bytes in all: white "
                   "space and characters that the tokenizer normalizes")


def check_sidecar(files: Files, data: train_gpt.Dataset, tokenizer: Any, report: Report) -> None:
    """The sidecar against the pieces, a part at a time; each begins with the token before it, which may be ESCAPE."""
    wrong, first = 0, ""
    for start in range(0, len(data.val_bytes), CHUNK_TOKENS):
        tokens = data.val_tokens[start:start + CHUNK_TOKENS + 1]
        counts = data.val_bytes[start:start + CHUNK_TOKENS]
        places = wrong_counts(tokens, counts, tokenizer)
        if len(places) and not first:
            place = int(places[0])
            piece = tokenizer.id_to_piece(int(tokens[place + 1]))
            first = f"{counts[place]} bytes for token {start + place + 1} = {piece!r}"
        wrong += len(places)
    if wrong > MAX_WRONG_COUNTS * len(data.val_bytes):
        report.fault(f"{files.sidecar[0]}: {wrong:,} counts do not fit their pieces, first {first}; make it again")
    elif wrong:
        report.say("bytes", f"{wrong:,} counts differ from their pieces: characters that the tokenizer normalizes")


# ------------------------------------------------------------------------------------------------ split
def window_hashes(ids: np.ndarray) -> np.ndarray:
    """ids (..., n) -> (..., n - WINDOW + 1) uint64, a hash of each stretch of WINDOW tokens; by doubling its length."""
    with np.errstate(over="ignore"):
        hashes, factor, length = ids.astype(np.uint64) + np.uint64(1), np.uint64(0x9E3779B97F4A7C15), 1
        while length < WINDOW:
            hashes = hashes[..., :-length] * factor + hashes[..., length:]
            factor, length = factor * factor, 2 * length
        return hashes ^ hashes >> np.uint64(29)


def near_duplicates(data: train_gpt.Dataset) -> list[int]:
    """Validation documents of which half or more of the stretches occur in training, whatever document holds them.

    Stretches are WINDOW tokens long, side by side, and start with the document; training is looked up at every token.
    A document without a whole stretch is not judged.
    """
    bounds = train_gpt.document_bounds(data.val_tokens)
    starts = [np.arange(a, b - WINDOW + 1, WINDOW) for a, b in zip(bounds[:-1] + 1, bounds[1:])]
    owner = np.repeat(np.arange(len(starts)), [len(places) for places in starts])
    places = np.concatenate(starts)
    if not len(places):
        return []
    windows, step = np.lib.stride_tricks.sliding_window_view(data.val_tokens, WINDOW), CHUNK_TOKENS // WINDOW
    parts = [windows[places[i:i + step]] for i in range(0, len(places), step)]
    worth = np.concatenate([(np.diff(np.sort(part)) != 0).sum(axis=1) + 1 >= MIN_DISTINCT for part in parts])
    owner, wanted = owner[worth], np.concatenate([window_hashes(part)[:, 0] for part in parts])[worth]
    mask = np.uint64((1 << 24) - 1)
    table, found = np.zeros(1 << 24, bool), []  # most stretches of training end at this table
    table[wanted & mask] = True
    for start in range(0, len(data.train), CHUNK_TOKENS):
        end = min(start + CHUNK_TOKENS + WINDOW - 1, len(data.train))
        if end - start < WINDOW:
            break
        hashes = window_hashes(data.train.slice(start, end - start))
        candidates = hashes[table[hashes & mask]]
        found.append(np.unique(candidates[np.isin(candidates, wanted)]))
    hit = np.isin(wanted, np.concatenate([np.zeros(0, np.uint64), *found]))
    total, hits = (np.bincount(x, minlength=len(starts)) for x in (owner, owner[hit]))
    return np.flatnonzero((hits > 0) & (2 * hits >= total)).tolist()


def check_split(files: Files, data: train_gpt.Dataset, report: Report) -> None:
    count = len(train_gpt.document_bounds(data.val_tokens)) - 1
    if data.leaked_documents:
        report.fault(f"{files.folder}: {data.leaked_documents:,} of {count:,} validation documents occur in training; "
                     "make the data again with data/prepare.py")
    near = near_duplicates(data)
    which = f", first document {near[0]}" if near else ""
    report.say("split", f"{data.leaked_documents:,} of {count:,} validation documents occur in training; of "
               f"{len(near):,} half or more of the stretches of {WINDOW} tokens do{which}")
    if files.folder.name.startswith("fineweb10B") and count != prepare.FINEWEB_VAL_DOCS:
        report.say("split", f"the published validation set has {prepare.FINEWEB_VAL_DOCS:,} documents, this one "
                   f"{count:,}: scores cannot be compared with published ones")


# ------------------------------------------------------------------------------------------------ the command
def verify(folder: Path, option: Path | None, full: bool, workers: int) -> list[str]:
    """Checks one dataset and prints what was found -> faults. UserError or InputError where it cannot go on."""
    report, files = Report(), find_files(folder)
    check_headers(files, report)
    if files.manifest is not None:
        check_manifest(files, report)
    path = find_tokenizer(files, option)
    model = path.read_bytes()
    given = hashlib.sha256(model).hexdigest()
    made = files.manifest["tokenizer"]["sha256"] if files.manifest is not None else given
    train_gpt.require(made == given, f"{path}: the shards were made with tokenizer {made[:12]}, this is {given[:12]}: "
                      "name the right one with --tokenizer")
    tokenizer: Any = prepare.load_tokenizer(model, str(path))
    config = train_gpt.Config(data_path=str(folder), tokenizer_path=str(path), vocab_size=tokenizer.vocab_size(),
                              max_leaked_documents=sys.maxsize)
    world = train_gpt.World(0, 1, train_gpt.torch.device("cpu"), train_gpt.torch.float32)
    data = train_gpt.open_dataset(config, world)
    report.say("tokenizer", f"{tokenizer.vocab_size():,} pieces, sha256 {data.tokenizer_sha256}")
    sizes = None
    if full:
        val = train_gpt.TokenStream(files.val)
        read = functools.partial(read_batch, str(path), data.tokenizer_sha256, *train_gpt.byte_table(tokenizer)[:2])
        work = functools.partial(read, find_mode(files, tokenizer, val, read))
        sizes = check_documents(files, "val", val, work, workers, report)
        check_documents(files, "train", data.train, work, workers, report)
    check_bytes(files, data, tokenizer, sizes, report)
    check_split(files, data, report)
    print(f"data_fingerprint:{data.fingerprint} {folder}")
    return report.faults


def main(arguments: list[str] | None = None) -> int:
    parser = prepare.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="folder of fineweb_train_*.bin and fineweb_val_*.bin")
    add("--tokenizer", type=Path, metavar="MODEL", help="default: the manifest's, or the published name, in "
        "DIR/../../tokenizers")
    add("--full", action="store_true", help="decode and encode again every document of both sides")
    add("--workers", type=prepare.positive, default=os.cpu_count() or 1, help="processes (default: all cores)")
    config = parser.parse_args(arguments)
    try:
        faults = verify(config.folder, config.tokenizer, config.full, config.workers)
    except (prepare.InputError, train_gpt.UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenProcessPool:
        print("error: a worker process died (out of memory?); take fewer --workers and start again", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if faults:
        print(f"error: {config.folder}: {len(faults)} faults, first: {faults[0]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
