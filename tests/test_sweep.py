"""tools/sweep.py: ranges, a search with a program that only pretends to train, how it goes on, and what it refuses."""
import argparse
import os
import re
import sys
import types
from pathlib import Path

import optuna
import pytest
import sweep
from test_tools import call, cells, png_size, refused

TRAINER = '''"""Pretends to train: the score depends on two settings."""
import json
import os
import sys
from dataclasses import dataclass


@dataclass
class Config:
    matrix_lr: float = 0.02
    num_loops: int = 0
    mode: str = "plain"


rate, loops = float(os.environ["MATRIX_LR"]), int(os.environ.get("NUM_LOOPS", 0))
bpb = 1 + (rate - 0.03) ** 2 * 1000 + 0.01 * loops
if os.environ.get("MODE") == "fail":
    sys.exit("error: MODE=fail: no data")
for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
    assert name not in os.environ
with open(os.path.join(os.environ["LOG_DIR"], os.environ["RUN_ID"] + ".txt"), "w") as log:
    log.write(os.environ.get("CUDA_VISIBLE_DEVICES", "-") + " " + os.environ["BASE"])
open(os.path.join(os.environ["LOG_DIR"], os.environ["RUN_ID"] + ".artifact"), "w").close()
for step in (1, 2, 3):
    print(f"step:{step}/3 val_loss:{bpb + 1 / step:.4f} val_bpb:1.0 train_time:{step}ms paused_seconds:0.1", flush=True)
print("result " + json.dumps({"val_bpb": bpb, "fits": os.environ.get("MODE") != "large", "submission_bytes": 17000000}))
'''


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with the pretender and a preset."""
    (tmp_path / "trainer.py").write_text(TRAINER)
    (tmp_path / "base.env").write_text("# a preset\nBASE=yes\n")
    return tmp_path


def options(place: Path, *more: str) -> tuple[str, ...]:
    return ("--program", str(place / "trainer.py"), "--preset", str(place / "base.env"),
            "--log-dir", str(place / "logs"), "--seed", "1", *more)


def test_ranges():
    assert sweep.parse_range("A=1:5") == ("A", 1.0, 5.0, False, True, ())
    assert sweep.parse_range("A=0.01:1:log") == ("A", 0.01, 1.0, True, False, ())
    assert sweep.parse_range("A=x,y,x").choices == ("x", "y")
    for text in ("A", "a=1:2", "A=", "A=1:2:3", "A=2:1", "A=0:1:log", "A=x:1", "A=1:inf"):
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(text)):
            sweep.parse_range(text)


class Fixed:
    """A trial that always draws the low end."""

    def suggest_int(self, name, low, high, log):
        return low

    def suggest_float(self, name, low, high, log):
        return low

    def suggest_categorical(self, name, choices):
        return choices[-1]


def test_suggestions_are_what_variables_take():
    drawn = [sweep.parse_range(text).suggest(Fixed()) for text in ("A=1:5", "A=0.00123456789:1", "A=x,y")]
    assert drawn == ["1", "0.00123457", "y"]


def test_optuna_is_optional(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, _, err = call(sweep, capsys, *options(place), "MATRIX_LR=0.01:0.05")
    assert code == 2 and err == "error: the package optuna is missing; install it with pip\n"


def test_refuses(place, capsys):
    assert "no setting of trainer.py; did you mean MATRIX_LR?" in refused(
        sweep, capsys, *options(place), "MATRIX_L=0.01:0.05")
    assert "given twice" in refused(sweep, capsys, *options(place), "NUM_LOOPS=0,1", "NUM_LOOPS=0,2")
    assert "No such file" in refused(sweep, capsys, "--program", place / "absent.py", "NUM_LOOPS=0,1")
    assert "above 0" in refused(sweep, capsys, *options(place), "--trials", "0", "NUM_LOOPS=0,1")


def test_environment_of_a_trial(place, monkeypatch):
    worker = object.__new__(sweep.Worker)
    worker.preset, worker.folder, worker.local_rank = {"BASE": "yes", "A": "1"}, place, 1
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_PORT", "1"), ("KEPT", "k"),
                        ("TORCHELASTIC_RUN_ID", "x"), ("CUDA_VISIBLE_DEVICES", "4,6")):
        monkeypatch.setenv(name, value)
    found = worker.environment("run", {"A": "2"})
    assert found["CUDA_VISIBLE_DEVICES"] == "6" and found["A"] == "2" and found["BASE"] == "yes"
    assert found["KEPT"] == "k" and found["LOG_DIR"] == str(place) and found["RUN_ID"] == "run"
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & set(found)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert worker.environment("run", {})["CUDA_VISIBLE_DEVICES"] == "1"


def test_alive():
    assert sweep.alive(os.getpid()) and not sweep.alive(2 ** 22 + 1)


# --- with Optuna
def test_searches_goes_on_and_stops_bad_trials_early(place, capsys):
    space = "MATRIX_LR=0.001:0.1:log", "NUM_LOOPS=0:2"
    code, out, err = call(sweep, capsys, *options(place, "--trials", "4"), *space)
    assert code == 0 and "sweep: 4 finished, 0 stopped early, 0 failed" in out, err
    code, out, err = call(sweep, capsys, *options(place, "--trials", "12"), *space)
    assert code == 0, err
    counts = re.search(r"sweep: (\d+) finished, (\d+) stopped early, 0 failed", out)
    assert counts and int(counts[1]) + int(counts[2]) == 12 and int(counts[2]) > 0, "goes on, and stops what is bad"
    best = min(float(row[0]) for name, row in cells(out).items() if name.isdigit())
    assert best < 1.1 and re.search(r"best: MATRIX_LR=0\.0\d+ NUM_LOOPS=\d\n", out)
    folder = place / "logs/sweep"
    assert png_size(folder / "study.png")[0] > 1500, "two panels: there is an importance plot"
    assert (folder / "sweep_0000.txt").read_text().endswith(" yes") and not list(folder.glob("*.artifact"))
    assert "other ranges" in refused(sweep, capsys, *options(place), "MATRIX_LR=0.001:0.2:log", "NUM_LOOPS=0:2")


def test_failures_end_the_sweep(place, capsys):
    code, out, err = call(sweep, capsys, *options(place), "MATRIX_LR=0.01:0.05", "MODE=fail")
    assert code == 2 and out.count("failed: exit code 1: error: MODE=fail: no data") == 3
    assert "3 trials in a row failed, the last one: exit code 1" in err and "Traceback" not in err
    code, out, err = call(sweep, capsys, *options(place, "--name", "large", "--trials", "1"), "MATRIX_LR=0.01:0.05",
                          "MODE=large")
    assert code == 2 and "17,000,000 bytes do not fit" in out and "no trial came to a score" in err


def test_trials_of_a_killed_worker_are_run_again(place, capsys):
    space = "MATRIX_LR=0.01:0.05"
    call(sweep, capsys, *options(place, "--trials", "1"), space)
    database = f"sqlite:///{place / 'logs/sweep/study.db'}"
    study = optuna.load_study(study_name="sweep", storage=database)
    for worker in (f"{sweep.socket.gethostname()} {2 ** 22 + 1}", f"elsewhere {2 ** 22 + 1}"):
        trial = study.ask()
        trial.set_user_attr("worker", worker)
        trial.suggest_float("MATRIX_LR", 0.01, 0.05)
    lost = trial.study.trials[1].params["MATRIX_LR"]
    assert call(sweep, capsys, *options(place, "--trials", "4"), space)[0] == 0
    trials = optuna.load_study(study_name="sweep", storage=database).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL", "RUNNING", "COMPLETE", "COMPLETE"]
    assert trials[3].params["MATRIX_LR"] == lost, "the killed worker's trial came first"


def test_the_second_worker_waits_for_the_first(place, monkeypatch):
    worker = object.__new__(sweep.Worker)
    worker.folder = place
    answers = iter((None, types.SimpleNamespace(user_attrs={}), types.SimpleNamespace(user_attrs={"asked": "x"})))
    assert worker.when_there(lambda: next(answers)).user_attrs == {"asked": "x"}
    monkeypatch.setattr(sweep, "WAIT_SECONDS", -1)
    with pytest.raises(sweep.ToolError, match="look at the first worker"):
        worker.when_there(lambda: None)
