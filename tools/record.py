"""What a record folder is: its files and keys, the limits, what follows from the logs, what a sound log looks like.

Imported by make_record.py, which writes such folders, and validate_record.py, which takes nothing in them for granted:
both take definitions from here, and the checker applies them to the folder's own files again.
"""
import ast
import functools
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compare_runs import WIN_NATS, WIN_P, against, mean, spread, welch
from outcomes import Outcome
from pack import pack
from run_log import PACKED_FIRST_LINE, SEPARATOR, ToolError

SIZE_LIMIT_BYTES = 16_000_000  # model and program
LIMIT_SECONDS = 600  # of training with calibration, and again of evaluation
MIN_SEEDS = 3
CLOCK_SECONDS = 0.002  # by which two roundings of a time to milliseconds may differ
VAL_DOCUMENTS, VAL_BYTES = 50_000, 151_080_000  # the challenge's validation text; bytes within VAL_BYTES_SHARE
VAL_BYTES_SHARE = 0.005  # what tokenizers normalize: the published ones count 151,074,000 to 151,078,000
MAX_PROBABILITY_ERROR = 1e-4  # of a sum over the vocabulary that the program still calls legal
RECORD, NON_RECORD = "10min_16mb", "non_record_16mb"  # tracks
README, PULL_REQUEST, SUBMISSION, RUN = "README.md", "PR.md", "submission.json", "run.sh"
PACKED, READABLE, REQUIREMENTS, PLOT = "train_gpt.py", "train_gpt_readable.py", "requirements.txt", "runs.png"
FIXED_FILES = {
    PACKED: "the program as it is counted, shipped and run", READABLE: "the same with comments, to be read",
    SUBMISSION: "the numbers, for programs", README: "this page", PULL_REQUEST: "title and text of the pull request",
    REQUIREMENTS: "packages", RUN: "the command", PLOT: "losses in training, scores of the stages"}
CLUTTER = {"__pycache__", "logs", ".DS_Store"}  # of runs in the folder; no part of it
PUBLISHED_KEYS = {"author": str, "github_id": str, "name": str, "date": str, "val_bpb": float}  # in every folder
GIVEN_KEYS = {  # what does not follow from the logs
    **dict.fromkeys(("author", "github_id", "name", "date", "blurb", "track", "commit", "technique_summary"), str),
    "attribution": dict, "lineage": list, "comparison": dict, "base": dict, "revisions": list, "files": dict}
ATTENTION_PACKAGES = {  # back end: its line in a requirements.txt
    "fa3": "flash_attn_3  # not on PyPI: wheels of Dao-AILab/flash-attention, folder hopper", "fa4": "flash-attn-4"}
PATHS = {"data_dir", "data_path", "tokenizer_path", "log_dir", "artifact_path", "resume"}  # of a machine
EVENTS = {  # lines of a sound log
    "version": r"train_gpt:(\S+) python:(\S+) torch:(\S+) numpy:\S+ source_sha256:([0-9a-f]+)",
    "world": r"run_id:(\S+) device:(.*) world_size:(\d+) dtype:",
    "data": r"train_shards:(\d+) train_tokens:(\d+) val_documents:(\d+) val_tokens:(\d+) val_bytes:(\d+) "
            r"leaked_documents:(\d+)",
    "fingerprint": r"data_fingerprint:([0-9a-f]{64})$",
    "model": r"num_params:(\d+) attention:(\S+) ",
    "trained": r"peak_memory:(\d+)MiB steps:(\d+) train_seconds:(\d+\.\d+)",
    "bytes": r"artifact_bytes:(\d+) code_bytes:(\d+) submission_bytes:(\d+) limit_bytes:(\d+) fits:([01])$",
}
# lines that some runs have
CALIBRATION = re.compile(r"calibration tokens:\d+ (?:temperature:\d+\.\d+ )?seconds:(\d+\.\d+)")
COMPILED = re.compile(r"compile_warmup seconds:(\d+\.\d)$")
STOPPED = re.compile(r"stopping_early: wallclock_cap train_time:(\d+)ms step:(\d+)/")
PROGRESS = re.compile(r"step:(\d+)/\d+ train_loss:\S+ train_time:(\d+)ms step_avg:(\d+\.\d+)ms ")
BATCH_SHARE = re.compile(r"stage step:(\d+) .*\bbatch_share:(\S+)")


