"""Logs as train_gpt.py and the published scripts write them, made up, for the tests of the tools that read them."""
import hashlib
import json
import math
import platform
from pathlib import Path

PROGRAM = '''"""A program for tests: it has what the tools ask train_gpt.py for, and does nothing."""
import json
import os
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Config:
    """Settings."""

    run_id: str = ""
    seed: int = 1337
    log_dir: str = "logs"
    data_path: str = ""
    tokenizer_path: str = ""
    vocab_size: int = 8192
    model_dim: int = 512
    num_heads: int = 8
    mlp_mult: float = 4.0
    iterations: int = 20000
    matrix_lr: float = 0.026
    train_batch_tokens: int = 786432
    train_log_every: int = 10
    batch_schedule: str = ""
    resume: str = ""
    audit: bool = True
    val_docs: int = 0
    ngram_order: int = 0
    ttt_unsafe_multi_epoch: int = 0
    xsa_last_n: int = 11
    tied: bool = True

    @classmethod
    def from_env(cls, environ):
        """-> (Config, notes)."""
        kinds = {f.name.upper(): f for f in fields(cls)}
        return cls(**{kinds[name].name: kinds[name].type(text) for name, text in environ.items() if name in kinds}), []


if __name__ == "__main__":
    print("result " + json.dumps({"steps": int(os.environ["ITERATIONS"]), "val_bpb": 2.5}))
'''
CODE_BYTES = 5000  # that a run of the readable program counts
SETTINGS = {"run_id": "", "seed": 1337, "log_dir": "logs", "data_path": "", "tokenizer_path": "", "vocab_size": 8192,
            "model_dim": 512, "num_heads": 8, "mlp_mult": 4.0, "iterations": 20000, "matrix_lr": 0.026,
            "train_batch_tokens": 786432, "train_log_every": 10, "batch_schedule": "", "resume": "", "audit": True,
            "val_docs": 0, "ngram_order": 0, "ttt_unsafe_multi_epoch": 0, "xsa_last_n": 11, "tied": True}
TOKENS, BYTES = 50_360_000, 151_080_000  # of the validation text; about what the challenge's has
PER_NAT = TOKENS / BYTES / math.log(2)
AUDIT = {"scored_targets": TOKENS, "targets": TOKENS, "scored_bytes": BYTES, "leaked_documents": 0, "in_time": True,
         "noise_nats": 0.0, "change_before_nats": 0.0, "causal": True, "probability_error": 1e-06}
H100 = "NVIDIA H100 80GB HBM3 (compute capability (9, 0))"


def stage_sums(bpb: float, tokens: int = TOKENS, count_bytes: int = BYTES) -> dict:
    """A stage of the result as report_result writes it."""
    nats = bpb * math.log(2) * count_bytes
    return {"nats": nats, "tokens": tokens, "bytes": count_bytes, "seconds": 12.5, "val_loss": nats / tokens,
            "val_bpb": nats / math.log(2) / count_bytes}


def our_log(seed: int, bpb: float = 1.06, source: str = PROGRAM, settings: dict | None = None, steps: int = 100,
            result: dict | None = None, text: tuple[int, int] = (TOKENS, BYTES)) -> str:
    """A log of train_gpt.py: source, readable or packed, settings, events, result; `result` replaces some of it.

    text: tokens and bytes of the validation text.
    """
    settings = SETTINGS | {"run_id": f"new_seed{seed}", "seed": seed, "matrix_lr": 0.03} | (settings or {})
    stages = {name: stage_sums(bpb + extra, *text) for name, extra in
              (("raw", 0.02), ("averaged", 0.01), ("quantized", 0.013), ("sliding", 0.0))}
    packed = source.startswith("#coding:latin1\n")
    sha256 = hashlib.sha256(source.encode("latin1" if packed else "utf8")).hexdigest()
    code = len(source) if packed else CODE_BYTES
    lines = ["=" * 100, *(f"{name}:{value}" for name, value in settings.items()),
             f"train_gpt:0.1.0 python:{platform.python_version()} torch:2.11.0+cu130 numpy:2.0.0 "
             f"source_sha256:{sha256[:16]}",
             f"run_id:{settings['run_id']} device:{H100} world_size:8 dtype:bfloat16",
             f"train_shards:80 train_tokens:8000000000 val_documents:50000 val_tokens:{text[0] + 1} "
             f"val_bytes:{text[1]} leaked_documents:0", f"data_fingerprint:{'ab' * 32}",
             "num_params:35945623 attention:fa4 compile:parts kernels:leaky2 accumulation_steps:1",
             "compile_warmup seconds:100.5"]
    for step in range(10, steps + 1, 10):
        loss, time = stages["raw"]["val_loss"] + 20 / step - 20 / steps, f"train_time:{step * 5900}ms"
        lines.append(f"step:{step}/20000 train_loss:{loss + seed % 7 / 10 / step:.4f} {time} step_avg:5900.00ms "
                     "lr_multiplier:1.000 looping:0")
        if step % 20 == 0:
            lines.append(f"step:{step}/20000 val_loss:{loss:.4f} val_bpb:1.5000 {time} paused_seconds:0.1")
    seconds = steps * 5.9 + 0.125
    lines += [f"stopping_early: wallclock_cap train_time:{seconds * 1000:.0f}ms step:{steps}/20000",
              f"peak_memory:40000MiB steps:{steps} train_seconds:{seconds:.3f}"]
    model = 15_900_000 + seed
    facts = {
        "version": "0.1.0", "run_id": settings["run_id"], "seed": seed, "world_size": 8, "device": H100,
        "torch": "2.11.0+cu130", "data_fingerprint": "ab" * 32,
        "overrides": {name.upper(): value for name, value in settings.items() if value != SETTINGS[name]},
        "steps": steps, "train_tokens": steps * 786432, "train_seconds": round(seconds, 3), "num_params": 35945623,
        "peak_memory_bytes": 42_000_000_000, "stages": stages, "official_stage": "sliding",
        "val_loss": stages["sliding"]["val_loss"], "val_bpb": stages["sliding"]["val_bpb"], "compile_seconds": 100.5,
        "calibration_seconds": 4.25, "eval_seconds": 300.5, "artifact_bytes": model, "code_bytes": code,
        "submission_bytes": model + code, "source_sha256": sha256, "headroom_bytes": 16_000_000 - model - code,
        "fits": model + code <= 16_000_000, "legal": True,
        "audit": AUDIT | {"scored_targets": text[0], "targets": text[0], "scored_bytes": text[1]}} | (result or {})
    stage_lines = [f"final_{name}_exact val_loss:{s['val_loss']:.8f} val_bpb:{s['val_bpb']:.8f} eval_time:12500ms"
                   for name, s in facts["stages"].items()]
    lines += [*stage_lines[:2], f"calibration tokens:131072 temperature:1.0 seconds:{facts['calibration_seconds']:.3f}",
              *stage_lines[2:],
              f"artifact_bytes:{facts['artifact_bytes']} code_bytes:{facts['code_bytes']} "
              f"submission_bytes:{facts['submission_bytes']} limit_bytes:16000000 fits:{int(facts['fits'])}",
              "result " + json.dumps(facts)]
    return source + "\n" + "\n".join(lines) + "\n"


