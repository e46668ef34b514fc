"""Checks a record folder as a reviewer would: computes every number again from the files, and says pass or fail.

    python tools/validate_record.py records/track_10min_16mb/2026-05-01_MyRecord
    python tools/validate_record.py records/track_10min_16mb/2026-05-01_MyRecord --smoke

Folders of the challenge's repository work too; what their scripts do not log is listed as unknown, not as a failure.
Exit code: 0 pass, 1 fail, 2 no folder. Without --smoke nothing of the folder runs, unless train_gpt_readable.py has a
pack_source of its own, as it had before tools/pack.py: that one runs in a process of its own.
"""
import argparse
import ast
import hashlib
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from outcomes import Outcome, check_group, read_outcome
from pack import OtherUnpacker, minify, unpacked
from record import (
    CLUTTER,
    FIXED_FILES,
    GIVEN_KEYS,
    LIMIT_SECONDS,
    MAX_PROBABILITY_ERROR,
    MIN_SEEDS,
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
    code_faults,
    compare_with,
    config_defaults,
    derive,
    differing_lines,
    encode_source,
    events,
    log_faults,
    log_name,
    non_record_reasons,
    packages,
    packed_form,
    packs_itself,
    read_json,
    settings_faults,
    sha256,
    smoke,
)
from record_pages import notes_of, render_pull_request, render_readme, render_run
from run_log import ToolError, exit_code

PASS, FAIL, UNKNOWN = "pass", "FAIL", "unknown"
CLAIM = re.compile(r"(?<![\w.#])(\d+\.\d{4,}|\d{1,3}(?:,\d{3}){2,}|\d{7,})(?![\w.]*\w)")  # scores, numbers of bytes
GRACE_SECONDS = 10  # over the limit that accepted records took for calibration
LOG_NAME = re.compile(r".*\.log|.*(log|seed).*\.txt")  # of published folders


class Report:
    """The checks of a folder, in order."""

    def __init__(self):
        self.rows: list[tuple[str, str, str]] = []

    def add(self, name: str, faults: Sequence[str], good: str = "") -> bool:
        """One check: failed with these faults, or passed. -> passed."""
        self.rows.append((FAIL, name, "; ".join(faults)) if faults else (PASS, name, good))
        return not faults

    def unknown(self, name: str, why: str) -> None:
        self.rows.append((UNKNOWN, name, why))

    @property
    def failed(self) -> int:
        return sum(verdict == FAIL for verdict, _, _ in self.rows)

    def __str__(self) -> str:
        return "\n".join(f"{verdict:7} {name:14} {text}".rstrip() for verdict, name, text in self.rows)


def differences(wanted: Any, found: Any, name: str = "") -> Iterator[str]:
    """Where two JSON values differ, in words."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key in {**wanted, **found}:
            yield from differences(wanted.get(key), found.get(key), f"{name}.{key}".lstrip("."))
    elif wanted != found:
        yield f"{name} is {found!s:.60}, the logs give {wanted!s:.60}"


def numbers_in(value: Any) -> Iterator[float]:
    """All numbers in a JSON value."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from numbers_in(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def unfounded_claims(text: str, known: Sequence[float]) -> list[str]:
    """Scores and byte counts in a text that are none of the known numbers, however rounded."""
    faults = []
    for claim in dict.fromkeys(match[1] for match in CLAIM.finditer(text)):
        digits = len(claim.partition(".")[2])
        value = float(claim.replace(",", ""))
        if not any(math.isclose(round(abs(number), digits), value, abs_tol=1e-12) for number in known):
            faults.append(f"claims {claim}, which is in no log")
    return faults


def first_difference(name: str, wanted: str, found: str) -> list[str]:
    """Two pages -> what is said about the first line in which they differ."""
    if wanted == found:
        return []
    rows = list(zip([*wanted.splitlines(), "(end)"], [*found.splitlines(), "(end)"]))
    line = next((i for i, (a, b) in enumerate(rows, 1) if a != b), len(rows))
    a, b = rows[line - 1]
    return [f"{name} line {line}: {b.strip()!r:.90} where the logs give {a.strip()!r:.90}"]


def read_page(path: Path) -> str:
    return path.read_text(encoding="utf8", errors="replace") if path.is_file() else ""


