"""Section 1, config: variables -> Config, refusals with their remedies, aliases, near misses, --help, and AST rules."""
import ast
import itertools
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import train_gpt
from train_gpt import ALIASES, CHOICES, KINDS, Config, Count, Decay, Fraction, Positive, UserError, help_text, main

ROOT = Path(train_gpt.__file__).resolve().parent
TREE = ast.parse(Path(train_gpt.__file__).read_bytes())
FIELDS = {f.name: f for f in fields(Config)}
POSITIVE = [name for name, f in FIELDS.items() if f.type in (Count, Positive)]
FRACTIONS = [name for name, f in FIELDS.items() if f.type in (Fraction, Decay)]

# Values that differ from the default, where the next number or another text would break a rule between settings.
OTHER = {"device": "cpu", "compile": "0", "attention": "sdpa", "muon_coefficients": "quintic", "eval_mode": "packed",
         "matrix_quantizer": "fp16", "embed_quantizer": "fp16", "compressor": "lzma", "train_order": "strided",
         "model_dim": "1024",
         "num_heads": "16", "num_kv_heads": "2", "mlp_mult": "3.5", "rope_dims": "14", "xsa_last_n": "10",
         "rope_stretch": "1.5",
         "parallel_start_layer": "9", "loop_start": "4", "loop_end": "6", "muon_backend_steps": "4",
         "train_batch_tokens": "98304", "micro_batch_tokens": "49152", "train_seq_schedule": "1024@0.5,2048@1",
         "batch_schedule": "0.5@0.5,1@1", "mlp_activation": "swiglu", "embed_dim": "256", "embed_init": "overtone",
         "matrix_init": "uniform", "resid_mix_init": "phase", "softcap_type": "poly5", "rope_scaling": "yarn",
         "attn_gate": "dense", "smear_gate": "static", "bigram_hash": "31", "depth_lora_rank": "8",
         "swa_start_frac": "0.2", "late_qat_threshold": "0.15", "ttt_strategy": "stream", "ttt_order": "length",
         "ttt_chunk_schedule": "8@256,24@2000", "ttt_targets": "q,head", "ttt_optimizer": "sgd", "ngram_order": "8"}
NEEDED = {"ttt_unsafe_multi_epoch": {"TTT_STRATEGY": "stream"}, "ttt_order": {"NGRAM_ORDER": "0"},
          "smear_gate": {"EVAL_MODE": "sliding"}}  # set with them


def other_text(name: str) -> str:
    """A valid text for the field's variable that is not its default."""
    f = FIELDS[name]
    if name in OTHER:
        return OTHER[name]
    if KINDS[name] is bool:
        return "0" if f.default else "1"
    if KINDS[name] is int:
        return str(f.default + 1)
    if KINDS[name] is float:
        return str(f.default / 2 + 0.125)
    return "some/text"


def refusal(**variables: str) -> str:
    """The complaint about this environment."""
    with pytest.raises(UserError) as caught:
        Config.from_env(variables)
    text = str(caught.value)
    assert text and "\n" not in text
    return text


# --- fields
@pytest.mark.parametrize("name", FIELDS)
def test_every_field_parses_from_its_variable(name):
    text, others = other_text(name), NEEDED.get(name, {})
    config, notes = Config.from_env({name.upper(): f"  {text} ", **others})
    value = getattr(config, name)
    assert value != FIELDS[name].default and type(value) is KINDS[name] and not notes
    assert value == (KINDS[name](text) if KINDS[name] is not bool else text == "1")
    assert config.overrides() == {name.upper(): value, **{other: getattr(config, other.lower()) for other in others}}


def test_the_empty_environment_gives_the_defaults():
    config, notes = Config.from_env({})
    assert config == Config() and config.overrides() == {} and notes == []


def test_overrides_names_exactly_what_differs():
    config, _ = Config.from_env({"MODEL_DIM": "512", "NUM_LAYERS": "12", "MATRIX_LR": "0.02", "LN_SCALE": "0"})
    assert config.overrides() == {"NUM_LAYERS": 12, "MATRIX_LR": 0.02, "LN_SCALE": False}


@pytest.mark.parametrize("text, value", [("1", True), ("0", False), ("true", True), ("False", False), (" TRUE ", True)])
def test_switches(text, value):
    assert Config.from_env({"PREFLIGHT": text})[0].preflight is value


def test_numbers_may_be_written_with_underscores_and_exponents():
    config, _ = Config.from_env({"TRAIN_BATCH_TOKENS": "786_432", "ADAM_EPS": "1e-10", "MAX_WALLCLOCK_SECONDS": "1e3"})
    assert (config.train_batch_tokens, config.adam_eps, config.max_wallclock_seconds) == (786432, 1e-10, 1000.0)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind is not str])
def test_every_unparsable_value_is_refused(name):
    wanted = {bool: "must be 0 or 1", int: "must be a whole number", float: "must be a number"}[KINDS[name]]
    for text in ("", "abc", "1x", "2" if KINDS[name] is bool else "1,5"):
        assert refusal(**{name.upper(): text}) == f"{name.upper()}={text}: {wanted}"
    if KINDS[name] is int:
        assert wanted in refusal(**{name.upper(): "1.5"})


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind in (int, float)])
def test_every_number_is_finite_and_not_negative(name):
    assert refusal(**{name.upper(): "-1"}).startswith(f"{name.upper()}=-1")
    if KINDS[name] is float:
        for text in ("nan", "inf"):
            assert refusal(**{name.upper(): text}) == f"{name.upper()}={text}: must be a finite number, at least 0"


