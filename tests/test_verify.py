"""data/verify.py: whole datasets pass with the trainer's fingerprint; every kind of damage is told in one line."""
import contextlib
import io
import json
import lzma
import re
import shutil
import subprocess
import sys
from pathlib import Path

import caseops
import numpy as np
import pytest
import sentencepiece
import verify
from hypothesis import given, settings
from hypothesis import strategies as st
from program import write_tokens
from test_prepare import ODD, REAL, ROOT, make, normalizing_model, read_shard, write_jsonl

import train_gpt

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")
T, A, C, E = caseops.OPERATORS
TEXTS = [*REAL[:40], *ODD, f"an {T} of the text {E}{A}", "The NASA  McDonald\n\nAT iPod", *REAL[40:60]]
KINDS = {"plain": ("--vocab-size", 400), "caseops": ("--vocab-size", 400, "--caseops"),
         "fused": ("--vocab-size", 400, "--caseops", "fused"), "byte260": ("--tokenizer", "byte260"),
         "lossy": ("--allow-lossy", "--tokenizer")}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> dict[str, Path]:
    """Finished datasets by kind. Tests only read them."""
    root = tmp_path_factory.mktemp("datasets")
    source = write_jsonl(root / "a.jsonl", TEXTS)
    model = normalizing_model(root / "n.model")
    return {kind: make(root / kind, source, "--val-docs", 12, "--shard-tokens", 3000, *options,
                       *([model] if kind == "lossy" else [])).folder for kind, options in KINDS.items()}


@pytest.fixture
def copy(datasets, tmp_path):
    """copy(kind) -> the dataset in a folder that a test may change."""
    def make_copy(kind: str) -> Path:
        shutil.copytree(datasets[kind].parent.parent, tmp_path / kind)
        return tmp_path / kind / "datasets" / "d"
    return make_copy


def model_of(folder: Path) -> Path:
    """A dataset's folder -> its tokenizer."""
    return folder.parent.parent / "tokenizers" / "d.model"


def check(folder: Path, *options) -> tuple[int, str, str]:
    """The command in this process -> exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = verify.main([str(folder), *map(str, options), "--workers", "1"])
    return code, out.getvalue(), err.getvalue()


def fault(folder: Path, *options) -> str:
    """A run that must find something -> the line of error."""
    code, _, err = check(folder, *options)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def change(path: Path, place: int, value: int) -> None:
    """Writes another number at a place of a shard."""
    numbers = read_shard(path)
    numbers[place] = value
    write_tokens(path, numbers)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_dataset_passes_with_the_trainers_fingerprint(datasets, kind, full):
    folder = datasets[kind]
    code, out, err = check(folder, *(["--full"] if full else []))
    assert (code, err) == (0, ""), out
    model = model_of(folder)
    size = sentencepiece.SentencePieceProcessor(model_file=str(model)).vocab_size()
    config, _ = train_gpt.Config.from_env({"DATA_PATH": str(folder), "TOKENIZER_PATH": str(model),
                                           "VOCAB_SIZE": str(size)})
    world = train_gpt.World(0, 1, train_gpt.torch.device("cpu"), train_gpt.torch.float32)
    fingerprint = train_gpt.open_dataset(config, world).fingerprint
    assert out.splitlines()[-1] == f"data_fingerprint:{fingerprint} {folder}"
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert "names, counts and hashes of" in out and "0 of 12 validation documents occur in training" in out
    if full:
        for side in ("train", "val"):
            found = re.search(rf"{side}: ([\d,]+) documents, ([\d,]+) bytes; 0 are", out)
            documents, size = (int(number.replace(",", "")) for number in found.groups())
            assert documents == manifest[side]["documents"]
            assert size == manifest[side]["bytes"] or kind == "lossy"


@pytest.mark.parametrize("kind", ["plain", "caseops", "fused"])
def test_without_a_manifest_the_shards_speak_for_themselves(copy, kind):
    folder = copy(kind)
    (folder / "manifest.json").unlink()
    model = model_of(folder)
    other = model.rename(model.with_name("other.model"))
    assert f"{model}: no tokenizer found; name the one of these shards with --tokenizer" in fault(folder)
    code, out, err = check(folder, "--tokenizer", other, "--full")
    assert (code, err) == (0, "")
    assert "; 0 are encoded to other tokens" in out


# --- damage
def test_a_cut_shard(copy):
    folder = copy("plain")
    path = folder / "fineweb_train_000001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    assert f"{path}: " in fault(folder) and "truncated or altered" in fault(folder)


def test_an_altered_shard(copy):
    folder = copy("plain")
    path = folder / "fineweb_train_000001.bin"
    change(path, 5, 300)
    assert f"1 faults, first: {path}: its hash is not that of manifest.json" in fault(folder)


def test_a_missing_shard_and_a_foreign_one(copy):
    folder = copy("plain")
    (folder / "fineweb_train_000001.bin").unlink()
    error = fault(folder)
    assert re.search(r"the (\d+) train shards are not numbered 0 to \d+", error) and "2 faults" in error
    write_tokens(folder / "fineweb_train_000001.bin", np.array([1, 300, 301]))
    assert "fineweb_train_000001.bin: 3 tokens, manifest.json says 3,000" in fault(folder)
    (folder / "fineweb_train_000001.bin").rename(folder / "fineweb_train_000099.bin")
    out = check(folder)[1]
    assert "fineweb_train_000099.bin: not in manifest.json" in out
    assert "fineweb_train_000001.bin: in manifest.json, but missing" in out


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"train": {"shards": 3}, "val": {}, "options": {}}'])
def test_a_manifest_that_is_none(copy, content):
    folder = copy("plain")
    (folder / "manifest.json").write_bytes(content)
    assert f"{folder / 'manifest.json'}: not a manifest" in fault(folder)


def forget_hashes(folder: Path, **changes) -> None:
    """A manifest that agrees with the files as they are now, and says other things if wanted."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for side in ("train", "val"):
        for shard in manifest[side]["shards"]:
            for file in (shard, shard.get("sidecar", shard)):
                file["sha256"] = verify.prepare.file_sha256(folder / file["file"])
    for side, values in changes.items():
        manifest[side].update(values)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_manifest_with_other_counts(copy):
    folder = copy("plain")
    for changes in ({"bytes": 3}, {"documents": 3}):
        shutil.copy(folder / "manifest.json", folder / "kept")
        forget_hashes(folder, val=changes)
        assert f"{folder / 'manifest.json'}: says " in fault(folder)
        shutil.move(folder / "kept", folder / "manifest.json")


