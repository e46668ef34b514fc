"""data/prepare.py: any text -> tokenizer, shards, manifest. Shards are read here by an independent reader."""
import argparse
import contextlib
import errno
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import sentencepiece
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import prepare  # noqa: E402

import train_gpt  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")
SCRIPT = ROOT / "data" / "prepare.py"
STDLIB = Path(sysconfig.get_path("stdlib"))
MODULES = ("ast", "bisect", "csv", "heapq", "queue", "sched", "shelve", "textwrap")
MARK = "\u2581"
ODD = ["caf\u00e9 \U0001f642 \U0001f469\u200d\U0001f469\u200d\U0001f467 \u6f22\u5b57\n", "a\r\nb\rc\td\n\n",
       "x  y   z    \n", "nul \0 in text", "  spaces around  ", "\ufeffmark first",
       "<s></s><pad><unk><0x0A> 2024 12345 2024\n", "\n", " ", "\ufb01 \uff21 e\u0301 \u2585"]
LOST = [f"one {MARK} mark", MARK]
SETTINGS = ("--vocab-size", "400", "--val-docs", "5")


def real_texts(size: int = 1500) -> list[str]:
    """Pieces of this Python's own source files."""
    sources = [(STDLIB / f"{name}.py").read_text(encoding="utf-8") for name in MODULES]
    return [source[i:i + size] for source in sources for i in range(0, len(source), size)]


REAL = real_texts()
TEXTS = REAL[:60] + ODD + REAL[:3] + LOST + REAL[60:80] + ["", *ODD[:2]]


class Result(NamedTuple):
    folder: Path
    model: Path
    manifest: dict
    stdout: str

    @property
    def tokenizer(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=self.model.read_bytes())

    def shards(self, side: str) -> list[np.ndarray]:
        return [read_shard(path) for path in sorted(self.folder.glob(f"fineweb_{side}_[0-9]*.bin"))]

    def documents(self, side: str) -> list[str]:
        """Decoded texts of all documents, in order."""
        tokens = np.concatenate(self.shards(side))
        starts = np.flatnonzero(tokens == 1)
        assert starts[0] == 0
        return self.tokenizer.decode([part[1:].tolist() for part in np.split(tokens, starts[1:])])


def read_shard(path: Path) -> np.ndarray:
    """A shard by the format's definition, with nothing of the program."""
    data = path.read_bytes()
    header = np.frombuffer(data[:1024], "<i4")
    assert header[:2].tolist() == [20240520, 1] and not header[3:].any()
    assert len(data) == 1024 + 2 * header[2] and header[2] > 0
    return np.frombuffer(data[1024:], "<u2").astype(int)


