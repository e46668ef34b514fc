"""Searches settings with Optuna: one training run per trial, the score is what it minimizes.

    python tools/sweep.py --preset presets/laptop.env --trials 20 MATRIX_LR=0.01:0.05:log WARMDOWN_FRAC=0.4:0.9
    torchrun --standalone --nproc_per_node=8 tools/sweep.py --trials 80 MATRIX_LR=0.01:0.05:log NUM_LOOPS=0,1,2

Under torchrun every process is a worker with a GPU of its own. NAME=low:high is a range (of whole numbers where both
are), NAME=low:high:log one on a logarithmic scale, NAME=a,b,c a choice. All trials are in logs/NAME/study.db, with
their logs beside it; the same command continues a sweep that was stopped, and trials that a killed worker left open are
run again. Trials whose validation losses (VAL_LOSS_EVERY) are above the median of the others' are stopped early.
Optuna is optional: pip install optuna.
"""
import argparse
import contextlib
import difflib
import importlib
import json
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from plot_runs import COLORS, DPI
from record import config_defaults
from run_log import VALIDATION, ToolError, exit_code, read_text, table

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = re.compile(r"RANK|LOCAL_RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)|(GROUP|ROLE|TORCHELASTIC)_\w+")
STARTUP_TRIALS = 5  # that are neither stopped early nor chosen by the sampler's model
FAILURES_IN_A_ROW = 3  # after which it is no bad luck
GRACE_SECONDS = 30  # for a trial that is told to stop
WAIT_SECONDS = 60  # for the first worker to make the study
SHOWN = 5  # trials in the table


class Range(NamedTuple):
    """Values that a setting may take."""

    name: str
    low: float
    high: float
    log: bool
    whole: bool
    choices: tuple[str, ...]  # empty = a range

    def suggest(self, trial: Any) -> str:
        """The trial's value, as its variable takes it."""
        if self.choices:
            return trial.suggest_categorical(self.name, self.choices)
        if self.whole:
            return str(trial.suggest_int(self.name, int(self.low), int(self.high), log=self.log))
        return f"{trial.suggest_float(self.name, self.low, self.high, log=self.log):.6g}"


class TrialFailed(Exception):
    """A run that came to no score; the argument says why."""


def parse_range(text: str) -> Range:
    """'MATRIX_LR=0.01:0.05:log' -> Range. ArgumentTypeError says what is wrong with it."""
    def number(word: str) -> float:
        try:
            return float(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text}: {word!r} is no number; NAME=low:high or NAME=a,b,c") from None
    name, equals, values = text.partition("=")
    if not re.fullmatch(r"[A-Z][A-Z0-9_]*", name) or not equals or not values:
        raise argparse.ArgumentTypeError(f"{text}: must look like NAME=low:high, NAME=low:high:log or NAME=a,b,c")
    words = values.split(":")
    if len(words) == 1:
        return Range(name, 0.0, 0.0, False, False, tuple(dict.fromkeys(values.split(","))))
    log = words[2:] == ["log"]
    if words[2:] not in ([], ["log"]):
        raise argparse.ArgumentTypeError(f"{text}: behind low:high may stand only :log")
    low, high = number(words[0]), number(words[1])
    if not low < high < math.inf or (log and low <= 0):
        raise argparse.ArgumentTypeError(f"{text}: low must be below high" + ", and above 0 for log" * log)
    whole = all(re.fullmatch(r"[+-]?\d+", word) for word in words[:2])
    return Range(name, low, high, log, whole, ())


def read_preset(path: Path | None) -> dict[str, str]:
    """NAME=value lines of a preset."""
    lines = [line.strip() for line in read_text(path).splitlines()] if path else []
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def check_names(space: Sequence[Range], program: Path) -> None:
    """ToolError for a name that is no setting of the program, or is there twice."""
    known = [name.upper() for name in config_defaults(read_text(program))]
    names = [one.name for one in space]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            raise ToolError(f"{name}: no setting of {program.name}" + f"; did you mean {close[0]}?" * bool(close))
        if names.count(name) > 1:
            raise ToolError(f"{name}: given twice; give each setting one range")