def test_a_manifest_with_another_number_of_training_documents(copy):
    folder = copy("lossy")
    forget_hashes(folder, train={"documents": 3})
    assert check(folder)[0] == 0 and "documents, manifest.json says 3; make" in fault(folder, "--full")


def test_another_tokenizer(copy, datasets):
    folder, other = copy("plain"), model_of(datasets["caseops"])
    assert "the shards were made with tokenizer" in fault(folder, "--tokenizer", other)
    (folder / "manifest.json").unlink()
    assert "TOKENIZER_PATH does not fit these shards" in fault(folder, "--tokenizer", other)
    assert "none.model: no tokenizer found" in fault(folder, "--tokenizer", "none.model")


def test_text_that_is_not_that_of_the_manifest(copy):
    """Another word in a training document: only decoding tells."""
    folder = copy("plain")
    model = sentencepiece.SentencePieceProcessor(model_file=str(model_of(folder)))
    path = folder / "fineweb_train_000001.bin"
    change(path, int(np.flatnonzero(read_shard(path) == model.piece_to_id("a"))[0]), model.piece_to_id("b"))
    forget_hashes(folder)
    assert check(folder)[0] == 0
    assert "train: the decoded text is not that of manifest.json (sha256_text)" in check(folder, "--full")[1]


def test_tokens_that_no_text_is_encoded_to(copy):
    folder = copy("plain")
    path = folder / "fineweb_train_000001.bin"
    change(path, 500, 3 + 1 + ord("x"))  # the byte piece of a character that has a piece
    forget_hashes(folder)
    assert "1 of " in fault(folder, "--full") and "documents are encoded to other tokens" in fault(folder, "--full")


@pytest.mark.parametrize("full", [False, True])
def test_a_sidecar_that_counts_wrong(copy, full):
    folder, options = copy("caseops"), ["--full"] * full
    path = folder / "fineweb_val_bytes_000000.bin"
    counts, tokens = read_shard(path), read_shard(folder / "fineweb_val_000000.bin")
    pieces = [tokenizer_of(folder).id_to_piece(token) for token in range(400)]
    words = [not pieces[token].startswith("\u2581") for token in tokens.tolist()]
    place = int(np.flatnonzero((counts == 1) & words)[0])
    for value, found in ((2, 1), (0, 1)):
        change(path, place, value)
        forget_hashes(folder)
        assert "validation documents with" in fault(folder, *options)
        if full:
            assert "document 0 has " in check(folder, *options)[1]
        assert len(verify.wrong_counts(tokens, read_shard(path)[1:], tokenizer_of(folder))) == found
    signs = [not pieces[token].isalpha() for token in tokens.tolist()]
    write_tokens(path, np.where((counts == 1) & signs, 2, counts))  # letters are what the trainer looks at
    forget_hashes(folder)
    assert "counts do not fit their pieces, first 2 bytes for token" in check(folder)[1]


def test_a_sidecar_that_counts_spaces_twice(copy):
    """PR #1719's fault. Words are judged by the trainer's check, what else begins with a space by the decoded text."""
    folder = copy("caseops")
    (folder / "manifest.json").unlink()  # as published: nothing says that the tokens give the text back
    pieces = [tokenizer_of(folder).id_to_piece(token) for token in range(400)]
    space = np.array([piece.startswith("\u2581") for piece in pieces])
    word = np.array([piece[1:].isascii() and piece[1:].isalpha() for piece in pieces])
    paths = sorted(folder.glob("fineweb_val_bytes_*"))
    right = [(path, read_shard(path), read_shard(folder / path.name.replace("bytes_", ""))) for path in paths]
    for path, counts, tokens in right:
        write_tokens(path, counts + (space & word)[tokens])
    assert "does not belong to these shards" in fault(folder, "--tokenizer", model_of(folder))
    for path, counts, tokens in right:
        write_tokens(path, counts + 9 * (space & ~word)[tokens])
    assert check(folder, "--tokenizer", model_of(folder))[0] == 0
    assert "it is not of this text" in fault(folder, "--tokenizer", model_of(folder), "--full")