# --- folders made by make_record.py
def check_files(folder: Path, given: Mapping[str, Any]) -> list[str]:
    """Missing, extra, and altered files."""
    wanted = {*FIXED_FILES, *map(log_name, given["seeds"])}
    found = {path.name for path in folder.iterdir()} - CLUTTER
    faults = [f"{name} is missing" for name in sorted(wanted - found)]
    faults += [f"{name} does not belong here" for name in sorted(found - wanted)]
    for name in sorted(wanted & found - {SUBMISSION}):
        if sha256(folder / name) != given["files"].get(name):
            faults.append(f"{name} was changed after the folder was made")
    plot = folder / PLOT
    if plot.is_file() and not plot.read_bytes().startswith(b"\x89PNG\r\n"):
        faults.append(f"{PLOT} is no PNG")
    return faults


def check_keys(given: Mapping[str, Any]) -> list[str]:
    """Keys that do not follow from the logs: are they there, and of their kind?"""
    faults = [f"{key} is missing or no {kind.__name__}" for key, kind in GIVEN_KEYS.items()
              if not isinstance(given.get(key), kind)]
    if not faults and given["technique_summary"] != "; ".join(given["attribution"]):
        faults.append("technique_summary does not name the techniques of attribution")
    faults += [f"{key} is empty" for key in PUBLISHED_KEYS if given.get(key) == ""]
    if not isinstance(given.get("seeds"), list) or not all(isinstance(seed, int) for seed in given["seeds"]):
        faults.append("seeds is missing or no list of whole numbers")
    if given.get("track") not in (RECORD, NON_RECORD):
        faults.append(f"track {given.get('track')} is neither {RECORD} nor {NON_RECORD}")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", str(given.get("date"))):
        faults.append(f"date {given.get('date')} is no day as 2026-05-01")
    return faults


def read_all(paths: Sequence[Path]) -> tuple[list[Outcome], list[str]]:
    """Logs -> (those that can be read, what is wrong with the others)."""
    outcomes, faults = [], []
    for path in paths:
        try:
            outcomes.append(read_outcome(path))
        except ToolError as error:
            faults.append(str(error).replace(f"{path.parent}/", ""))
    return outcomes, faults


def check_logs(folder: Path, seeds: Sequence[int]) -> tuple[list[Outcome], list[str]]:
    """The logs of these seeds -> (runs, what is wrong with them)."""
    outcomes, faults = read_all([folder / log_name(seed) for seed in seeds])
    for outcome in outcomes:
        own = log_faults(outcome) if outcome.ours else ["of another script"]
        faults += [f"{outcome.path.name}: {fault}" for fault in own]
        if outcome.path.name != log_name(outcome.seed or 0):
            faults.append(f"{outcome.path.name}: is of seed {outcome.seed}")
    return outcomes, faults


def group_faults(outcomes: Sequence[Outcome]) -> list[str]:
    """What keeps the runs from being one experiment under several seeds."""
    try:
        check_group(outcomes)
    except ToolError as error:
        return [str(error).replace(f"{outcomes[0].path.parent}/", "")]
    return []


def packing(source: bytes, packed: bytes, again: bytes, given: Mapping[str, Any],
            outcomes: Sequence[Outcome]) -> tuple[list[str], str]:
    """Is the packed program made of the readable one, which packs to `again` here? -> (faults, what cannot be told).

    Each version of Python writes the minified program in its own way; what it says must be the same.
    """
    faults = [] if again == packed else [f"{PACKED} is not what {READABLE} packs to"]
    ran, here = events(outcomes[0])["version"][1].split(".")[:2], [str(part) for part in sys.version_info[:2]]
    other = f"Python {'.'.join(ran)} packed it; it can tell" if ran != here else ""
    if faults and packs_itself(source):
        return ([], other) if other else (faults, "")
    try:
        if faults and ast.dump(ast.parse(unpacked(packed))) == ast.dump(ast.parse(minify(source))):
            faults = []
    except OtherUnpacker as error:
        return [], f"{PACKED} {error}; that of commit {given['commit'][:12]} can tell"
    except ToolError as error:
        faults = [f"{faults[0]}: {error}"]
    except (SyntaxError, ValueError):  # as a newer Python nests quotes
        return ([], other) if other else (faults, "")
    return faults, ""


