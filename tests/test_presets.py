"""Presets: complete, what they were when they were written, of the published size, and able to run; and published
command lines, which copy over."""
import json
import math
import re
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import program
import pytest
import torch
from helpers import tiny_dataset, write_shard

import train_gpt
from train_gpt import ALIASES, GPT, KINDS, Config, param_shapes, parse_value, predicted_bytes

ROOT = Path(train_gpt.__file__).resolve().parent
FILES = sorted((ROOT / "presets").glob("*.env"))
SYSTEMS = {row["preset"]: row for row in json.loads((ROOT / "presets/table.json").read_text())}  # published
OWN = {"laptop", "proxy", "record"}  # presets that repeat nothing
DEFAULTS = json.loads((ROOT / "tests/preset_defaults.json").read_text())  # of Config when the presets were written
CODE_BYTES = 29_500  # of the packed program, about
TOY_SECONDS = 3.0  # of processor time for a whole run of toy size, which other processes hardly change
FITTED = "standard deviations gives that size"  # a preset's comment where its clips were chosen for the published size


def variables(name: str) -> dict[str, str]:
    """The lines of a preset."""
    lines = (ROOT / f"presets/{name}.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def config_of(name: str) -> Config:
    return Config.from_env(variables(name))[0]


def count(config: Config) -> int:
    return sum(math.prod(shape) for shape in param_shapes(config).values())


def as_number(published: int | str) -> tuple[float, float]:
    """15863489 -> itself, exact; '15.91 MB' -> (15910000, 5000): the number and how far rounding may have moved it."""
    if isinstance(published, int):
        return published, 0
    digits = published.split()[0]
    return float(digits) * 1e6, 0.5 * 10 ** (6 - len(digits.partition(".")[2]))


def shown(published: int | str | None) -> str:
    """As the page and the presets write it."""
    return f"{published:,}" if isinstance(published, int) else published or "unpublished"


# --- files
def test_every_preset_is_in_the_table_or_our_own():
    assert {path.stem for path in FILES} == set(SYSTEMS) | OWN and not set(SYSTEMS) & OWN


def test_a_shell_reads_the_same_lines():
    """Patterns of QUANT_OVERRIDES are not expanded, nor is anything else."""
    for path in FILES:
        script = f"set -eua; . '{path}'; set +a; env -0"
        shell = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, env={}, cwd=ROOT)
        found = dict(line.split("=", 1) for line in shell.stdout.split("\0") if line)
        assert variables(path.stem).items() <= found.items() and len(found) - len(variables(path.stem)) < 5


@pytest.mark.parametrize("name", [path.stem for path in FILES])
def test_preset_is_complete_and_says_where_it_is_from(name):
    text = (ROOT / f"presets/{name}.env").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    names = [line.split("=")[0] for line in lines]
    assert len(names) == len(set(names)) and all(re.fullmatch(r"[A-Z0-9_]+=[\w./@,:*=\[\]-]+", line) for line in lines)
    assert {variable.lower() for variable in names} <= set(KINDS)  # our names, so that nothing is a matter of aliases
    assert text.startswith("# ") and text.isascii() and max(map(len, text.splitlines())) <= 120
    if name in SYSTEMS:
        row, head = SYSTEMS[name], text.split("# ---")[0]
        for published in (shown(row["score"]), shown(row["bytes"]), row["source"]):
            assert all(part in head for part in re.findall(r"#?\d[-\d.,]*\d", published)), published
        assert "Differs from the published" in head
    if name == "laptop":
        assert {"DATA_PATH", "TOKENIZER_PATH", "VOCAB_SIZE"} <= set(names)  # others take the published data


@pytest.mark.parametrize("name", [path.stem for path in FILES if path.stem != "record"])
def test_a_changed_default_changes_no_preset(name):
    """What a preset does not set is what the default was when it was written."""
    config, notes = Config.from_env(variables(name))
    given = {variable.lower(): parse_value(variable, text, KINDS[variable.lower()])
             for variable, text in variables(name).items()}
    expected = {field: given.get(field, value) for field, value in DEFAULTS.items()}
    changed = {field: value for field, value in expected.items() if getattr(config, field) != value}
    lines = " ".join(f"{field.upper()}={value}" for field, value in changed.items())
    assert not changed, f"put what the defaults were into presets/{name}.env: {lines}"
    assert notes == [] and set(given) <= set(DEFAULTS), "append new fields to tests/preset_defaults.json"