class Worker:
    """Runs trials of one study on one device."""

    def __init__(self, config: argparse.Namespace):
        self.config, self.optuna = config, importlib.import_module("optuna")
        self.rank, self.local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
        self.folder = config.log_dir.resolve() / config.name
        self.preset = read_preset(config.preset)
        self.optuna.logging.set_verbosity(self.optuna.logging.ERROR)
        self.study = self.open_study()

    def open_study(self) -> Any:
        """The study, made by the first worker. ToolError where its name belongs to another search."""
        optuna = self.optuna
        asked = json.dumps({"space": [list(one) for one in self.config.space], "preset": self.preset})
        def storage() -> Any:
            return optuna.storages.RDBStorage(f"sqlite:///{self.folder / 'study.db'}",
                                              engine_kwargs={"connect_args": {"timeout": WAIT_SECONDS}})
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            study = optuna.create_study(storage=storage(), study_name=self.config.name, load_if_exists=True)
            if "asked" not in study.user_attrs:
                study.set_user_attr("asked", asked)
        study = self.when_there(lambda: optuna.load_study(
            study_name=self.config.name, storage=storage(), pruner=optuna.pruners.MedianPruner(STARTUP_TRIALS)))
        study.sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP_TRIALS, constant_liar=True,
                                                   seed=self.seed(len(study.trials)))
        if study.user_attrs["asked"] != asked:
            raise ToolError(f"{self.folder / 'study.db'}: begun with other ranges or another preset; choose another "
                            "--name, or repeat its command")
        return study

    def when_there(self, load: Callable[[], Any]) -> Any:
        """load() as soon as the first worker has made the study. ToolError after a minute."""
        end = time.monotonic() + WAIT_SECONDS
        while True:
            with contextlib.suppress(Exception):  # whatever a database says that is not there, or half there
                if "asked" in (study := load()).user_attrs:
                    return study
            if time.monotonic() > end:
                raise ToolError(f"{self.folder / 'study.db'}: no study in it; look at the first worker's output")
            time.sleep(0.2)

    def seed(self, trials: int) -> int | None:
        """Of the sampler: workers must not draw alike, nor may one that starts again behind so many trials."""
        return None if self.config.seed is None else self.config.seed + 10_000 * self.rank + trials

    # --- the loop
    def run(self) -> None:
        """Runs trials until the study has as many as were asked for."""
        self.retire_dead_trials()
        failures = 0
        while self.count() < self.config.trials:
            self.study.optimize(self.objective, n_trials=1, catch=(TrialFailed,))
            mine = [trial for trial in self.trials() if trial.user_attrs.get("worker") == self.identity()]
            failed = mine and mine[-1].state.name == "FAIL"
            failures = failures + 1 if failed else 0
            if failures == FAILURES_IN_A_ROW:
                raise ToolError(f"{failures} trials in a row failed, the last one: {mine[-1].user_attrs['reason']}")
        self.report()

    def identity(self) -> str:
        return f"{socket.gethostname()} {os.getpid()}"

    def count(self) -> int:
        """Trials that are done or being run."""
        return sum(trial.state.name != "WAITING" and not lost(trial) for trial in self.trials())

    def trials(self) -> list[Any]:
        return self.study.get_trials(deepcopy=False)

    def retire_dead_trials(self) -> None:
        """Puts trials of workers that are gone from this host back into the queue."""
        for trial in self.trials():
            host, _, process = trial.user_attrs.get("worker", "").partition(" ")
            if trial.state.name != "RUNNING" or host != socket.gethostname() or alive(int(process)):
                continue
            with contextlib.suppress(ValueError, RuntimeError):  # another worker was faster
                self.study.tell(trial.number, state=self.optuna.trial.TrialState.FAIL)
                self.study.enqueue_trial(trial.params)

    def objective(self, trial: Any) -> float:
        """One training run -> its bits per byte. Raises TrialFailed, or TrialPruned."""
        trial.set_user_attr("worker", self.identity())
        chosen = {one.name: one.suggest(trial) for one in self.config.space}
        name = f"{self.config.name}_{trial.number:04}"
        try:
            bpb = self.train(trial, name, chosen)
        except TrialFailed as error:
            trial.set_user_attr("reason", str(error))
            print(f"{name} failed: {error}", flush=True)
            raise
        finally:
            for kind in ("checkpoint", "artifact"):  # of every trial they would fill the disk
                (self.folder / f"{name}.{kind}").unlink(missing_ok=True)
        print(f"{name} val_bpb:{bpb:.5f} {shown(chosen)}", flush=True)
        return bpb

    def environment(self, name: str, chosen: Mapping[str, str]) -> dict[str, str]:
        """Variables of a trial: no launcher's, this worker's GPU, preset and choices."""
        kept = {key: value for key, value in os.environ.items() if not LAUNCHER.fullmatch(key)}
        if "LOCAL_RANK" in os.environ:
            visible = [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
            kept["CUDA_VISIBLE_DEVICES"] = visible[self.local_rank] if self.local_rank < len(visible) else \
                str(self.local_rank)
        return {**kept, **self.preset, **chosen, "RUN_ID": name, "LOG_DIR": str(self.folder)}

    def train(self, trial: Any, name: str, chosen: Mapping[str, str]) -> float:
        """Runs the program, watches its validation losses -> bits per byte."""
        result, losses = None, 0
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen([sys.executable, str(self.config.program)], text=True, stderr=errors,
                                       stdout=subprocess.PIPE, env=self.environment(name, chosen))
            assert process.stdout
            try:
                for line in process.stdout:
                    if found := VALIDATION.match(line):
                        losses += 1
                        trial.report(float(found[2]), losses)  # by number: steps and seconds differ between trials
                        if trial.should_prune():
                            print(f"{name} stopped early at val_loss:{found[2]} {shown(chosen)}", flush=True)
                            raise self.optuna.TrialPruned
                    elif line.startswith("result {"):
                        result = json.loads(line.removeprefix("result "))
                code = process.wait()
            finally:
                stop(process)
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["it printed nothing"])[-1]
        if result is None or not math.isfinite(result["val_bpb"]):
            raise TrialFailed(f"exit code {code}: {last}")
        if not result.get("fits", True):
            raise TrialFailed(f"{result['submission_bytes']:,} bytes do not fit")
        return result["val_bpb"]

    # --- what came out
    def report(self) -> None:
        """Table of the best trials, the best one's settings, a plot."""
        done = [trial for trial in self.trials() if trial.state.name == "COMPLETE"]
        states = [trial.state.name for trial in self.trials() if not lost(trial)]
        counts = ", ".join(f"{states.count(state)} {text}" for state, text in
                           (("COMPLETE", "finished"), ("PRUNED", "stopped early"), ("FAIL", "failed")))
        if not done:
            raise ToolError(f"{self.folder}: no trial came to a score ({counts})")
        best = sorted(done, key=lambda trial: trial.value)[:SHOWN]
        names = [one.name for one in self.config.space]
        rows = [[str(trial.number), f"{trial.value:.5f}", *(f"{trial.params[name]:.6g}" if isinstance(
            trial.params[name], float) else str(trial.params[name]) for name in names)] for trial in best]
        out = self.folder / "study.png"
        importances = self.importances(done)
        plot(done, importances, out)
        print(f"\n{self.config.name}: {counts}\n\n" + table(["trial", "bits per byte", *names], rows)
              + f"\n\nbest: {shown(dict(zip(names, rows[0][2:])))}\nwrote {out}")

    def importances(self, done: Sequence[Any]) -> dict[str, float]:
        """How much of the scores' differences each setting explains, {} where the trials cannot tell."""
        varied = {one.name for one in self.config.space if len({trial.params[one.name] for trial in done}) > 1}
        if len(done) < STARTUP_TRIALS or len(varied) < 2:
            return {}
        import warnings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is experimental in older versions of Optuna
            evaluator = self.optuna.importance.PedAnovaImportanceEvaluator()
            return dict(self.optuna.importance.get_param_importances(self.study, evaluator=evaluator))


