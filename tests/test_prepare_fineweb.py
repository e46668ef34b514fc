"""data/prepare.py as the published data were made: CaseOps with its sidecar, --like fineweb, byte260."""
import argparse
import contextlib
import io
import json
import shutil
import tracemalloc
from pathlib import Path

import caseops
import numpy as np
import prepare
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prepare import MARK, ODD, REAL, crashed_at, make, read_shard, refused, tree, write_jsonl

import train_gpt

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")
T, A, C, E = caseops.OPERATORS
MODES = pytest.mark.parametrize("mode", caseops.MODES)
TEXTS = [*REAL[:30], *ODD, f"an {T} of the text {E}", "The NASA  McDonald\n\nAT iPod", REAL[0], f"lost {MARK}", ""]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "texts.jsonl", TEXTS)


@pytest.fixture(scope="module")
def done(corpus, tmp_path_factory):
    """CaseOps datasets with a tokenizer of their own, by mode."""
    return {mode: make(tmp_path_factory.mktemp(mode), corpus, "--vocab-size", 400, "--val-docs", 12, "--caseops", mode,
                       "--shard-tokens", 1500) for mode in caseops.MODES}


def open_dataset(settings: dict[str, str]) -> train_gpt.Dataset:
    config, _ = train_gpt.Config.from_env(settings)
    return train_gpt.open_dataset(config, train_gpt.World(0, 1, train_gpt.torch.device("cpu"), train_gpt.torch.float32))


def settings_of(stdout: str) -> dict[str, str]:
    """What the last line says to set."""
    return dict(word.split("=", 1) for word in stdout.splitlines()[-1].split()[2:])


# --- CaseOps
@MODES
def test_caseops_shards_give_the_text_back(done, mode):
    result = done[mode]
    texts = [caseops.decode(text, mode) for side in ("train", "val") for text in result.documents(side)]
    assert sorted({*texts}) == sorted({text for text in TEXTS if text and MARK not in text})
    assert result.manifest["options"]["caseops"] == mode and result.manifest["dropped"]["failed_round_trip"] == 1
    assert [result.tokenizer.piece_to_id(char) for char in caseops.OPERATORS] == [4, 5, 6, 7]


@MODES
def test_the_sidecar_holds_the_bytes_of_each_document(done, mode):
    result = done[mode]
    shards = result.manifest["val"]["shards"]
    assert len(shards) > 1 and not [s for s in result.manifest["train"]["shards"] if "sidecar" in s]
    counts = [read_shard(result.folder / shard["sidecar"]["file"]) for shard in shards]
    assert [len(part) for part in counts] == [len(shard) for shard in map(read_shard, (
        result.folder / shard["file"] for shard in shards))]
    assert [part.sum() for part in counts] == [shard["sidecar"]["bytes"] for shard in shards]
    names = [shard["sidecar"]["file"] for shard in shards]
    assert names == [f"fineweb_val_bytes_{i:06d}.bin" for i in range(len(shards))]
    starts = np.flatnonzero(np.concatenate([read_shard(result.folder / shard["file"]) for shard in shards]) == 1)
    sizes = [part.sum() for part in np.split(np.concatenate(counts), starts[1:])]
    assert sizes == [len(caseops.decode(text, mode).encode()) for text in result.documents("val")]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.text(st.characters(codec="utf-8"), max_size=20),
                          st.sampled_from([*ODD, *caseops.OPERATORS, MARK, " The", "NASA", "  iPod"]))).map("".join),
       st.sampled_from(caseops.MODES))
def test_any_text_survives_with_its_bytes_or_is_dropped(done, text, mode):
    model, sha256 = str(done[mode].model), done[mode].manifest["tokenizer"]["sha256"]
    document = prepare.Document(0, 0, Path("x"), text.encode(), counted=True)
    (tokens, counts, reason), = prepare.encode_batch(model, sha256, mode, True, [document])
    assert len(counts) == len(tokens) and counts[0] == 0 and counts.dtype == tokens.dtype == np.uint16
    assert (reason is not None) == (MARK in text)
    if not reason:
        assert counts.sum() == len(text.encode())
        assert caseops.decode(done[mode].tokenizer.decode(tokens[1:].tolist()), mode) == text


@MODES
def test_the_trainer_takes_caseops_data(done, mode):
    result = done[mode]
    dataset = open_dataset(settings_of(result.stdout))
    assert dataset.val_bytes.sum() == result.manifest["val"]["bytes"]
    assert dataset.leaked_documents == 0


def test_a_kill_at_any_file_operation_changes_no_sidecar(corpus, done, tmp_path, monkeypatch):
    out, whole = tmp_path / "out", tree(done["fused"].folder.parent.parent)
    options = (corpus, "--vocab-size", 400, "--val-docs", 12, "--caseops", "fused", "--shard-tokens", 1500)
    point, came = 0, True
    while came:
        point += 5
        shutil.rmtree(out, ignore_errors=True)
        came = crashed_at(monkeypatch, point, *options, "--name", "d", "--out", out)
        make(out, *options)
        assert tree(out) == whole, point
    assert point > 20
    sidecar = out / "datasets" / "d" / "fineweb_val_bytes_000000.bin"
    sidecar.write_bytes(sidecar.read_bytes()[:-1])
    assert "damaged or missing: starting over" in make(out, *options).stdout and tree(out) == whole