@pytest.mark.parametrize("name", POSITIVE)
def test_zero_is_refused_where_it_means_nothing(name):
    text = "0" if KINDS[name] is int else "0.0"
    assert refusal(**{name.upper(): text}) == f"{name.upper()}={text}: must be above 0"


@pytest.mark.parametrize("name", FRACTIONS)
def test_fractions_end_at_one(name):
    text = refusal(**{name.upper(): "1.01"})
    assert text.startswith(f"{name.upper()}=1.01: ") and "1" in text.split(":")[1]


@pytest.mark.parametrize("name", sorted(CHOICES))
def test_choices_are_listed(name):
    text = refusal(**{name.upper(): "nonsense"})
    assert text.startswith(f"{name.upper()}=nonsense: ") and all(choice in text for choice in CHOICES[name])
    for choice in CHOICES[name]:
        assert getattr(Config.from_env({name.upper(): choice, **NEEDED.get(name, {})})[0], name) == choice


def test_the_tables_name_fields():
    assert set(CHOICES) <= set(FIELDS) and len(POSITIVE) > 20 and len(FRACTIONS) > 10


CROSS_CHECKS = [  # environment, what the complaint says
    ({"MODEL_DIM": "100", "NUM_HEADS": "8"}, ("MODEL_DIM=100", "NUM_HEADS=8", "not divisible")),
    ({"NUM_HEADS": "8", "NUM_KV_HEADS": "3"}, ("NUM_HEADS=8", "NUM_KV_HEADS=3", "not divisible")),
    ({"NUM_HEADS": "4", "NUM_KV_HEADS": "8"}, ("NUM_HEADS=4", "NUM_KV_HEADS=8")),
    ({"MLP_MULT": "2.001"}, ("MLP_MULT=2.001", "MODEL_DIM=512", "change one")),
    ({"ROPE_DIMS": "15"}, ("ROPE_DIMS=15", "even")),
    ({"ROPE_DIMS": "66"}, ("ROPE_DIMS=66", "at most 64")),
    ({"MODEL_DIM": "1", "NUM_HEADS": "1", "NUM_KV_HEADS": "1"}, ("MODEL_DIM=1", "at least 2")),
    ({"GATE_WINDOW": "513"}, ("GATE_WINDOW=513", "MODEL_DIM=512: must be at least")),
    ({"GATE_WINDOW": "513", "EMBED_DIM": "513"}, ("GATE_WINDOW=513", "MODEL_DIM=512: must be at least")),
    ({"SWA_START_FRAC": "0.4", "WARMDOWN_FRAC": "0"}, ("SWA_START_FRAC=0.4", "never reached", "WARMDOWN_FRAC=0.0")),
    ({"EMBED_DIM": "11"}, ("GATE_WINDOW=12", "at most MODEL_DIM=512, EMBED_DIM=11")),
    ({"DEPTH_LORA_RANK": "4", "NUM_LOOPS": "0"}, ("DEPTH_LORA_RANK=4", "NUM_LOOPS=0")),
    ({"VALUE_RESIDUAL": "1", "LOOP_END": "10", "PARALLEL_START_LAYER": "0"}, ("VALUE_RESIDUAL=1", "LOOP_END=10")),
    ({"SWA_START_FRAC": "0.1"}, ("SWA_START_FRAC=0.1", "never reached", "MIN_LR=0.1")),
    ({"LATE_QAT_THRESHOLD": "0.05"}, ("LATE_QAT_THRESHOLD=0.05", "never reached", "MIN_LR=0.1")),
    ({"TRAIN_SEQ_SCHEDULE": "1000.5@0.5,2048@1"}, ("TRAIN_SEQ_SCHEDULE=1000.5@0.5,2048@1", "tokens: whole")),
    ({"QAT_START": "0.5", "LATE_QAT_THRESHOLD": "0.15"},
     ("QAT_START=0.5", "LATE_QAT_THRESHOLD=0.15", "set one of them")),
    *(({"TRAIN_SEQ_SCHEDULE": text}, (f"TRAIN_SEQ_SCHEDULE={text}: must look like 1024@0.1,2048@1",))
      for text in ("2048", "2048@1,", "2048@1@1", "x@1", "2048@all", "1024@0.5;2048@1")),
    *(({name: text}, (f"{name}={text}: needs values above 0, the largest",))
      for name, full in (("TRAIN_SEQ_SCHEDULE", "2048"), ("BATCH_SCHEDULE", "1"))
      for text in (f"{full}@0.5", f"{full}@1.5", f"{full}@0.5,{full}@0.5,{full}@1", f"{full}@0.7,{full}@0.5,{full}@1",
                   f"0@0.5,{full}@1", f"-1@0.5,{full}@1", f"nan@0.5,{full}@1", f"{full}@nan")),
    ({"TRAIN_SEQ_SCHEDULE": "1024@1"}, ("TRAIN_SEQ_SCHEDULE=1024@1", "the largest 2048")),
    ({"TRAIN_SEQ_SCHEDULE": "1024@0.5,4096@1"}, ("TRAIN_SEQ_SCHEDULE=1024@0.5,4096@1", "the largest 2048")),
    ({"BATCH_SCHEDULE": "0.5@1"}, ("BATCH_SCHEDULE=0.5@1", "the largest 1,")),
    ({"BATCH_SCHEDULE": "1@0.5,2@1"}, ("BATCH_SCHEDULE=1@0.5,2@1", "the largest 1,")),
    ({"PARALLEL_START_LAYER": "11"}, ("PARALLEL_START_LAYER=11", "second half of NUM_LAYERS=11", "0 = off")),
    ({"PARALLEL_START_LAYER": "4", "NUM_LOOPS": "0"}, ("PARALLEL_START_LAYER=4", "second half of NUM_LAYERS=11")),
    ({"LOOP_START": "6"}, ("LOOP_START=6", "LOOP_END=5", "no part of NUM_LAYERS=11")),
    ({"LOOP_END": "11", "PARALLEL_START_LAYER": "0"}, ("LOOP_END=11", "no part of NUM_LAYERS=11")),
    ({"LOOP_END": "8"}, ("LOOP_END=8", "below PARALLEL_START_LAYER=8", "NUM_LOOPS=0")),
    ({"VOCAB_SIZE": "65537"}, ("VOCAB_SIZE=65537", "at most 65536")),
    ({"TRAIN_BATCH_TOKENS": "100000", "MICRO_BATCH_TOKENS": "98304"},
     ("TRAIN_BATCH_TOKENS=100000", "MICRO_BATCH_TOKENS=98304", "not divisible")),
    ({"TRAIN_BATCH_TOKENS": "100001"}, ("TRAIN_BATCH_TOKENS=100001", "MICRO_BATCH_TOKENS=12500", "not divisible")),
    ({"ROPE_STRETCH": "0.5"}, ("ROPE_STRETCH=0.5", "at least 1")),
    ({"TRAIN_ORDER": "strided", "TRAIN_SEQ_LEN": "1000"},
     ("MICRO_BATCH_TOKENS=98304", "TRAIN_SEQ_LEN=1000", "TRAIN_ORDER=strided", "change one")),
    ({"EVAL_STRIDE": "2049"}, ("EVAL_STRIDE=2049", "at most EVAL_SEQ_LEN=2048")),
    ({"EVAL_TEMPERATURE": "0.49"}, ("EVAL_TEMPERATURE=0.49", "0.5 to 2", "0 = fitted")),
    ({"EVAL_TEMPERATURE": "2.01"}, ("EVAL_TEMPERATURE=2.01", "0.5 to 2", "0 = fitted")),
    ({"TARGET_BYTES": "16000001"}, ("TARGET_BYTES=16000001", "the limit is 16,000,000")),
    ({"EVAL_SEQ_LEN": "32"}, ("EVAL_STRIDE=64", "EVAL_SEQ_LEN=32")),
    ({"MAX_WALLCLOCK_SECONDS": "8"}, ("GPTQ_RESERVE_SECONDS=8.0", "MAX_WALLCLOCK_SECONDS=8.0")),
    ({"MATRIX_BITS": "9"}, ("MATRIX_BITS=9", "2 to 8")), ({"MATRIX_BITS": "1"}, ("MATRIX_BITS=1", "2 to 8")),
    ({"EMBED_BITS": "9"}, ("EMBED_BITS=9", "2 to 8")), ({"EMBED_BITS": "1"}, ("EMBED_BITS=1", "2 to 8")),
    ({"MUON_BACKEND_STEPS": "6"}, ("MUON_BACKEND_STEPS=6", "at most 5", "MUON_COEFFICIENTS=polar")),
    ({"MUON_BACKEND_STEPS": "11", "MUON_COEFFICIENTS": "quintic"}, ("MUON_BACKEND_STEPS=11", "at most 10", "quintic")),
    ({"TTT_TARGETS": "q,w"}, ("TTT_TARGETS=q,w", "'head'", "each once")),
    ({"TTT_TARGETS": "q,q"}, ("TTT_TARGETS=q,q", "each once")),
    ({"TTT_CHUNK_SCHEDULE": "0@10"}, ("TTT_CHUNK_SCHEDULE=0@10", "whole tokens", "8@256")),
    ({"NGRAM_ORDER": "3"}, ("NGRAM_ORDER=3", "4 or more")),
    ({"NGRAM_ORDER": "16", "TTT_ORDER": "length"}, ("NGRAM_ORDER=16", "TTT_ORDER=length", "order of the text")),
    ({"EVAL_MODE": "adapted", "SMEAR_GATE": "mean"}, ("EVAL_MODE=adapted", "SMEAR_GATE=mean")),
    ({"TTT_FREEZE_BLOCKS": "12"}, ("TTT_FREEZE_BLOCKS=12", "NUM_LAYERS=11")),
    ({"GLOBAL_TTT_CHUNK_TOKENS": "0"}, ("GLOBAL_TTT_CHUNK_TOKENS=0", "TTT_STRATEGY=stream")),
    ({"TTT_UNSAFE_MULTI_EPOCH": "1"}, ("TTT_UNSAFE_MULTI_EPOCH=1", "TTT_STRATEGY=stream")),
]


