"""What is written about the program: the techniques page, presets, README's commands, and the limits of the file."""
import re
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest

import train_gpt
from train_gpt import Config

ROOT = Path(train_gpt.__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
from count_lines import code_lines, longest_functions  # noqa: E402

SOURCE = (ROOT / "train_gpt.py").read_bytes()
FIELDS = {f.name.upper() for f in fields(Config)}
PLUMBING = {  # where things are, how the program runs, what it prints: no technique
    "RUN_ID", "SEED", "LOG_DIR", "ARTIFACT_PATH", "RESUME", "PREFLIGHT", "CHECKPOINT_EVERY_SECONDS", "DEVICE",
    "COMPILE", "ATTENTION", "ALLOW_OVERSIZE", "DATA_DIR", "DATA_PATH", "TOKENIZER_PATH", "VOCAB_SIZE",
    "MAX_LEAKED_DOCUMENTS", "FORCE_STOP_STEP", "EVAL_ONLY", "AUDIT", "VAL_BATCH_TOKENS", "VAL_LOSS_EVERY", "TRAIN_LOG_EVERY"}

# Every preset as its differences from the default.
PRESETS = {
    "naive_baseline": {
        "vocab_size": 1024, "train_seq_len": 1024, "eval_seq_len": 1024, "document_mask": False, "eval_mode": "packed",
        "train_batch_tokens": 524288, "micro_batch_tokens": 65536, "num_layers": 9, "mlp_mult": 2.0,
        "leaky_relu_slope": 0.0, "rope_dims": 64, "ln_scale": False, "qk_gain_init": 1.5, "xsa_last_n": 0,
        "skip_gates_enabled": False, "num_loops": 0, "parallel_start_layer": 0, "sparse_attn_gate_scale": 0.0,
        "smear_gate": "off", "matrix_init": "uniform", "matrix_lr": 0.04, "scalar_lr": 0.04, "tied_embed_lr": 0.05,
        "muon_momentum": 0.95, "muon_momentum_warmup_start": 0.85, "muon_momentum_warmup_steps": 500,
        "muon_coefficients": "quintic", "muon_row_normalize": False, "muon_wd": 0.0, "embed_wd": 0.0, "adam_wd": 0.0,
        "beta2": 0.95, "grad_clip_norm": 0.0, "ema_decay": 0.0, "warmdown_iters": 1200, "min_lr": 0.0,
        "gptq_reserve_seconds": 0.0, "matrix_quantizer": "rtn", "embed_quantizer": "rtn", "target_bytes": 0,
        "matrix_bits": 8, "embed_bits": 8, "attn_clip_sigmas": 12.7,
        "mlp_clip_sigmas": 12.7, "embed_clip_sigmas": 12.7, "compressor": "lzma"},
    "proxy": {
        "seed": 42, "iterations": 100000, "max_wallclock_seconds": 240.0, "gptq_reserve_seconds": 0.5,
        "train_batch_tokens": 196608, "muon_momentum_warmup_steps": 300, "train_log_every": 25,
        "batch_schedule": "0.5@0.65,1@1", "train_seq_schedule": "1024@0.4,2048@1", "enable_looping_at": 0.5},
    "laptop": {
        "data_path": "data/datasets/stdlib", "tokenizer_path": "data/tokenizers/stdlib.model", "vocab_size": 2048,
        "train_seq_len": 256, "train_order": "strided", "max_wallclock_seconds": 175.0, "gptq_reserve_seconds": 0.0,
        "val_loss_every": 250, "train_batch_tokens": 2048, "micro_batch_tokens": 1024, "num_layers": 3,
        "model_dim": 128, "num_heads": 4, "num_kv_heads": 2, "mlp_mult": 3.0,
        "qk_gain_init": 2.0, "xsa_last_n": 0, "num_loops": 0,
        "parallel_start_layer": 2, "muon_momentum": 0.95, "muon_momentum_warmup_steps": 100, "ema_decay": 0.98,
        "warmdown_frac": 0.7, "eval_seq_len": 256},
}
PRESET_FILES = sorted((ROOT / "presets").glob("*.env"))
DATA_FROM_OUTSIDE = {"naive_baseline", "proxy"}  # presets for the published data, wherever it lies


# --- docs/techniques.md
def table_rows() -> list[list[str]]:
    """Cells of the rows of all tables whose first column is `setting`."""
    rows, inside = [], False
    for line in (ROOT / "docs/techniques.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif cells[0] == "setting":
            inside = True
            assert cells[2] == "function"
        elif inside and not set(line) <= set("|- :"):
            rows.append(cells)
    return rows


def test_every_setting_but_plumbing_is_a_technique():
    described = [name for row in table_rows() for name in re.findall(r"`([A-Z0-9_]+)`", row[0])]
    assert sorted(described) == sorted(set(described)), "described twice"
    assert PLUMBING <= FIELDS
    assert set(described) == FIELDS - PLUMBING


def test_every_name_on_the_techniques_page_exists():
    text = (ROOT / "docs/techniques.md").read_text()
    names = set(re.findall(r"`([A-Z][A-Z0-9]*_?[A-Z0-9_]*)`", text))
    assert names and all(name in FIELDS or hasattr(train_gpt, name) for name in names), names - FIELDS


def test_the_page_says_how_many_techniques_are_unmeasured():
    stated = re.search(r'"unmeasured": (\d+) rows', (ROOT / "docs/techniques.md").read_text())
    assert stated and int(stated[1]) == sum(row[-1] == "unmeasured" for row in table_rows())


def test_every_function_on_the_techniques_page_exists():
    rows = table_rows()
    assert len(rows) > 20
    for row in rows:
        assert len(row) == 6, row
        functions = re.findall(r"`([\w.]+)`", row[2])
        assert functions, row
        for path in functions:
            value = train_gpt
            for part in path.split("."):
                assert hasattr(value, part), f"{path} of {row[0]}"
                value = getattr(value, part)


# --- presets
def preset_variables(path: Path) -> dict[str, str]:
    """The variables as a shell sets them."""
    before = subprocess.run(["bash", "-c", "env -0"], capture_output=True, text=True, check=True, env={}).stdout
    after = subprocess.run(["bash", "-c", f"set -eua; . '{path}'; set +a; env -0"], capture_output=True, text=True,
                           check=True, env={}).stdout
    known = {line.split("=", 1)[0] for line in before.split("\0")} | {"_", ""}
    return {name: value for name, _, value in (line.partition("=") for line in after.split("\0")) if name not in known}


def test_presets_are_there():
    assert {path.stem for path in PRESET_FILES} >= set(PRESETS)


@pytest.mark.parametrize("path", PRESET_FILES, ids=lambda path: path.stem)
def test_preset_is_the_pinned_config(path):
    variables = preset_variables(path)
    assert variables and set(variables) <= FIELDS, set(variables) - FIELDS
    config, notes = Config.from_env(variables)
    default = asdict(Config())
    assert notes == []
    assert all(getattr(config, name.lower()) == train_gpt.parse_value(name, text, type(default[name.lower()]))
               for name, text in variables.items())
    differences = {name: value for name, value in asdict(config).items() if value != default[name]}
    assert differences == PRESETS.get(path.stem, {}), f"pin {path.stem} in PRESETS"
    assert all(type(value) is type(default[name]) for name, value in PRESETS[path.stem].items())
    assert config.accumulation_steps(1) > 0


@pytest.mark.parametrize("path", PRESET_FILES, ids=lambda path: path.stem)
def test_preset_runs_as_it_is(path):
    """It names its data and tokenizer, but for presets of the published data; each variable is set once."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    names = [line.split("=")[0] for line in lines]
    assert len(names) == len(set(names)) and all(re.fullmatch(r"[A-Z0-9_]+=[\w./@,-]+", line) for line in lines)
    if path.stem not in DATA_FROM_OUTSIDE:
        assert {"DATA_PATH", "TOKENIZER_PATH", "VOCAB_SIZE"} <= set(names)
    assert path.read_text().startswith("# ")


def test_the_laptop_preset_reads_what_make_data_writes():
    command = re.search(r"prepare\.py (.*)", (ROOT / "Makefile").read_text())
    variables = preset_variables(ROOT / "presets/laptop.env")
    assert command
    assert f"--vocab-size {variables['VOCAB_SIZE']}" in command[1]
    assert f"--name {Path(variables['DATA_PATH']).name}" in command[1]
    assert Path(variables["TOKENIZER_PATH"]).stem == Path(variables["DATA_PATH"]).name


# --- commands in README.md and the other pages
def commands(text: str) -> list[str]:
    """Shell commands in ``` blocks and indented lines; a trailing backslash joins lines."""
    found, fenced = [], False
    text = text.replace("\\\n", " ")
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            words = line.strip().removeprefix("$ ")
            without = re.sub(r"^([A-Z_0-9]+=\S*\s+)+", "", words)
            if re.match(r"(make|python3?|torchrun|set -a)\b", without):
                found.append(words)
    return found


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def complaint(command: str) -> str:
    """What is wrong with a shell command of a page, or ''."""
    parsed = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=False)
    if parsed.returncode:
        return parsed.stderr
    command = re.sub(r"\s#.*", "", command)
    for part in re.split(r"&&|\|\||[;|]", command):
        words = [word for word in part.split() if not re.fullmatch(r"[A-Z_0-9]+=\S*", word)]
        if words[:1] == ["make"]:
            unknown = {word for word in words[1:] if not word.startswith("-")} - make_targets()
            if unknown:
                return f"no make target {unknown}"
    named = [word.strip("'\"") for word in re.split(r"[\s;]+", command)]
    for word in named:
        if re.fullmatch(r"[\w./-]+\.(py|env)", word) and not (ROOT / word).is_file():
            return f"no file {word}"
    return ""


PAGES = sorted(path for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "data/README.md")
               if path.is_file())


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_of_a_page(page):
    wrong = {command: complaint(command) for command in commands(page.read_text())}
    assert not any(wrong.values()), {command: text for command, text in wrong.items() if text}


def test_readme_shows_how_to_run():
    shown = " ".join(commands((ROOT / "README.md").read_text()))
    assert "train_gpt.py" in shown and "make" in shown


def test_commands_of_the_program_and_the_makefile():
    assert train_gpt.__doc__
    shown = [re.split(r" {3,}", line)[0] for line in commands(train_gpt.__doc__.replace(" a laptop's CPU", ""))]
    assert len(shown) >= 4 and not any(complaint(line) for line in shown), shown
    text = re.sub(r"\$\((BIN|PYTHON|VENV|RUN_ID)\)/?", "", (ROOT / "Makefile").read_text())
    missing = [name for name in re.findall(r"[\w./-]+\.(?:py|env)\b", text) if not (ROOT / name).is_file()]
    assert not missing


def test_the_check_of_commands_can_fail():
    page = "```\nmake nothing\npython absent.py\nset -a; . presets/absent.env; set +a; python train_gpt.py\n" \
           "A=1 python train_gpt.py 'x\n```\n    make check test\n\nmake prose\n" \
           "    B=2 torchrun --x=1 train_gpt.py # y\n"
    found = commands(page)
    assert len(found) == 6
    assert [bool(complaint(command)) for command in found] == [True, True, True, True, False, False]


# --- the file itself
def test_train_gpt_stays_readable():
    text = SOURCE.decode("ascii")
    assert code_lines(text) <= 2500
    assert longest_functions(text)[0][0] <= 60, longest_functions(text)[:3]
    assert max(map(len, text.splitlines())) <= 120
    assert "\t" not in text and "\r" not in text and text.endswith("\n")


def test_counting_is_of_code_only():
    text = '"""Doc.\n\nMore.\n"""\n# comment\n\ndef f(\n    a,\n):\n    """Doc."""\n    return (a +\n            1)\n'
    assert code_lines(text) == 5 and longest_functions(text) == [(6, "f")]
