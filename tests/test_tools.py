"""The commands in tools/: what they print and write, their --help, and how they refuse mistakes (exit code 2)."""
import hashlib
import io
import json
import lzma
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import count_lines  # noqa: E402
import plot_runs  # noqa: E402
import run_log  # noqa: E402
import sample  # noqa: E402
import summary  # noqa: E402

import train_gpt  # noqa: E402

TOOLS = ("plot_runs", "sample", "summary", "count_lines", "compare_runs", "make_record",
         "validate_record", "leaderboard", "sweep")
STAGES = {"raw": 1.25, "averaged": 1.2, "quantized": 1.21, "sliding": 1.125}
TEXTS = [f"the cat number {i} sat on the mat, and the dog saw it.\n" * 3 for i in range(30)] + ["caf\u00e9 \u20ac 12"]
TOKENIZER_OPTIONS = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False,
                     "add_dummy_prefix": False, "byte_fallback": True, "pad_id": 0, "bos_id": 1, "eos_id": 2,
                     "unk_id": 3, "minloglevel": 2, "num_threads": 1, "character_coverage": 0.99,
                     "hard_vocab_limit": True}


# --- a log as train_gpt.py writes it
def run_lines(run_id: str = "demo", steps: int = 5, finished: bool = True, count_bytes: int = 1000,
              vocab_size: int = 300, first: int = 1, resumed: int | None = None) -> list[str]:
    """One run's part of a log file: the source, the line of 100 '=', settings, events."""
    lines = ['"""The source."""', "step:9/9 train_loss:9.0000 train_time:9ms step_avg:9.00ms", 'result {"steps": 9}',
             "=" * 100, f"run_id:{run_id}", "resume:", f"vocab_size:{vocab_size}", "train_gpt:0.1.0 python:3.11.7",
             "warning: something"]
    if resumed is not None:
        lines.append(f"resumed step:{resumed} train_time:1000ms path:x")
    for step in range(first, steps + 1):
        lines.append(f"step:{step}/{steps} train_loss:{5 - 0.5 * step:.4f} train_time:{step * 500}ms step_avg:500.00ms "
                     "lr_multiplier:1.000 looping:0")
        if step % 2 == 0:
            lines.append(f"step:{step}/{steps} val_loss:{5 - 0.4 * step:.4f} val_bpb:1.5000 train_time:{step * 500}ms "
                         "paused_seconds:0.1")
    if finished:
        lines.append(f"peak_memory:100MiB steps:{steps} train_seconds:{steps / 2:.3f}")
        lines += [f"final_{name}_exact val_loss:2.00000000 val_bpb:{bpb:.8f} eval_time:1500ms"
                  for name, bpb in STAGES.items()]
        result = {"run_id": run_id, "seed": 7, "world_size": 1, "device": "cpu (1 threads)", "steps": steps,
                  "num_params": 12345, "train_seconds": 2.5, "artifact_bytes": 20000, "code_bytes": 5000,
                  "submission_bytes": 25000, "headroom_bytes": 15_975_000, "official_stage": "sliding",
                  "val_bpb": STAGES["sliding"], "audit": {"scored_bytes": count_bytes}}
        lines.append("result " + json.dumps(result))
    return lines


def write_log(path: Path, *parts: list[str]) -> Path:
    path.write_text("".join(line + "\n" for part in parts for line in part), encoding="utf8")
    return path


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return write_log(tmp_path / "demo.txt", run_lines())


# --- a tokenizer, shards and an artifact
@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 300 pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(TEXTS), model_writer=model, model_type="bpe", vocab_size=300, **TOKENIZER_OPTIONS)
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.model"
    path.write_bytes(model.getvalue())
    return path


def write_shard(path: Path, tokens: list[int]) -> None:
    header = np.zeros(train_gpt.SHARD_HEADER_INTS, "<i4")
    header[:3] = train_gpt.SHARD_MAGIC, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.array(tokens, "<u2").tobytes())