@pytest.mark.parametrize("variables, parts", CROSS_CHECKS, ids=lambda x: " ".join(x) if isinstance(x, dict) else "")
def test_every_rule_between_settings_complains_with_name_value_and_remedy(variables, parts):
    text = refusal(**variables)
    assert all(part in text for part in parts), text


def broken_rule(variables: dict[str, str]) -> int | None:
    """The line of the rule between settings that this environment breaks first."""
    config = object.__new__(Config)  # unchecked
    for name, f in FIELDS.items():
        text = variables.get(name.upper())
        object.__setattr__(config, name, f.default if text is None else train_gpt.parse_value(name, text, KINDS[name]))
    rules = config.rules()
    try:
        for condition, _ in rules:
            if not condition:
                return rules.gi_frame.f_lineno
    except UserError:
        return None  # a schedule that cannot be read
    return None


def test_every_rule_between_settings_has_a_row():
    members = itertools.chain(*(node.body for node in TREE.body if getattr(node, "name", "") == "Config"))
    rules = [node for member in members if getattr(member, "name", "") == "rules"
             for node in ast.walk(member) if isinstance(node, ast.Yield)]
    broken = {broken_rule(variables) for variables, _ in CROSS_CHECKS}
    assert len(rules) > 18
    untested = [rule.lineno for rule in rules if not broken & set(range(rule.lineno, rule.end_lineno + 1))]
    assert not untested, f"rules at these lines of train_gpt.py have no row in CROSS_CHECKS: {untested}"


