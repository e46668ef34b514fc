"""Golden numbers: what a small model learns in three steps, and what is left of it after quantization, float32 on CPU.

A change that should not change numbers must leave them as they are. Where it should, look at the difference, then print
the new ones with `python tests/test_golden.py` and put them below (these are of torch 2.13). The tolerance leaves room
for other torch versions and processors, not for other mathematics.
"""
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from program import settings, write_data  # noqa: E402

import train_gpt  # noqa: E402
from train_gpt import Config, Evaluator, Log, StopRequest, Trainer, World, attention_sdpa  # noqa: E402

TOLERANCE = 1e-3
FAST = {"ENABLE_LOOPING_AT": 0.3, "MATRIX_LR": 0.3, "TIED_EMBED_LR": 0.1, "SCALAR_LR": 0.1, "TIED_EMBED_INIT_STD": 0.2,
        "ADAM_WD": 0.2, "MATRIX_BITS": 5}  # so that three steps show every technique: without one, numbers move by 2e-3
VARIANTS = {  # all techniques of the default; the plainest model
    "default": FAST,
    "plain": {**FAST, "NUM_LOOPS": 0, "PARALLEL_START_LAYER": 0, "SPARSE_ATTN_GATE_SCALE": 0, "SMEAR_GATE_ENABLED": 0,
              "XSA_LAST_N": 0, "SKIP_GATES_ENABLED": 0, "LN_SCALE": 0, "EMA_DECAY": 0, "MUON_ROW_NORMALIZE": 0,
              "MUON_COEFFICIENTS": "quintic", "MATRIX_QUANTIZER": "rtn", "EMBED_QUANTIZER": "rtn", "TARGET_BYTES": 0,
               "LEAKY_RELU_SLOPE": 0, "SOFTCAP_TYPE": "tanh", "DOCUMENT_MASK": 0, "GRAD_CLIP_NORM": 0}}
GOLDEN = {
    "default": {"losses": [6.44254, 4.21268, 3.57662], "quantized": 3.49328, "sliding": 3.4895},
    "plain": {"losses": [6.44254, 4.19693, 3.61685], "quantized": 3.41506, "sliding": 3.40675},
}


def measure(folder: Path, variant: str) -> dict[str, object]:
    """Nats per token: of the three steps, and of the validation text after quantization, packed and sliding."""
    variables = settings(write_data(folder / "data"), folder / "logs", ITERATIONS=3, **VARIANTS[variant])
    config = replace(Config.from_env(variables)[0], data_dir=str(folder))
    world = World(0, 1, torch.device("cpu"), torch.float32)
    log, dataset = Log(world, config), train_gpt.open_dataset(config, world)
    trainer, losses = Trainer(config, world, log, dataset, attention_sdpa, False), []
    check = trainer.check
    trainer.check = lambda finite, what, step: (check(finite, what, step), losses.append(trainer.last_loss))[0]
    trainer.run(StopRequest(), lambda: None)
    trainer.loader.close()
    trainer.use_averages()
    guides, _ = train_gpt.calibrate_on_training_text(config, trainer, dataset)
    data = train_gpt.pack_artifact(config, train_gpt.quantize(config, trainer.params, guides), {})
    _, weights = train_gpt.unpack_artifact(data, "artifact")
    trainer.model.load_state_dict(weights)
    evaluator = Evaluator(config, world, log, dataset, False)
    return {"losses": [round(loss, 5) for loss in losses[:3]],
            "quantized": round(evaluator.score(trainer.model, config.eval_seq_len).val_loss, 5),
            "sliding": round(evaluator.score(trainer.model, config.eval_stride).val_loss, 5)}


def check(tmp_path: Path, variant: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        measured, golden = measure(tmp_path, variant), GOLDEN[variant]
    finally:
        torch.set_num_threads(threads)
    assert measured.keys() == golden.keys() and len(measured["losses"]) == 3
    for name in ("quantized", "sliding"):
        assert abs(measured[name] - golden[name]) < TOLERANCE, (name, measured, golden)
    assert all(abs(a - b) < TOLERANCE for a, b in zip(measured["losses"], golden["losses"])), (measured, golden)


def test_the_default_techniques_give_the_golden_numbers(tmp_path):
    check(tmp_path, "default")


def test_the_plainest_model_gives_the_golden_numbers(tmp_path):
    check(tmp_path, "plain")


if __name__ == "__main__":
    for name in VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            print(f'    "{name}": {measure(Path(folder), name)},', file=sys.stderr)