def check_program(folder: Path, given: Mapping[str, Any], outcomes: Sequence[Outcome], report: Report) -> None:
    """Is the packed program made of the readable one, and did the logged runs run one of both?"""
    source, packed = (folder / READABLE).read_bytes(), (folder / PACKED).read_bytes()
    try:
        (faults, unknown), defaults = packing(source, packed, packed_form(folder / READABLE), given, outcomes), \
            config_defaults(source.decode())
    except ToolError as error:
        report.add("program", [str(error)])
        return
    digests = {hashlib.sha256(form).hexdigest() for form in (source, packed)}
    for outcome in outcomes:
        name = outcome.path.name
        if hashlib.sha256(encode_source(outcome.run.source)).hexdigest() not in digests:
            faults.append(f"{name}: its source is neither {READABLE} nor {PACKED}")
        faults += [f"{name}: {fault}" for fault in (*code_faults(outcome, source, packed),
                                                    *settings_faults(outcome, defaults))]
    report.add("program", faults, f"{len(packed):,} bytes; the logs are of it" if unknown else
               f"{PACKED} is {READABLE}, packed, {len(packed):,} bytes; the logs are of it")
    if unknown:
        report.unknown("program", f"is {PACKED} {READABLE}, packed? {unknown}")


def check_audit(outcomes: Sequence[Outcome], report: Report) -> None:
    """Did the program test its own scores, and what came of it? That it says what its numbers say is in log_faults."""
    audits = {outcome.path.name: outcome.run.fact("audit") for outcome in outcomes}
    without = [name for name, audit in audits.items() if "causal" not in audit]
    if without:
        report.unknown("audit", f"AUDIT=1 was off in {', '.join(without)}: nobody looked whether scores are causal")
        return
    broken = [name for name, audit in audits.items()
              if not (audit["causal"] and audit["probability_error"] < MAX_PROBABILITY_ERROR)]
    change, noise, error = (max(audit[key] for audit in audits.values())
                            for key in ("change_before_nats", "noise_nats", "probability_error"))
    text = f"another token changes earlier scores by {change:.2g} nats (noise {noise:.2g}), probabilities sum to 1 " \
           f"within {error:.2g}"
    if broken:
        report.unknown("audit", f"{', '.join(broken)}: not passed, and not called legal: {text}")
    else:
        report.add("audit", [], text)


def limit_faults(given: Mapping[str, Any], sizes: Mapping[str, int]) -> list[str]:
    """Rules of the track that the recomputed numbers break."""
    faults = [f"{name}: {size:,} bytes, {size - SIZE_LIMIT_BYTES:,} over the limit of {SIZE_LIMIT_BYTES:,}"
              for name, size in sizes.items() if size > SIZE_LIMIT_BYTES]
    return faults + (non_record_reasons(given) if given["track"] == RECORD else [])


def check_revisions(given: Mapping[str, Any]) -> list[str]:
    """Does the history end with what the folder now says?"""
    last = given["revisions"][-1] if given["revisions"] else {}
    keys = "source_sha256", "val_bpb", "seeds", "commit"
    return [f"the last revision says {key} {last.get(key)!s:.60}, the folder {given[key]!s:.60}" for key in keys
            if last.get(key) != given[key]]


def check_ours(folder: Path, given: dict[str, Any], report: Report) -> None:
    """All checks of a folder that make_record.py made."""
    if not report.add("keys", check_keys(given), f"{len(given)} in {SUBMISSION}"):
        return
    count = len(FIXED_FILES) + len(given["seeds"])
    report.add("files", check_files(folder, given), f"{count}, none extra, none changed since the folder was made")
    outcomes, faults = check_logs(folder, given["seeds"])
    sound = report.add("logs", faults, "each agrees with itself: source, settings, lines, sums, result")
    sound &= bool(outcomes) and report.add(
        "one experiment", group_faults(outcomes) or [*differing_lines(outcomes)],
        f"same program, settings, data and device; seeds {', '.join(map(str, given['seeds']))}")
    if not sound or not all((folder / name).is_file() for name in FIXED_FILES):
        report.unknown("the rest", "cannot be computed from these files")
        return
    check_audit(outcomes, report)
    check_program(folder, given, outcomes, report)
    size = (folder / PACKED).stat().st_size
    facts = derive(outcomes, size) | compare_with(outcomes, given["comparison"])
    sizes = {outcome.path.name: (outcome.model_bytes or 0) + size for outcome in outcomes}
    report.add("score", list(differences(facts, {key: given.get(key) for key in facts})),
               f"{facts['val_bpb']:.8f} bits per byte, {len(facts)} numbers of {SUBMISSION} computed again")
    report.add("limits", limit_faults({**given, **facts}, sizes),
               f"track {given['track']}; {max(sizes.values()):,} of {SIZE_LIMIT_BYTES:,} bytes")
    report.add("revisions", check_revisions(given), f"{len(given['revisions'])}")
    check_pages(folder, {**given, **facts}, outcomes, report)


