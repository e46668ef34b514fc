"""The pages of a record folder, made of its submission.json and logs. Imported by make_record and validate_record.

Everything here is a pure function of what the folder holds, so the checker renders a page again and compares.
"""
import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from compare_runs import WIN_NATS
from outcomes import Outcome
from record import (
    FIXED_FILES,
    NON_RECORD,
    PATHS,
    PLOT,
    SIZE_LIMIT_BYTES,
    environment_text,
    non_record_reasons,
    packages,
)
from run_log import table

NOTES_START, NOTES_END = "\n## Notes\n\n", "\n\n## Settings\n"
SHOWN_STAGES = "bits per byte after each stage"
UNKNOWN = "-"
REMARKS = {"no_ngram_cache": ": n-gram smoothing counts earlier tokens only, and its probabilities sum to 1"}


def title(facts: Mapping[str, Any]) -> str:
    """'Record: NAME - val_bpb 1.05651 (3-seed mean)'."""
    kind = "Non-record" if facts["track"] == NON_RECORD else "Record"
    seeds = f"{len(facts['seeds'])}-seed mean" if len(facts["seeds"]) > 1 else "1 seed"
    return f"{kind}: {facts['name']} - val_bpb {facts['val_bpb']:.5f} ({seeds})"


def number(value: float | None, digits: int) -> str:
    return UNKNOWN if value is None else f"{value:,.{digits}f}"


def results_table(facts: Mapping[str, Any]) -> str:
    """One row per seed, then mean and standard deviation."""
    rows = [[seed, number(one["val_loss"], 8), number(one["val_bpb"], 8), number(one["artifact_bytes"], 0),
             number(SIZE_LIMIT_BYTES - one["artifact_bytes"], 0)] for seed, one in facts["seed_results"].items()]
    rows += [["mean", number(facts["val_loss"], 8), number(facts["val_bpb"], 8),
              number(facts["artifact_bytes_mean"], 0), UNKNOWN],
             ["std", number(facts["val_loss_std"], 8), number(facts["val_bpb_std"], 8), UNKNOWN, UNKNOWN]]
    return table(["seed", "val_loss (nats a token)", "val_bpb (bits a byte)", "bytes (model + program)", "bytes left"],
                 rows)


def stages_table(facts: Mapping[str, Any]) -> str:
    """Bits per byte of every stage, by seed."""
    by_seed = facts["seed_results"]
    names = list(next(iter(by_seed.values()))["stages"])
    rows = [[name + ", the score" * (name == facts["official_stage"]),
             *(number(one["stages"].get(name), 5) for one in by_seed.values())] for name in names]
    return table([SHOWN_STAGES, *by_seed], rows)


def timing_table(facts: Mapping[str, Any]) -> str:
    """Seconds, steps, memory by seed."""
    rows = [[label, *(number(one[key] / scale, digits) for one in facts["seed_results"].values())]
            for label, key, scale, digits in (
                ("steps", "steps", 1, 0), ("milliseconds a step", "step_avg_ms", 1, 2),
                ("training tokens", "train_tokens", 1, 0), ("training, seconds", "train_time_s", 1, 3),
                ("calibration, seconds", "calibration_time_s", 1, 3),
                ("evaluation, seconds", "eval_time_s", 1, 3),
                ("compiling before the clock, seconds", "compile_time_s", 1, 3),
                ("peak memory, MiB", "peak_memory_bytes", 2 ** 20, 0), ("model, bytes", "model_bytes", 1, 0),
                ("program, bytes", "code_bytes", 1, 0))]
    return table(["measured", *facts["seed_results"]], rows)


def comparison_text(facts: Mapping[str, Any]) -> str:
    """How it compares with the record to beat, if one was named."""
    if not facts["comparison"]:
        return ""
    p = facts["comparison_p_value"]
    return (f"Against {facts['comparison']['name']} ({facts['comparison_baseline_bpb']:.5f}): "
            f"{facts['delta_vs_leaderboard_bpb']:+.5f} bits per byte, {facts['delta_vs_leaderboard_nats']:+.5f} nats "
            f"per token; p of not being better by {WIN_NATS} nats: {UNKNOWN if p is None else f'{p:.4g}'}.")


def shown_setting(name: str, text: str) -> str:
    """A line NAME='value'; of paths only the last part, the rest is of one machine."""
    value = PurePath(text).name if name in PATHS else text
    return f"{name.upper()}={shlex.quote(value)}"


def settings_part(facts: Mapping[str, Any], outcomes: Sequence[Outcome]) -> list[str]:
    """What differs from the base preset, and all settings."""
    base, parts = facts["base"], []
    if base:
        rows = [[f"`{name}`", f"`{old}`", f"`{new}`"] for name, (old, new) in base["differences"].items()]
        parts += [f"Against `{base['preset']}`:" if rows else f"The settings are those of `{base['preset']}`.",
                  *([table(["setting", "there", "here"], rows)] if rows else [])]
    lines = [shown_setting(name, text) for name, text in outcomes[0].run.settings.items()
             if name not in {"seed", "run_id"}]
    return [*parts, "<details><summary>All settings</summary>\n\n```\n" + "\n".join(lines) + "\n```\n\n</details>"]