def log_name(seed: int) -> str:
    return f"train_seed{seed}.log"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def encode_source(text: str) -> bytes:
    """The program's text in a log -> its bytes; packed programs are Latin-1."""
    return text.encode("latin1" if text.startswith(PACKED_FIRST_LINE) else "utf8", "replace")


def read_json(path: Path) -> dict[str, Any]:
    """ToolError for a file that is missing or holds no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf8"))
    except OSError as error:
        raise ToolError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ToolError(f"{path}: no JSON ({error})") from None
    if not isinstance(value, dict):
        raise ToolError(f"{path}: must be a JSON object, {{...}}")
    return value


def matches(outcome: Outcome, pattern: re.Pattern[str]) -> list[tuple[str, ...]]:
    """Groups of all lines behind the settings that begin so."""
    return [match.groups() for line in outcome.run.events if (match := pattern.match(line))]


def events(outcome: Outcome) -> dict[str, tuple[str, ...]]:
    """{name: what its line says}; a line that is missing has no entry."""
    found = {}
    for line in outcome.run.events:
        for name, pattern in EVENTS.items():
            if name not in found and (match := re.match(pattern, line)):
                found[name] = match.groups()
    return found


# --- the program, asked from outside: whatever it does when imported, it does in a process of its own
ASK = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("program", sys.argv[1])
program = sys.modules["program"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)
config, _ = program.Config.from_env(json.loads(sys.argv[2]))
own = getattr(program, "pack_source", lambda source: b"")(open(sys.argv[1], "rb").read())
print(json.dumps({"packed": own.decode("latin1"), "settings": vars(config)}))
"""


@functools.lru_cache
def ask_source(source: bytes, variables: str) -> tuple[str, dict[str, Any]]:
    """Program, variables as JSON -> (what it said last, its answer, {} = none). Slow: the program imports torch."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PACKED
        path.write_bytes(source)
        done = subprocess.run([sys.executable, "-c", ASK, str(path), variables], text=True, check=False,
                              capture_output=True, env={**os.environ, **ONE_THREAD})
    last = ((done.stderr if done.returncode else done.stdout).strip().splitlines() or ["it printed nothing"])[-1]
    return last, {} if done.returncode else json.loads(last)


def ask_program(path: Path, variables: Mapping[str, str]) -> tuple[bytes, dict[str, Any]]:
    """Program, variables -> (what its own pack_source makes of it, {setting: value} of these variables)."""
    last, answer = ask_source(path.read_bytes(), json.dumps(dict(variables)))
    if not answer:
        raise ToolError(f"{path}: cannot be imported: {last}")
    return answer["packed"].encode("latin1"), answer["settings"]


def packs_itself(source: bytes) -> bool:
    """Programs before tools/pack.py had a pack_source of their own, and counted exactly what it gave."""
    return b"\ndef pack_source(" in source


def packed_form(path: Path) -> bytes:
    """Readable program -> what is counted, shipped and run. Nothing of it runs here but a pack_source of its own."""
    source = path.read_bytes()
    try:
        return ask_program(path, {})[0] if packs_itself(source) else pack(source)
    except ToolError as error:
        raise ToolError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None


def code_faults(outcome: Outcome, source: bytes, packed: bytes) -> Iterator[str]:
    """Did this run count the bytes of the packed program? The readable one does not know them, and counts more."""
    ran_readable = outcome.run.fact("source_sha256") == hashlib.sha256(source).hexdigest()
    counted, bound = outcome.code_bytes or 0, ran_readable and not packs_itself(source)
    if counted < len(packed) or (counted > len(packed) and not bound):
        yield f"counted {counted} bytes of program, {PACKED} has {len(packed)}"


def config_defaults(source: str) -> dict[str, Any]:
    """Source of train_gpt.py -> {setting: default}, without running it. ToolError where it has no class Config.

    A default that is no plain value comes as its text.
    """
    def value(node: ast.expr) -> Any:
        try:
            return ast.literal_eval(node)
        except ValueError:
            return ast.unparse(node)
    try:
        classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Config"]
    except SyntaxError as error:
        raise ToolError(f"{READABLE}: no Python: {error.msg}, line {error.lineno}") from None
    fields = [node for node in classes[0].body if isinstance(node, ast.AnnAssign)] if classes else []
    found = {node.target.id: value(node.value) for node in fields
             if isinstance(node.target, ast.Name) and node.value is not None}
    if not found:
        raise ToolError(f"{READABLE}: no class Config with settings in it; not a train_gpt.py")
    return found


def environment_text(value: Any) -> str:
    """A setting's value as its variable takes it."""
    return str(int(value)) if isinstance(value, bool) else str(value)