@pytest.fixture
def shards(tmp_path: Path, tokenizer: Path) -> Path:
    """A folder with TEXTS as the validation shard."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    folder = tmp_path / "shards"
    folder.mkdir()
    tokens = [i for text in TEXTS for i in (train_gpt.BOS, *processor.encode(text))]
    write_shard(folder / "fineweb_val_000000.bin", tokens)
    write_shard(folder / "fineweb_train_000000.bin", [1, 5])
    return folder


def make_artifact(path: Path, sha256: str = "", looping: bool = True, only: int | None = None) -> Path:
    """A tiny model with random weights; `only` = an id that has all the probability."""
    config = train_gpt.Config(vocab_size=300, num_layers=3, model_dim=16, num_heads=2, num_kv_heads=1, rope_dims=4,
                              xsa_last_n=2, num_loops=1, loop_start=1, loop_end=1, parallel_start_layer=2,
                              gate_window=4, matrix_quantizer="fp16", embed_quantizer="fp16", compressor="lzma")
    model = train_gpt.GPT(config)
    model.init_weights(1)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(2)
    for name in ("embedding", "out_proj", "down_proj"):
        weights[name].normal_(0.0, 0.5, generator=generator)
    if only is not None:  # all embeddings point one way, that of this id the furthest
        weights["embedding"].fill_(0.1)[only] = 5.0
        for name in ("out_proj", "down_proj"):
            weights[name].zero_()
    info = {"looping": looping, "tokenizer_sha256": sha256}
    path.write_bytes(train_gpt.pack_artifact(config, train_gpt.quantize(config, weights), info))
    return path


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return make_artifact(tmp_path / "tiny.artifact")


def call(tool, capsys: pytest.CaptureFixture, *arguments) -> tuple[int, str, str]:
    """Runs a tool's main -> exit code, stdout, stderr."""
    capsys.readouterr()
    try:
        code = tool.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(tool, capsys: pytest.CaptureFixture, *arguments) -> str:
    """Runs a tool that must end with 2 and one line on stderr -> that line."""
    code, out, err = call(tool, capsys, *arguments)
    assert code == 2 and not out and "Traceback" not in err
    return err.splitlines()[-1]


