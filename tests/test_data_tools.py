"""data/tokenizer_report.py, bench/loader.py, and tools/sample.py with the tokenizers of data/."""
import contextlib
import io
import re
import subprocess
import sys
import types
from pathlib import Path

import caseops
import prepare
import program
import pytest
import sentencepiece
import tokenizer_report
from test_prepare import ODD, REAL, make, write_jsonl

sys.path.insert(0, str(program.ROOT / "bench"))
import loader
import sample
import summary

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")
T, A, C, E = caseops.OPERATORS
WORDS = "The end of the matter is The end that NASA saw in London. " * 30


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Tokenizers of 300 pieces by form of CaseOps."""
    root, found = tmp_path_factory.mktemp("models"), {}
    for mode in ("none", *caseops.MODES):
        options = ("--caseops", mode) if mode != "none" else ()
        source = write_jsonl(root / "a.jsonl", [WORDS + str(i) for i in range(3)])
        found[mode] = make(root / mode, source, "--val-docs", 1, "--vocab-size", 300, *options).model
    return found


# --- tokenizer_report
def report(*arguments) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = tokenizer_report.main([*map(str, arguments)])
    return code, out.getvalue(), err.getvalue()


def rows_of(out: str) -> list[list[str]]:
    """Cells of the tables without their heads."""
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in out.splitlines() if line[:1] == "|"]
    return [row for row in cells if row[0] not in ("tokenizer", "word") and not row[0].startswith("---")]


def test_the_report_counts_what_the_tokenizers_do(models, tmp_path):
    texts = [WORDS, "caf\u00e9 \u6f22\u5b57", f"the operator {T} itself"]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    arguments = [models["none"], models["plain"], f"{models['fused']}:fused", "byte260"]
    code, out, err = report(source, *arguments, "--dim", 16, "--bits", 4)
    assert (code, err) == (0, "")
    size = sum(len(text.encode()) for text in texts)
    assert f"3 documents, {size:,} bytes" in out
    forms = [("d", None, "none"), ("d:plain", "plain", "plain"), ("d:fused", "fused", "fused"), ("byte260", None, None)]
    rows = rows_of(out)
    for row, (name, mode, key) in zip(rows[:4], forms, strict=True):
        model = models[key].read_bytes() if key else prepare.byte260_model()
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
        ids = [i for text in texts for i in tokenizer.encode(caseops.encode(text, mode) if mode else text)]
        byte = sum(map(tokenizer.is_byte, ids))
        assert row == [name, str(tokenizer.vocab_size()), f"{len(ids):,}", f"{size / len(ids):.4f}",
                       f"{len(ids) / size:.5f}", f"{tokenizer.vocab_size() * 8:,}",
                       f"{100 * len({*ids}) / tokenizer.vocab_size():.1f} %", f"{100 * byte / len(ids):.3f} %", "0"]
    assert float(rows[2][3]) > float(rows[1][3]), "fused operators save tokens"


def test_the_report_shows_the_words_that_fall_apart(models, tmp_path):
    source, times = tmp_path / "a.txt", {"aab": 50, "zzzzzz": 90, "of": 9}
    source.write_text("".join(f"{word} " * count for word, count in times.items()))
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(models["none"]))
    costs = {word: count * (len(tokenizer.encode(f"a {word}")) - 2) for word, count in times.items()}
    found = rows_of(report(source, models["none"], "--top", 2)[1])[1:]
    assert [row[0] for row in found] == sorted(costs, key=lambda word: -costs[word])[:2]
    for row in found:
        assert int(row[1]) == times[row[0]] and int(row[1]) * (int(row[2]) - 1) == costs[row[0]] > 0
        spelled = re.sub("<0x(..)>", lambda match: chr(int(match[1], 16)), row[3])
        assert spelled.replace("\\u2581", "").replace(" ", "") == row[0]


def test_the_report_reads_no_more_than_it_is_told(models, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl.zst", REAL[:20])
    assert "1 documents, 100 bytes" in report(source, "byte260", "--bytes", 100)[1]
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.txt").write_text("\u00e9" * 10)
    assert "2 documents, 24 bytes" in report(folder, "byte260", "--bytes", 25)[1], "a cut character is left out"


def test_documents_that_a_tokenizer_changes_are_counted(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(REAL), model_writer=model, vocab_size=400, model_type="bpe", byte_fallback=True,
        minloglevel=2, normalization_rule_name="nmt_nfkc", pad_id=0, bos_id=1, eos_id=2, unk_id=3,
        max_sentence_length=100_000)
    (tmp_path / "n.model").write_bytes(model.getvalue())
    source = write_jsonl(tmp_path / "a.jsonl", ["one line", "two\nlines", *ODD[:1]])
    assert rows_of(report(source, tmp_path / "n.model")[1])[0][-1] == "2"


@pytest.mark.parametrize("arguments, words", [
    (("a.txt", "none.model"), "tokenizer none.model: no such file"),
    (("none.txt", "byte260"), "none.txt: no such file"),
    (("a.txt", "a.txt"), "a.txt: not a SentencePiece model"), (("empty.txt", "byte260"), "empty.txt: holds no text"),
    (("a.txt", "byte260:fused"), "byte260: has no pieces for the operators of --caseops fused")])
def test_mistakes_are_told_in_one_line(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("text")
    Path("empty.txt").write_text("")
    code, out, err = report(*arguments)
    assert code == 2 and not out and err.count("\n") == 1 and words in err


# --- bench/loader.py
@pytest.mark.parametrize("pause", ["0", "2"])
def test_the_loader_is_measured(tmp_path, pause):
    program.write_data(tmp_path / "data")
    command = [sys.executable, program.ROOT / "bench" / "loader.py", "--seconds", "0.1", "--step-ms", pause]
    done = subprocess.run(command, check=False, env=program.settings(tmp_path / "data", tmp_path / "logs"),
                          capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'data'}: 10,000 training tokens in 2 shards, micro-batches of 128 tokens")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[3:]]
    assert [row[0] for row in rows] == ["sequential", "strided", "shuffled"]
    for _, rate, milliseconds, slowest in rows:
        assert float(slowest) >= float(milliseconds) > 0 and float(rate) >= 0


def test_the_loader_needs_shards(tmp_path, monkeypatch, capsys):
    for name, value in program.settings(tmp_path, tmp_path / "logs").items():
        monkeypatch.setenv(name, value)
    assert loader.main(["--seconds", "0.1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: DATA_PATH={tmp_path}: no fineweb_train_*.bin") and error.count("\n") == 1


# --- tools/sample.py
@pytest.mark.parametrize("mode", caseops.MODES)
def test_samples_of_a_caseops_tokenizer_have_capitals(models, mode, capsys):
    """Also in the middle: an operator waits for its letter, and what was shown stays."""
    sampler = object.__new__(sample.Sampler)
    sampler.bos, sampler.caseops = 1, mode
    sampler.tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(models[mode]))
    assert caseops.has_operators(sampler.tokenizer)
    text = "The  NASA of iPod\n\nIn X"
    ids = sampler.encode(text)
    assert ids[0] == 1 and sampler.decode(ids) == text
    assert all(text.startswith(sampler.decode(ids[:end])) for end in range(1, len(ids)))
    sampler.generate = lambda prompt, seed: (ids[:end] for end in range(1, len(ids) + 1))
    assert sampler.write(ids[:1], 0) == len(ids) - 1 and capsys.readouterr().out == f"{text}\n"


def test_samples_of_other_tokenizers_are_what_they_decode_to(models):
    model = sentencepiece.SentencePieceProcessor(model_proto=prepare.byte260_model())
    assert sample.forbidden_ids(model, 1) == [0, 2, 3] and not caseops.has_operators(model)
    assert not caseops.has_operators(sentencepiece.SentencePieceProcessor(model_file=str(models["none"])))


# --- tools/summary.py
@pytest.mark.parametrize("mode", caseops.MODES)
def test_compressors_read_the_text_with_its_capitals(mode, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [WORDS + str(i) for i in range(9)])
    made = make(tmp_path, source, "--val-docs", 2, "--vocab-size", 300, "--caseops", mode)
    size = made.manifest["val"]["bytes"]
    run = types.SimpleNamespace(settings={"vocab_size": "300"}, fact=lambda name: {"scored_bytes": size})
    text, transformed = summary.validation_text(run, made.folder, made.model)
    assert transformed and len(text) == size and text.decode().startswith(WORDS)