# --- what follows from the logs
def rounded(value: float) -> float:
    return round(value, 8)


def device_name(outcome: Outcome) -> str:
    """'8 x NVIDIA H100 80GB HBM3'."""
    return f"{outcome.world_size} x {outcome.run.fact('device').split(' (compute capability')[0]}"


def seed_facts(outcome: Outcome, code_bytes: int) -> dict[str, Any]:
    """A run's entry of `seed_results`. As in published folders, artifact_bytes is model and program together.

    The program's bytes are those of the packed file; a run of the readable one counted some more.
    Seconds are there once for readers, and in whole milliseconds under the names that published folders use.
    """
    fact = outcome.run.fact
    stages = {name: rounded(stage["val_bpb"]) for name, stage in fact("stages").items()}
    return {"val_loss": rounded(outcome.val_loss), "val_bpb": rounded(outcome.val_bpb),
            "artifact_bytes": fact("artifact_bytes") + code_bytes, "model_bytes": fact("artifact_bytes"),
            "code_bytes": code_bytes, "steps": fact("steps"),
            "step_avg_ms": round(1000 * fact("train_seconds") / max(fact("steps"), 1), 2),
            "train_time_s": fact("train_seconds"), "calibration_time_s": fact("calibration_seconds"),
            "compile_time_s": fact("compile_seconds"), "eval_time_s": fact("eval_seconds"),
            "train_wallclock_ms": round(1000 * fact("train_seconds")),
            "eval_time_ms": round(1000 * fact("eval_seconds")),
            "train_tokens": fact("train_tokens"), "peak_memory_bytes": fact("peak_memory_bytes"),
            "val_tokens": fact("audit")["targets"], "target_tokens": fact("audit")["scored_targets"],
            "pre_quant_val_bpb": stages.get("averaged"), "quantized_val_bpb": stages.get("quantized"), "stages": stages}


def stage_mean(outcomes: Sequence[Outcome], stage: str) -> float | None:
    """Mean bits per byte of a stage that all runs have."""
    found = [outcome.run.fact("stages").get(stage) for outcome in outcomes]
    return rounded(mean([stage["val_bpb"] for stage in found if stage])) if all(found) else None


def derive(outcomes: Sequence[Outcome], code_bytes: int) -> dict[str, Any]:
    """Runs of one record, by seed; the packed program's size -> every key of submission.json that follows from them."""
    first, n = outcomes[0], len(outcomes)
    found, seeds, fact = events(first), [seed_facts(outcome, code_bytes) for outcome in outcomes], first.run.fact
    cuda = re.search(r"\+cu(\d+)(\d)", fact("torch"))
    std = [rounded(spread([seed[key] for seed in seeds])) if n > 1 else None for key in ("val_loss", "val_bpb")]
    def largest(key: str) -> Any:
        return max(seed[key] for seed in seeds)
    return {
        "val_loss": rounded(mean([seed["val_loss"] for seed in seeds])),
        "val_bpb": rounded(mean([seed["val_bpb"] for seed in seeds])), "val_loss_std": std[0], "val_bpb_std": std[1],
        "seeds": [outcome.seed for outcome in outcomes],
        "seed_results": {str(outcome.seed): seed for outcome, seed in zip(outcomes, seeds)},
        "pre_quant_val_bpb": stage_mean(outcomes, "averaged"), "quantized_val_bpb": stage_mean(outcomes, "quantized"),
        "official_stage": first.stage, "bytes_total": largest("artifact_bytes"), "bytes_code": code_bytes,
        "artifact_bytes_mean": round(mean([seed["artifact_bytes"] for seed in seeds])),
        "artifact_bytes_max": largest("artifact_bytes"),
        "train_steps_mean": round(mean([seed["steps"] for seed in seeds]), 2), "step_stop": largest("steps"),
        "step_avg_ms_mean": round(mean([seed["step_avg_ms"] for seed in seeds]), 2),
        "train_wallclock_ms": round(1000 * largest("train_time_s")), "wallclock_seconds": largest("train_time_s"),
        "calibration_seconds_max": largest("calibration_time_s"), "eval_time_seconds": largest("eval_time_s"),
        "num_params": fact("num_params"), "val_tokens": fact("audit")["targets"],
        "target_tokens": fact("audit")["scored_targets"], "val_bytes": fact("audit")["scored_bytes"],
        "val_documents": int(found["data"][2]), "leaked_documents": fact("audit")["leaked_documents"],
        "data_fingerprint": fact("data_fingerprint"), "source_sha256": fact("source_sha256"),
        "program_version": fact("version"), "hardware": device_name(first), "pytorch_version": fact("torch"),
        "cuda_version": f"{cuda[1]}.{cuda[2]}" if cuda else None,
        "flash_attn_version": None, "attention": found["model"][1],  # the log names a back end, no package's version
        "settings": {name: value for name, value in fact("overrides").items()
                     if name.lower() not in PATHS | {"seed", "run_id"}},
        "logs": {str(outcome.seed): log_name(outcome.seed or 0) for outcome in outcomes},
        "compliance": compliance(outcomes, int(found["data"][2]), largest("artifact_bytes"))}