def call(*arguments) -> tuple[int, str, str]:
    """The command in this process with one worker -> exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = prepare.main([*map(str, arguments), "--workers", "1"])
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def make(out: Path, *arguments) -> Result:
    """A run that must succeed."""
    code, stdout, stderr = call(*arguments, "--name", "d", "--out", out)
    assert (code, stderr) == (0, "")
    folder = out / "datasets" / "d"
    return Result(folder, out / "tokenizers" / "d.model", json.loads((folder / "manifest.json").read_bytes()), stdout)


def refused(*arguments, name: str = "d") -> str:
    """A run that must end with exit code 2 and one line of error -> that line."""
    code, _, stderr = call(*arguments, "--name", name)
    assert code == 2 and stderr.startswith("error: ") and stderr.count("\n") == 1 and stderr.endswith("\n"), stderr
    return stderr


def write_jsonl(path: Path, texts, key: str = "text") -> Path:
    lines = b"".join(json.dumps({"id": i, key: text}).encode() + b"\n" for i, text in enumerate(texts))
    path.write_bytes(zstandard.compress(lines) if path.suffix == ".zst" else lines)
    return path


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def stamps(root: Path) -> dict[str, tuple[int, int]]:
    """What changes when a file is written again, even with the same bytes."""
    return {str(path.relative_to(root)): (path.stat().st_mtime_ns, path.stat().st_ino) for path in root.rglob("*")}


def expected(texts: list[str], val_docs: int = 0, val_first: int = 0, seed: int = 1337) -> tuple[list[str], list[str]]:
    """(training, validation) documents by the rule in README.md, before those that fail the round trip are dropped."""
    texts = [text for text in texts if text]

    def key(text: str) -> bytes:
        return hashlib.sha256(f"{seed}:".encode() + hashlib.sha256(text.encode()).digest()).digest()

    chosen = set(texts[:val_first] if val_first else sorted(set(texts), key=key)[:val_docs])
    val = texts[:val_first] if val_first else [text for text in dict.fromkeys(texts) if text in chosen]
    return [text for text in texts if text not in chosen], val


def lossless(texts: list[str]) -> list[str]:
    return [text for text in texts if MARK not in text]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "texts.jsonl", TEXTS)


@pytest.fixture(scope="module")
def done(corpus, tmp_path_factory) -> Result:
    """A finished dataset with many small shards. Tests only read it."""
    return make(tmp_path_factory.mktemp("done"), corpus, *SETTINGS, "--shard-tokens", 3000)


@pytest.fixture
def copy(done, tmp_path) -> Path:
    """The same in a folder that a test may change."""
    shutil.copytree(done.folder.parent.parent, tmp_path / "out")
    return tmp_path / "out"


def normalizing_model(path: Path) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(REAL).split("\n")), model_writer=model, model_type="bpe", vocab_size=400,
        byte_fallback=True, normalization_rule_name="nmt_nfkc", add_dummy_prefix=True, pad_id=0, bos_id=1, eos_id=2,
        unk_id=3, character_coverage=0.99, num_threads=1, minloglevel=2)
    path.write_bytes(model.getvalue())
    return path


# --- round trip
@pytest.fixture(scope="module")
def round_trip(done):
    def check(text: str) -> None:
        (tokens, counts, reason), = prepare.encode_batch(
            str(done.model), done.manifest["tokenizer"]["sha256"], None, True,
            [prepare.Document(0, 0, Path("x"), text.encode())])
        assert tokens.dtype == np.uint16 and tokens[0] == 1 and counts is None
        if MARK in text:
            assert reason is not None
        else:
            assert reason is None and not {0, 1, 2, 3} & set(tokens[1:].tolist())
            assert done.tokenizer.decode(tokens[1:].tolist()) == text
    return check


@pytest.mark.parametrize("name", ["argparse", "html/entities", "encodings/cp037", "stringprep", "this"])
def test_real_text_survives(name, round_trip):
    round_trip((STDLIB / f"{name}.py").read_bytes().decode())


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.text(st.characters(codec="utf-8"), max_size=20),
                          st.sampled_from([*ODD, *LOST, "\0", "\r", "\t", "   ", " \n ", "\u2028", "1" * 40])))
       .map("".join))
@example(MARK * 3)
@example(" " + MARK)
@example("\0" * 5)
def test_any_text_survives_or_is_dropped(round_trip, text):
    round_trip(text)


def test_a_document_with_the_space_mark_is_dropped_named_and_counted(corpus, done, tmp_path):
    assert not [text for side in ("train", "val") for text in done.documents(side) if MARK in text]
    assert done.manifest["dropped"]["failed_round_trip"] == len(LOST)
    named = [line for line in done.stdout.splitlines() if line.startswith("dropped /")]
    assert len(named) == len(LOST) and all(str(corpus) in line and "U+2581" in line for line in named)
    lossy = make(tmp_path, corpus, *SETTINGS, "--allow-lossy")
    assert lossy.manifest["dropped"]["failed_round_trip"] == 0 and "one   mark" in lossy.documents("train")


# --- tokenizer
def test_the_tokenizer_has_the_promised_settings(done):
    tokenizer = done.tokenizer
    assert (tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id()) == (0, 1, 2, 3)
    assert tokenizer.vocab_size() == 400
    pieces = [tokenizer.id_to_piece(i) for i in range(400)]
    assert [piece for i, piece in enumerate(pieces) if tokenizer.is_byte(i)] == [f"<0x{i:02X}>" for i in range(256)]
    assert not tokenizer.encode("self", out_type=str)[0].startswith(MARK)
    assert tokenizer.encode("\ufb01 ", out_type=str) == ["<0xEF>", "<0xAC>", "<0x81>", MARK]
    config = argparse.Namespace(vocab_size=1000, character_coverage=0.9999, like=None, caseops=None)
    model = prepare.train_tokenizer([*REAL, "in 2024 and 1999\n" * 1000], config)
    larger = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [larger.id_to_piece(i) for i in range(1000) if not larger.is_byte(i)]
    assert {piece for piece in pieces if any(c.isdigit() for c in piece)} == set("0123456789")
    assert larger.encode("20241", out_type=str) == list("20241")
    assert any(MARK in piece.strip(MARK) for piece in pieces), "pieces may cross spaces"
    assert any("\n" in piece.strip("\n") for piece in pieces), "pieces may cross line ends"


def test_the_tokenizer_sees_training_documents_only(tmp_path):
    texts = ["qqqqzzzz" * 200, *REAL[:40]]
    result = make(tmp_path, write_jsonl(tmp_path / "a.jsonl", texts), "--vocab-size", "400", "--val-first", 1)
    assert not [i for i in range(400) if "zz" in result.tokenizer.id_to_piece(i)]


def test_the_sample_of_the_tokenizer_is_bounded(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", REAL[:40])
    whole = make(tmp_path / "1", source, *SETTINGS)
    part = make(tmp_path / "2", source, *SETTINGS, "--tokenizer-sample-bytes", 20_000)
    assert "from 35 documents" in whole.stdout and "from 13 documents" in part.stdout
    assert part.documents("train") == whole.documents("train")


# --- shards
SHORT = [text[:40] for text in REAL[:12]]


@pytest.mark.parametrize("shard_tokens, texts, options", [
    (1, [*LOST, *SHORT, *ODD], ("--tokenizer", "given", "--allow-lossy")),
    (7, [*SHORT, *ODD], ("--tokenizer", "given")),
    (500, [*LOST, *REAL[:15], *LOST, *REAL[15:30], *ODD, *LOST], ("--vocab-size", 400))])
def test_shards_hold_exactly_the_documents_in_order(done, tmp_path, shard_tokens, texts, options):
    options = [done.model if word == "given" else word for word in options]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    result = make(tmp_path / "out", source, "--val-docs", 3, "--shard-tokens", shard_tokens, *options)
    for side, wanted in zip(("train", "val"), expected(texts, val_docs=3)):
        shards = result.shards(side)
        assert {len(shard) for shard in shards[:-1]} <= {shard_tokens} and 0 < len(shards[-1]) <= shard_tokens
        assert [path.name for path in sorted(result.folder.glob(f"fineweb_{side}_*"))] == [
            f"fineweb_{side}_{i:06d}.bin" for i in range(len(shards))]
        if shard_tokens == 1:
            wanted = [text.replace(MARK, " ") for text in wanted]
        assert result.documents(side) == lossless(wanted)
        tokens = [1]
        for text in lossless(wanted):
            tokens += [*result.tokenizer.encode(text), 1]
        assert np.concatenate(shards).tolist() == tokens[:-1]
        assert len(shards) > 2 and any(shard[0] != 1 for shard in shards), "documents straddle shards"


# --- split
SIDES = st.tuples(st.sampled_from(["val_docs", "val_first", "val_fraction"]), st.integers(1, 6), st.floats(0.01, 0.99))


def split_of(names: list[int], option: str, value) -> tuple[list[int], list[int]]:
    keys = b"".join(hashlib.sha256(bytes([name])).digest() for name in names)
    config = argparse.Namespace(**{**dict.fromkeys(("val_docs", "val_first", "val_fraction")), option: value})
    sides, firsts = prepare.split(np.frombuffer(keys, ">u8").reshape(-1, 4), config)
    return sides.tolist(), firsts.tolist()


@given(st.lists(st.integers(0, 7), min_size=1, max_size=14), SIDES, st.randoms(use_true_random=False))
def test_the_split_follows_its_rule(names, how, rng):
    option, count, share = how
    value = share if option == "val_fraction" else count
    order = sorted(set(names), key=lambda name: hashlib.sha256(bytes([name])).digest())
    if option == "val_fraction":
        count = max(1, int(share * len(order) + 0.5))
    chosen = list(range(min(count, len(names)))) if option == "val_first" else [names.index(n) for n in order[:count]]
    wanted = [prepare.DUPLICATE if name in {names[i] for i in chosen} else prepare.TRAIN for name in names]
    for i in chosen:
        wanted[i] = prepare.VAL
    if prepare.TRAIN not in wanted:
        with pytest.raises(prepare.InputError, match="no training text is left"):
            split_of(names, option, value)
        return
    sides, firsts = split_of(names, option, value)
    assert sides == wanted and firsts == [names.index(name) for name in order]
    if option != "val_first":
        moved = rng.sample(names, len(names))
        sides_moved, _ = split_of(moved, option, value)
        assert sorted(zip(names, sides)) == sorted(zip(moved, sides_moved))


@pytest.mark.parametrize("options, rule", [
    (("--val-docs", 5), {"val_docs": 5}), (("--val-docs", 5, "--seed", 7), {"val_docs": 5, "seed": 7}),
    (("--val-fraction", 0.2), {"val_docs": 18}), ((), {"val_docs": 1}),
    (("--val-first", 62), {"val_first": 62})])
def test_the_options_of_the_split(corpus, done, tmp_path, options, rule):
    result = make(tmp_path, corpus, "--tokenizer", done.model, *options, "--allow-lossy")
    train, val = ([text.replace(MARK, " ") for text in side] for side in expected(TEXTS, **rule))
    assert (result.documents("train"), result.documents("val")) == (train, val)
    present = sum(map(bool, TEXTS))
    assert result.manifest["dropped"]["duplicates_of_validation"] == present - len(train) - len(val)


def test_a_fraction_is_of_the_different_texts(corpus):
    assert len(set(filter(None, TEXTS))) == 92  # 0.2 of it is 18


def test_no_text_stands_on_both_sides_wherever_documents_stand(tmp_path):
    texts = [*REAL[:30], *REAL[:30], *REAL[:10]]
    results = []
    for seed in range(3):
        random.Random(seed).shuffle(texts)
        source = write_jsonl(tmp_path / f"{seed}.jsonl", texts)
        result = make(tmp_path / str(seed), source, "--vocab-size", "400", "--val-docs", 8)
        train, val = result.documents("train"), result.documents("val")
        assert len(val) == 8 and not set(train) & set(val)
        assert result.manifest["dropped"]["duplicates_of_validation"] == sum(map(texts.count, val)) - 8 > 0
        results.append((sorted(train), sorted(val)))
    assert results[0] == results[1] == results[2]


# --- sources
def test_every_kind_of_source(tmp_path):
    (tmp_path / "in" / "sub" / "site-packages").mkdir(parents=True)
    files = {"b.txt": "from b\r\n", "a.md": "# from a", "sub/c.txt": "from c", "sub/skipped.rst": "no", "z.txt": "",
             "sub/site-packages/d.txt": "no", "bad.txt": None}
    for name, text in files.items():
        (tmp_path / "in" / name).write_bytes(b"\xff\xfe" if text is None else text.encode())
    write_jsonl(tmp_path / "in" / "sub" / "a.jsonl", ["from jsonl", "", "second \U0001f642"])
    lines = write_jsonl(tmp_path / "lines.jsonl", ["frame one", *REAL[:20]]).read_bytes()
    half = len(lines) // 2
    skippable = b"\x50\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"abc"
    (tmp_path / "z.jsonl.zst").write_bytes(
        zstandard.compress(lines[:half]) + skippable + zstandard.compress(b"\n \n" if lines[half - 1] == 10 else b"")
        + zstandard.compress(lines[half:] + b'{"text": "last, no line end"}'))
    odd = tmp_path / "odd.jsonl"
    odd.write_bytes(b'\n{"text": "\\ud800"}\n{"text": "\xff"}\n  \r\n{"text": "kept"}\r\n')
    sources = [tmp_path / "in", tmp_path / "z.jsonl.zst", odd, tmp_path / "in" / "b.txt"]
    result = make(tmp_path / "out", *sources, "--vocab-size", 400, "--val-first", 1)
    assert result.documents("val") == ["# from a"]
    assert result.documents("train") == ["from b\r\n", "from jsonl", "second \U0001f642", "from c", "frame one",
                                         *REAL[:20], "last, no line end", "kept", "from b\r\n"]
    assert result.manifest["dropped"] == {"empty": 2, "not_utf8": 3, "duplicates_of_validation": 0,
                                          "failed_round_trip": 0}
    rows = [(row["name"], row["files"], row["documents"]) for row in result.manifest["sources"]]
    assert rows == [("in", 6, 5), ("z.jsonl.zst", 1, 22), ("odd.jsonl", 1, 1), ("b.txt", 1, 1)]
    assert [row["bytes"] for row in result.manifest["sources"]][2:] == [4, 8]


def test_a_large_zst_is_read_piece_by_piece(tmp_path):
    texts = [random.Random(i).randbytes(i * 9).hex() for i in range(400)]
    path = write_jsonl(tmp_path / "a.jsonl.zst", texts)
    assert path.stat().st_size > 2 << 18
    read = list(prepare.read_file(path, "text"))
    assert [text.decode() for text, _ in read] == texts
    positions = [position for _, position in read]
    assert positions == sorted(positions) and positions[0] < positions[-1] == path.stat().st_size


def test_stdlib_is_this_pythons_own_source(tmp_path):
    files = prepare.find_source("stdlib").files
    assert STDLIB / "argparse.py" in files and not [path for path in files if "site-packages" in path.parts]
    result = make(tmp_path, "stdlib", "--vocab-size", 600, "--val-docs", 2, "--max-docs", 30)
    texts = [path.read_bytes().decode() for path in files[:40] if path.stat().st_size][:30]
    assert result.documents("train") == expected(texts, val_docs=2)[0]


def test_text_key_and_max_docs(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl.zst", ["", *REAL[:60]], key="body")
    result = make(tmp_path, source, *SETTINGS, "--text-key", "body", "--max-docs", 31)
    assert sorted(result.documents("train") + result.documents("val")) == sorted(REAL[:31])
    assert result.manifest["dropped"]["empty"] == 1
    assert "'text'" in refused(source, *SETTINGS, "--out", tmp_path / "2")


# --- a given tokenizer
def test_a_given_tokenizer_is_taken_as_it_is(corpus, done, tmp_path):
    model = shutil.copy(done.model, tmp_path / "some.model")
    result = make(tmp_path, corpus, "--tokenizer", model, "--val-first", 4, "--vocab-size", 7, "--allow-lossy")
    assert result.model.read_bytes() == done.model.read_bytes()
    assert result.manifest["tokenizer"] == {**done.manifest["tokenizer"], "trained_here": False}
    assert result.documents("val") == TEXTS[:4] and "VOCAB_SIZE=400" in result.stdout


def test_a_given_tokenizer_may_fail_for_one_percent(done, tmp_path):
    texts = [f"document {i}" for i in range(200)]
    for count, accepted in ((2, True), (3, False)):
        texts[-count:] = [MARK + str(i) for i in range(count)]
        source, out = write_jsonl(tmp_path / f"{count}.jsonl", texts), tmp_path / str(count)
        if accepted:
            result = make(out, source, "--val-first", 4, "--tokenizer", done.model)
            assert result.manifest["dropped"]["failed_round_trip"] == 2
        else:
            error = refused(source, "--val-first", 4, "--tokenizer", done.model, "--out", out)
            assert "changes 3 of 200 documents" in error


def test_a_normalizing_tokenizer_is_refused_unless_allowed(tmp_path):
    model, source = normalizing_model(tmp_path / "n.model"), write_jsonl(tmp_path / "a.jsonl", REAL[:30])
    arguments = (source, "--tokenizer", model, "--val-first", 3, "--out", tmp_path)
    for _ in range(2):
        assert "--allow-lossy" in refused(*arguments)
        assert not (tmp_path / "datasets" / "d" / "manifest.json").exists()
    result = make(tmp_path, *arguments[:-2], "--allow-lossy", "--force")
    assert result.manifest["options"]["allow_lossy"] and result.manifest["dropped"]["failed_round_trip"] == 0
    wanted = [result.tokenizer.decode(result.tokenizer.encode(text)) for text in REAL[:30]]
    assert result.documents("val") == wanted[:3] != REAL[:3] and result.documents("train") == wanted[3:]


# --- manifest and trainer
def test_the_manifest_says_what_is_there(corpus, done):
    manifest, sides = done.manifest, expected(TEXTS, val_docs=5)
    for side, texts in zip(("train", "val"), map(lossless, sides)):
        said, joined = manifest[side], "".join(texts).encode()
        assert (said["documents"], said["bytes"]) == (len(texts), len(joined))
        assert said["sha256_text"] == hashlib.sha256(joined).hexdigest()
        paths = sorted(done.folder.glob(f"fineweb_{side}_*.bin"))
        assert said["tokens"] == sum(map(len, done.shards(side)))
        assert said["shards"] == [{"file": path.name, "tokens": len(read_shard(path)),
                                   "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in paths]
    assert manifest["tokenizer"] == {"file": "d.model", "vocab_size": 400, "trained_here": True,
                                     "sha256": hashlib.sha256(done.model.read_bytes()).hexdigest()}
    present = [text for text in TEXTS if text]
    assert manifest["dropped"] == {"empty": 1, "not_utf8": 0, "failed_round_trip": len(LOST),
                                   "duplicates_of_validation": len(present) - sum(map(len, sides))}
    source, = manifest["sources"]
    assert (source["name"], source["files"], source["documents"]) == ("texts.jsonl", 1, len(present))
    assert source["bytes"] == sum(len(text.encode()) for text in present)
    assert manifest["options"] == {
        "vocab_size": 400, "val_docs": 5, "val_fraction": None, "val_first": None, "shard_tokens": 3000,
        "tokenizer_sample_bytes": 8_000_000, "character_coverage": 0.9999, "max_docs": None, "text_key": "text",
        "seed": 1337, "allow_lossy": False, "caseops": None, "like": None}
    assert {path.name for path in done.folder.iterdir()} == {"manifest.json"} | {
        shard["file"] for side in ("train", "val") for shard in manifest[side]["shards"]}


def test_the_trainer_takes_the_result(done):
    line = done.stdout.splitlines()[-1]
    assert line.startswith("train with: ")
    config, _ = train_gpt.Config.from_env(dict(word.split("=", 1) for word in line.split()[2:]))
    world = train_gpt.World(0, 1, train_gpt.torch.device("cpu"), train_gpt.torch.float32)
    dataset = train_gpt.open_dataset(config, world)
    val = lossless(expected(TEXTS, val_docs=5)[1])
    assert dataset.val_bytes.sum() == len("".join(val).encode()) == done.manifest["val"]["bytes"]
    assert dataset.leaked_documents == 0
    assert dataset.tokenizer_sha256 == done.manifest["tokenizer"]["sha256"]
    assert len(dataset.train) == done.manifest["train"]["tokens"]


# --- the same bytes, kills, damage
class Killed(BaseException):
    pass


def crashed_at(monkeypatch, point: int, *arguments) -> bool:
    """Runs the command up to the `point`-th half of a rename or removal, like kill -9 -> whether it came so far."""
    step = 0

    def half() -> None:
        nonlocal step
        step += 1
        if step == point:
            raise Killed

    def wrapped(operation):
        def run(*args, **options):
            half()
            operation(*args, **options)
            half()
        return run

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", wrapped(os.replace))
        patch.setattr(Path, "unlink", wrapped(Path.unlink))
        try:
            call(*arguments)
        except Killed:
            return True
        return False


@pytest.mark.parametrize("before", ["nothing", "another dataset", "a damaged one"])
def test_a_kill_at_any_file_operation_changes_nothing(done, tmp_path, monkeypatch, before):
    monkeypatch.setattr(prepare, "MAX_LOSSY_FRACTION", 1)
    source, out = write_jsonl(tmp_path / "a.jsonl", [*LOST, *REAL[:12], *REAL[:4], "", *ODD, *LOST]), tmp_path / "out"
    options = (source, "--tokenizer", done.model, "--val-first", 5, "--shard-tokens", 3000)
    whole = tree(make(tmp_path / "whole", *options).folder.parent.parent)
    other = make(tmp_path / "other", source, *SETTINGS, "--shard-tokens", 1700).folder.parent.parent
    if before == "another dataset":
        options += ("--force",)
    point = 0
    while True:
        point += 1
        shutil.rmtree(out, ignore_errors=True)
        if before == "another dataset":
            shutil.copytree(other, out)
        elif before == "a damaged one":
            shutil.copytree(tmp_path / "whole", out)
            (out / "datasets" / "d" / "fineweb_train_000001.bin").write_bytes(b"")
        came = crashed_at(monkeypatch, point, *options, "--name", "d", "--out", out)
        state = out / "datasets" / "d" / "prepare_state.json"
        shards = json.loads(state.read_bytes())["train"] if state.exists() and before == "nothing" else []
        kept = {shard["file"]: stamps(state.parent)[shard["file"]] for shard in shards}
        make(out, *options)
        assert tree(out) == whole, point
        assert kept.items() <= stamps(state.parent).items(), "a finished shard was written again"
        if not came:
            break
    assert point > 12


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A megabyte: several batches for each worker."""
    texts = [text for repeat in range(9) for text in (f"{repeat}\n{text}" for text in real_texts(4000))]
    return write_jsonl(tmp_path_factory.mktemp("large") / "a.jsonl.zst", [*texts, *LOST, "", *texts[:20], *ODD])


