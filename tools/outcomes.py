"""Reads what a finished run came to, from our logs and those of the published scripts. Imported by the other tools.

    from outcomes import read_outcome
    outcome = read_outcome(Path("logs/demo.txt"))
    print(outcome.seed, outcome.val_bpb, outcome.submission_bytes, outcome.train_seconds)

The published scripts (records/ of the challenge's repository) wrote three kinds of lines over time; all are understood:
`step:1/20000 train_loss:6.9 train_time:45ms`, `500/20000 train_loss: 2.5 train_time: 0.8m`, and a score as the last
line with val_loss and val_bpb (final_int8_zlib_roundtrip_exact, legal_ttt_exact, quantized_ttt_phased, ...).
"""
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from run_log import SEPARATOR, STEP, VALIDATION, Point, Run, Stage, ToolError, parse_log, read_text

OURS = re.compile(r"^train_gpt:\S+ python:.* source_sha256:[0-9a-f]+", re.MULTILINE)
NOT_FINITE = re.compile(r"\b((?:train|val)_loss|val_bpb): ?(-?nan|-?inf)", re.IGNORECASE)
MINUTES_STEP = re.compile(r"(\d+)/\d+ train_loss: (\d+\.\d+) train_time: (\d+\.\d+)m")
PUBLISHED_STAGE = re.compile(r"([a-z][\w -]*?) val_loss:(\d+\.\d+) val_bpb:(\d+\.\d+)(?:.*? eval_time:(\d+)ms)?")
PUBLISHED = {  # fact: its line; the last one in the log counts
    "stopped": r"^stopping_early: wallclock_cap train_time: ?(\d+)ms step: ?(\d+)/",
    "hessians": r"^GPTQ:collected \d+ Hessians in (\d+\.\d+)s",
    "model": r"^Serialized model (?:int|quant)\S*: (\d+) bytes",
    "code": r"^Code size(?: \(compressed\))?: (\d+) bytes",
    "total": r"^Total submission size \S+: (\d+) bytes",
    "evaluated": r"^total_eval_time: ?(\d+\.\d+)s",
    "val_tokens": r"(?:^val_tokens: ?|^val_loader:.* tokens:)(\d+)",
    "world_size": r"^\s*world_size: ?(\d+)",
    "seed": r"^\s*seed: ?(\d+)\s*$",
}
OF_A_RUN = {"seed", "run_id"}  # settings in which the runs of one record may differ


@dataclass
class Outcome:
    """A finished run. None = the log does not say."""

    path: Path
    run: Run  # settings, losses, stages; for our logs the result line too
    ours: bool
    seed: int | None
    stage: str  # that is the score
    val_loss: float  # nats per token
    val_bpb: float  # bits per byte
    steps: int | None
    train_seconds: float | None
    calibration_seconds: float | None
    eval_seconds: float | None
    model_bytes: int | None
    code_bytes: int | None
    submission_bytes: int | None
    targets: int | None
    world_size: int | None

    @property
    def bpb_per_nat(self) -> float:
        """Bits per byte of one nat per token: tokens / bytes / ln 2, a constant of tokenizer and text."""
        return self.val_bpb / self.val_loss

    def score(self, stage: str | None) -> tuple[float, float]:
        """Name of a stage, None = the score -> (nats per token, bits per byte). ToolError for an unknown one."""
        if stage is None:
            return self.val_loss, self.val_bpb
        if stage not in self.run.stages:
            raise ToolError(f"{self.path}: no stage {stage!r}; it has {', '.join(self.run.stages)}")
        return self.run.stages[stage][:2]


def read_outcome(path: Path) -> Outcome:
    """Log file -> Outcome. ToolError for a log that is cut off, diverged, or of a script nobody knows."""
    text = read_text(path)
    ours = OURS.search(text) is not None
    run = parse_log(path) if ours else Run(path)
    events = run.events if ours else text.rpartition(SEPARATOR + "\n")[2].splitlines()
    for line in events:
        if found := NOT_FINITE.search(line):
            raise ToolError(f"{path}: {found[0]} in it: training diverged, there is nothing to report")
    return our_outcome(run) if ours else published_outcome(path, text, events)


