"""The whole program: one process, torchrun, two nodes, killed processes, signals, copies, and every kind of mistake."""
import importlib.util
import json
import lzma
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from program import (
    ROOT,
    SCRIPT,
    environment,
    free_port,
    result_of,
    run,
    settings,
    started,
    step_losses,
    torchrun,
    wait_for_line,
    write_data,
)

import train_gpt

STEPS = 24
RESULT_FIELDS = """version run_id seed world_size device torch source_sha256 data_fingerprint overrides steps
    train_tokens train_seconds calibration_seconds compile_seconds eval_seconds peak_memory_bytes num_params stages
    official_stage val_loss val_bpb artifact_bytes code_bytes submission_bytes headroom_bytes fits legal audit"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("layout") / "data" / "datasets" / "tiny")


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    """The uninterrupted run of one process that all others are compared with: (finished process, log folder)."""
    logs = tmp_path_factory.mktemp("one")
    done = run(settings(data, logs, ITERATIONS=STEPS))
    assert (done.returncode, done.stderr) == (0, "")
    return done, logs


@pytest.fixture
def inside(data, tmp_path, capsys):
    """inside(**changes) -> (exit code, stdout, stderr) of main in this process: quick, and nothing may escape it."""
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)

    def call(module=train_gpt, **changes) -> tuple[int, str, str]:
        capsys.readouterr()
        code = module.main(settings(data, tmp_path / "logs", **{"ITERATIONS": STEPS, **changes}))
        return code, *capsys.readouterr()

    yield call
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    for number, handler in handlers:
        signal.signal(number, handler)


# --- one process
def test_the_result_line_is_complete(one, data):
    result = result_of(one[0].stdout)
    assert set(result) >= set(RESULT_FIELDS.split())
    assert list(result["stages"]) == ["raw", "averaged", "quantized", "sliding"]
    assert result["official_stage"] == "sliding"
    for stage in result["stages"].values():
        assert set(stage) == {"nats", "tokens", "bytes", "val_loss", "val_bpb", "seconds"}
        assert stage["tokens"] == 1499 and stage["val_loss"] == pytest.approx(stage["nats"] / 1499)
        assert stage["val_bpb"] == stage["nats"] / math.log(2) / stage["bytes"]
        assert stage["seconds"] == round(stage["seconds"], 3) > 0
        assert stage["bytes"] == result["stages"]["raw"]["bytes"] > 3000
        assert stage["val_bpb"] == pytest.approx(stage["nats"] / 0.6931471805599453 / stage["bytes"])
    assert result["val_bpb"] == result["stages"]["sliding"]["val_bpb"] < result["stages"]["quantized"]["val_bpb"]
    assert result["val_loss"] == result["stages"]["sliding"]["val_loss"] < 3.3, "it does not learn"
    assert (result["steps"], result["train_tokens"]) == (STEPS, STEPS * 512)
    assert (result["seed"], result["world_size"]) == (1337, 1)
    assert result["submission_bytes"] == result["artifact_bytes"] + result["code_bytes"]
    assert result["headroom_bytes"] == 16_000_000 - result["submission_bytes"] > 0
    assert result["artifact_bytes"] == (one[1] / "run.artifact").stat().st_size
    assert result["code_bytes"] == len(lzma.compress(SCRIPT.read_bytes()))
    assert f"\ncode_bytes:{result['code_bytes']} upper bound: run what tools/pack.py makes" in one[0].stdout
    assert result["fits"] is result["legal"] is True and result["audit"]["scored_targets"] == 1499
    assert result["overrides"]["NUM_LAYERS"] == 4 and result["overrides"]["DATA_PATH"] == str(data)
    assert len(result["source_sha256"]) == len(result["data_fingerprint"]) == 64


def test_the_log_begins_with_the_source_and_holds_all_events(one):
    done, logs = one
    log = (logs / "run.txt").read_text()
    assert log.startswith(SCRIPT.read_text()) and log.endswith(done.stdout)
    assert log.splitlines()[-1].startswith("result {")
    assert sorted(path.name for path in logs.iterdir()) == ["run.artifact", "run.checkpoint", "run.txt"]
    assert len(step_losses(done.stdout)) == STEPS
    for stage in ("raw", "averaged", "quantized", "sliding"):
        line, = re.findall(rf"^final_{stage}_exact val_loss:(\S+) val_bpb:(\S+) eval_time:\d+ms$", done.stdout, re.M)
        score = result_of(done.stdout)["stages"][stage]
        assert line == (f"{score['val_loss']:.8f}", f"{score['val_bpb']:.8f}")
    for pattern in (r"^step:1/24 train_loss:\d\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms ",
                    r"^data_fingerprint:[0-9a-f]{64}$", r" leaked_documents:0 bytes:unchecked$"):  # has no tokenizer
        assert re.search(pattern, done.stdout, re.M), pattern


def test_the_artifact_is_what_was_scored(one, data, inside):
    """Resuming from the end of training goes straight to quantization and gives the same bytes and score."""
    code, out, _ = inside(RESUME=one[1] / "run.checkpoint", ARTIFACT_PATH=one[1] / "again.artifact")
    assert code == 0 and not step_losses(out) and f"resumed step:{STEPS}" in out
    again, before = result_of(out), result_of(one[0].stdout)
    assert (one[1] / "again.artifact").read_bytes() == (one[1] / "run.artifact").read_bytes()
    for stage in before["stages"]:
        assert again["stages"][stage]["nats"] == before["stages"][stage]["nats"]
    assert (again["steps"], again["train_seconds"]) == (before["steps"], before["train_seconds"])


def test_the_cheap_score_only(one, inside):
    code, out, _ = inside(EVAL_MODE="packed", RESUME=one[1] / "run.checkpoint")
    result, before = result_of(out), result_of(one[0].stdout)
    assert code == 0 and list(result["stages"]) == ["raw", "averaged", "quantized"]
    assert result["official_stage"] == "quantized"
    assert result["val_bpb"] == before["stages"]["quantized"]["val_bpb"]


def test_validation_and_checkpoints_in_training_do_not_change_the_score(one, inside):
    code, out, _ = inside(VAL_LOSS_EVERY=10, CHECKPOINT_EVERY_SECONDS=0.2, TRAIN_LOG_EVERY=0)
    assert code == 0 and result_of(out)["val_loss"] == result_of(one[0].stdout)["val_loss"]
    assert len(re.findall(r"^step:[12]0/24 val_loss:\S+ val_bpb:\S+ train_time:", out, re.M)) == 2
    assert 15 <= len(step_losses(out)) <= 22


def test_the_wallclock_ends_training(inside):
    start = time.perf_counter()
    code, out, _ = inside(MAX_WALLCLOCK_SECONDS=1.0, GPTQ_RESERVE_SECONDS=0.4, ITERATIONS=100000)
    result = result_of(out)
    assert code == 0 and 2 <= result["steps"] < 1000 and "stopping_early: wallclock_cap" in out
    assert result["train_seconds"] < 1.0 and time.perf_counter() - start < 60


# --- several processes
@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    done = run(settings(data, tmp_path_factory.mktemp("two"), ITERATIONS=STEPS), torchrun(2))
    assert done.returncode == 0, done.stderr
    return done


def assert_same_run(output: str, expected: str, world_size: int = 2) -> None:
    """Step losses within 1e-4, final score within 1e-5."""
    assert step_losses(output) == pytest.approx(step_losses(expected), abs=1.01e-4)
    mine, other = result_of(output), result_of(expected)
    assert mine["world_size"] == world_size and mine["steps"] == other["steps"]
    assert mine["data_fingerprint"] == other["data_fingerprint"]
    for stage, score in other["stages"].items():
        assert mine["stages"][stage]["val_bpb"] == pytest.approx(score["val_bpb"], abs=1e-5)
        assert mine["stages"][stage]["bytes"] == score["bytes"]


def test_two_processes_equal_one(one, two):
    assert_same_run(two.stdout, one[0].stdout)
    assert len(two.stdout.splitlines()) == len(one[0].stdout.splitlines()), "lines of other ranks"


def test_two_nodes_equal_one_process(one, data, tmp_path):
    """Two torchrun agents that meet at a port of this host."""
    meeting = f"--rdzv_endpoint=127.0.0.1:{free_port()}"
    command = torchrun(1, "--nnodes=2", "--rdzv_backend=c10d", meeting, "--rdzv_id=x")
    variables = settings(data, tmp_path / "logs", ITERATIONS=STEPS)
    with started(variables, command) as first, started(variables, command) as second:
        outputs = [process.communicate(timeout=120) for process in (first, second)]
        assert (first.returncode, second.returncode) == (0, 0), outputs
    (output,) = (out for out, _ in outputs if out)  # rank 0's; the other node is silent
    assert_same_run(output, one[0].stdout)


def ranks(size: int, variables: dict[str, str]) -> list[dict[str, str]]:
    """What a launcher sets, without its help when a process dies."""
    port = str(free_port())
    return [{**variables, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} for rank in range(size)]


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_is_killed_the_others_end(data, tmp_path, victim):
    variables = ranks(2, settings(data, tmp_path / "logs", ITERATIONS=100000, TRAIN_LOG_EVERY=1))
    with started(variables[0]) as first, started(variables[1]) as second:
        processes = [first, second]
        wait_for_line(first, "step:2/")
        processes[victim].kill()
        start = time.monotonic()
        survivor = processes[1 - victim]
        _, stderr = survivor.communicate(timeout=60)
        assert survivor.returncode > 0 and time.monotonic() - start < 60
    assert "Traceback" not in stderr and "error: another process is gone" in stderr


# --- interruptions
def test_a_signal_writes_a_checkpoint_and_resuming_gives_the_uninterrupted_score(one, data, tmp_path, inside):
    with started(settings(data, tmp_path / "first", ITERATIONS=STEPS)) as process:
        wait_for_line(process, "step:3/")
        process.send_signal(signal.SIGINT)
        rest, stderr = process.communicate(timeout=60)
    checkpoint = tmp_path / "first" / "run.checkpoint"
    assert process.returncode == 130 and stderr == f"interrupted; RESUME={checkpoint} continues\n"
    saved = int(re.search(r"^checkpoint step:(\d+) ", rest, re.M)[1])
    assert 3 <= saved < STEPS and "final_" not in rest
    code, out, _ = inside(RESUME=checkpoint)
    assert code == 0 and f"resumed step:{saved} " in out
    result, whole = result_of(out), result_of(one[0].stdout)
    assert result["stages"]["sliding"]["nats"] == whole["stages"]["sliding"]["nats"] and result["steps"] == STEPS
    assert step_losses(out) == step_losses(one[0].stdout)[saved:]


def test_two_processes_stop_together_at_a_signal_and_one_can_resume(one, data, tmp_path, inside):
    """SIGTERM to the launcher alone, as a cluster does it."""
    with started(settings(data, tmp_path / "first", ITERATIONS=STEPS), torchrun(2)) as process:
        wait_for_line(process, "step:3/")
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    checkpoint = tmp_path / "first" / "run.checkpoint"
    assert process.returncode != 0 and checkpoint.exists()
    assert stderr.count(f"interrupted; RESUME={checkpoint} continues") == 2 and "train_gpt.py\", line" not in stderr
    code, out, _ = inside(RESUME=checkpoint)
    assert code == 0
    assert result_of(out)["val_bpb"] == pytest.approx(result_of(one[0].stdout)["val_bpb"], abs=1e-5)
    losses = step_losses(out)
    assert 0 < len(losses) < STEPS - 2
    assert losses == pytest.approx(step_losses(one[0].stdout)[-len(losses):], abs=1.01e-4)


def test_a_signal_before_training_ends_without_a_traceback(data, tmp_path):
    with started(settings(data, tmp_path / "logs")) as process:
        wait_for_line(process, "train_gpt:")
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stderr.startswith("interrupted; ") and "Traceback" not in stderr, stderr
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["run.txt"]


def test_a_signal_during_the_imports_ends_without_a_traceback(data, tmp_path):
    (tmp_path / "numpy.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    with started(settings(data, tmp_path / "logs", PYTHONPATH=tmp_path)) as process:
        wait_for_line(process, "importing")
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (-signal.SIGINT, "")


KILLS = '''
import json, os, signal, sys
import torch
import torch._dynamo  # as every optimizer does; here once for all
import train_gpt
points, variables = json.loads(sys.argv[1]), json.loads(sys.argv[2])
for point in points:
    logs = os.path.join(variables["LOG_DIR"], point.replace(" ", "-"))
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        calls = {"save": 0}
        def die():
            os.kill(os.getpid(), signal.SIGKILL)
        def save(state, file, original=torch.save):
            calls["save"] += 1
            if calls["save"] < 3:
                return original(state, file)
            if point == "before the write":
                die()
            if point == "half way":
                file.write(b"x" * 10000)
                file.flush()
                die()
            original(state, file)
        def wrap(name):
            original = getattr(os, name)
            def wrapper(*arguments):
                if calls["save"] == 3 and point == "before " + name:
                    die()
                result = original(*arguments)
                if calls["save"] == 3 and point == "after " + name:
                    die()
                return result
            setattr(os, name, wrapper)
        torch.save = save
        wrap("fsync")
        wrap("replace")
        train_gpt.main({**variables, "LOG_DIR": logs})
        os._exit(1)
    _, status = os.waitpid(child, 0)
    state = torch.load(os.path.join(logs, "run.checkpoint"), weights_only=True)
    print("killed", json.dumps([point, os.WTERMSIG(status), state["step"]]), flush=True)
'''


def test_a_process_killed_while_it_writes_a_checkpoint_leaves_a_whole_one(data, tmp_path, inside):
    """Checkpoints are written before every step; the third one is cut off. The second or third must be loadable."""
    points = {"before the write": 1, "half way": 1, "before fsync": 1, "before replace": 1, "after replace": 2}
    variables = settings(data, tmp_path, CHECKPOINT_EVERY_SECONDS=1e-9)
    done = subprocess.run([sys.executable, "-c", KILLS, json.dumps(list(points)), json.dumps(variables)], cwd=ROOT,
                          env=environment({}), capture_output=True, text=True, timeout=120, check=False)
    killed = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("killed ")]
    assert killed == [[point, signal.SIGKILL, step] for point, step in points.items()], done.stderr
    code, out, _ = inside(ITERATIONS=8, RESUME=tmp_path / "half-way" / "run.checkpoint")
    assert code == 0 and len(step_losses(out)) == 7


# --- limits and checks
def test_a_part_of_the_validation_set_is_no_official_score(one, inside):
    code, out, _ = inside(EVAL_ONLY=one[1] / "run.artifact", VAL_DOCS=2)
    result, whole = result_of(out), result_of(one[0].stdout)
    assert code == 0 and whole["legal"] and not result["legal"]
    assert 0 < result["audit"]["targets"] < whole["audit"]["targets"] and re.search(r" val_documents:2 ", out)


def test_a_submission_over_the_limit_is_scored_and_fails(one, inside, monkeypatch):
    monkeypatch.setattr(train_gpt, "SIZE_LIMIT_BYTES", 1000)
    code, out, _ = inside(RESUME=one[1] / "run.checkpoint")
    result = result_of(out)
    assert code == 3 and result["fits"] is result["legal"] is False and result["headroom_bytes"] < 0
    assert re.search(r"^error: \d+ bytes, over 1000; .*ALLOW_OVERSIZE=1", out, re.M)
    code, out, _ = inside(RESUME=one[1] / "run.checkpoint", ALLOW_OVERSIZE=1)
    assert code == 0 and result_of(out)["fits"] is False


def test_preflight_checks_and_trains_nothing(inside, tmp_path):
    code, out, _ = inside(PREFLIGHT=1, MAX_WALLCLOCK_SECONDS=600, QAT_START=0.75, TRAIN_SEQ_SCHEDULE="32@0.5,64@1")
    assert code == 0 and out.splitlines()[-1] == "preflight ok" and not step_losses(out) and "final_" not in out
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["run.txt"]
    for pattern in (r"^preflight projected_steps:24 projected_train_seconds:\d+ peak_memory:\d+MiB$",
                    r"predicted_artifact_bytes:\d+ code_bytes:\d+ predicted_submission_bytes:"):
        assert re.search(pattern, out, re.M)
    steps = re.findall(r"^preflight step_seconds:0\.\d+ share:(0\.\d+) (.*)$", out, re.M)
    assert [(float(part), what) for part, what in steps] == [(pytest.approx(part, abs=0.002), what) for part, what in (
        (0.35, "looping:0 quantizing:0 seq_len:32 batch_share:1"),
        (0.15, "looping:1 quantizing:0 seq_len:32 batch_share:1"),
        (0.25, "looping:1 quantizing:0 seq_len:64 batch_share:1"),
        (0.25, "looping:1 quantizing:1 seq_len:64 batch_share:1"))]


def test_preflight_projects_the_steps_of_the_time(inside, monkeypatch):
    """Stages that take 1 and 3 seconds a step, for 35 and 65 hundredths of 92 seconds."""
    monkeypatch.setattr(train_gpt.Trainer, "warmup", lambda self, steps: {
        stage: 3.0 if stage.looping else 1.0 for stage in train_gpt.stages(self.config)})
    code, out, _ = inside(PREFLIGHT=1, MAX_WALLCLOCK_SECONDS=100, ITERATIONS=10000)
    assert code == 0 and "projected_steps:52 projected_train_seconds:92 " in out
    code, out, _ = inside(PREFLIGHT=1, MAX_WALLCLOCK_SECONDS=100, ITERATIONS=20)
    assert code == 0 and "projected_steps:20 projected_train_seconds:46 " in out


def test_tokens_are_counted_as_the_schedule_of_the_batch_uses_them(inside):
    """Half the tokens in the first 12 of 24 steps and in the one that begins at one half."""
    code, out, _ = inside(BATCH_SCHEDULE="0.5@0.5,1@1", EVAL_MODE="packed")
    assert code == 0 and result_of(out)["train_tokens"] == 13 * 256 + 11 * 512


@pytest.mark.parametrize("preflight", [0, 1])
def test_a_full_disk_is_noticed_before_training(inside, monkeypatch, preflight):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    code, out, err = inside(PREFLIGHT=preflight)
    assert not step_losses(out)
    assert code == 2 and re.search(r"^error: LOG_DIR: .*1,000 bytes free.*; .*set LOG_DIR", err)


# --- copies of the file
@pytest.fixture(scope="module")
def layout(data, packed_program):
    """The repository's layout around the data: a plain and a packed copy of the program in a record's folder."""
    root = data.parents[2]
    for name, content in (("plain", SCRIPT.read_bytes()), ("packed", packed_program.read_bytes())):
        folder = root / "records" / "track_non_record_16mb" / name
        folder.mkdir(parents=True)
        (folder / "train_gpt.py").write_bytes(content)
    (root / "train_gpt.py").write_bytes(b"raise SystemExit('not this file')\n")
    return root


def test_a_copy_in_a_record_runs_from_the_root(one, layout, tmp_path):
    script = layout / "records" / "track_non_record_16mb" / "plain" / "train_gpt.py"
    done = run(settings(Path("data/datasets/tiny"), tmp_path / "logs", ITERATIONS=STEPS), script=script, cwd=layout)
    assert (done.returncode, done.stderr) == (0, "")
    assert result_of(done.stdout)["stages"]["sliding"]["nats"] == result_of(one[0].stdout)["stages"]["sliding"]["nats"]


def test_the_packed_file_runs_from_its_own_folder_with_the_same_score(one, layout):
    folder = layout / "records" / "track_non_record_16mb" / "packed"
    done = run(settings(Path("./data/datasets/tiny"), Path("logs"), ITERATIONS=STEPS),
               script=Path("train_gpt.py"), cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    result, plain = result_of(done.stdout), result_of(one[0].stdout)
    assert result["stages"]["sliding"]["nats"] == plain["stages"]["sliding"]["nats"]
    assert (folder / "logs" / "run.artifact").read_bytes() == (one[1] / "run.artifact").read_bytes()
    assert result["code_bytes"] == (folder / "train_gpt.py").stat().st_size < plain["code_bytes"]
    assert f"\ncode_bytes:{result['code_bytes']} packed\n" in done.stdout
    log = (folder / "logs" / "run.txt").read_text()
    assert log.startswith((folder / "train_gpt.py").read_bytes().decode("latin1")[:1000].replace("\r", "\n"))


def test_a_plain_copy_runs_from_its_own_folder(layout, inside, monkeypatch):
    folder = layout / "records" / "track_non_record_16mb" / "plain"
    monkeypatch.chdir(folder)
    spec = importlib.util.spec_from_file_location("copied_train_gpt", folder / "train_gpt.py")
    copied = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, copied)
    spec.loader.exec_module(copied)
    code, out, _ = inside(copied, DATA_PATH="data/datasets/tiny", LOG_DIR="logs", ITERATIONS=2)
    assert code == 0 and result_of(out)["steps"] == 2 and (folder / "logs" / "run.artifact").exists()


# --- mistakes
MISTAKES = {  # name -> (variables, what the line says)
    "no data": ({"DATA_PATH": "/nowhere/at/all"}, "DATA_PATH=/nowhere/at/all: no such folder; python data/prepare.py"),
    "log below a file": ({"LOG_DIR": "{file}/logs"}, "set LOG_DIR"),
    "artifact below a file": ({"ARTIFACT_PATH": "{file}/a", "ITERATIONS": "1"}, "set ARTIFACT_PATH"),
    "batch": ({"WORLD_SIZE": "3", "RANK": "0"}, "TRAIN_BATCH_TOKENS=512 (times 1) is no multiple of 3 processes x"),
    "no tokenizer": ({"TOKENIZER_PATH": "{file}"}, "TOKENIZER_PATH={file}: not a SentencePiece model"),
    "absent tokenizer": ({"TOKENIZER_PATH": "/nowhere.model"}, "TOKENIZER_PATH=/nowhere.model: no such file"),
    "vocabulary": ({"VOCAB_SIZE": "50"}, "outside VOCAB_SIZE=50"),
    "compile": ({"COMPILE": "1"}, "COMPILE=1: needs CUDA, this is cpu; use COMPILE=auto"),
    "compile how": ({"COMPILE": "whole"}, "COMPILE=whole: must be one of auto, 0, 1"),
    "batch schedule": ({"BATCH_SCHEDULE": "0.3@0.5,1@1"}, "TRAIN_BATCH_TOKENS=512 (times 0.3) is no multiple"),
    "no gpu": ({"DEVICE": "cuda"}, "DEVICE=cuda: torch finds no CUDA device; check the driver or use DEVICE=cpu"),
    "attention": ({"ATTENTION": "fa3"}, "ATTENTION=fa3: needs a GPU of compute capability 9.0"),
    "resume": ({"RESUME": "{file}"}, "RESUME={file}: no readable checkpoint"),
    "resume absent": ({"RESUME": "/nowhere"}, "RESUME=/nowhere: no readable checkpoint"),
    "other model": ({"RESUME": "{checkpoint}", "ROPE_BASE": "77"}, "was trained with ROPE_BASE=10000.0, now 77.0"),
    "matrix_lr": ({"MATRIX_LR": "1e30"}, "training diverged; lower MATRIX_LR"),
    "scalar_lr": ({"SCALAR_LR": "1e38"}, "training diverged; lower MATRIX_LR, TIED_EMBED_LR or SCALAR_LR"),
    "last step": ({"MATRIX_LR": "1e30", "ITERATIONS": "1"}, "diverged"),
    "unknown": ({"MATRX_LR": "0.1"}, "MATRX_LR: unknown setting; did you mean MATRIX_LR?"),
    "value": ({"ITERATIONS": "ten"}, "ITERATIONS=ten: must be a whole number"),
    "rule": ({"MODEL_DIM": "33"}, "MODEL_DIM=33 is not divisible by NUM_HEADS=2"),
    "world without rank": ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2"),
    "rank": ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK=first"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_every_mistake_is_one_line_and_exit_code_2(one, inside, tmp_path, monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "file").write_text("just text")
    places = {"{file}": str(tmp_path / "file"), "{checkpoint}": str(one[1] / "run.checkpoint")}
    variables, complaint = MISTAKES[name]
    for place, path in places.items():
        variables = {key: text.replace(place, path) for key, text in variables.items()}
        complaint = complaint.replace(place, path)
    code, out, err = inside(**variables)
    assert code == 2 and "Traceback" not in out + err and "result {" not in out
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n") and complaint in err
    log = tmp_path / "logs" / "run.txt"
    assert not log.exists() or log.read_text().endswith(err)


def test_a_mistake_ends_all_processes(data, tmp_path):
    """The first that finds it tells it; the launcher's own report follows."""
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    path = folder / "fineweb_train_000001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    done = run(settings(folder, tmp_path / "logs"), torchrun(2))
    assert done.returncode != 0 and 'train_gpt.py", line' not in done.stderr
    assert re.search(rf"^(rank 1: )?error: {path}: .*truncated", done.stderr, re.M)


def test_the_command_line_passes_the_exit_code_on(data, tmp_path):
    done = run(settings(data, tmp_path / "logs", COMPILE="1"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr == "error: COMPILE=1: needs CUDA, this is cpu; use COMPILE=auto\n"


def test_out_of_memory_names_the_variable(inside, monkeypatch):
    def forward(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(train_gpt.GPT, "forward", forward)
    code, _, err = inside()
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: out of memory (CUDA out of memory.")
    assert "lower MICRO_BATCH_TOKENS" in err