def compliance(outcomes: Sequence[Outcome], documents: int, largest_bytes: int) -> dict[str, bool]:
    """Which rules the measured numbers keep. Only what the logs and the files show; nothing is declared.

    The program has no SLOT (a shift of hidden states or logits, fitted to the targets that it then scores) and no ETLB
    (a bias of the logits, fitted in evaluation), so no setting could break these two. N-gram smoothing is no cache that
    is filled before the score, but who asks for no n-grams at all is told that there are some.
    """
    facts = [outcome.run.fact for outcome in outcomes]
    learns_first = any(outcome.run.settings.get("ttt_unsafe_multi_epoch", "0") != "0" or
                       not outcome.run.fact("audit").get("causal", True) for outcome in outcomes)
    return {"train_under_600s": all(fact("train_seconds") + fact("calibration_seconds") <= LIMIT_SECONDS
                                    for fact in facts),
            "eval_under_600s": all(fact("eval_seconds") <= LIMIT_SECONDS for fact in facts),
            "artifact_under_16mb": largest_bytes <= SIZE_LIMIT_BYTES,
            "three_seeds": len(facts) >= MIN_SEEDS, "full_validation": documents == VAL_DOCUMENTS and all(
                fact("audit")["scored_targets"] == fact("audit")["targets"] and
                abs(fact("audit")["scored_bytes"] / VAL_BYTES - 1) <= VAL_BYTES_SHARE for fact in facts),
            "no_validation_document_in_training_data": all(fact("audit")["leaked_documents"] == 0 for fact in facts),
            "eight_h100": all(fact("world_size") == 8 and "H100" in fact("device") for fact in facts),
            "legal_by_the_programs_audit": all(fact("legal") is True for fact in facts),
            "score_first_ttt": not learns_first, "no_pre_quant_ttt": not learns_first, "no_slot": True, "no_etlb": True,
            "no_ngram_cache": all(outcome.run.settings.get("ngram_order", "0") == "0" for outcome in outcomes)}


def packages(facts: Mapping[str, Any]) -> list[str]:
    """What ran, as lines of a requirements.txt."""
    attention = ATTENTION_PACKAGES.get(facts["attention"])
    return [f"torch=={facts['pytorch_version'].partition('+')[0]}", *([attention] if attention else [])]


def compare_with(outcomes: Sequence[Outcome], comparison: Mapping[str, Any]) -> dict[str, Any]:
    """{name, val_bpb, scores} of the record to beat, {} = none -> the published keys of a comparison, and p."""
    if not comparison:
        return {"comparison_baseline_bpb": None, "delta_vs_leaderboard_bpb": None, "delta_vs_leaderboard_nats": None,
                "comparison_p_value": None}
    per_nat = mean([outcome.bpb_per_nat for outcome in outcomes])
    ours, other = [outcome.val_bpb for outcome in outcomes], comparison["scores"]
    margin = WIN_NATS * per_nat
    test = welch(ours, other, margin) if len(other) > 1 else against(ours, comparison["val_bpb"], margin)
    delta = mean(ours) - comparison["val_bpb"]
    return {"comparison_baseline_bpb": comparison["val_bpb"], "delta_vs_leaderboard_bpb": rounded(delta),
            "delta_vs_leaderboard_nats": rounded(delta / per_nat),
            "comparison_p_value": None if test.by_margin is None else rounded(test.by_margin)}