def test_record_is_the_defaults():
    assert config_of("record") == Config() and list(variables("record")) == ["MAX_WALLCLOCK_SECONDS"]


def test_the_laptop_preset_reads_what_make_data_writes():
    command = re.search(r"prepare\.py (.*)", (ROOT / "Makefile").read_text())
    laptop = variables("laptop")
    assert command and f"--vocab-size {laptop['VOCAB_SIZE']}" in command[1]
    assert f"--name {Path(laptop['DATA_PATH']).name}" in command[1]
    assert Path(laptop["TOKENIZER_PATH"]).stem == Path(laptop["DATA_PATH"]).name


# --- sizes
@pytest.mark.parametrize("name", SYSTEMS)
def test_parameters_are_the_published_ones(name):
    """But for `fewer` of them, which the row's note explains."""
    row, config = SYSTEMS[name], config_of(name)
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(config).parameters()) == count(config)
    assert "fewer" not in row or row["note"]
    if row["parameters"]:
        published, rounding = as_number(row["parameters"])
        assert abs(count(config) + row.get("fewer", 0) - published) <= rounding


def test_what_is_missing_is_what_the_notes_say():
    value_embeddings = 1024 * 128 + 256 * 128 + 1 + 2  # table, projection, scale, and a scale in each of two layers
    untied_head, lanes = 8192 * 768, 8 * (4 + 2)  # lanes of layers without lanes; two softcaps
    assert {name: row["fewer"] for name, row in SYSTEMS.items() if "fewer" in row} == {
        "gptq_lite_ema": value_embeddings, "leakyrelu_legal_ttt_parallel_muon": value_embeddings,
        "ternary_74m": untied_head, "binary_106m": untied_head, "r0427": lanes, "lrzip_1934": lanes,
        "frontier_2135": lanes + 2}
    form = {"NUM_LAYERS": "4", "MODEL_DIM": "768", "ROPE_DIMS": "96", "LOOP_START": "0", "LOOP_END": "3",
            "DEPTH_LORA_RANK": "4", "SMEAR_GATE": "off"}  # the script that PR #363 ships
    assert count(Config.from_env(variables("depth_recurrence_noisy_qat") | form)[0]) == 22_526_496
    assert " ".join("=".join(item) for item in form.items()) in " ".join(
        (ROOT / "presets/depth_recurrence_noisy_qat.env").read_text().replace("#", "").split())


@pytest.mark.parametrize("name", SYSTEMS)
def test_predicted_size_is_near_the_published_one(name):
    row, config = SYSTEMS[name], config_of(name)
    published, _ = as_number(row["bytes"])
    assert predicted_bytes(config) + CODE_BYTES == pytest.approx(published, rel=row.get("tolerance", 0.06))


def test_the_packed_program_has_about_these_bytes(packed_program):
    assert packed_program.stat().st_size == pytest.approx(CODE_BYTES, rel=0.05)


def test_the_page_says_where_the_size_is_no_prediction():
    """Where clips were fitted to it, and where it is off by more than 6 %."""
    page = (ROOT / "docs/systems.md").read_text()
    fitted = [path.stem for path in FILES if FITTED in path.read_text()]
    paragraph = next(part for part in page.split("\n\n") if part.startswith("The size is a fit"))
    assert fitted and set(re.findall(r"`([a-z]\w+)`", paragraph.split("Off by more")[0])) == set(fitted)
    assert [name for name, row in SYSTEMS.items() if "tolerance" in row] == ["binary_106m"]
    assert "`binary_106m`" in paragraph.split("Off by more")[1]