# --- all tools
def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a tool as a user does."""
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", TOOLS)
def test_help_names_the_example(name: str) -> None:
    done = run_script(name, "--help")
    assert done.returncode == 0 and f"python tools/{name}.py " in done.stdout and not done.stderr


@pytest.mark.parametrize("name", TOOLS)
def test_no_arguments_is_a_mistake(name: str) -> None:
    done = run_script(name)
    assert done.returncode == 2 and "required" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", [*TOOLS, "run_log", "outcomes", "record", "record_pages"])
def test_sources_are_ascii(name: str) -> None:
    assert (ROOT / "tools" / f"{name}.py").read_bytes().isascii()


# --- run_log
def test_parse_log_reads_only_what_follows_the_separator(log: Path) -> None:
    run = run_log.parse_log(log)
    assert run.name == "demo" and run.settings["vocab_size"] == "300" and "train_gpt" not in run.settings
    assert [point.step for point in run.steps] == [1, 2, 3, 4, 5] and run.steps[0] == (1, 0.5, 4.5)
    assert run.validations == [(2, 1.0, 4.2), (4, 2.0, 3.4), (5, 2.5, 2.0)], "the last weights' score ends the curve"
    assert {name: stage.val_bpb for name, stage in run.stages.items()} == STAGES and run.stages["raw"].seconds == 1.5
    assert run.result is not None and run.result["num_params"] == 12345


def test_parse_log_takes_the_last_run_of_a_file(tmp_path: Path) -> None:
    run = run_log.parse_log(write_log(tmp_path / "a.txt", run_lines(steps=8), run_lines(steps=3, finished=False)))
    assert len(run.steps) == 3 and not run.stages and run.result is None


def test_parse_log_passes_over_a_last_run_that_did_nothing(tmp_path: Path) -> None:
    run = run_log.parse_log(write_log(tmp_path / "a.txt", run_lines(steps=4), run_lines(steps=0, finished=False)))
    assert len(run.steps) == 4 and len(run.stages) == 4 and run.result is not None


def test_parse_log_joins_a_resumed_run_with_its_beginning(tmp_path: Path) -> None:
    parts = run_lines(steps=4, finished=False), run_lines(steps=6, first=3, resumed=2)
    run = run_log.parse_log(write_log(tmp_path / "a.txt", *parts))
    assert [point.step for point in run.steps] == [1, 2, 3, 4, 5, 6]
    assert [point.step for point in run.validations] == [2, 4, 6, 6]


def test_parse_log_survives_a_cut_result_and_windows_line_ends(tmp_path: Path) -> None:
    lines = run_lines()
    path = tmp_path / "a.txt"
    path.write_bytes("\r\n".join([*lines[:-1], lines[-1][:50]]).encode())
    run = run_log.parse_log(path)
    assert run.result is None and len(run.steps) == 5 and len(run.stages) == 4


def test_a_result_of_another_version_is_a_mistake_without_traceback(log: Path, capsys: pytest.CaptureFixture) -> None:
    log.write_text(log.read_text().replace('"num_params"', '"parameters"'))
    for tool in (summary, plot_runs):
        assert "no 'num_params'" in refused(tool, capsys, log)


# --- plot_runs
def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_plot_writes_a_png_next_to_the_log(log: Path, capsys: pytest.CaptureFixture) -> None:
    code, out, _ = call(plot_runs, capsys, log)
    path = log.with_suffix(".png")
    assert code == 0 and out == f"wrote {path}\n"
    assert png_size(path) == tuple(round(inches * plot_runs.DPI) for inches in plot_runs.INCHES)


def test_plot_of_three_runs_one_of_them_unfinished(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    others = [write_log(tmp_path / f"{name}.txt", run_lines(name, finished=name == "_b")) for name in ("_b", "c$x$")]
    code, _, _ = call(plot_runs, capsys, log, *others, "--out", tmp_path / "all.png")
    width, height = png_size(tmp_path / "all.png")
    assert code == 0 and width == plot_runs.INCHES[0] * plot_runs.DPI and height >= plot_runs.INCHES[1] * plot_runs.DPI


def test_plot_of_unfinished_runs_has_no_bars(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write_log(tmp_path / "a.txt", run_lines(steps=1, finished=False))
    assert call(plot_runs, capsys, path)[0] == 0
    assert png_size(path.with_suffix(".png"))[0] < plot_runs.INCHES[0] * plot_runs.DPI


def test_plot_refuses_what_it_cannot_draw(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    no_log, no_steps = tmp_path / "no_log.txt", write_log(tmp_path / "no_steps.txt", run_lines(steps=0, finished=False))
    no_log.write_bytes(bytes(range(256)))
    assert "No such file" in refused(plot_runs, capsys, tmp_path / "absent.txt")
    assert "Is a directory" in refused(plot_runs, capsys, tmp_path)
    assert "no log of train_gpt.py" in refused(plot_runs, capsys, no_log)
    assert "no_steps.txt" in refused(plot_runs, capsys, log, no_steps)
    assert "PNG only" in refused(plot_runs, capsys, log, "--out", tmp_path / "a.jpg")
    assert "No such file" in refused(plot_runs, capsys, log, "--out", tmp_path / "absent" / "a.png")
    assert not list(tmp_path.glob("*.png"))


def test_axes_are_zoomed() -> None:
    assert plot_runs.bar_limits([1.07, 1.06, 1.08])[0] == pytest.approx(1.04)
    assert plot_runs.bar_limits([0.5, 3.0])[0] == 0 and plot_runs.bar_limits([1.0])[0] == 0
    points = [run_log.Point(i, float(i), 9.0 if i < 5 else 3.0 - 0.01 * i) for i in range(1, 101)]
    low, high = plot_runs.loss_limits([run_log.Run(Path("a"), steps=points)])
    assert 1.8 < low < 2.0 and 2.9 < high < 3.2


def test_display_names_differ(tmp_path: Path) -> None:
    named = (("1", "a"), ("2", "a"), ("3", "x" * 99))
    names = plot_runs.display_names([run_log.Run(tmp_path / name, {"run_id": run_id}) for name, run_id in named])
    assert len(set(names)) == 3 and max(map(len, names)) <= plot_runs.MAX_NAME


# --- summary
def cells(text: str) -> dict[str, list[str]]:
    """Markdown tables -> {first cell: the other cells}."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def test_summary_without_text(log: Path, capsys: pytest.CaptureFixture) -> None:
    code, out, _ = call(summary, capsys, log)
    rows = cells(out)
    assert code == 0 and rows["model, raw"] == ["1.2500", "1.5"]
    assert rows["model, sliding, the score"] == ["1.1250", "1.5"]
    assert rows["artifact bytes"] == ["20,000"] and rows["code bytes, at most"] == ["5,000"]
    assert rows["submission bytes"] == ["25,000"] and rows["limit bytes"] == ["16,000,000"]
    assert rows["training seconds"] == ["2.5"] and rows["steps"] == ["5"] and rows["parameters"] == ["12,345"]
    assert "zlib" not in out and len({len(line) for line in out.split("\n\n")[1].splitlines()}) == 1