def test_rules_hold_just_inside_their_limits():
    for variables in ({"ROPE_DIMS": "64"}, {"ROPE_DIMS": "0"}, {"GATE_WINDOW": "512"}, {"XSA_LAST_N": "12"},
                      {"PARALLEL_START_LAYER": "5", "NUM_LOOPS": "0"}, {"PARALLEL_START_LAYER": "10"},
                      {"LOOP_END": "7"}, {"LOOP_START": "5"}, {"LOOP_END": "10", "PARALLEL_START_LAYER": "0"},
                      {"LOOP_START": "9", "LOOP_END": "1", "NUM_LOOPS": "0"}, {"VOCAB_SIZE": "65536"},
                      {"EVAL_STRIDE": "2048"}, {"MAX_WALLCLOCK_SECONDS": "0"}, {"MATRIX_BITS": "2"},
                      {"EMBED_DIM": "12"}, {"EMBED_DIM": "513", "GATE_WINDOW": "512"},
                      {"MODEL_DIM": "2", "NUM_HEADS": "1", "NUM_KV_HEADS": "1", "ROPE_DIMS": "2", "GATE_WINDOW": "2"},
                      {"MLP_MULT": "2.001", "MLP_HIDDEN": "1"}, {"DEPTH_LORA_RANK": "1", "NUM_LOOPS": "1"},
                      {"VALUE_RESIDUAL": "1", "LOOP_END": "9", "PARALLEL_START_LAYER": "0"},
                      {"VALUE_RESIDUAL": "1", "LOOP_END": "10", "NUM_LOOPS": "0"},
                      {"SWA_START_FRAC": "0.101"}, {"LATE_QAT_THRESHOLD": "0.01", "MIN_LR": "0"}, {"QAT_START": "1"},
                      {"TRAIN_SEQ_SCHEDULE": "2048@0.1,512@1"}, {"BATCH_SCHEDULE": "1@1"}, {"BATCH_SCHEDULE": ""},
                      {"EMBED_BITS": "8"}, {"MUON_BACKEND_STEPS": "10", "MUON_COEFFICIENTS": "quintic"}):
        assert set(Config.from_env(variables)[0].overrides()) <= set(variables)


def test_the_batch_must_divide_among_the_processes():
    config = Config(train_batch_tokens=512, micro_batch_tokens=64)
    assert [config.accumulation_steps(size) for size in (1, 2, 4, 8)] == [8, 4, 2, 1]
    for size in (3, 16):
        with pytest.raises(UserError, match=rf"TRAIN_BATCH_TOKENS=512 .*{size} processes.*MICRO_BATCH_TOKENS=64"):
            config.accumulation_steps(size)


def test_a_batch_alone_brings_its_micro_batch():
    """Published commands set TRAIN_BATCH_TOKENS=524288, of which the default is no divisor: their scripts take 1/8."""
    for batch, micro in ((524288, 65536), (393216, 98304), (786432, 98304), (512, 64), (4, 1)):
        assert Config.from_env({"TRAIN_BATCH_TOKENS": str(batch)})[0].micro_batch_tokens == micro
    config, notes = Config.from_env({"TRAIN_BATCH_TOKENS": "524288", "MICRO_BATCH_TOKENS": "131072"})
    assert config.micro_batch_tokens == 131072 and notes == []


def test_every_share_of_the_batch_must_divide_among_the_processes():
    config = Config(train_batch_tokens=512, micro_batch_tokens=64)
    assert [config.accumulation_steps(2, share) for share in (0.25, 0.5, 0.75, 1.0)] == [1, 2, 3, 4]
    for size, share in ((2, 0.125), (2, 0.3), (4, 0.75 / 2), (8, 0.5)):
        with pytest.raises(UserError, match=rf"TRAIN_BATCH_TOKENS=512 .times {share}. .*{size} processes"):
            config.accumulation_steps(size, share)


EXTREMES = {"EMA_DECAY": "1", "BETA1": "1", "BETA2": "1", "ITERATIONS": "9" * 400, "SEED": "99999999999999999999"}