def command(source: Path, out: Path, workers: int) -> list[str]:
    return [sys.executable, str(SCRIPT), str(source), "--name", "d", "--out", str(out), "--workers", str(workers),
            "--vocab-size", "400", "--val-docs", "30", "--shard-tokens", "20000"]


@pytest.fixture
def start():
    """Starts the command; what hangs at the end of the test is killed."""
    processes = []

    def run(source: Path, out: Path, workers: int, *more: str) -> subprocess.Popen:
        process = subprocess.Popen([*command(source, out, workers), *more], stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True, start_new_session=True)
        processes.append(process)
        return process
    yield run
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_until(process: subprocess.Popen, condition) -> None:
    end = time.monotonic() + 60
    while not condition() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.fixture(scope="module")
def two_workers(large, tmp_path_factory) -> dict[str, bytes]:
    """Files of a run from the command line with two worker processes."""
    out = tmp_path_factory.mktemp("two")
    done = subprocess.run(command(large, out, 2), check=False, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "encode: 100 % of" in done.stdout and done.stdout.splitlines()[-1].startswith("train with: ")
    return tree(out)


def test_one_worker_and_two_give_the_same_bytes(large, two_workers, tmp_path):
    make(tmp_path, large, *command(large, tmp_path, 1)[-6:])
    assert tree(tmp_path) == two_workers and len(two_workers) > 15


def test_kill_and_start_again(start, large, two_workers, tmp_path):
    """kill -9 of the parent at random moments: workers end too, finished shards stay, the bytes are the same."""
    folder, rng, kept = tmp_path / "datasets" / "d", random.Random(os.urandom(8)), {}
    for attempt, shards in enumerate((0, rng.randint(1, 4), rng.randint(6, 10))):
        process = start(large, tmp_path, 1 + attempt % 2)
        wait_until(process, lambda: len(list(folder.glob("fineweb_train*"))) >= shards)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, 0.4 if shards == 0 else 0.05))
        process.kill()
        process.communicate(timeout=30)  # pipes close when the last worker has ended
        if (folder / "prepare_state.json").exists():
            state = json.loads((folder / "prepare_state.json").read_bytes())
            now = {shard["file"]: stamps(folder)[shard["file"]] for side in ("train", "val") for shard in state[side]}
            assert kept.items() <= now.items()
            kept = now
    process = start(large, tmp_path, 2)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, "") and "resumed: " in stdout
    assert tree(tmp_path) == two_workers and kept and kept.items() <= stamps(folder).items()