def check_pages(folder: Path, facts: Mapping[str, Any], outcomes: Sequence[Outcome], report: Report) -> None:
    """Are the pages what the logs give, and are the author's own words covered by them?"""
    readme = read_page(folder / README)
    notes = notes_of(readme)
    pages = {README: render_readme(facts, outcomes, notes), RUN: render_run(facts, outcomes),
             PULL_REQUEST: render_pull_request(facts, f"{facts['date']}_{facts['name']}")}
    report.add("pages", [fault for name, page in pages.items()
                         for fault in first_difference(name, page, read_page(folder / name))],
               f"{', '.join(pages)} are what the logs give")
    ran, asked = packages(facts), read_page(folder / REQUIREMENTS).splitlines()
    report.add("requirements", [f"{REQUIREMENTS} does not ask for {line}, which ran" for line in ran
                                if line not in asked], ", ".join(ran))
    known = [*numbers_in({**facts, "files": {}}), *numbers_in([outcome.run.result for outcome in outcomes])]
    said = "\n".join((facts["name"], facts["blurb"], notes))
    report.add("claims", unfounded_claims(said, known), "every score and size in the author's own words is in the logs")


# --- folders of the challenge's repository
def check_published(folder: Path, given: dict[str, Any], report: Report) -> None:
    """What can be checked of a folder that another script's author made by hand."""
    missing = [f"{name} is missing" for name in (README, PACKED) if not (folder / name).is_file()]
    report.add("files", missing, f"{len(list(folder.iterdir()))} files")
    report.add("keys", [f"{key} is missing or no {kind.__name__}" for key, kind in PUBLISHED_KEYS.items()
                        if not isinstance(given.get(key), (kind, int) if kind is float else kind)],
               f"{len(given)} in {SUBMISSION}")
    paths = sorted(path for path in folder.iterdir() if LOG_NAME.fullmatch(path.name))
    outcomes, faults = read_all(paths)
    if not report.add("logs", faults if paths else ["no log in the folder"], f"{len(outcomes)} with a score"):
        return
    seeds = [outcome.seed for outcome in outcomes]
    report.add("seeds", [] if len(set(seeds)) == len(seeds) else [f"{seeds}: one twice"], ", ".join(map(str, seeds)))
    group = group_faults(outcomes) if len(set(seeds)) == len(seeds) else []
    report.add("one experiment", group, "same settings, as far as they are logged")
    check_published_score(given, outcomes, report)
    check_published_limits(folder, given, outcomes, report)
    known = [*numbers_in(given), *(number for outcome in outcomes for stage in outcome.run.stages.values()
                                   for number in stage)]
    told = unfounded_claims(" ".join(re.findall(r"\*\*([^*]+)\*\*", read_page(folder / README))), known)
    report.add("claims", [], "the README's bold numbers are in the logs") if not told else \
        report.unknown("claims", f"of the README's bold numbers: {'; '.join(told)}")


def check_published_score(given: Mapping[str, Any], outcomes: Sequence[Outcome], report: Report) -> None:
    """Is the score the mean of the logs' last scores?"""
    mean = math.fsum(outcome.val_bpb for outcome in outcomes) / len(outcomes)
    claimed = given.get("val_bpb", math.nan)
    digits = min(len(str(claimed).partition(".")[2]), 8)
    agrees = isinstance(claimed, (int, float)) and abs(claimed - mean) <= 0.5001 * 10.0 ** -max(digits, 1) + 1e-8
    report.add("score", [] if agrees else [f"{claimed} is not the logs' mean, {mean:.8f} "
                                           f"({', '.join(f'{outcome.val_bpb:.8f}' for outcome in outcomes)})"],
               f"{mean:.8f}, mean of {outcomes[0].stage}")
    report.unknown("sums", "the script logs no sums of nats and bytes, so the score itself cannot be computed again")


