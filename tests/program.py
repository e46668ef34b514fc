"""Small data, small settings, and ways to run the program: shared by test_train, test_program and test_golden."""
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import train_gpt

ROOT = Path(train_gpt.__file__).resolve().parent
SCRIPT = ROOT / "train_gpt.py"
VOCAB = 64
SETTINGS = {  # a whole run takes less than a second after the imports
    "VOCAB_SIZE": VOCAB, "NUM_LAYERS": 4, "MODEL_DIM": 32, "NUM_HEADS": 2, "NUM_KV_HEADS": 1, "MLP_MULT": 2,
    "ROPE_DIMS": 8, "XSA_LAST_N": 2, "PARALLEL_START_LAYER": 3, "LOOP_START": 1, "LOOP_END": 1, "NUM_LOOPS": 1,
    "TRAIN_SEQ_LEN": 64, "TRAIN_BATCH_TOKENS": 512, "MICRO_BATCH_TOKENS": 128, "EVAL_SEQ_LEN": 64, "EVAL_STRIDE": 16,
    "ITERATIONS": 8, "MAX_WALLCLOCK_SECONDS": 0, "TRAIN_LOG_EVERY": 1, "DEVICE": "cpu", "COMPRESSOR": "zstd",
    "NGRAM_ORDER": 0, "EVAL_MODE": "sliding"}


def make_tokens(seed: int, count: int) -> np.ndarray:
    """Documents of 10 to 200 tokens in which the next token depends on the one before."""
    random, tokens = np.random.default_rng(seed), []
    while len(tokens) < count:
        token = int(random.integers(2, VOCAB))
        tokens.append(train_gpt.BOS)
        for _ in range(int(random.integers(10, 200))):
            tokens.append(token)
            token = 2 + (5 * token + int(random.integers(0, 4))) % (VOCAB - 2)
    return np.array(tokens[:count])


def write_tokens(path: Path, tokens: np.ndarray) -> None:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())


def write_data(folder: Path, seed: int = 0) -> Path:
    """Two training shards, one validation shard, and a byte sidecar, so that no tokenizer is needed."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(2):
        write_tokens(folder / f"fineweb_train_{i:06}.bin", make_tokens(10 * seed + i, 5000))
    val = make_tokens(10 * seed + 2, 1500)
    write_tokens(folder / "fineweb_val_000000.bin", val)
    write_tokens(folder / "fineweb_val_bytes_000000.bin", np.where(val == train_gpt.BOS, 0, 1 + val % 5))
    return folder


def settings(data: Path, logs: Path, **changes) -> dict[str, str]:
    """The variables of a small run."""
    return {name: str(value) for name, value in
            {**SETTINGS, "DATA_PATH": data, "LOG_DIR": logs, "RUN_ID": "run", **changes}.items()}


def environment(variables: dict[str, str]) -> dict[str, str]:
    """A clean environment for a subprocess, with one thread."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LANG") if name in os.environ}
    return {**kept, "OMP_NUM_THREADS": "1", **variables}


def torchrun(processes: int, *options: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *(options or ("--standalone",)),
            f"--nproc_per_node={processes}"]


@contextlib.contextmanager
def started(variables: dict[str, str], command=(sys.executable,), script: Path = SCRIPT, cwd: Path = ROOT):
    """The program as a process of its own process group, which is gone afterwards; stdout and stderr are pipes."""
    process = subprocess.Popen([*command, str(script)], cwd=cwd, env=environment(variables), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def run(variables: dict[str, str], command=(sys.executable,), script: Path = SCRIPT, cwd: Path = ROOT, timeout=120):
    """Runs the program to its end -> a finished process with returncode, stdout, stderr."""
    with started(variables, command, script, cwd) as process:
        stdout, stderr = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def result_of(output: str) -> dict:
    """The result line, which is the last one."""
    last = output.splitlines()[-1]
    assert last.startswith("result {"), last
    return json.loads(last.removeprefix("result "))


def step_losses(output: str) -> list[float]:
    """Training losses by step."""
    lines = [line.split() for line in output.splitlines() if line.startswith("step:") and " train_loss:" in line]
    return [float(words[1].removeprefix("train_loss:")) for words in lines]


def wait_for_line(process: subprocess.Popen, start: str) -> list[str]:
    """Reads the output up to a line that begins so -> the lines so far. An end of the output is a failure."""
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if line.startswith(start):
            return lines
    raise AssertionError(f"no line {start!r} in {lines}: {process.stderr.read()}")


def wait_until(condition, seconds: float = 60.0) -> None:
    """Waits for a condition; AssertionError when time is up."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "time is up"
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