def test_summary_compares_with_compressors(tmp_path: Path, tokenizer: Path, shards: Path,
                                           capsys: pytest.CaptureFixture) -> None:
    text = "".join(TEXTS).encode()
    path = write_log(tmp_path / "a.txt", run_lines(count_bytes=len(text)))
    code, out, err = call(summary, capsys, path, "--text-tokenizer", tokenizer, "--data", shards)
    assert code == 0, err
    expected = {"zlib -9": zlib.compress(text, 9), "xz -9e": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)}
    for name, packed in expected.items():
        bpb = 8 * len(packed) / len(text)
        assert cells(out)[name][0] == f"{bpb:.4f}"
        assert (f"beats {name} by" in out) == (STAGES["sliding"] < bpb)
    assert "sidecar" not in out and "transform" not in out


def test_summary_verdict() -> None:
    compression = {"zlib -9": summary.Compression(4.0, 0.1), "xz -9e": summary.Compression(1.0, 0.1)}
    text = summary.verdict(1.0, compression, 5000)
    assert text.startswith("The model beats zlib -9 by 75.0 % and does not beat xz -9e (") and "5,000 bytes" in text


def test_summary_with_a_byte_sidecar_counts_the_original_bytes(tmp_path: Path, tokenizer: Path, shards: Path,
                                                               capsys: pytest.CaptureFixture) -> None:
    tokens = train_gpt.read_shard(shards / "fineweb_val_000000.bin")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    sidecar = [0, *train_gpt.table_bytes(tokens, processor).tolist()]
    sidecar[tokens.tolist().index(processor.encode(" 12")[0])] += 5
    write_shard(shards / "fineweb_val_bytes_000000.bin", sidecar)
    path = write_log(tmp_path / "a.txt", run_lines(count_bytes=sum(sidecar)))
    code, out, err = call(summary, capsys, path, "--text-tokenizer", tokenizer, "--data", shards)
    text = "".join(TEXTS).encode()
    assert code == 0 and f"transform left it: {len(text):,} bytes" in out, err
    assert cells(out)["zlib -9"][0] == f"{8 * len(zlib.compress(text, 9)) / sum(sidecar):.4f}"


def test_summary_refuses(log: Path, tmp_path: Path, tokenizer: Path, shards: Path,
                         capsys: pytest.CaptureFixture) -> None:
    unfinished = write_log(tmp_path / "b.txt", run_lines(finished=False))
    other = write_log(tmp_path / "c.txt", run_lines(vocab_size=301))
    assert "did not finish" in refused(summary, capsys, unfinished)
    assert "No such file" in refused(summary, capsys, tmp_path / "absent.txt")
    assert "go together" in refused(summary, capsys, log, "--data", shards)
    assert "the run scored 1,000" in refused(summary, capsys, log, "--data", shards, "--text-tokenizer", tokenizer)
    assert "no fineweb_" in refused(summary, capsys, log, "--data", tmp_path, "--text-tokenizer", tokenizer)
    assert "no such file" in refused(summary, capsys, log, "--data", shards, "--text-tokenizer", tmp_path / "absent")
    assert "300 pieces" in refused(summary, capsys, other, "--data", shards, "--text-tokenizer", tokenizer)