def credits_part(facts: Mapping[str, Any]) -> list[str]:
    """Earlier records it builds on, and where each technique in use comes from."""
    parents = [f"* {one['name']} ({one['author']}, {one['val_bpb']})" for one in facts["lineage"]]
    rows = [[technique, source] for technique, source in facts["attribution"].items()]
    lines = ["| technique in use | source |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)]
    return (["Builds on:\n\n" + "\n".join(parents)] if parents else []) + (["\n".join(lines)] if rows else [])


def render_readme(facts: Mapping[str, Any], outcomes: Sequence[Outcome], notes: str) -> str:
    """README.md; `notes` is the author's own text, the rest follows from logs and submission.json."""
    reasons, seeds = non_record_reasons(facts), "one seed"
    if len(facts["seeds"]) > 1:
        seeds = f"mean of {len(facts['seeds'])} seeds, std {facts['val_bpb_std']:.5f}"
    head = (f"**{facts['val_bpb']:.5f} bits per byte** ({seeds}), "
            f"**{facts['bytes_total']:,} bytes** at most of {SIZE_LIMIT_BYTES:,}, {facts['num_params']:,} parameters, "
            f"{facts['hardware']}, torch {facts['pytorch_version']}. Track {facts['track']}. "
            f"By {facts['author']} (@{facts['github_id']}), {facts['date']}.")
    parts = [f"# {facts['name']}", head, facts["blurb"], "## Results", results_table(facts), comparison_text(facts),
             stages_table(facts), f"![loss in training, bits per byte of the stages]({PLOT})", timing_table(facts),
             f"Scored: all {facts['target_tokens']:,} targets of {facts['val_documents']:,} validation documents, "
             f"{facts['val_bytes']:,} bytes of text; {facts['leaked_documents']} of these documents are in the "
             f"training data. Data fingerprint `{facts['data_fingerprint']}`."]
    if facts["track"] == NON_RECORD:
        parts += ["## Why this is no record", "\n".join(f"* {reason}" for reason in reasons) or
                  "It keeps all limits of the record track; its author submits it as a non-record."]
    parts += [NOTES_START.strip() + "\n\n" + notes] if notes else []
    parts += ["## Settings", *settings_part(facts, outcomes), "## Techniques and credits", *credits_part(facts),
              "## Test plan", test_plan(facts), "## Files", files_part(facts), "## Revisions", revisions_part(facts)]
    return "\n\n".join(part for part in parts if part) + "\n"


def notes_of(readme: str) -> str:
    """README.md -> the author's own text in it."""
    start, end = readme.find(NOTES_START), readme.rfind(NOTES_END)
    return readme[start + len(NOTES_START):end] if 0 <= start < end else ""


def test_plan(facts: Mapping[str, Any]) -> str:
    return f"""1. `PREFLIGHT=1 ./run.sh {facts['seeds'][0]}` checks data, disk and memory, measures a step, stops.
2. `./run.sh` runs all seeds on {facts['hardware']}; each ends with a line `result {{json}}`.
3. `python tools/validate_record.py DIR --smoke`, in the repository this program is from, computes every number of this
   page again from the logs, and runs `train_gpt.py` on toy data."""


def files_part(facts: Mapping[str, Any]) -> str:
    lines = [f"* `{name}`: {what}" for name, what in FIXED_FILES.items()]
    return "\n".join(lines + [f"* `{name}`: the log of seed {seed}, source first" for seed, name in
                              facts["logs"].items()])


def revisions_part(facts: Mapping[str, Any]) -> str:
    lines = ["| date | commit | val_bpb | what changed |", "|---|---|---:|---|"]
    return "\n".join(lines + [f"| {one['date']} | `{one['commit'][:12]}` | {one['val_bpb']:.5f} | {one['note']} |"
                              for one in facts["revisions"]])


def render_pull_request(facts: Mapping[str, Any], folder: str) -> str:
    """PR.md: the title in the first line, then the text."""
    checks = [f"- [{'x' if kept else ' '}] {name.replace('_', ' ')}{'' if kept else REMARKS.get(name, '')}"
              for name, kept in facts["compliance"].items()]
    reasons = non_record_reasons(facts) if facts["track"] == NON_RECORD else []
    parts = [title(facts), facts["blurb"], results_table(facts), comparison_text(facts), stages_table(facts),
             "Measured, not declared:\n\n" + "\n".join(checks),
             "Why this is no record:\n\n" + "\n".join(f"* {reason}" for reason in reasons) if reasons else "",
             "Test plan:\n\n" + test_plan(facts),
             f"Adds only the folder `records/track_{facts['track']}/{folder}`; everything else is in its README.md."]
    return "\n\n".join(part for part in parts if part) + "\n"


def render_run(facts: Mapping[str, Any], outcomes: Sequence[Outcome]) -> str:
    """run.sh [SEED...]: the settings that differ from the defaults, one run per seed."""
    given = outcomes[0].run.settings
    paths = [f'export {name.upper()}="${{{name.upper()}:-data/{folder}/{PurePath(given[name]).name}}}"'
             for name, folder in (("data_path", "datasets"), ("tokenizer_path", "tokenizers")) if given.get(name)]
    values = [f"export {name}={shlex.quote(environment_text(value))}" for name, value in facts["settings"].items()]
    seeds = " ".join(map(str, facts["seeds"]))
    return "\n".join([
        "#!/bin/bash", f"# ./run.sh [SEED...] repeats the runs of this record ({facts['hardware']}).",
        "# DATA_PATH and TOKENIZER_PATH may be set before; relative ones are looked up here and in the folders above.",
        "set -euo pipefail",
        'cd "$(dirname "$0")"', *paths, *values, f"for seed in ${{*:-{seeds}}}; do",
        f'  SEED=$seed RUN_ID=seed$seed torchrun --standalone --nproc_per_node="${{NPROC:-{outcomes[0].world_size}}}" '
        "train_gpt.py", "done"]) + "\n"


def render_requirements(ours: str, facts: Mapping[str, Any]) -> str:
    """The repository's requirements, with the torch and the attention package that ran."""
    torch, *others = packages(facts)
    lines = [torch if line.startswith("torch") else line for line in ours.splitlines()]
    return "\n".join([*lines, *(line for line in others if line not in lines)]) + "\n"