def check_published_limits(folder: Path, given: Mapping[str, Any], outcomes: Sequence[Outcome], report: Report) -> None:
    """Bytes, seconds, number of runs."""
    faults, notes, record = [], [], NON_RECORD not in (given.get("track"), folder.parent.name.removeprefix("track_"))
    for outcome in outcomes:
        name, total = outcome.path.name, outcome.submission_bytes
        if total is None:
            notes.append(f"{name} logs no total size")
        elif total > SIZE_LIMIT_BYTES:
            faults.append(f"{name}: {total:,} bytes, {total - SIZE_LIMIT_BYTES:,} over the limit")
        elif outcome.model_bytes and outcome.code_bytes and total != outcome.model_bytes + outcome.code_bytes:
            faults.append(f"{name}: {outcome.model_bytes:,} + {outcome.code_bytes:,} bytes are not {total:,}")
        trained, calibrated = outcome.train_seconds or 0.0, outcome.calibration_seconds or 0.0
        if record and trained > LIMIT_SECONDS + 1:
            faults.append(f"{name}: trained {trained:.1f} seconds")
        elif record and trained + calibrated > LIMIT_SECONDS:
            (faults if trained + calibrated > LIMIT_SECONDS + GRACE_SECONDS else notes).append(
                f"{name}: {trained:.1f} s of training and {calibrated:.1f} s of calibration are over {LIMIT_SECONDS}")
        if record and (outcome.eval_seconds or 0.0) > LIMIT_SECONDS:
            faults.append(f"{name}: evaluated {outcome.eval_seconds:.1f} seconds")
    claimed, largest = given.get("bytes_total"), max((outcome.submission_bytes or 0 for outcome in outcomes), default=0)
    if claimed and largest and claimed not in {outcome.submission_bytes for outcome in outcomes}:
        faults.append(f"bytes_total {claimed:,} is in no log; the largest is {largest:,}")
    report.add("limits", faults, f"at most {largest:,} of {SIZE_LIMIT_BYTES:,} bytes")
    size, counted = (folder / PACKED).stat().st_size if (folder / PACKED).is_file() else 0, outcomes[0].code_bytes
    if size and counted and size != counted:
        notes.append(f"the logs count {counted:,} bytes of program, {PACKED} has {size:,}: packed elsewhere")
    others = [path.name for path in folder.iterdir() if path.suffix in {".py", ".c", ".cpp", ".cu", ".so"}
              and path.name != PACKED]
    if others:
        notes.append(f"{', '.join(sorted(others))}: code that is not counted")
    if record and len(outcomes) < MIN_SEEDS:
        notes.append(f"{len(outcomes)} logs; the record track wants {MIN_SEEDS}")
    for note in notes:
        report.unknown("limits", note)


def check(folder: Path) -> tuple[dict[str, Any], Report]:
    """Folder -> (submission.json, all checks that run nothing of it). ToolError where it has no submission.json."""
    if not folder.is_dir():
        raise ToolError(f"{folder}: no such folder; give one of records/")
    given, report = read_json(folder / SUBMISSION), Report()
    ours = "revisions" in given or (folder / READABLE).is_file()
    try:
        (check_ours if ours else check_published)(folder, given, report)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        report.add("form", [f"{SUBMISSION} is not built as such files are: {type(error).__name__} {error}"])
    return given, report


def validate(folder: Path, with_smoke: bool) -> int:
    """Prints all checks -> exit code: 0 pass, 1 fail."""
    given, report = check(folder)
    if with_smoke:
        try:
            good, faults = f"{PACKED} ran on toy data, {smoke(folder, given.get('settings', {})):.4f} bits per byte", []
        except (ToolError, OSError) as error:
            good, faults = "", [str(error)]
        report.add("smoke", faults, good)
    passed = sum(verdict == PASS for verdict, _, _ in report.rows)
    print(report)
    print(f"\n{'FAIL' if report.failed else 'PASS'}: {folder.name}, {passed} checks passed, {report.failed} failed, "
          f"{len(report.rows) - passed - report.failed} unknown")
    return 1 if report.failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line -> exit code: 0 pass, 1 fail, 2 a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="record folder")
    parser.add_argument("--smoke", action="store_true", help="run its packed program on toy data too, about 15 seconds")
    config, codes = parser.parse_args(arguments), []
    return exit_code(lambda: codes.append(validate(config.folder, config.smoke))) or codes[0]


if __name__ == "__main__":
    sys.exit(main())
