"""Makes a record folder from the logs of its runs, and tests it. No number is typed: all of them come from the logs.

    python tools/make_record.py logs/mine_seed42.txt logs/mine_seed314.txt logs/mine_seed999.txt --name MyRecord
    python tools/make_record.py logs/laptop_seed*.txt --name Demo --track non_record_16mb --base presets/laptop.env

The folder appears in records/ whole or not at all, after it has passed validate_record.py. Mistakes are refused: logs
of another program, with other settings, cut off or edited; a working tree with changes; times and sizes over limits.
"""
import argparse
import getpass
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import plot_runs
import validate_record
from outcomes import Outcome, check_group, read_outcome
from record import (
    NON_RECORD,
    PACKED,
    PLOT,
    PUBLISHED_KEYS,
    PULL_REQUEST,
    READABLE,
    README,
    RECORD,
    REQUIREMENTS,
    RUN,
    SIZE_LIMIT_BYTES,
    SUBMISSION,
    ask_program,
    code_faults,
    compare_with,
    config_defaults,
    derive,
    differing_lines,
    last_run,
    log_faults,
    log_name,
    non_record_reasons,
    packed_form,
    read_json,
    settings_faults,
    sha256,
    smoke,
)
from record_pages import render_pull_request, render_readme, render_requirements, render_run
from run_log import ToolError, exit_code, read_text

ROOT = Path(__file__).resolve().parent.parent
OFF = {"0", "0.0", "False", "", "off", "none", "-"}  # values of settings that are not in use


def git(root: Path, *arguments: str) -> str:
    """Output of a git command. ToolError outside a repository."""
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["failed"])[-1]
        raise ToolError(f"{root}: git {arguments[0]}: {reason}; records are made in a clone")
    return done.stdout.strip()


def clean_commit(root: Path) -> str:
    """The commit of a tree without changes to tracked files. ToolError for a dirty tree."""
    changed = git(root, "status", "--porcelain", "--untracked-files=no").splitlines()
    if changed:
        raise ToolError(f"{root}: uncommitted changes ({len(changed)} files, {changed[0].split()[-1]} first); commit "
                        "them, so that the record can name the commit it is made of")
    return git(root, "rev-parse", "HEAD")


def person(root: Path, wanted: str, key: str) -> str:
    """What was given, else git's setting, else the login name."""
    done = subprocess.run(["git", "-C", str(root), "config", key], capture_output=True, text=True, check=False)
    return wanted or done.stdout.strip() or getpass.getuser()


class Program(NamedTuple):
    """The tree's train_gpt.py. A run may have been one of the source, or of its packed form."""

    source: bytes
    packed: bytes
    defaults: dict[str, Any]  # {setting: default}


def read_program(root: Path) -> Program:
    """ToolError where there is none, or it cannot be packed."""
    try:
        source = (root / PACKED).read_bytes()
    except OSError as error:
        raise ToolError(f"{root / PACKED}: {error.strerror}; --root names the clone that ran") from None
    return Program(source, packed_form(root / PACKED), config_defaults(source.decode()))


def read_logs(paths: Sequence[Path], program: Program) -> list[Outcome]:
    """Logs -> runs by seed. ToolError for any that is unsound, foreign, or of another program than the tree's."""
    outcomes = [read_outcome(path) for path in paths]
    digests = [hashlib.sha256(form).hexdigest() for form in program[:2]]
    for outcome in outcomes:
        if not outcome.ours:
            raise ToolError(f"{outcome.path}: not a log of this train_gpt.py, but of another script; records are made "
                            "of logs of this repository's program")
        for fault in log_faults(outcome):
            raise ToolError(f"{outcome.path}: {fault}; give the log as the program wrote it")
        if outcome.run.fact("source_sha256") not in digests:
            raise ToolError(f"{outcome.path}: of another program (source_sha256 "
                            f"{outcome.run.fact('source_sha256')[:16]}, {PACKED} here has {digests[0][:16]}); check "
                            "out the commit that it was run from")
        for fault in settings_faults(outcome, program.defaults):
            raise ToolError(f"{outcome.path}: {fault}; give the log as the program wrote it")
        for fault in code_faults(outcome, program.source, program.packed):
            raise ToolError(f"{outcome.path}: {fault}; make the record with the Python that packed")
    check_group(outcomes)
    for fault in differing_lines(outcomes):
        raise ToolError(f"{fault}; run all seeds alike")
    return sorted(outcomes, key=lambda outcome: outcome.seed or 0)