@pytest.mark.parametrize("variable", EXTREMES)
def test_values_that_training_cannot_use_are_refused_at_the_start(variable):
    """EMA_DECAY=1 divides by zero, BETA=1 is refused by AdamW, huge whole numbers overflow: all with a traceback."""
    assert variable in refusal(**{variable: EXTREMES[variable]})


# --- other names
RENAMED = {"SIZE_TARGET": ("target_bytes", "15900000", 15_900_000), "TOKEN_ORDER": ("ngram_order", "12", 12),
           "MUON_WEIGHT_DECAY": ("muon_wd", "0.5", 0.5), "ADAM_WEIGHT_DECAY": ("adam_wd", "0.5", 0.5),
           "EMBED_WEIGHT_DECAY": ("embed_wd", "0.5", 0.5), "VAL_BATCH_SIZE": ("val_batch_tokens", "4096", 4096),
           "EMBEDDING_BITS": ("embed_bits", "5", 5), "TIED_EMBEDDING_LR": ("tied_embed_lr", "0.5", 0.5),
           "BIGRAM_VOCAB_SIZE": ("bigram_hash_buckets", "4096", 4096), "BIGRAM_DIM": ("bigram_hash_dim", "64", 64),
           "SKIP_GATE_ENABLED": ("skip_gates_enabled", "0", False), "TTT_EVAL_SEQ_LEN": ("eval_seq_len", "4096", 4096),
           "TTT_LR": ("global_ttt_lr", "0.5", 0.5), "TTT_EPOCHS": ("global_ttt_epochs", "3", 3),
           "TTT_CHUNK_TOKENS": ("global_ttt_chunk_tokens", "4096", 4096),
           "TTT_MOMENTUM": ("global_ttt_momentum", "0.5", 0.5), "TTT_GRAD_CLIP": ("global_ttt_grad_clip", "0.5", 0.5)}
TRANSLATED = {  # (variable, text) -> (our field, value, another value of it that contradicts)
    ("SMEAR_GATE_ENABLED", "0"): ("smear_gate", "off", "input"),
    ("SMEAR_GATE_ENABLED", "1"): ("smear_gate", "input", "static"),
    ("USE_SMEARGATE", "0"): ("smear_gate", "off", "mean"), ("USE_SMEARGATE", "1"): ("smear_gate", "static", "input"),
    ("GATED_ATTN_ENABLED", "1"): ("attn_gate", "dense", "sparse"),
    ("GATED_ATTENTION", "1"): ("attn_gate", "dense", "output"),
    ("ATTN_OUT_GATE_ENABLED", "1"): ("attn_gate", "output", "sparse"),
    ("SPARSE_ATTN_GATE_ENABLED", "0"): ("sparse_attn_gate_scale", 0.0, "0.75"),
    ("SPARSE_ATTN_GATE_ENABLED", "1"): ("attn_gate", "sparse", "dense"),
    ("EMA_ENABLED", "0"): ("ema_decay", 0.0, "0.75"), ("SWA_ENABLED", "0"): ("swa_start_frac", 0.0, "0.75"),
    ("LATE_QAT", "0"): ("late_qat_threshold", 0.0, "0.75"), ("TTT_ENABLED", "1"): ("eval_mode", "adapted", "packed"),
    ("PHASED_TTT_ENABLED", "0"): ("phased_ttt_num_phases", 0, "2"),
    ("PHASED_TTT_ENABLED", "1"): ("eval_mode", "adapted", "packed"),
    ("NGRAM_TILT_ENABLED", "0"): ("ngram_order", 0, "3"),
    ("NGRAM_TILT_ENABLED", "1"): ("ngram_order", 16, "3"),
    ("TTT_K_LORA", "0"): ("ttt_targets", "q,v,out,mlp,head", "q"),
    ("TTT_MASK", "no_qv"): ("ttt_targets", "k,out,mlp,head", "q")}
NUMBERS = (["0.0"], ["0.5", ""])
INERT = {"ROPE_YARN": (["0"], ["1"]), "FUSED_CE_ENABLED": (["0", "1"], ["2"]),
         "PARALLEL_FINAL_LANE": (["mean", "MEAN"], ["attn"]),
         "SPARSE_ATTN_GATE_INIT_STD": (["0", "0.0"], ["0.01"]),
         "ATTN_OUT_GATE_ENABLED": (["0"], ["2"]), "GATED_ATTN_ENABLED": (["0"], ["2"]),
         "GATED_ATTENTION": (["0"], [""]), "TTT_ENABLED": (["0"], ["yes"]), "QAT_ENABLED": (["0"], ["1"]),
         "SWA_ENABLED": (["1"], ["2"]), "LATE_QAT": (["1"], ["0.15"]),
         "OPTROT_ENABLED": (["0"], ["1"]), "EMA_ENABLED": (["1"], ["maybe"]), "MUON_HUBER_WD": (["0"], ["1"]),
         "TTT_K_LORA": (["1"], ["2"]), "TTT_MASK": ([""], ["q"]), "TTT_O_LORA": (["1"], ["0"]),
         "TTT_MLP_LORA": (["1"], ["0"]),
         "MATRIX_CLIP_SIGMAS": (["12.85"], ["13"]), "QK_GAIN_INIT_SCHEDULE": ([""], ["4,5"]),
         "TTT_UPDATE_EVERY": (["1"], ["2"]), "TTT_GRAD_STEPS": (["1"], ["2"]),
         "GLOBAL_TTT_OPTIMIZER": (["sgd"], ["muon"]), "NGRAM_HINT_PRECOMPUTE_OUTSIDE": (["0"], ["1"]),
         "WITHIN_TAU": (["99.0"], ["0.5"]), "WORD_TAU": (["99.0"], ["0.5"]), "WITHIN_BOOST": NUMBERS,
         "WORD_BOOST": NUMBERS, "AGREE_ADD_BOOST": NUMBERS, "TTT_LORA_EMA_DECAY": NUMBERS}