def tokenizer_of(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(model_of(folder)))


# --- split
def test_a_validation_document_in_training(copy):
    folder = copy("plain")
    val, path = read_shard(folder / "fineweb_val_000000.bin"), max(folder.glob("fineweb_train_*"))
    document = val[:int(np.flatnonzero(val == 1)[1])]
    write_tokens(path, np.concatenate([read_shard(path), document]))
    (folder / "manifest.json").unlink()
    options = ("--tokenizer", model_of(folder))
    assert "1 of 12 validation documents occur in training; make the data again" in fault(folder, *options)


def near(train: list[int], documents: list[list[int]]) -> list[int]:
    """near_duplicates of bare tokens."""
    val = np.array([token for document in documents for token in (1, *document)], np.uint16)
    stream = train_gpt.TokenStream([])
    stream.shards, stream.offsets = [np.array(train, np.uint16)], np.array([0, len(train)])
    return verify.near_duplicates(train_gpt.Dataset(stream, val, val[1:], "", "", 0, 0))


def test_near_duplicates_share_half_of_their_stretches(monkeypatch):
    monkeypatch.setattr(verify, "CHUNK_TOKENS", 64)  # stretches cross the ends of chunks
    rng = np.random.default_rng(0)
    a, b, c, short = (rng.integers(2, 400, n).tolist() for n in (320, 320, 320, 31))
    ruler = [7, 8] * 160
    train = [1, *rng.integers(2, 400, 77), *a[:170], 5, 5, *b[:140], *ruler, 9, *c[3:], *short]
    assert near(train, [a, b, ruler, c, short]) == [0, 3]
    assert near(train, [b, short]) == [] == near(train, [short])
    assert near(a, [a]) == [0] and near(a[:31], [a]) == []


@given(st.lists(st.integers(0, 3), min_size=verify.WINDOW, max_size=120))
@settings(max_examples=50, deadline=None)
def test_equal_stretches_have_equal_hashes(tokens):
    tokens = np.array(tokens, np.uint16)
    hashes = verify.window_hashes(tokens)
    windows = [tuple(tokens[i:i + verify.WINDOW]) for i in range(len(tokens) - verify.WINDOW + 1)]
    assert len(hashes) == len(windows)
    assert len(set(hashes.tolist())) == len(set(windows))
    assert all((hashes[i] == hashes[0]) == (windows[i] == windows[0]) for i in range(len(windows)))


@pytest.mark.parametrize("chunk", [1, 7, 1 << 22])
def test_documents_are_whole_whatever_the_shards(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(verify, "CHUNK_TOKENS", chunk)
    whole = [[5, 6], [1, 2, 3], [1], [1], [1, *range(2, 30)], [1, 9]]
    tokens = np.array([token for document in whole for token in document])
    for i, part in enumerate(np.split(tokens, [1, 4, 15, 16])):
        write_tokens(tmp_path / f"{i}.bin", part)
    stream = train_gpt.TokenStream(sorted(tmp_path.glob("*.bin")))
    assert [document.tolist() for document in verify.documents(stream)] == whole


# --- the command
def test_the_published_validation_set_has_another_size(copy):
    folder = copy("plain")
    folder = folder.rename(folder.with_name("fineweb10B_sp400"))
    code, out, _ = check(folder)
    assert code == 0 and "the published validation set has 50,000 documents, this one 12" in out


def test_the_published_shards_pass(corpus_dir, published_model, tmp_path):
    """The validation shard, its sidecar, and the beginning of a training shard, without a manifest."""
    for name in ("fineweb_val_000000.bin", "fineweb_val_bytes_000000.bin"):
        (tmp_path / name).write_bytes(lzma.decompress((corpus_dir / f"{name}.xz").read_bytes()))
    with lzma.open(corpus_dir / "fineweb_train_000000.bin.xz") as file:
        write_tokens(tmp_path / "fineweb_train_000000.bin", np.frombuffer(file.read(200_000)[1024:], "<u2"))
    code, out, err = check(tmp_path, "--tokenizer", published_model, "--full")
    assert (code, err) == (0, "") and "3,081,622 of 1,140 validation documents by the sidecar" in out
    assert "val: 1,140 documents, 3,080,562 bytes; 0 are encoded to other tokens" in out


def test_the_command_line_with_workers(datasets):
    done = subprocess.run([sys.executable, ROOT / "data" / "verify.py", datasets["fused"], "--full", "--workers", "2"],
                          check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == check(datasets["fused"], "--full")[1]


def test_mistakes_are_told_in_one_line(tmp_path):
    assert "none: no such folder" in fault(tmp_path / "none")
    assert "no fineweb_train_*.bin" in fault(tmp_path)