def techniques(root: Path, defaults: Mapping[str, Any], settings: Mapping[str, str]) -> dict[str, str]:
    """docs/techniques.md -> {technique in use: where it comes from}.

    A choice between words is in use where the row speaks of the chosen word.
    """
    def in_use(name: str, words: str) -> bool:
        value, default = settings.get(name, "-"), defaults.get(name)
        return value not in OFF and (not isinstance(default, str) or not default or value.lower() in words.lower())
    found = {}
    for line in read_text(root / "docs/techniques.md").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" |")]
        names = re.findall(r"`([A-Z][A-Z0-9_]*)`", cells[0]) if line.startswith("| `") and len(cells) > 3 else []
        switch = [name.lower() for name in names[:1]] + [  # the first one; others where they were changed
            name.lower() for name in names[1:] if settings.get(name.lower()) != str(defaults.get(name.lower()))]
        if cells[3:4] not in ([], [""]) and any(in_use(name, cells[1]) for name in switch):
            found[cells[1]] = cells[3]
    return found


def earlier(path: Path) -> dict[str, Any]:
    """A folder or submission.json of an earlier record -> {name, author, val_bpb, scores of its seeds}."""
    given = read_json(path / SUBMISSION if path.is_dir() else path)
    for key, kind in PUBLISHED_KEYS.items():
        if not isinstance(given.get(key), (kind, int) if kind is float else kind):
            raise ToolError(f"{path}: {key} is missing in it, or no {kind.__name__}; give a record's {SUBMISSION}")
    seeds = given.get("seed_results")
    scores = [one["val_bpb"] for one in (seeds.values() if isinstance(seeds, dict) else seeds or [])]
    return {"name": given["name"], "author": given["author"], "val_bpb": float(given["val_bpb"]), "scores": scores}


def base_differences(root: Path, preset: Path | None, outcome: Outcome) -> dict[str, Any]:
    """Preset -> {preset, differences: {SETTING: [its value there, here]}}; {} for none."""
    if preset is None:
        return {}
    lines = [line.strip() for line in read_text(preset).splitlines()]
    variables = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    _, there = ask_program(root / PACKED, variables)
    here = outcome.run.settings
    return {"preset": f"presets/{preset.name}",
            "differences": {name.upper(): [str(value), here[name]] for name, value in there.items()
                            if name not in {"seed", "run_id", "data_path", "tokenizer_path", "data_dir", "log_dir"}
                            and str(value) != here[name]}}


def read_notes(path: Path | None) -> str:
    """The author's own section of the README. ToolError where its headings would end it."""
    text = read_text(path).strip() if path else ""
    if re.search(r"^##? ", text, re.MULTILINE):
        raise ToolError(f"--notes {path}: headings in it must be ### or smaller; larger ones are the page's own")
    return text


def describe(facts: Mapping[str, Any]) -> str:
    """A blurb, for those who give none."""
    return (f"{facts['num_params']:,} parameters, {facts['train_steps_mean']:,.0f} steps of "
            f"{facts['step_avg_ms_mean']:,.1f} ms on {facts['hardware']}; score of stage {facts['official_stage']}.")


def gather(outcomes: Sequence[Outcome], program: Program, config: argparse.Namespace, commit: str) -> dict[str, Any]:
    """Runs and options -> submission.json, but for the files' hashes. ToolError for what breaks the track's limits."""
    root, facts = config.root, derive(outcomes, len(program.packed))
    for outcome in outcomes:
        size = (outcome.model_bytes or 0) + len(program.packed)
        if size > SIZE_LIMIT_BYTES:
            raise ToolError(f"{outcome.path}: {size:,} bytes are {size - SIZE_LIMIT_BYTES:,} over the limit of "
                            f"{SIZE_LIMIT_BYTES:,}; lower TARGET_BYTES or make the model smaller")
    comparison = earlier(config.against) if config.against else {}
    credited = techniques(root, program.defaults, outcomes[0].run.settings)
    facts = {"author": person(root, config.author, "user.name"),
             "github_id": person(root, config.github_id, "github.user"), "name": config.name,
             "date": config.date, "blurb": config.blurb or describe(facts), "track": config.track, **facts,
             "comparison": comparison, **compare_with(outcomes, comparison), "commit": commit,
             "technique_summary": "; ".join(credited), "attribution": credited,
             "lineage": [{key: value for key, value in earlier(path).items() if key != "scores"}
                         for path in config.parent],
             "base": base_differences(root, config.base, outcomes[0])}
    reasons = non_record_reasons(facts)
    if config.track == RECORD and reasons:
        raise ToolError(f"--track {RECORD}: {' '.join(reasons)} --track {NON_RECORD} takes it, and says so")
    return facts