def workers_of(process: subprocess.Popen) -> list[int]:
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return []


def ignores_interrupts(pid: int) -> bool:
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(status["SigIgn"], 16) & 1 << signal.SIGINT - 1)


def test_an_interrupt_is_told_in_one_line(start, large, tmp_path):
    process = start(large, tmp_path, 2, "--shard-tokens", "300")  # a thousand shards: it takes a while
    wait_until(process, lambda: len(workers := workers_of(process)) == 2 and all(map(ignores_interrupts, workers)))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (130, "interrupted; the same command continues with what is finished\n")


def test_a_dead_worker_is_told_in_one_line(start, large, two_workers, tmp_path):
    process = start(large, tmp_path, 2)
    wait_until(process, lambda: workers_of(process))
    os.kill(workers_of(process)[0], signal.SIGKILL)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 2 and stderr.startswith("error: a worker process died") and stderr.count("\n") == 1
    process = start(large, tmp_path, 1)
    assert process.communicate(timeout=60)[1] == "" and tree(tmp_path) == two_workers


@pytest.mark.parametrize("first", [OSError("handle is closed"), ValueError("bad value(s) in fds_to_keep")])
@pytest.mark.parametrize("second", [BrokenProcessPool("a worker died"), OSError(errno.EAGAIN, "no more processes")])
def test_a_worker_that_dies_while_another_starts(monkeypatch, first, second):
    """What CPython's pool raises then is no reason; a second call tells the real one."""
    errors = [first, second]

    class Pool:
        def __init__(self, *arguments, **options): ...
        def shutdown(self, **options): ...
        def submit(self, *arguments): raise errors.pop(0)

    monkeypatch.setattr(prepare, "ProcessPoolExecutor", Pool)
    with pytest.raises(type(second)) as caught:
        list(prepare.map_ordered(str, [1], 2))
    assert caught.value is second and not errors