def shown(chosen: Mapping[str, str]) -> str:
    """'MATRIX_LR=0.02 NUM_LOOPS=1', to be pasted into a shell."""
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in chosen.items())


def lost(trial: Any) -> bool:
    """Did the trial end with its worker? A run that failed has a reason."""
    return trial.state.name == "FAIL" and "reason" not in trial.user_attrs


def alive(process: int) -> bool:
    """Is there a process of this number?"""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def stop(process: subprocess.Popen[str]) -> None:
    """Ends a process, gently at first."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        process.kill()
        process.wait()
    if process.stdout:
        process.stdout.close()


def plot(done: Sequence[Any], importances: Mapping[str, float], out: Path) -> None:
    """Scores in order with the best so far, and the settings' importance -> PNG."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    with plt.rc_context({"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 12, "font.size": 10}):
        figure, axes = plt.subplots(1, 2 if importances else 1, figsize=(11.0 if importances else 6.0, 4.4),
                                    squeeze=False)
        figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08)
        numbers, scores = [trial.number for trial in done], [trial.value for trial in done]
        best = [min(scores[:i + 1]) for i in range(len(scores))]
        axes[0, 0].plot(numbers, scores, linestyle="", marker="o", color=COLORS[0], label="trial")
        axes[0, 0].step(numbers, best, where="post", color=COLORS[1], label="best so far")
        low, high = min(scores), sorted(scores)[int(0.8 * (len(scores) - 1))]  # not what went quite wrong
        margin = 0.1 * (high - low) or 0.01
        axes[0, 0].set(title="Scores (the best 80 %)", xlabel="trial", ylabel="bits per byte (lower is better)",
                       ylim=(low - margin, high + margin))
        axes[0, 0].legend(frameon=False)
        axes[0, 0].grid(alpha=0.3)
        if importances:
            names = sorted(importances, key=lambda name: importances[name])
            bars = axes[0, 1].barh(names, [importances[name] for name in names], color=COLORS[0])
            axes[0, 1].bar_label(bars, fmt="{:.0%}", padding=4)
            axes[0, 1].set_xlim(0, 1.1 * max(importances.values()))
            axes[0, 1].set(title="Importance of the settings", xlabel="share of what the scores differ by (PED-ANOVA)")
        part = out.with_name(f".{out.name}.{os.getpid()}.part")  # workers that end together write it at once
        figure.savefig(part, dpi=DPI, format="png")
        os.replace(part, out)
        plt.close(figure)


def search(config: argparse.Namespace) -> None:
    """Runs this worker's share of the sweep."""
    check_names(config.space, config.program)
    Worker(config).run()


def at_least_one(text: str) -> int:
    """Argument -> a whole number above 0."""
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number above 0")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line -> exit code: 0 done, 2 a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("space", nargs="+", type=parse_range, metavar="NAME=VALUES", help="a setting and what it may be")
    add("--trials", type=at_least_one, default=20, help="of all workers and starts together; default 20")
    add("--preset", type=Path, metavar="ENV", help="settings of all trials; else what is in the environment")
    add("--name", type=str, default="sweep", help="of the sweep, its folder, its runs; default sweep")
    add("--log-dir", type=Path, default=Path("logs"), help="holds the sweep's folder; default logs")
    add("--program", type=Path, default=ROOT / "train_gpt.py", help="what to run; default train_gpt.py")
    add("--seed", type=int, help="of the search, to repeat one of one worker; default: another each time")
    config = parser.parse_args(arguments)
    return exit_code(lambda: search(config))


if __name__ == "__main__":
    sys.exit(main())