def non_record_reasons(facts: Mapping[str, Any]) -> list[str]:
    """submission.json -> why the folder is none for the record track, in words; [] = it is."""
    kept, seeds, p = facts["compliance"], facts["seed_results"].values(), facts["comparison_p_value"]
    training = max(seed["train_time_s"] + seed["calibration_time_s"] for seed in seeds)
    named = facts["comparison"].get("name")
    scored, whole = f"{facts['val_documents']:,} documents", f"{VAL_DOCUMENTS:,} documents"
    if scored == whole:  # so it is the bytes that tell
        scored, whole = f"{scored} with {facts['val_bytes']:,} bytes", f"{whole} with about {VAL_BYTES:,} bytes"
    return [text for holds, text in (
        (kept["three_seeds"], f"{len(seeds)} seed{'s' * (len(seeds) > 1)}; the record track wants {MIN_SEEDS}."),
        (kept["eight_h100"], f"Run on {facts['hardware']}, not on 8 x H100."),
        (kept["train_under_600s"], f"Training and calibration took {training:.1f} seconds; the limit is 600."),
        (kept["eval_under_600s"], f"Evaluation took {facts['eval_time_seconds']:.1f} seconds; the limit is 600."),
        (kept["full_validation"], f"Scored {facts['target_tokens']:,} targets of {scored}, not the challenge's "
                                  f"validation text of {whole}."),
        (kept["no_validation_document_in_training_data"],
         f"{facts['leaked_documents']} validation documents occur in the training data."),
        (kept["legal_by_the_programs_audit"], "The program's own audit calls a run not legal."),
        (p is not None and p < WIN_P, f"Not shown to be better than {named} by {WIN_NATS} nats at p < {WIN_P} (p = "
                                      f"{p})." if named else "Compared with no earlier record.")) if not holds]


# --- what a sound log looks like
def log_faults(outcome: Outcome) -> list[str]:
    """Everything in which a log contradicts itself, in words: it was cut, edited, or is of another program."""
    found = events(outcome)
    missing = [name for name in EVENTS if name not in found]
    if missing:
        return [f"no line {', no line '.join(repr(name) for name in missing)}: cut off or edited"]
    try:
        return [*score_faults(outcome), *line_faults(outcome, found), *training_faults(outcome, found),
                *audit_faults(outcome)]
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        return [f"its result cannot be read ({error!r}): edited, or of another version"]


def score_faults(outcome: Outcome) -> Iterator[str]:
    """Are scores and losses what their sums give, and what the lines before the result say?"""
    run, fact = outcome.run, outcome.run.fact
    stages, audit = fact("stages"), fact("audit")
    for name, stage in stages.items():
        loss, bpb = stage["nats"] / stage["tokens"], stage["nats"] / math.log(2) / stage["bytes"]
        for key, value in (("val_loss", loss), ("val_bpb", bpb)):
            if not math.isclose(stage[key], value, rel_tol=1e-9):
                yield f"{name} {key} {stage[key]} is not what its sums give, {value:.8f}"
        shown = run.stages.get(name)
        if not shown or f"{loss:.8f} {bpb:.8f}" != f"{shown.val_loss:.8f} {shown.val_bpb:.8f}":
            yield f"final_{name}_exact does not say val_loss:{loss:.8f} val_bpb:{bpb:.8f} as the result does"
        if shown and abs(stage["seconds"] - shown.seconds) > CLOCK_SECONDS:
            yield f"final_{name}_exact says eval_time {shown.seconds:.3f} seconds, the result {stage['seconds']}"
        if (stage["tokens"], stage["bytes"]) != (audit["scored_targets"], audit["scored_bytes"]):
            yield f"{name} counts {stage['tokens']} targets and {stage['bytes']} bytes, the audit others"
    if fact("official_stage") != [*stages][-1]:
        yield f"official_stage {fact('official_stage')} is not its last stage, {[*stages][-1]}"
    official = stages[fact("official_stage")]
    for key in ("val_loss", "val_bpb"):
        if fact(key) != official[key]:
            yield f"{key} {fact(key)} is not that of stage {fact('official_stage')}, {official[key]}"
    evaluating = sum(stages[name]["seconds"] for name in {"quantized", fact("official_stage")})  # one after the other
    if fact("eval_seconds") < evaluating - CLOCK_SECONDS:
        yield f"eval_seconds {fact('eval_seconds')} is less than its stages took, {evaluating:.3f}"
    steps = [point.step for point in run.steps]
    times = [point.seconds for point in run.steps]
    if not steps or steps != sorted(set(steps)) or times != sorted(times) or steps[-1] > fact("steps"):
        yield "its progress lines are missing or out of order"