# --- whole runs, of toy size
@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Small shards; of the validation text the first 400 tokens."""
    folder = tiny_dataset(tmp_path_factory.mktemp("data"))
    for path in folder.glob("fineweb_val_*.bin"):
        write_shard(path, np.fromfile(path, "<u2", 400, offset=1024))
    return folder


def toy(name: str, data: Path, logs: Path) -> dict[str, str]:
    """The preset's variables, in a small model: only sizes, and where things are."""
    config = config_of(name)
    sizes = {"VOCAB_SIZE": program.VOCAB, "MODEL_DIM": 32, "NUM_HEADS": 2, "NUM_KV_HEADS": 1, "MLP_MULT": 2,
             "MLP_HIDDEN": 48 * bool(config.mlp_hidden), "ROPE_DIMS": min(config.rope_dims, 16),
             "EMBED_DIM": 16 * bool(config.embed_dim), "BIGRAM_HASH_DIM": 8,
             "BIGRAM_HASH_BUCKETS": 32 * bool(config.bigram_hash_buckets), "TRAIN_SEQ_LEN": 64, "EVAL_SEQ_LEN": 64,
             "EVAL_STRIDE": 64, "TRAIN_BATCH_TOKENS": 256, "MICRO_BATCH_TOKENS": 128, "ITERATIONS": 2,
             "MAX_WALLCLOCK_SECONDS": 0, "WARMUP_STEPS": 1, "GPTQ_CALIBRATION_BATCHES": 1, "TTT_BATCH_SIZE": 4,
             "TTT_CHUNK_SIZE": 32, "TTT_LORA_RANK": 4, "PHASED_TTT_PREFIX_DOCS": 3, "GLOBAL_TTT_CHUNK_TOKENS": 128}
    if config.train_seq_schedule:
        sizes["TRAIN_SEQ_SCHEDULE"] = "32@0.4,64@1"
    places = {"DATA_PATH": data, "TOKENIZER_PATH": "", "LOG_DIR": logs, "RUN_ID": name, "DEVICE": "cpu"}
    return variables(name) | {key: str(value) for key, value in (sizes | places).items()}


@pytest.fixture(scope="module")
def what_a_first_run_loads(data, tmp_path_factory, no_waiting_for_the_disk):
    """What the first run of a process takes besides, a second for imports and caches, is on no preset's clock."""
    assert train_gpt.main(toy("r0427", data, tmp_path_factory.mktemp("first"))) == 0


@pytest.mark.parametrize("name", [path.stem for path in FILES])
def test_preset_runs_from_shards_to_score(name, data, tmp_path, capsys, what_a_first_run_loads):
    environ, start = toy(name, data, tmp_path), time.process_time()
    assert train_gpt.main(environ) == 0
    assert time.process_time() - start < TOY_SECONDS
    result = program.result_of(capsys.readouterr().out)
    config = Config.from_env(environ)[0]
    assert result["steps"] == 2 and 0 < result["val_bpb"] < 10 and result["num_params"] == count(config)
    stage = "smoothed" if config.ngram_order else config.eval_mode
    assert result["official_stage"] == {"packed": "quantized"}.get(stage, stage)
    assert name != "pcll_532_as_published" or not result["legal"]
    assert {key: value for key, value in result["overrides"].items() if key != "RUN_ID"} == \
        {key: value for key, value in config.overrides().items() if key != "RUN_ID"}