REPLACED = {  # of a published method that is not here: (values that pass, one that does not, what the log says)
    **{name: (["0", "1"], "2", "tcq leaves less error") for name in ("LQER_ENABLED", "LQER_ASYM_ENABLED")},
    "AWQ_LITE_ENABLED": (["0", "1"], "2", "tcq"), "CASEOPS_ENABLED": (["0", "1"], "yes", "DATA_PATH"),
    "LQER_RANK": (["2", "4"], "0", "tcq"), "LQER_TOP_K": (["1", "3", "4"], "x", "tcq"),
    "LQER_FACTOR_BITS": (["4"], "5", "tcq"), "LQER_ASYM_GROUP": (["32", "64"], "0", "tcq"),
    "SMEAR_GATE_BOS_FIX": (["0", "1"], "2", "no token is ever smeared into another document"),
    "ASYM_LOGIT_RESCALE": (["0", "1"], "2", "SOFTCAP_TYPE=two_sided"),
    "TOKEN_THRESHOLD": (["0.8", "0.800"], "0.5", "counts"), "TOKEN_BOOST": (["2.625"], "3", "counts"),
    "GATED_ATTN_QUANT_GATE": (["0", "1"], "2", "kept in float16"), "COMPRESSOR": (["pergroup"], "lrzip", "means rans")}


def test_these_tables_cover_all_aliases():
    assert set(RENAMED) | {name for name, _ in TRANSLATED} | set(INERT) | set(REPLACED) == set(ALIASES)
    assert {name.lower() for name in ALIASES} & set(FIELDS) == {"compressor"}  # which has a value more


@pytest.mark.parametrize("variable", RENAMED)
def test_renamed_variables_set_our_field(variable):
    name, text, value = RENAMED[variable]
    config, notes = Config.from_env({variable: text})
    assert config.overrides() == {name.upper(): value} and notes == []
    assert Config.from_env({variable: text, name.upper(): text})[0] == config  # twice the same is no contradiction
    assert refusal(**{variable: "abc"}).startswith(f"{variable}=abc: must be")


@pytest.mark.parametrize("variable", RENAMED)
def test_an_alias_that_contradicts_its_field_is_refused(variable):
    name, text, _ = RENAMED[variable]
    default = str(int(FIELDS[name].default) if KINDS[name] is bool else FIELDS[name].default)
    for environ in ({variable: text, name.upper(): default}, {name.upper(): default, variable: text}):
        complaint = refusal(**environ)
        assert f"{variable}={text} contradicts {name.upper()}=" in complaint and "set one" in complaint


@pytest.mark.parametrize("variable, text", TRANSLATED)
def test_translated_values(variable, text):
    name, value, other = TRANSLATED[variable, text]
    config, notes = Config.from_env({variable: text})
    assert config == Config(**{name: value}) and notes == []
    assert Config.from_env({variable: text, name.upper(): str(value)}) == (config, [])
    assert f"{variable}={text} contradicts {name.upper()}={other}" in refusal(**{variable: text, name.upper(): other})
    accepted = " or ".join(ALIASES[variable])
    assert refusal(**{variable: "2"}).endswith(f"drop it or set {accepted}")


def test_aliases_that_ask_for_different_gates_contradict_each_other():
    assert "contradicts" in refusal(GATED_ATTN_ENABLED="1", ATTN_OUT_GATE_ENABLED="1")
    assert "contradicts" in refusal(SMEAR_GATE_ENABLED="1", USE_SMEARGATE="1")
    config, notes = Config.from_env({"GATED_ATTN_ENABLED": "0", "ATTN_OUT_GATE_ENABLED": "1", "GATED_ATTENTION": "0"})
    assert config == Config(attn_gate="output") and len(notes) == 2


@pytest.mark.parametrize("variable", INERT)
def test_switches_without_effect_pass_with_a_note_where_they_ask_for_what_is_so(variable):
    accepted, refused = INERT[variable]
    for text in accepted:
        config, notes = Config.from_env({variable: text})
        assert config == Config() and len(notes) == 1 and f"{variable}={text}" in notes[0]
    for text in refused:
        complaint = refusal(**{variable: text})
        assert complaint.startswith(f"{variable}={text}: ") and accepted[0] in complaint


@pytest.mark.parametrize("variable", REPLACED)
def test_published_methods_that_are_replaced_pass_with_a_note_that_says_by_what(variable):
    accepted, refused, reason = REPLACED[variable]
    for text in accepted:
        config, notes = Config.from_env({variable: text})
        assert config == Config() and len(notes) == 1
        assert notes[0].startswith(f"{variable}={text} ") and reason in notes[0]
    assert refusal(**{variable: refused}).startswith(f"{variable}={refused}: ")