def line_faults(outcome: Outcome, found: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    """Do source, settings and the lines before the result say what the result says?"""
    run, fact = outcome.run, outcome.run.fact
    audit, settings = fact("audit"), run.settings
    calibrated = matches(outcome, CALIBRATION)
    sizes = fact("artifact_bytes"), fact("code_bytes"), fact("submission_bytes")
    training = fact("train_seconds") + fact("calibration_seconds")
    in_time = training <= LIMIT_SECONDS and fact("eval_seconds") <= LIMIT_SECONDS
    digest = hashlib.sha256(encode_source(run.source)).hexdigest()
    if digest != fact("source_sha256"):
        yield f"its source has sha256 {digest[:16]}, its result says {fact('source_sha256')[:16]}"
    said = [  # what the lines say, what the result says
        ("source_sha256", found["version"][3], fact("source_sha256")[:len(found["version"][3])]),
        ("version", found["version"][0], fact("version")), ("torch", found["version"][2], fact("torch")),
        ("run_id", (found["world"][0], settings.get("run_id")), (fact("run_id"), fact("run_id"))),
        ("device", found["world"][1], fact("device")), ("world_size", int(found["world"][2]), fact("world_size")),
        ("seed", settings.get("seed"), str(fact("seed"))), ("num_params", int(found["model"][0]), fact("num_params")),
        ("val_tokens", int(found["data"][3]), audit["targets"] + 1),
        ("val_bytes", int(found["data"][4]), audit["scored_bytes"]),
        ("leaked_documents", int(found["data"][5]), audit["leaked_documents"]),
        ("data_fingerprint", found["fingerprint"][0], fact("data_fingerprint")),
        ("steps", int(found["trained"][1]), fact("steps")),
        ("train_seconds", float(found["trained"][2]), fact("train_seconds")),
        ("calibration_seconds", float(calibrated[-1][0]) if calibrated else 0.0, fact("calibration_seconds")),
        ("bytes", tuple(map(int, found["bytes"])), (*sizes, SIZE_LIMIT_BYTES, int(sizes[2] <= SIZE_LIMIT_BYTES))),
        ("submission_bytes", sizes[0] + sizes[1], sizes[2]),
        ("headroom_bytes", SIZE_LIMIT_BYTES - sizes[2], fact("headroom_bytes")),
        ("fits", sizes[2] <= SIZE_LIMIT_BYTES, fact("fits")), ("in_time", in_time, audit["in_time"])]
    said += [(name, settings.get(name.lower()), str(value)) for name, value in fact("overrides").items()]
    for name, line, result in said:
        if line != result:
            yield f"{name}: the lines say {line}, the result says {result}"


def training_faults(outcome: Outcome, found: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    """Do the lines of training say the steps, tokens, seconds and bytes of memory that the result says?"""
    run, fact, settings = outcome.run, outcome.run.fact, outcome.run.settings
    steps, seconds, resumed = fact("steps"), fact("train_seconds"), bool(settings.get("resume"))
    stopped, planned = matches(outcome, STOPPED), int(settings.get("force_stop_step", 0)) or int(settings["iterations"])
    for milliseconds, step in stopped:
        if int(step) != steps or abs(int(milliseconds) / 1000 - seconds) > CLOCK_SECONDS:
            yield f"stopping_early says step {step} after {milliseconds} ms, the result {steps} after {seconds} seconds"
    if steps > planned or (steps < planned and not stopped and not resumed):
        yield f"steps: {steps} of {planned}, and no line stopping_early"
    progress = [(int(step), int(time), float(average)) for step, time, average in matches(outcome, PROGRESS)]
    for step, time, average in progress:
        if abs(average - time / step) > 0.5 / step + 0.0051:  # what rounding leaves
            yield f"step {step}: step_avg:{average}ms is not train_time / step, {time / step:.2f}"
    if run.steps and run.steps[-1].seconds > seconds + CLOCK_SECONDS:
        yield f"train_seconds {seconds} is before its last progress line, {run.steps[-1].seconds}"
    every, logged = int(settings["train_log_every"]), [step for step, *_ in progress]
    # a resumed log goes on anywhere, or, where training had ended, not at all
    first = (logged or [(steps // (every or 1) + 1) * every])[0] if resumed else every
    if every and (first % every or logged != list(range(first, steps + 1, every))):
        yield f"its progress lines are not those of every {every} steps to step {steps}"
    least, most = token_bounds(outcome)
    if not least * (1 - 1e-5) <= fact("train_tokens") <= most * (1 + 1e-5):  # shares are logged with six digits
        yield f"train_tokens {fact('train_tokens')} are not those of {steps} steps, {least:.0f}" + \
            f" to {most:.0f}" * (least < most)
    compiling = float((matches(outcome, COMPILED) or [("0",)])[-1][0])
    if abs(fact("compile_seconds") - compiling) > 0.5:  # the line is written a moment earlier
        yield f"compile_seconds {fact('compile_seconds')}: the lines say {compiling}"
    if fact("peak_memory_bytes") < int(found["trained"][0]) * 2 ** 20:
        yield f"peak_memory_bytes {fact('peak_memory_bytes')} is less than the {found['trained'][0]} MiB of training"


def token_bounds(outcome: Outcome) -> tuple[float, float]:
    """Least and most tokens of the logged steps: equal, but where a resumed log lacks the lines of earlier stages."""
    settings, steps = outcome.run.settings, outcome.run.fact("steps")
    shares = [float(part.partition("@")[0]) for part in settings.get("batch_schedule", "").split(",") if part] or [1.0]
    whole = steps * int(settings["train_batch_tokens"])
    if settings.get("resume"):
        return min(shares) * whole, max(shares) * whole
    changes = [(0, shares[0]), *((int(step), float(share)) for step, share in matches(outcome, BATCH_SHARE))]
    ends = [*(step for step, _ in changes[1:]), steps]
    tokens = sum((end - start) * share for (start, share), end in zip(changes, ends)) * (whole / max(steps, 1))
    return tokens, tokens


def audit_faults(outcome: Outcome) -> Iterator[str]:
    """Is what the result calls causal and legal what its numbers and settings say?"""
    fact, audit, settings = outcome.run.fact, outcome.run.fact("audit"), outcome.run.settings
    audited, documents = "causal" in audit, int(events(outcome)["data"][2])
    if audited != (settings.get("audit") == "True"):
        yield f"audit: the lines say AUDIT={settings.get('audit')}, the result has {'one' if audited else 'none'}"
    if audited and audit["causal"] != (audit["change_before_nats"] <= audit["noise_nats"]):
        yield (f"causal is {audit['causal']}, with a change of {audit['change_before_nats']} nats before the changed "
               f"token and a noise of {audit['noise_nats']}")
    subset = int(settings.get("val_docs", 0))
    if subset and documents > subset:
        yield f"val_documents: the lines say {documents}, VAL_DOCS is {subset}"
    broken = [text for text, holds in (
        ("in_time", audit["in_time"]), ("fits", fact("fits")), ("leaked_documents", audit["leaked_documents"] == 0),
        ("causal", audit.get("causal", True)), ("VAL_DOCS", not subset),
        ("probability_error", audit.get("probability_error", 0.0) < MAX_PROBABILITY_ERROR),
        ("TTT_UNSAFE_MULTI_EPOCH", settings.get("ttt_unsafe_multi_epoch", "0") == "0")) if not holds]
    if fact("legal") and broken:
        yield f"its result calls itself legal, against its {', '.join(broken)}"


def differing_lines(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Do all logs of a record say the same of data and model? The folder says it once, of the first."""
    first = events(outcomes[0])
    for outcome in outcomes[1:]:
        for name in ("data", "model"):
            mine = events(outcome).get(name)
            if mine != first.get(name):
                yield f"{outcome.path.name}: its line {name!r} says {mine}, that of {outcomes[0].path.name} " \
                      f"{first.get(name)}"


def settings_faults(outcome: Outcome, defaults: Mapping[str, Any]) -> list[str]:
    """Is every setting that differs from the source's defaults an override of the result, and nothing else?"""
    settings, overrides = outcome.run.settings, outcome.run.fact("overrides")
    differing = {name.upper() for name, value in defaults.items() if settings.get(name) != str(value)}
    faults = [f"{name} differs from the source's default, but the result does not say so"
              for name in sorted(differing - set(overrides) - {"RUN_ID"})]
    faults += [f"{name} is the source's default, the result calls it changed"
               for name in sorted(set(overrides) - differing)]
    return faults + [f"{name.upper()} is no setting of the source" for name in settings if name not in defaults]


def last_run(text: str) -> str:
    """A log file -> the part of its last run; all of it where that one was resumed."""
    first = text.partition("\n")[0] + "\n"
    start = text.rfind("\n" + first) + 1
    part = text[start:]
    return text if SEPARATOR not in part or re.search(r"^resumed step:", part, re.MULTILINE) else part


# --- the folder's own test: its packed program, in its place, on toy data
TOY = {"TRAIN_SEQ_LEN": "64", "EVAL_SEQ_LEN": "64", "EVAL_STRIDE": "32", "TRAIN_BATCH_TOKENS": "512",
       "MICRO_BATCH_TOKENS": "128", "VAL_BATCH_TOKENS": "4096", "TRAIN_SEQ_SCHEDULE": "", "BATCH_SCHEDULE": "",
       "ITERATIONS": "6", "MAX_WALLCLOCK_SECONDS": "0", "VAL_LOSS_EVERY": "0", "DEVICE": "cpu", "COMPILE": "0",
       "ATTENTION": "auto", "VOCAB_SIZE": "64", "GPTQ_CALIBRATION_BATCHES": "2", "CHECKPOINT_EVERY_SECONDS": "0",
       "FORCE_STOP_STEP": "0", "PREFLIGHT": "0", "RESUME": "", "ARTIFACT_PATH": "", "TOKENIZER_PATH": "",
       "RUN_ID": "smoke", "MAX_LEAKED_DOCUMENTS": "1000000", "FP8_MATMUL": "0"}
TOY_TOKENS = 1500  # in each of three shards
SMOKE_SECONDS = 300
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # small work is faster so, much faster on a busy machine


def toy_settings(settings: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, str]:
    """A record's settings -> the same model, narrow, for six short steps; only settings that the program knows."""
    def value(name: str) -> Any:
        return settings.get(name.upper(), known.get(name, 0))
    width = 8 * int(value("num_heads"))  # the heads stay, so that whatever is said of heads and layers holds
    small = {"MODEL_DIM": str(width), "MLP_HIDDEN": str(2 * width)}
    for name, most in (("rope_dims", 8), ("gate_window", 8), ("embed_dim", 16), ("bigram_hash_buckets", 64),
                       ("bigram_hash_dim", 8), ("depth_lora_rank", 2)):
        small[name.upper()] = str(min(int(value(name)), most))
    chosen = {name: environment_text(value) for name, value in settings.items()} | TOY | small
    return {name: text for name, text in chosen.items() if name.lower() in known}


def write_toy_data(folder: Path) -> None:
    """Two shards for training, one for validation, and its byte sidecar, so that no tokenizer is needed."""
    import numpy as np
    random = np.random.default_rng(0)
    for name in ("train_000000", "train_000001", "val_000000", "val_bytes_000000"):
        tokens = random.integers(4, 64, TOY_TOKENS)
        tokens[::100] = 1  # begin of a document
        if name.startswith("val_bytes"):
            tokens = np.where(np.arange(TOY_TOKENS) % 100 == 0, 0, 3)
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, TOY_TOKENS
        (folder / f"fineweb_{name}.bin").write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def smoke(folder: Path, settings: Mapping[str, Any]) -> float:
    """Runs the folder's packed program on toy data, with the record's settings made small -> its bits per byte.

    ToolError where it does not come to a result.
    """
    known = config_defaults((folder / READABLE).read_text(encoding="utf8"))
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LANG") if name in os.environ}
    with tempfile.TemporaryDirectory() as name:
        write_toy_data(Path(name))
        variables = toy_settings(settings, known) | {"DATA_PATH": name, "LOG_DIR": name}
        try:
            done = subprocess.run([sys.executable, PACKED], cwd=folder, capture_output=True, text=True, check=False,
                                  env={**kept, **ONE_THREAD, **variables}, timeout=SMOKE_SECONDS)
        except subprocess.TimeoutExpired:
            raise ToolError(f"{folder / PACKED}: took more than {SMOKE_SECONDS} seconds on toy data") from None
    last = (done.stdout.splitlines() or [""])[-1]
    if done.returncode or not last.startswith("result {"):
        reason = (done.stderr.strip().splitlines() or [last])[-1]
        raise ToolError(f"{folder / PACKED}: exit code {done.returncode} on toy data: {reason}")
    return json.loads(last.removeprefix("result "))["val_bpb"]