# --- sample
def test_sample_is_deterministic_by_seed(artifact: Path, tokenizer: Path, capsys: pytest.CaptureFixture) -> None:
    def draw(*arguments) -> str:
        code, out, err = call(sample, capsys, artifact, "--tokenizer", tokenizer, "--device", "cpu", "--tokens", 12,
                              *arguments)
        assert code == 0 and re.search(r"\[\d+ tokens, [\d.]+ a second, cpu", err), err
        return out
    first = draw("--prompt", "the cat", "--seed", 3)
    assert first.startswith("the cat") and first.endswith("\n") and first == draw("--prompt", "the cat", "--seed", 3)
    assert first != draw("--prompt", "the cat", "--seed", 4)
    greedy = draw("--prompt", "the cat", "--temperature", 0)
    assert greedy == draw("--prompt", "the cat", "--temperature", 0, "--seed", 9)
    assert greedy == draw("--prompt", "the cat", "--top-p", 1e-6, "--seed", 5)
    several = draw("--prompt", "the cat", "--seed", 2, "--count", 2)
    assert several.startswith("--- sample 1 of 2, seed 2\nthe cat")
    assert several.endswith(f"--- sample 2 of 2, seed 3\n{first}")


def test_greedy_sample_equals_the_models_own_argmax(tmp_path: Path, tokenizer: Path,
                                                    capsys: pytest.CaptureFixture) -> None:
    for looping in (False, True):
        path = make_artifact(tmp_path / "a.artifact", looping=looping)
        code, out, err = call(sample, capsys, path, "--tokenizer", tokenizer, "--device", "cpu", "--tokens", 6,
                              "--temperature", 0, "--prompt", "a dog")
        assert code == 0, err
        header, weights = train_gpt.read_artifact(path)
        model = train_gpt.GPT(train_gpt.artifact_config(header))
        model.load_state_dict(weights)
        model.looping = looping
        processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
        ids = [1, *processor.encode("a dog")]
        for _ in range(6):
            segments = train_gpt.make_segments(np.zeros(1, np.int64), len(ids), len(ids), 0)
            with torch.no_grad():
                logits = model.logits(model.features(torch.tensor([ids]), segments))[-1]
            logits[[0, 2, 3]] = -torch.inf
            ids.append(int(logits.argmax()))
        expected = ids[:ids.index(1, 1)] if 1 in ids[1:] else ids
        assert out == processor.decode(expected) + "\n"


def test_sample_stops_at_the_end_of_the_document(tmp_path: Path, tokenizer: Path,
                                                 capsys: pytest.CaptureFixture) -> None:
    path = make_artifact(tmp_path / "bos.artifact", only=train_gpt.BOS)
    code, out, err = call(sample, capsys, path, "--tokenizer", tokenizer, "--prompt", "the", "--temperature", 0)
    assert code == 0 and out == "the\n" and err.startswith("[0 tokens") and "the document ended" in err


def test_sample_never_draws_other_control_ids(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    assert sample.forbidden_ids(processor, 1) == [0, 2, 3]
    path = make_artifact(tmp_path / "eos.artifact", only=2)
    code, out, err = call(sample, capsys, path, "--tokenizer", tokenizer, "--tokens", 20, "--temperature", 1)
    assert code == 0 and out.strip("\n") and "\u2047" not in out, err


def test_sample_from_bos_without_new_tokens_and_with_a_short_context(artifact: Path, tokenizer: Path,
                                                                     capsys: pytest.CaptureFixture) -> None:
    common = artifact, "--tokenizer", tokenizer, "--device", "cpu"
    assert call(sample, capsys, *common, "--tokens", 0)[:2] == (0, "\n")
    assert call(sample, capsys, *common, "--tokens", 0, "--prompt", "caf\u00e9")[:2] == (0, "caf\u00e9\n")
    code, out, err = call(sample, capsys, *common, "--tokens", 3, "--context", 4, "--prompt", "the cat sat on the mat")
    assert code == 0 and out.startswith("the cat sat") and "the model reads the last 4" in err


def test_sample_streams_whole_characters_to_a_terminal(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    euro = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in "\u20ac".encode()]
    ids, written = [1, *processor.encode("the"), *euro, *euro[:1]], []
    sampler = object.__new__(sample.Sampler)
    sampler.tokenizer = processor
    sampler.generate = lambda prompt, seed: (ids[:end] for end in range(len(prompt), len(ids) + 1))
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(terminal, "flush", lambda: written.append(terminal.getvalue()))
    assert sampler.write(ids[:2], 0) == len(ids) - 2
    assert terminal.getvalue() == processor.decode(ids[1:]) + "\n" and len(written) == len(ids)
    assert [text for text in written[:-1] if "\ufffd" in text] == [] and written[-2] == "the\u20ac"


def test_pick() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)
    def drawn(temperature: float, top_p: float) -> set[int]:
        return {sample.pick(logits, temperature, top_p, generator) for _ in range(200)}
    assert drawn(0, 1) == {0} and drawn(1, 1) == {0, 1, 2, 3}
    assert drawn(1, 0.5) == {0} and drawn(1, 0.6) == {0, 1} and drawn(1, 0.9) == {0, 1, 2} and drawn(0.01, 1) == {0}
    assert sample.pick(torch.tensor([1.0, -torch.inf]), 1e-9, 1.0, generator) == 0