def write_folder(folder: Path, facts: dict[str, Any], outcomes: Sequence[Outcome], program: Program, notes: str,
                 requirements: str) -> None:
    """Writes all files of a record into an empty folder."""
    for outcome in outcomes:
        (folder / log_name(outcome.seed or 0)).write_text(last_run(read_text(outcome.path)), encoding="utf8")
    (folder / PACKED).write_bytes(program.packed)
    (folder / READABLE).write_bytes(program.source)
    (folder / REQUIREMENTS).write_text(render_requirements(requirements, facts), encoding="utf8")
    (folder / RUN).write_text(render_run(facts, outcomes), encoding="utf8")
    (folder / RUN).chmod(0o755)
    (folder / README).write_text(render_readme(facts, outcomes, notes), encoding="utf8")
    name = f"{facts['date']}_{facts['name']}"
    (folder / PULL_REQUEST).write_text(render_pull_request(facts, name), encoding="utf8")
    plot_runs.plot([outcome.run for outcome in outcomes], folder / PLOT)
    facts["files"] = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    (folder / SUBMISSION).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf8")


def make(logs: Sequence[Path], config: argparse.Namespace) -> None:
    """Logs -> a tested record folder; nothing is left behind where anything goes wrong."""
    program = read_program(config.root)
    outcomes = read_logs(logs, program)
    commit, notes = clean_commit(config.root), read_notes(config.notes)
    target = config.root / "records" / f"track_{config.track}" / f"{config.date}_{config.name}"
    if target.exists() != bool(config.revise):
        raise ToolError(f"{target}: exists; --revise 'what changed' replaces it, another --name makes a second one"
                        if target.exists() else f"--revise: {target} does not exist; leave the option out")
    facts, requirements = gather(outcomes, program, config, commit), read_text(config.root / REQUIREMENTS)
    past = read_json(target / SUBMISSION)["revisions"] if config.revise else []
    facts["revisions"] = [*past, {"date": time.strftime("%Y-%m-%d", time.gmtime()), "commit": commit,
                                  "source_sha256": facts["source_sha256"], "val_bpb": facts["val_bpb"],
                                  "seeds": facts["seeds"], "note": config.revise or "first version"}]
    part, old = (target.with_name(f".{target.name}.{kind}") for kind in ("part", "old"))
    shutil.rmtree(part, ignore_errors=True)  # of one that was killed
    try:
        part.mkdir(parents=True)
        write_folder(part, facts, outcomes, program, notes, requirements)
        failed = [f"{name}: {text}" for verdict, name, text in validate_record.check(part)[1].rows
                  if verdict == validate_record.FAIL]
        if failed:
            raise ToolError(f"{target}: would not pass validate_record.py: {'; '.join(failed)}")
        toy = smoke(part, facts["settings"])
        if config.revise:
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)
        os.replace(part, target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise ToolError(f"{target}: {error.strerror}; free the space or the permission") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{target}: {facts['val_bpb']:.5f} bits per byte, {facts['bytes_total']:,} bytes, {len(outcomes)} seeds; its "
          f"packed program ran on toy data ({toy:.4f})\nCheck it: python tools/validate_record.py {target}")


def folder_name(text: str) -> str:
    """Argument -> a name that is a part of a folder's name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: letters, digits, _ . - only, as in SP8192_LongContext")
    return text


def calendar_day(text: str) -> str:
    """Argument -> a day as 2026-05-01."""
    try:
        return time.strftime("%Y-%m-%d", time.strptime(text, "%Y-%m-%d"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: no day; must look like 2026-05-01") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line -> exit code: 0 done, 2 a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("logs", nargs="+", type=Path, metavar="LOG", help="log of one seed, LOG_DIR/RUN_ID.txt")
    add("--name", type=folder_name, required=True, help="of the record; the folder is DATE_NAME")
    add("--track", choices=(RECORD, NON_RECORD), default=RECORD, help=f"default {RECORD}")
    add("--against", type=Path, metavar="JSON", help="folder or submission.json of the record to beat")
    add("--parent", type=Path, metavar="JSON", action="append", default=[],
        help="folder or submission.json of a record this one builds on; may be given again")
    add("--base", type=Path, metavar="ENV", help="preset to show the differences from")
    add("--notes", type=Path, metavar="MD", help="your own section of the README: what is new, what was tried")
    add("--blurb", default="", help="one sentence; default: size, steps, machine")
    add("--author", default="", help="default: git's user.name")
    add("--github-id", default="", help="default: git's github.user")
    add("--date", type=calendar_day, default=time.strftime("%Y-%m-%d", time.gmtime()), help="default: today, UTC")
    add("--revise", default="", metavar="WHAT", help="replace the folder of this name; what changed, for its revisions")
    add("--root", type=Path, default=ROOT, help="the clone that ran, and that takes the folder; default: this one")
    config = parser.parse_args(arguments)
    return exit_code(lambda: make(config.logs, config))


if __name__ == "__main__":
    sys.exit(main())