# --- published commands, word by word but for the seed
DATA = "DATA_PATH=./data/datasets/fineweb10B_sp1024 TOKENIZER_PATH=./data/tokenizers/fineweb_1024_bpe.model"
COMMANDS = {
    "r0427": """DATA_DIR=./data VOCAB_SIZE=8192
        DATA_PATH=./data/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved
        TOKENIZER_PATH=./data/tokenizers/fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model
        CASEOPS_ENABLED=1 ITERATIONS=20000 MAX_WALLCLOCK_SECONDS=600
        PHASED_TTT_ENABLED=1 PHASED_TTT_PREFIX_DOCS=2500 PHASED_TTT_NUM_PHASES=3 EMBED_BITS=7 MATRIX_LR=0.026 MIN_LR=0.1
        MLP_CLIP_SIGMAS=11.5 ATTN_CLIP_SIGMAS=13.0 EMBED_CLIP_SIGMAS=14.0 GRAD_CLIP_NORM=0.3 TTT_CHUNK_SIZE=48
        WARMUP_STEPS=20 MUON_BACKEND_STEPS=5 GLOBAL_TTT_MOMENTUM=0.9 WARMDOWN_FRAC=0.85 BETA2=0.99 TTT_BETA2=0.99
        TTT_WEIGHT_DECAY=0.5 TTT_LORA_RANK=80 SPARSE_ATTN_GATE_SCALE=0.5 GPTQ_RESERVE_SECONDS=0.5
        GPTQ_CALIBRATION_BATCHES=16 VAL_LOSS_EVERY=0 GATED_ATTN_QUANT_GATE=1 SPARSE_ATTN_GATE_ENABLED=1 GATE_WINDOW=12
        SMEAR_GATE_ENABLED=1 LQER_ENABLED=1 LQER_ASYM_ENABLED=1 LQER_RANK=4 LQER_FACTOR_BITS=4 LQER_ASYM_GROUP=64
        LQER_TOP_K=3 FUSED_CE_ENABLED=1 COMPRESSOR=pergroup NCCL_NET=Socket""",
    "lrzip_1934": """NCCL_NET=Socket DATA_DIR=./data CASEOPS_ENABLED=1 PHASED_TTT_PREFIX_DOCS=2000
        PHASED_TTT_NUM_PHASES=3 MATRIX_CLIP_SIGMAS=12.85 ATTN_CLIP_SIGMAS=12.0 MLP_CLIP_SIGMAS=12.0 EMBED_BITS=7
        EMBED_CLIP_SIGMAS=12.0 MATRIX_LR=0.026 MIN_LR=0.1 FUSED_CE_ENABLED=1 SPARSE_ATTN_GATE_ENABLED=1
        SMEAR_GATE_ENABLED=1 GATE_WINDOW=12 LQER_ENABLED=1 LQER_RANK=4 LQER_TOP_K=3 LQER_FACTOR_BITS=4
        LQER_ASYM_ENABLED=1 LQER_ASYM_GROUP=64 TTT_WARM_START_A=1 GPTQ_RESERVE_SECONDS=0.5 GPTQ_CALIBRATION_BATCHES=16
        EMBED_WD=0.06 COMPRESSOR=pergroup""",
    # that of PR #2130 with 32 calibration batches, and what its log lists besides
    "frontier_2135": """PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True ASYM_LOGIT_RESCALE=1 NGRAM_TILT_ENABLED=1
        NGRAM_HINT_PRECOMPUTE_OUTSIDE=0 TOKEN_ORDER=16 TOKEN_THRESHOLD=0.800 TOKEN_BOOST=2.625 WITHIN_TAU=99.0
        WITHIN_BOOST=0.0 WORD_TAU=99.0 WORD_BOOST=0.0 AGREE_ADD_BOOST=0.0 DATA_DIR=./data CASEOPS_ENABLED=1
        SMEAR_GATE_BOS_FIX=0 TTT_LORA_EMA_DECAY=0.0 TTT_UPDATE_EVERY=1 PHASED_TTT_PREFIX_DOCS=2500
        PHASED_TTT_NUM_PHASES=1 EVAL_SEQ_LEN=2560 TTT_EVAL_SEQ_LEN=2560 COMPRESSOR=pergroup MATRIX_CLIP_SIGMAS=12.85
        ATTN_CLIP_SIGMAS=13.0 MLP_CLIP_SIGMAS=11.5 EMBED_BITS=7 EMBED_CLIP_SIGMAS=14.0 MATRIX_LR=0.028 MIN_LR=0.1
        WARMDOWN_FRAC=0.85 BETA2=0.99 FUSED_CE_ENABLED=1 SPARSE_ATTN_GATE_ENABLED=1 SPARSE_ATTN_GATE_SCALE=0.5
        SMEAR_GATE_ENABLED=1 GATE_WINDOW=12 LQER_ENABLED=1 LQER_RANK=4 LQER_TOP_K=3 LQER_FACTOR_BITS=4
        LQER_ASYM_ENABLED=1 LQER_ASYM_GROUP=32 TTT_WARM_START_A=1 TTT_LORA_RANK=80 TTT_BETA2=0.99 TTT_WEIGHT_DECAY=2.0
        TTT_LORA_LR=8e-5 GPTQ_RESERVE_SECONDS=0.5 GPTQ_CALIBRATION_BATCHES=32 TTT_K_LORA=0 TTT_O_LORA=1 TTT_MLP_LORA=1
        EMA_DECAY=0.9965 TTT_GRAD_STEPS=1 MUON_HUBER_WD=0 OPTROT_ENABLED=0 GLOBAL_TTT_OPTIMIZER=sgd
        QK_GAIN_INIT_SCHEDULE=""",
    "smeargate_orthoinit_muonwd": f"""RUN_ID=smeargate_orthoinit_muonwd {DATA} VOCAB_SIZE=1024 NUM_LAYERS=9
        MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 MLP_MULT=3 TIE_EMBEDDINGS=1 USE_SMEARGATE=1 TRAIN_SEQ_LEN=1024
        TRAIN_BATCH_TOKENS=524288 LOGIT_SOFTCAP=30.0 ROPE_BASE=10000.0 QK_GAIN_INIT=1.5 BIGRAM_HASH_BUCKETS=4096
        BIGRAM_HASH_DIM=128 TIED_EMBED_LR=0.030 MATRIX_LR=0.020 SCALAR_LR=0.020 MUON_MOMENTUM=0.99
        MUON_MOMENTUM_WARMUP_START=0.92 MUON_MOMENTUM_WARMUP_STEPS=1500 MUON_WEIGHT_DECAY=0.01 MUON_BACKEND_STEPS=5
        WARMDOWN_ITERS=3000 WARMUP_STEPS=20 EVAL_STRIDE=64 MAX_WALLCLOCK_SECONDS=600"""}