def test_a_complete_dataset_is_left_alone(corpus, copy):
    before = stamps(copy)
    for more in ((), ("--force",)):
        again = make(copy, corpus, *SETTINGS, "--shard-tokens", 3000, *more)
        assert "complete already" in again.stdout and stamps(copy) == before


@pytest.mark.parametrize("name, damage", [
    ("datasets/d/fineweb_train_000000.bin", lambda data: data[:2000] + bytes([data[2000] ^ 1]) + data[2001:]),
    ("datasets/d/fineweb_train_000002.bin", None), ("datasets/d/fineweb_val_000000.bin", lambda data: data[:-2]),
    ("tokenizers/d.model", lambda data: data[:-1] + b"?"), ("tokenizers/d.model", None)])
def test_a_damaged_file_is_made_again(corpus, done, copy, name, damage):
    if damage is None:
        (copy / name).unlink()
    else:
        (copy / name).write_bytes(damage((copy / name).read_bytes()))
    again = make(copy, corpus, *SETTINGS, "--shard-tokens", 3000)
    assert "damaged or missing" in again.stdout and tree(copy) == tree(done.folder.parent.parent)


@pytest.mark.parametrize("more", [("--seed", 2), ("--vocab-size", 401), ("--max-docs", 80), ("--shard-tokens", 3001)])
def test_another_request_is_refused_or_replaces_by_force(corpus, copy, tmp_path, more):
    (copy / "datasets" / "d" / "fineweb_val_bytes_000000.bin").write_bytes(b"an old sidecar")
    before = stamps(copy)
    options = (corpus, *SETTINGS, "--shard-tokens", 3000, *more)
    assert "--force" in refused(*options, "--out", copy) and stamps(copy) == before
    make(copy, *options, "--force")
    assert tree(copy) == tree(make(tmp_path / "fresh", *options).folder.parent.parent)


