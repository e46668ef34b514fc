"""Reads the log files of train_gpt.py; one way to report mistakes, and to print a table. Imported by the other tools.

    from run_log import parse_log
    run = parse_log(Path("logs/demo.txt"))
    print(run.name, run.steps[-1].loss, run.stages["quantized"].val_bpb, run.result["submission_bytes"])

A log file holds one or more runs (a run ID that is used again appends), each: the program's source, a line of 100 '=',
the settings, the events. Only what follows such a line counts, up to the next source. The last run that got anywhere is
taken; one that was resumed keeps the steps of those before it, up to the checkpoint.
"""
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

PACKED_FIRST_LINE = "#coding:latin1\n"  # of a program that tools/pack.py, or an older one itself, has packed
SEPARATOR = "=" * 100
SETTING = re.compile(r"([a-z]\w*):(.*)")
STEP = re.compile(r"step:(\d+)/\d+ train_loss:(\d+\.\d+) train_time:(\d+)ms ")
VALIDATION = re.compile(r"step:(\d+)/\d+ val_loss:(\d+\.\d+) val_bpb:\d+\.\d+ train_time:(\d+)ms ")
TRAINED = re.compile(r"peak_memory:\d+MiB steps:(\d+) train_seconds:(\d+\.\d+)")
RESUMED = re.compile(r"resumed step:(\d+) ")
STAGE = re.compile(r"final_(\w+)_exact val_loss:(\d+\.\d+) val_bpb:(\d+\.\d+) eval_time:(\d+)ms")


class ToolError(ValueError):
    """A mistake of the user: printed without a traceback. Says what, its value, and where possible the remedy."""


class Point(NamedTuple):
    """A loss in training."""

    step: int
    seconds: float
    loss: float  # nats per token


class Stage(NamedTuple):
    """A score of the whole validation text."""

    val_loss: float  # nats per token
    val_bpb: float  # bits per byte
    seconds: float


@dataclass
class Run:
    """What a log tells about one run."""

    path: Path
    settings: dict[str, str] = field(default_factory=dict)
    steps: list[Point] = field(default_factory=list)
    validations: list[Point] = field(default_factory=list)
    stages: dict[str, Stage] = field(default_factory=dict)
    trained: tuple[int, float] | None = None  # steps and seconds, once training is over
    result: dict[str, Any] | None = None  # None where the run did not finish
    source: str = ""  # the program's text as the log holds it
    events: list[str] = field(default_factory=list)  # all lines behind the settings

    @property
    def name(self) -> str:
        return self.settings.get("run_id") or self.path.stem

    def fact(self, key: str) -> Any:
        """A field of the result. ToolError where there is none."""
        if self.result is None:
            raise ToolError(f"{self.path}: no line 'result {{..}}' in it: the run did not finish")
        if key not in self.result:
            raise ToolError(f"{self.path}: its result has no {key!r}: written by another version of train_gpt.py")
        return self.result[key]

    def resume(self, earlier: "Run", step: int) -> None:
        """Takes over the losses of an earlier run up to a step."""
        self.steps = [point for point in earlier.steps if point.step <= step]
        self.validations = [point for point in earlier.validations if point.step <= step]

    def add(self, line: str) -> None:
        """Takes in one line of the log, if it says anything."""
        self.events.append(line)
        for pattern, points in ((STEP, self.steps), (VALIDATION, self.validations)):
            if found := pattern.match(line):
                points.append(Point(int(found[1]), int(found[3]) / 1000, float(found[2])))
        if found := TRAINED.match(line):
            self.trained = int(found[1]), float(found[2])
        if found := STAGE.match(line):
            self.stages[found[1]] = stage = Stage(float(found[2]), float(found[3]), int(found[4]) / 1000)
            if found[1] == "raw" and self.trained:
                self.validations.append(Point(*self.trained, stage.val_loss))
        if line.startswith("result {"):
            try:
                self.result = json.loads(line.removeprefix("result "))
            except ValueError:
                self.result = None  # cut off


def read_text(path: Path) -> str:
    """Whatever a file holds, as text. ToolError where it cannot be read."""
    try:
        return path.read_bytes().decode("utf8", "replace")
    except OSError as error:
        raise ToolError(f"{path}: {error.strerror}") from None


def parse_log(path: Path) -> Run:
    """Log file -> its last run. ToolError for a file that is missing or no log."""
    lines, source = read_text(path).split("\n"), []
    earlier, run, in_source, in_settings = Run(path), None, True, False
    for line in (line.rstrip("\r") for line in lines):
        if line == SEPARATOR:
            earlier = run if run and (run.steps or run.stages) else earlier
            run, in_source, in_settings, source = Run(path, source="\n".join(source)), False, True, []
        elif run is None or in_source or line == lines[0].rstrip("\r"):
            in_source = True  # up to the next separator
            source.append(line)
        elif in_settings and (found := SETTING.fullmatch(line)):
            in_settings = found[1] != "train_gpt"
            if in_settings:
                run.settings[found[1]] = found[2]
            else:
                run.events.append(line)
        elif found := RESUMED.match(line):
            run.resume(earlier, int(found[1]))
        else:
            run.add(line)
    if run is None:
        raise ToolError(f"{path}: no log of train_gpt.py (no line of 100 '='); give a LOG_DIR/RUN_ID.txt")
    return run if run.steps or run.stages else earlier


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells -> a Markdown table, padded so that it can be read as it is; all columns but the first are numbers."""
    widths = [max(3, *(len(row[i]) for row in [header, *rows])) for i in range(len(header))]
    lines = [[cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths))]
             for row in [header, *rows]]
    lines.insert(1, ["-" * (width - 1) + ":" if i else "-" * width for i, width in enumerate(widths)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def load_program() -> Any:
    """The module train_gpt, which lies above this folder. Slow to import (torch), so only for those who need it."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    return importlib.import_module("train_gpt")


def exit_code(work: Callable[[], None]) -> int:
    """Does the work -> 0, or 2 after printing a mistake of the user, 130 after Ctrl-C."""
    try:
        work()
        sys.stdout.flush()
        return 0
    except (ToolError, getattr(sys.modules.get("train_gpt"), "UserError", ToolError)) as error:
        message, code = f"error: {error}", 2
    except ModuleNotFoundError as error:
        message, code = f"error: the package {error.name} is missing; install it with pip", 2
    except BrokenPipeError:  # the reader has seen enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    print(message, file=sys.stderr)
    return code