@pytest.mark.parametrize("variable, guess", [
    ("MATRX_LR", "MATRIX_LR"), ("MUON_WDD", "MUON_WD"), ("MUON_WD_", "MUON_WD"), ("NUM_LAYER", "NUM_LAYERS"),
    ("ITERATION", "ITERATIONS"), ("WARMDOWN_FRACTION", "WARMDOWN_FRAC"), ("VOCABSIZE", "VOCAB_SIZE"),
    ("EMA_DECAYS", "EMA_DECAY"), ("ROPE_DIM", "ROPE_DIMS"), ("MAX_WALLCLOCK_SECOND", "MAX_WALLCLOCK_SECONDS"),
    ("EMA_ENABLE", "EMA_ENABLED"), ("XSA_LAST", "XSA_LAST_N")])
def test_near_misses_are_refused_with_a_guess(variable, guess):
    text = refusal(**{variable: "1"})
    assert text.startswith(f"{variable}: unknown setting; did you mean {guess}?") and "unset it" in text


@pytest.mark.parametrize("variable", ["TTT_FOO", "GPTQ_BLOCK", "EMA_X", "SWA_SOMETIMES", "LQER_BITS", "LORA_RANK_XYZ",
                                      "BIGRAM_ORDER", "MUON_EVERYTHING", "SOFTCAP", "QAT_BITS", "INT4_STEP",
                                      "VAL_TOKENS", "BITNET_GROUP_SIZE"])
def test_words_of_our_family_are_refused(variable):
    text = refusal(**{variable: "1"})
    assert text.startswith(f"{variable}: unknown setting; ") and "--help" in text


SHELL = """PATH HOME USER LOGNAME SHELL TERM LANG LC_ALL LC_CTYPE PWD OLDPWD SHLVL EDITOR VISUAL PAGER MAIL HOSTNAME
HOSTTYPE DISPLAY LS_COLORS LESSOPEN TMPDIR TMP TEMP TZ COLUMNS LINES XDG_SESSION_ID XDG_RUNTIME_DIR XDG_DATA_DIRS
XDG_CONFIG_DIRS SSH_CLIENT SSH_CONNECTION SSH_TTY SSH_AUTH_SOCK DBUS_SESSION_BUS_ADDRESS VIRTUAL_ENV VIRTUAL_ENV_PROMPT
CONDA_PREFIX CONDA_DEFAULT_ENV CONDA_SHLVL PYTHONPATH PYTHONUNBUFFERED PYTHONHASHSEED PYTHONDONTWRITEBYTECODE PS1 _
EMACS INSIDE_EMACS COLORTERM TERM_PROGRAM TERM_PROGRAM_VERSION VSCODE_IPC_HOOK_CLI JUPYTER_RUNTIME_DIR"""
BUILD = """CC CXX CFLAGS CXXFLAGS LDFLAGS COMPILER COMPILE_FLAGS LD_LIBRARY_PATH LD_PRELOAD MAKEFLAGS MAKELEVEL MFLAGS
PKG_CONFIG_PATH CMAKE_PREFIX_PATH JAVA_HOME GOPATH CI GITHUB_ACTIONS GITHUB_RUN_ID GITHUB_RUN_NUMBER GITHUB_WORKSPACE
GITHUB_TOKEN RUNNER_OS RUNNER_TEMP BUILD_ID BUILD_NUMBER JOB_NAME GITLAB_CI CI_JOB_ID CI_PIPELINE_ID CIRCLECI
TEST_CORPUS_DIR PYTEST_CURRENT_TEST PYTEST_VERSION PYTEST_XDIST_WORKER PYTEST_XDIST_WORKER_COUNT
PYTEST_XDIST_TESTRUNUID HYPOTHESIS_PROFILE DEBIAN_FRONTEND KUBERNETES_SERVICE_HOST KUBERNETES_PORT"""
CLUSTER = """CUDA_VISIBLE_DEVICES CUDA_HOME CUDA_PATH CUDA_LAUNCH_BLOCKING CUDA_DEVICE_ORDER CUDA_VERSION
NVIDIA_VISIBLE_DEVICES NVIDIA_DRIVER_CAPABILITIES NCCL_DEBUG NCCL_VERSION NCCL_IB_DISABLE
NCCL_SOCKET_IFNAME NCCL_NET GLOO_SOCKET_IFNAME
OMP_NUM_THREADS MKL_NUM_THREADS OPENBLAS_NUM_THREADS KMP_DUPLICATE_LIB_OK TOKENIZERS_PARALLELISM TORCH_HOME
TORCH_LOGS TORCH_NCCL_ASYNC_ERROR_HANDLING TORCH_CUDA_ARCH_LIST TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR
PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF HF_HOME HF_TOKEN HF_HUB_OFFLINE WANDB_MODE WANDB_PROJECT WANDB_API_KEY RANK
LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_NAME ROLE_WORLD_SIZE MASTER_ADDR
MASTER_PORT TORCHELASTIC_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_RUN_ID TORCHELASTIC_USE_AGENT_STORE
TORCHELASTIC_ERROR_FILE TORCHELASTIC_SIGNALS_TO_HANDLE TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING SLURM_JOB_ID
SLURM_NTASKS SLURM_PROCID SLURM_NODELIST SLURM_CPUS_PER_TASK RUNPOD_POD_ID RUNPOD_GPU_COUNT AWS_REGION
AWS_ACCESS_KEY_ID GOOGLE_APPLICATION_CREDENTIALS"""