def test_changed_sources_and_tokenizers_are_another_request(done, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", REAL[:30])
    model, out = Path(shutil.copy(done.model, tmp_path / "t.model")), tmp_path / "out"
    options = (source, "--tokenizer", model, "--val-first", 2)
    make(out, *options)
    model.write_bytes(make(tmp_path / "2", source, *SETTINGS).model.read_bytes())
    assert "belongs to another request" in refused(*options, "--out", out)
    shutil.copy(done.model, model)
    assert "complete already" in make(out, *options).stdout
    write_jsonl(source, REAL[:31])
    assert "belongs to another request" in refused(*options, "--out", out)


def test_a_source_edited_after_a_kill_is_prepared_afresh(done, tmp_path, monkeypatch):
    """The same size, so the request is the same: shards of both texts must not mix."""
    source = tmp_path / "a.jsonl"
    options = (source, "--val-docs", 3, "--vocab-size", 400, "--shard-tokens", 3000)
    for more in ((), ("--tokenizer", done.model)):
        write_jsonl(source, REAL[:40])
        out = tmp_path / f"out{len(more)}"
        crashed_at(monkeypatch, 25, *options, *more, "--name", "d", "--out", out)
        assert len(list((out / "datasets" / "d").glob("fineweb_train_*"))) > 1
        write_jsonl(source, [text.replace("self", "SELF") for text in REAL[:40]])
        assert "the sources changed" in make(out, *options, *more).stdout
        assert tree(out) == tree(make(tmp_path / f"fresh{len(more)}", *options, *more).folder.parent.parent)


@pytest.mark.parametrize("after", [[*REAL[:30], "grown"], REAL[:29], [*REAL[:29], REAL[29].swapcase()]])
def test_a_source_that_changes_meanwhile_is_told(tmp_path, monkeypatch, after):
    source, split = write_jsonl(tmp_path / "a.jsonl", REAL[:30]), prepare.split
    options = (source, "--vocab-size", 400, "--val-docs", 3, "--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "split", lambda *arguments: (write_jsonl(source, after), split(*arguments))[1])
        assert f"{source}: changed while it was read" in refused(*options)
    write_jsonl(source, REAL[:30])
    make(tmp_path / "out", *options[:-2])


def test_foreign_files_are_not_touched(corpus, tmp_path):
    for name in ("tokenizers/d.model", "datasets/d/fineweb_train_000000.bin", "datasets/d/manifest.json"):
        out = tmp_path / Path(name).name
        (out / name).parent.mkdir(parents=True)
        for content in (b"foreign", b"[1]", b"{}"):
            (out / name).write_bytes(content)
            assert "--force" in refused(corpus, *SETTINGS, "--out", out)
            assert tree(out) == {name: content}


def test_a_corrected_command_needs_no_force(corpus, tmp_path):
    for wrong in (("--vocab-size", 60000, "--val-docs", 5), ("--vocab-size", 400, "--val-docs", 5000)):
        refused(corpus, *wrong, "--out", tmp_path)
    make(tmp_path, corpus, *SETTINGS)


# --- mistakes
def test_the_remedy_for_a_vocabulary_of_the_wrong_size_works(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", REAL[:6])
    for wrong, word in ((20000, "take at most "), (262, "take at least ")):
        error = refused(source, "--vocab-size", wrong, "--val-docs", 1, "--out", tmp_path)
        right = error.split(word)[1].split()[0]
        make(tmp_path / right, source, "--vocab-size", right, "--val-docs", 1)


ZST = zstandard.compress(b"".join(json.dumps({"text": text}).encode() + b"\n" for text in REAL[:30]))
MISTAKES = {
    "missing path": ({}, "none.txt", ["none.txt: no such file"]),
    "extension": ({"a.csv": b"x"}, "a.csv", ["a.csv: unsupported extension", ".jsonl.zst"]),
    "no documents": ({"a.txt": b"", "b.txt": b"\xff"}, "a.txt b.txt", ["no documents (1 empty, 1 not UTF-8)"]),
    "empty folder": ({"in/a.rst": b"x"}, "in", ["no documents"]),
    "json": ({"a.jsonl": b'{"text": "x"}\n\n{"text": "y}\n'}, "a.jsonl",
             ["a.jsonl: line 3: malformed JSON", "column 13"]),
    "json in zst": ({"a.jsonl.zst": zstandard.compress(b'{"text": "x"}\n[')}, "a.jsonl.zst", ["zst: line 2: "]),
    "large number": ({"a.jsonl": b'{"text": "x", "id": ' + b"1" * 5000 + b"}"}, "a.jsonl", ["line 1: malformed JSON"]),
    "deep": ({"a.jsonl": b"[" * 100_000}, "a.jsonl", ["a.jsonl: line 1: malformed JSON"]),
    "no text": ({"a.jsonl": b'{"text": "x"}\n{"body": "y"}\n'}, "a.jsonl",
                ["line 2: no text under the key 'text'", "--text-key"]),
    "number as text": ({"a.jsonl": b'{"text": 3}'}, "a.jsonl", ["line 1: no text under"]),
    "no object": ({"a.jsonl": b'["text"]'}, "a.jsonl", ["line 1: no text under"]),
    "cut zst": ({"a.jsonl.zst": ZST[:-len(ZST) // 3]}, "a.jsonl.zst", ["a.jsonl.zst: not a whole zstd file"]),
    "last byte": ({"a.jsonl.zst": ZST[:-1]}, "a.jsonl.zst", ["a.jsonl.zst: not a whole zstd file"]),
    "cut in header": ({"a.jsonl.zst": ZST[:5]}, "a.jsonl.zst", ["a.jsonl.zst: not a whole zstd file"]),
    "second frame": ({"a.jsonl.zst": ZST + ZST[:-9]}, "a.jsonl.zst", ["a.jsonl.zst: not a whole zstd file"]),
    "no zst": ({"a.jsonl.zst": b'{"text": "x"}\n'}, "a.jsonl.zst", ["a.jsonl.zst: not a whole zstd file"]),
    "too many pieces": ({}, "ok.jsonl --vocab-size 30000", ["--vocab-size 30000: too large", "take at most"]),
    "too few pieces": ({}, "ok.jsonl --vocab-size 262", ["--vocab-size 262: too small", "take at least"]),
    "261": ({}, "ok.jsonl --vocab-size 261", ["--vocab-size 261: must be 262 to 65535"]),
    "65536": ({}, "ok.jsonl --vocab-size 65536", ["--vocab-size 65536: must be 262 to 65535"]),
    "no number": ({}, "ok.jsonl --vocab-size many", ["--vocab-size"]),
    "coverage": ({}, "ok.jsonl --character-coverage 2", ["--character-coverage 2.0: must be 0.98 to 1"]),
    "zero": ({}, "ok.jsonl --shard-tokens 0", ["--shard-tokens"]),
    "fraction": ({}, "ok.jsonl --val-fraction 1.0", ["--val-fraction"]),
    "two splits": ({}, "ok.jsonl --val-first 1 --val-docs 1", ["--val-docs", "--val-first"]),
    "all first": ({}, "ok.jsonl --val-first 30", ["--val-first 30: no training text is left of 30 documents"]),
    "all random": ({}, "ok.jsonl --val-docs 30", ["--val-docs 30: no training text is left of 30 documents"]),
    "all equal": ({"a.txt": b"x", "b.txt": b"x"}, "a.txt b.txt", ["no training text is left", "(1 different)"]),
    "all lossy": ({"a.txt": MARK.encode()}, "a.txt ok.jsonl --val-first 1 --vocab-size 400",
                  ["no document is left for val"]),
    "no tokenizer": ({}, "ok.jsonl --tokenizer none.model", ["--tokenizer none.model: no such file"]),
    "no model": ({"t.model": b"text"}, "ok.jsonl --tokenizer t.model", ["t.model: not a SentencePiece model"]),
    "empty model": ({"t.model": b""}, "ok.jsonl --tokenizer t.model", ["t.model: not a SentencePiece model"]),
    "out": ({"file": b""}, "ok.jsonl --out file/out --vocab-size 400", ["file/out", "Not a directory"]),
    "slash": ({}, "ok.jsonl --name a/b", ["--name a/b: letters"]),
    "dots": ({}, "ok.jsonl --name ..", ["--name ..: letters"]),
    "no sources": ({}, "", ["SOURCE"]),
    "unknown option": ({}, "ok.jsonl --vocabulary 3", ["--vocabulary"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_told_in_one_line(case, tmp_path, monkeypatch, capfd):
    files, arguments, words = MISTAKES[case]
    monkeypatch.chdir(tmp_path)
    for name, data in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(data)
    write_jsonl(Path("ok.jsonl"), REAL[:30])
    code, _, error = call("--name", "d", "--out", "out", *arguments.split())
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert all(word in error for word in words), error
    assert capfd.readouterr().err == "", "SentencePiece itself must not speak"


def limited(source: Path, out: Path, setup: str) -> subprocess.CompletedProcess:
    """The command after a line of shell that limits it."""
    line = f"{setup}; exec {sys.executable} {SCRIPT} {source} --name d --out {out} --workers 1 --vocab-size 400"
    return subprocess.run(["bash", "-c", line], check=False, capture_output=True, text=True, timeout=60)


def test_a_full_disk_is_told_and_leaves_nothing_half(tmp_path):
    source, out = write_jsonl(tmp_path / "a.jsonl", REAL), tmp_path / "out"
    done = limited(source, out, "ulimit -f 16")  # no file may grow over 16 KiB: the model fits, the shard does not
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"error: {out}: File too large; free space")
    assert not [name for name in tree(out) if "fineweb" in name and not name.endswith(".part")]
    make(out, source, "--vocab-size", 400)
    assert not [name for name in tree(out) if name.endswith(".part")]


@pytest.mark.parametrize("kind", ["dangling link", "pipe", "file", "folder"])
def test_what_cannot_be_read_is_not_left_out_silently(kind, tmp_path, monkeypatch):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    write_jsonl(tmp_path / "in" / "ok.jsonl", REAL[:30])
    path = tmp_path / "in" / "sub" / "a.txt"
    access, scandir = os.access, os.scandir
    if kind == "dangling link":
        path.symlink_to("/nowhere/at/all")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "file":  # root may read anything: the system's answers are changed
        path.write_text("text")
        monkeypatch.setattr(os, "access", lambda name, mode: name != path and access(name, mode))
    else:
        path = path.parent

        def refuse(name):
            if Path(name) == path:
                raise PermissionError(errno.EACCES, "Permission denied", str(name))
            return scandir(name)
        monkeypatch.setattr(os, "scandir", refuse)
    error = refused(tmp_path / "in", *SETTINGS, "--out", tmp_path / "out")
    assert f"{path}: " in error and ("neither a file" if kind in ("dangling link", "pipe") else "Permission") in error
    assert not (tmp_path / "out").exists()


def test_a_file_name_of_any_bytes_can_be_told(tmp_path):
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "ok.jsonl", REAL[:30])
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/in/\xff.txt")).write_text(MARK)
    done = limited(tmp_path / "in", tmp_path / "out", "export PYTHONIOENCODING=utf-8:strict")
    assert (done.returncode, done.stderr) == (0, "") and "\\udcff" in done.stdout


def test_the_command_line_tells_mistakes_and_help(tmp_path):
    for arguments, code in ((["--help"], 0), ([str(tmp_path / "none"), "--name", "d"], 2)):
        done = subprocess.run([sys.executable, SCRIPT, *arguments], check=False, capture_output=True, text=True,
                              cwd=tmp_path)
        assert done.returncode == code
        assert done.stderr.count("\n") == (code != 0) and "Traceback" not in done.stderr
        assert done.stdout.startswith("usage: ") == (code == 0)
    assert not list(tmp_path.iterdir())