def test_sample_refuses(artifact: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    broken = tmp_path / "broken.model"
    broken.write_bytes(b"no model")
    altered = tmp_path / "altered.artifact"
    altered.write_bytes(artifact.read_bytes()[:-1] + b"x")
    other = make_artifact(tmp_path / "other.artifact", sha256="ab" * 32)
    assert "sha256" in refused(sample, capsys, other, "--tokenizer", tokenizer)
    assert "not a SentencePiece model" in refused(sample, capsys, artifact, "--tokenizer", broken)
    assert "No such file" in refused(sample, capsys, artifact, "--tokenizer", tmp_path / "absent.model")
    assert "fineweb_300_bpe.model" in refused(sample, capsys, artifact)
    assert "No such file" in refused(sample, capsys, tmp_path / "absent.artifact", "--tokenizer", tokenizer)
    assert "no artifact" in refused(sample, capsys, tokenizer, "--tokenizer", tokenizer)
    assert "altered" in refused(sample, capsys, altered, "--tokenizer", tokenizer)
    assert "UTF-8" in refused(sample, capsys, artifact, "--tokenizer", tokenizer, "--prompt", "\udcff")
    for option, value in (("--temperature", "-1"), ("--temperature", "nan"), ("--top-p", "0"), ("--top-p", "1.5"),
                          ("--tokens", "-1"), ("--tokens", "x"), ("--count", "0"), ("--context", "0"),
                          ("--seed", "-1")):
        assert f"argument {option}: " in refused(sample, capsys, artifact, "--tokenizer", tokenizer, option, value)


def test_sample_accepts_the_right_tokenizer_and_refuses_another_vocabulary(tmp_path: Path, tokenizer: Path,
                                                                          capsys: pytest.CaptureFixture) -> None:
    sha256 = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    path = make_artifact(tmp_path / "a.artifact", sha256=sha256)
    assert call(sample, capsys, path, "--tokenizer", tokenizer, "--tokens", 1)[0] == 0
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    header = {"tokenizer_sha256": "", "model": {"vocab_size": processor.vocab_size() + 1}}
    with pytest.raises(run_log.ToolError, match="has 300 pieces, the artifact 301"):
        sample.load_tokenizer(tokenizer, header, 1)
    with pytest.raises(run_log.ToolError, match="its BOS is 1"):
        sample.load_tokenizer(tokenizer, {"tokenizer_sha256": sha256, "model": {"vocab_size": 300}}, 2)


# --- count_lines
SOURCE = '''"""A module."""
# a comment
import os  # counted


def short(x):
    """One
    two."""
    return x


class A:
    """Docstring."""

    def long(self):
        text = """not a
        docstring"""

        return (text,
                os)
'''


def test_count_lines() -> None:
    assert count_lines.code_lines(SOURCE) == 9
    assert count_lines.longest_functions(SOURCE) == [(6, "long"), (4, "short")]
    assert count_lines.code_lines("") == 0 and count_lines.longest_functions("x = 1\n") == []


@pytest.mark.parametrize(("options", "code"), [((), 0), (("--limit", "9"), 0), (("--limit", "8"), 1),
                                               (("--function-limit", "6"), 0), (("--function-limit", "5"), 1)])
def test_count_lines_limits(options: tuple[str, ...], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                            capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "a.py"
    path.write_text(SOURCE)
    monkeypatch.setattr(sys, "argv", ["count_lines.py", str(path), *options])
    assert count_lines.main() == code
    assert capsys.readouterr().out == f"{path}: 9 lines of code, longest function long: 6 lines\n"