def write_logs(folder: Path, scores: dict[int, float], name: str = "new", **changes) -> list[Path]:
    """{seed: bits per byte} -> log files."""
    folder.mkdir(parents=True, exist_ok=True)
    settings, paths = changes.pop("settings", {}), []
    for seed, bpb in scores.items():
        path = folder / f"{name}_seed{seed}.txt"
        path.write_text(our_log(seed, bpb, settings={"run_id": path.stem} | settings, **changes))
        paths.append(path)
    return paths


# What the script of PR #1855 writes, cut to the lines that tell something; numbers of its seed 42.
PHASED_LOG = """{line}
Hyperparameters:
  ema_decay: 0.9965
  logfile: logs/run{seed}.txt
  run_id: run{seed}
  seed: {seed}
  vocab_size: 8192
  world_size: 8
train_shards: 80
val_tokens: 47851520
model_params:35945671
1/20000 train_loss: 9.0087 train_time: 0.0m tok/s: 17921784
500/20000 train_loss: 2.5615 train_time: 0.8m tok/s: 8217810
4500/20000 train_loss: 2.2771 train_time: 9.0m tok/s: 6589668
4945/20000 val_loss: 2.3539 val_bpb: 1.0756
stopping_early: wallclock_cap train_time: {milliseconds}ms step: 4945/20000
peak memory allocated: 41717 MiB reserved: 47140 MiB
diagnostic pre-quantization post-ema val_loss:2.32848665 val_bpb:1.06395844 eval_time:6718ms
Serialized model: 135417533 bytes
Code size (uncompressed): 157868 bytes
Code size (compressed): 31999 bytes
GPTQ:collected 67 Hessians in 4.7s
Serialized model quantized+pergroup: 15865260 bytes
Total submission size quantized+pergroup: {total} bytes
diagnostic quantized val_loss:2.34727563 val_bpb:1.07254371 eval_time:49995ms
quantized_ttt_phased val_loss:{loss} val_bpb:{bpb} eval_time:508805ms
total_eval_time:508.8s
"""
# What the baseline's script writes: the source first.
BASELINE_LOG = """print("step:9/9 train_loss:1.0000 train_time:9ms step_avg:9.00ms")
{line}
Running Python 3.12.3
{line}
val_loader:shards pattern=./data/datasets/fineweb10B_sp1024/fineweb_val_*.bin tokens:62021632
seed:1337
step:1/20000 train_loss:6.9370 train_time:45ms step_avg:45.02ms
step:13780/20000 train_loss:2.0500 train_time:600000ms step_avg:43.54ms
step:13780/20000 val_loss:2.0606 val_bpb:1.2172 train_time:600038ms step_avg:43.54ms
stopping_early: wallclock_cap train_time:600038ms step:13780/20000
Serialized model: 67224983 bytes
Code size: 47642 bytes
Total submission size: 67272625 bytes
Serialized model int8+zlib: 15815847 bytes (payload:17178912 raw_torch:17224025 payload_ratio:3.91x)
Total submission size int8+zlib: 15863489 bytes
final_int8_zlib_roundtrip val_loss:2.0727 val_bpb:1.2244 eval_time:1401ms
final_int8_zlib_roundtrip_exact val_loss:2.07269931 val_bpb:1.22436570
"""


def phased_log(seed: int = 42, loss: str = "2.31944212", bpb: str = "1.05989454", total: int = 15897259,
               milliseconds: int = 599592) -> str:
    return PHASED_LOG.format(line="=" * 100, seed=seed, loss=loss, bpb=bpb, total=total, milliseconds=milliseconds)


def baseline_log() -> str:
    return BASELINE_LOG.format(line="=" * 100)