@pytest.mark.parametrize("variables", [SHELL, BUILD, CLUSTER], ids=["shell", "build", "cluster"])
def test_ordinary_environments_pass(variables):
    assert Config.from_env(dict.fromkeys(variables.split(), "1")) == (Config(), [])


def test_the_environment_of_this_test_passes():
    others = {name: text for name, text in os.environ.items() if name.lower() not in FIELDS and name not in ALIASES}
    assert Config.from_env(others) == (Config(), [])


# --- the command line
def test_help_lists_every_field_with_its_default_and_comment(capsys):
    assert main({}, ["--help"]) == 0 and main({}, ["-h"]) == 0
    shown = capsys.readouterr().out
    lines = help_text().splitlines()
    assert shown == (help_text() + "\n") * 2 and lines[0] == train_gpt.__doc__.strip().splitlines()[0]
    for name, f in FIELDS.items():
        line, = (line for line in lines if line.startswith(f"  {name.upper()}={f.default}"))
        comment = line.removeprefix(f"  {name.upper()}={f.default}")
        assert comment.startswith(" ") and comment.strip() and "# " not in comment, line


def test_an_unknown_argument_shows_the_help_and_fails(capsys):
    for arguments in (["--iterations", "3"], ["--help", "x"], ["config.py"]):
        assert main({}, arguments) == 2
        assert "ITERATIONS=20000" in capsys.readouterr().out


# --- the source
def config_reads() -> set[str]:
    """Fields that train_gpt.py uses: config.x, self.x in Config's own methods, names in the role table, names that are
    handed to getattr or to a function that looks its argument up in the config (as `scheduled`)."""
    readers, found = {"getattr": 1} | lookups(), set()
    for statement in TREE.body:
        in_config = isinstance(statement, ast.ClassDef) and statement.name == "Config"
        names = {t.id for t in getattr(statement, "targets", []) if isinstance(t, ast.Name)}
        for member in statement.body if isinstance(statement, ast.ClassDef) else [statement]:
            if isinstance(member, ast.FunctionDef) and member.name in ("checks", "rules"):
                continue  # what checks a setting does not use it
            for node in ast.walk(member):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    owner = node.value.id if isinstance(node.value, ast.Name) else getattr(node.value, "attr", "")
                    if owner == "config" or (owner == "self" and in_config):
                        found.add(node.attr)
                elif isinstance(node, ast.Constant) and names & {"PARAM_TABLE", "ATTN", "TABLE"}:
                    found.add(node.value)
                elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in readers:
                    owner, name = node.args[0], node.args[readers[node.func.id]]
                    if ast.unparse(owner) in ("config", "self.config") and isinstance(name, ast.Constant):
                        found.add(name.value)
    return found


def lookups() -> dict[str, int]:
    """{function that calls getattr(config, one of its arguments): position of that argument}; config is the first."""
    found = {}
    for function in (node for node in TREE.body if isinstance(node, ast.FunctionDef)):
        names = [argument.arg for argument in function.args.args]
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and ast.unparse(node).startswith("getattr(config, "):
                name = ast.unparse(node.args[1])
                if names[:1] == ["config"] and name in names:
                    found[function.name] = names.index(name)
    return found


def test_every_field_is_read_by_the_program():
    unread = set(FIELDS) - config_reads()
    assert not unread, f"declared, but nothing reads it: {sorted(unread)}"
    assert lookups() == {"scheduled": 1}


def test_only_the_entry_points_touch_the_environment():
    allowed = {"main", "start", "from_env"}
    places = []

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            function = node.name
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        if name in ("environ", "environb", "getenv", "getenvb", "putenv", "unsetenv") and function not in allowed:
            places.append((function, node.lineno))
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    *rest, entry = TREE.body
    for statement in rest:
        visit(statement, "")
    assert not places
    assert isinstance(entry, ast.If) and "__main__" in ast.unparse(entry.test)  # hands os.environ to main
    assert [line for line in ast.unparse(entry.body).splitlines() if "environ" in line] == [
        "exit_code = main(os.environ, sys.argv[1:])"]
    assert not [n for n in ast.walk(TREE) if isinstance(n, ast.ImportFrom) and n.module == "os"]


def test_importing_has_no_side_effects(tmp_path):
    code = ("import os, signal, sys\n"
            f"sys.path.insert(0, {str(ROOT)!r})\n"
            "before = dict(os.environ), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)\n"
            "import torch\n"
            "state = torch.get_rng_state(), torch.get_num_threads(), torch.get_float32_matmul_precision()\n"
            "import train_gpt, threading\n"
            "assert before == (dict(os.environ), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))\n"
            "assert torch.equal(state[0], torch.get_rng_state()) and state[1:] == (torch.get_num_threads(),\n"
            "    torch.get_float32_matmul_precision())\n"
            "assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()\n"
            "assert threading.active_count() == 1\n"
            "print('imported')\n")
    folder = tmp_path / "empty"
    folder.mkdir()
    folder.chmod(0o555)
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=folder, env={}, capture_output=True, text=True,
                          timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "imported\n", "")
    assert list(tmp_path.rglob("*")) == [folder]