PLACES = {"run_id", "data_dir", "data_path", "tokenizer_path", "warmup_steps", "seed"}  # no part of a system


def command(name: str) -> dict[str, str]:
    """The variables of a published command."""
    return dict(item.split("=", 1) for item in COMMANDS[name].split())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_published_command_is_accepted_and_sets_what_it_says(name):
    config, notes = Config.from_env(command(name))
    fields = {variable.lower(): text for variable, text in command(name).items() if variable not in ALIASES
              and variable.lower() in KINDS}
    assert len(fields) > 10
    for field, text in fields.items():
        assert getattr(config, field) == parse_value(field, text, KINDS[field])
    expected = {"r0427": {"eval_mode": "adapted", "smear_gate": "input", "attn_gate": "sparse", "compressor": "rans"},
                "lrzip_1934": {"embed_wd": 0.06, "attn_clip_sigmas": 12.0, "compressor": "rans"},
                "frontier_2135": {"smear_gate": "input", "ngram_order": 16, "ttt_targets": "q,v,out,mlp,head"},
                "smeargate_orthoinit_muonwd": {"smear_gate": "static", "muon_wd": 0.01, "micro_batch_tokens": 65536}}
    assert {field: getattr(config, field) for field in expected[name]} == expected[name]
    replaced = {note.split("=")[0] for note in notes if "no effect of its own" not in note}
    assert replaced == {variable for variable in command(name) if variable.startswith("LQER_") or variable in (
        "COMPRESSOR", "GATED_ATTN_QUANT_GATE", "ASYM_LOGIT_RESCALE", "SMEAR_GATE_BOS_FIX", "CASEOPS_ENABLED",
        "TOKEN_THRESHOLD", "TOKEN_BOOST")}


@pytest.mark.parametrize("name", [name for name in COMMANDS if "CASEOPS_ENABLED=1" in COMMANDS[name]])
def test_presets_of_systems_with_caseops_read_such_data(name):
    """Their published commands say CASEOPS_ENABLED=1, two of them without a DATA_PATH."""
    assert "caseops" in variables(name).get("DATA_PATH", "")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_published_command_over_its_preset_changes_nothing(name):
    """The published scripts had other defaults; the preset brings them, and agrees with the command."""
    both = asdict(Config.from_env(variables(name) | command(name))[0])
    alone = asdict(config_of(name))
    assert {field for field in both if both[field] != alone[field]} <= PLACES


# --- docs/systems.md
def table_text() -> str:
    """The table of docs/systems.md."""
    lines = ["| preset | system | source | score | parameters | bytes | here |", "|---|---|---|---|---|---|---|"]
    for name, row in SYSTEMS.items():
        numbers = " | ".join(shown(row[key]) for key in ("score", "parameters", "bytes"))
        note = row.get("note", "")
        lines.append(f"| [`{name}`](../presets/{name}.env) | {row['system']} | {row['source']} | {numbers} | {note} |")
    return "\n".join(lines) + "\n"


def test_the_page_shows_the_table():
    page = (ROOT / "docs/systems.md").read_text()
    assert table_text() in page, "docs/systems.md must hold:\n" + table_text()
    assert "docs/systems.md" in (ROOT / "README.md").read_text()