def our_outcome(run: Run) -> Outcome:
    """A finished run of train_gpt.py -> Outcome."""
    fact = run.fact
    try:
        if not all(math.isfinite(fact(key)) for key in ("val_loss", "val_bpb")):
            raise ToolError(f"{run.path}: val_bpb:{fact('val_bpb')} in its result: training diverged")
        return Outcome(run.path, run, True, fact("seed"), fact("official_stage"), fact("val_loss"), fact("val_bpb"),
                       fact("steps"), fact("train_seconds"), fact("calibration_seconds"), fact("eval_seconds"),
                       fact("artifact_bytes"), fact("code_bytes"), fact("submission_bytes"),
                       fact("audit")["scored_targets"], fact("world_size"))
    except (TypeError, KeyError) as error:
        raise ToolError(f"{run.path}: its result cannot be read ({error!r}): edited, or of another version") from None


def published_outcome(path: Path, text: str, events: Sequence[str]) -> Outcome:
    """A log of a published script -> Outcome. ToolError where no score is in it."""
    run, rows = Run(path), []
    for line in events:
        if found := STEP.match(line):
            run.steps.append(Point(int(found[1]), int(found[3]) / 1000, float(found[2])))
        elif found := MINUTES_STEP.match(line):
            run.steps.append(Point(int(found[1]), 60 * float(found[3]), float(found[2])))
        elif found := VALIDATION.match(line):
            run.validations.append(Point(int(found[1]), int(found[3]) / 1000, float(found[2])))
        elif found := PUBLISHED_STAGE.match(line):
            rows.append(found)
    if not rows:
        raise ToolError(f"{path}: no log of train_gpt.py, and no line '... val_loss:.. val_bpb:..' of a published "
                        "script's final score in it: it was cut off, or it is something else")
    for found in rows:
        run.stages[found[1]] = Stage(float(found[2]), float(found[3]), int(found[4] or 0) / 1000)
    run.settings = dict(re.findall(r"^  (\w+): (.*)$", text, re.MULTILINE))
    facts = {name: re.findall(pattern, text, re.MULTILINE) for name, pattern in PUBLISHED.items()}
    number = {name: int(found[-1]) for name, found in facts.items() if found and str(found[-1]).isdigit()}
    stopped, name = facts["stopped"], rows[-1][1]
    steps, seconds = (int(stopped[-1][1]), int(stopped[-1][0]) / 1000) if stopped else \
        (run.steps[-1].step, run.steps[-1].seconds) if run.steps else (None, None)
    timed = [stage.seconds for stage in run.stages.values() if stage.seconds]
    evaluated = float(facts["evaluated"][-1]) if facts["evaluated"] else timed[-1] if timed else None
    in_name = re.search(r"seed_?(\d+)", path.name)
    seed = number.get("seed", int(in_name[1]) if in_name else None)
    return Outcome(path, run, False, seed, name, run.stages[name].val_loss, run.stages[name].val_bpb, steps, seconds,
                   float(facts["hessians"][-1]) if facts["hessians"] else None, evaluated, number.get("model"),
                   number.get("code"), number.get("total"), number.get("val_tokens"), number.get("world_size"))


def differing_settings(a: Outcome, b: Outcome) -> dict[str, tuple[str, str]]:
    """{setting: (its value in a, in b)}, but for seed and name of a run, also in paths that published scripts log."""
    left, right = ({name: text.replace(one.run.settings.get("run_id") or "-", "-") if not one.ours else text
                    for name, text in one.run.settings.items() if name not in OF_A_RUN} for one in (a, b))
    return {name: (left.get(name, "-"), right.get(name, "-")) for name in dict.fromkeys([*left, *right])
            if left.get(name) != right.get(name)}


def check_group(outcomes: Sequence[Outcome]) -> None:
    """ToolError unless the runs are one experiment under several seeds: same program, settings, data and machines."""
    first, seeds = outcomes[0], {}
    for outcome in outcomes:
        if outcome.seed is not None and outcome.seed in seeds:
            raise ToolError(f"{outcome.path}: seed {outcome.seed} again, {seeds[outcome.seed]} has it too; "
                            "give each seed once")
        seeds[outcome.seed] = outcome.path
        if outcome.ours != first.ours:
            raise ToolError(f"{outcome.path}: a log of another script than {first.path}: compare them with -- between")
        for name, (mine, other) in differing_settings(outcome, first).items():
            raise ToolError(f"{outcome.path}: {name.upper()}={mine}, but {other} in {first.path}; runs of a group may "
                            "differ in SEED and RUN_ID only")
        for key, what in (("source_sha256", "program"), ("data_fingerprint", "data"), ("world_size", "processes"),
                          ("device", "device"), ("torch", "torch")) if first.ours else ():
            mine, other = outcome.run.fact(key), first.run.fact(key)
            if mine != other:
                raise ToolError(f"{outcome.path}: another {what}: {key} {mine!s:.24}, but {other!s:.24} in "
                                f"{first.path}; run all seeds alike")