def model_without(path: Path, **changes) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(REAL).split("\n")), model_writer=model, minloglevel=2,
        **{"model_type": "bpe", "vocab_size": 400, "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, **changes})
    path.write_bytes(model.getvalue())
    return path


def test_a_tokenizer_that_would_lose_text_is_refused(corpus, tmp_path):
    lossy = model_without(tmp_path / "lossy.model")
    error = refused(corpus, "--tokenizer", lossy, "--val-docs", 3, "--allow-lossy", "--out", tmp_path)
    assert f"--tokenizer {lossy}: has 0 byte pieces" in error and "byte_fallback" in error
    plain = model_without(tmp_path / "plain.model", byte_fallback=True)
    error = refused(corpus, "--tokenizer", plain, "--val-docs", 3, "--caseops", "--allow-lossy", "--out", tmp_path)
    assert "has no pieces for the operators of --caseops plain" in error


# --- --like fineweb
LIKE = ("--like", "fineweb", "--vocab-size", 400)


def like_fineweb(monkeypatch, out: Path, *arguments) -> tuple[str, str, int]:
    """A run with the published names -> stdout, stderr, exit code. Five documents stand for the 50,000."""
    monkeypatch.setattr(prepare, "FINEWEB_VAL_DOCS", 5)
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = prepare.main([*map(str, (*arguments, "--out", out, "--workers", 1))])
    return stdout.getvalue(), stderr.getvalue(), code


@pytest.mark.parametrize("options, dataset, tokenizer, size", [
    ((), "fineweb10B_sp400", "fineweb_400_bpe", 400), (("--caseops",), "fineweb10B_sp400_caseops",
                                                        "fineweb_400_bpe_caseops", 400),
    (("--caseops", "fused"), "fineweb10B_sp400_caseops_fused", "fineweb_400_bpe_caseops_fused", 400),
    (("--tokenizer", "byte260"), "fineweb10B_byte260", "fineweb_byte260", 260)])
def test_like_fineweb_has_the_published_split_and_names(monkeypatch, tmp_path, options, dataset, tokenizer, size):
    source = write_jsonl(tmp_path / "docs_selected.jsonl", [*REAL[:30], REAL[2], "a  b\n\u00bd The"])
    stdout, stderr, code = like_fineweb(monkeypatch, tmp_path / "out", source, *LIKE, *options)
    assert (stderr, code) == ("", 0)
    folder, model = tmp_path / "out" / "datasets" / dataset, tmp_path / "out" / "tokenizers" / f"{tokenizer}.model"
    assert settings_of(stdout) == {"DATA_PATH": str(folder), "TOKENIZER_PATH": str(model), "VOCAB_SIZE": str(size)}
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert (manifest["val"]["documents"], manifest["train"]["documents"]) == (5, 26)
    assert manifest["options"]["val_first"] == 5 and manifest["dropped"]["duplicates_of_validation"] == 1
    assert open_dataset(settings_of(stdout)).leaked_documents == 0
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    given = caseops.encode("a  b\n\u00bd The", options[1]) if "fused" in options else "a  b\n\u00bd the"
    normal = "a  b\n\u00bd the" if size == 260 else f"a b 1\u20442{T} the" if "fused" in options else "a b 1\u20442 the"
    assert processor.decode(processor.encode(given)) == normal
    if not options:  # the trainer's defaults
        assert open_dataset({"DATA_DIR": str(tmp_path / "out"), "VOCAB_SIZE": "400"}).leaked_documents == 0


def test_like_fineweb_is_the_real_number_of_documents(tmp_path):
    assert prepare.FINEWEB_VAL_DOCS == 50_000
    source = write_jsonl(tmp_path / "a.jsonl", [f"document {i}" for i in range(50_000)])
    error = refused(source, *LIKE, "--out", tmp_path)
    assert "--val-first 50000: no training text is left of 50000 documents" in error


@pytest.mark.parametrize("arguments, words", [
    ((*LIKE, "--val-docs", 3), ["--val-docs: --like fineweb takes the first 50,000 documents"]),
    (("--like", "pile"), ["--like"]), (("--caseops", "upper"), ["--caseops"])])
def test_mistakes_are_told(corpus, tmp_path, arguments, words):
    error = refused(corpus, *arguments, "--out", tmp_path)
    assert all(word in error for word in words)


def test_only_published_data_have_a_name_of_their_own(corpus, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        prepare.main([str(corpus), "--out", str(tmp_path)])
    assert stop.value.code == 2 and "--name: give the dataset a name" in capsys.readouterr().err


# --- byte260
BYTES = sentencepiece.SentencePieceProcessor(model_proto=prepare.byte260_model())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.text(st.characters(codec="utf-8"), max_size=20),
                          st.sampled_from([*ODD, MARK, "<0x41>", "  "]))).map("".join))
def test_byte260_spells_every_text_in_its_bytes(text):
    assert BYTES.encode(text) == [4 + byte for byte in text.encode()]
    assert BYTES.decode(BYTES.encode(text)) == text


def test_byte260_data_are_lossless_and_scored_by_byte(corpus, tmp_path):
    result = make(tmp_path, corpus, "--tokenizer", "byte260", "--val-docs", 12)
    texts = {*result.documents("val"), *result.documents("train")}
    assert sorted(texts) == sorted({text for text in TEXTS if text})
    dataset = open_dataset(settings_of(result.stdout))
    tokens = dataset.val_tokens[1:]
    assert dataset.val_bytes.tolist() == (tokens != 1).astype(int).tolist()
    assert result.manifest["tokenizer"]["vocab_size"] == 260


# --- memory
def test_the_split_takes_little_memory_for_a_document():
    count = 200_000
    keys = np.random.default_rng(0).integers(0, 1 << 62, (count, 2), np.uint64)
    for option in ("val_first", "val_docs"):
        config = argparse.Namespace(**{"val_docs": None, "val_first": None, "val_fraction": None, option: 5000})
        tracemalloc.start()
        prepare.split(keys, config)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 45 * count  # 24 bytes a document are there before
