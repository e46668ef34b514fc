"""Small texts, models and runs of test-time training. As a program: worlds of two and of three processes run them."""
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import program
import torch
import torch.distributed as dist
from helpers import QuietLog, randomize, single_world, tiny_config

import train_gpt
from train_gpt import BOS, GPT, Config, Dataset, Evaluator, TestTimeTrainer, World, document_bounds

SEQ_LEN, VOCAB = 32, 64
LENGTHS = (9, 1, 100, 40, 1, 33, 150, 16, 2, 64)  # targets of documents: one is longer than rows, two are single tokens
# what several ranks must do as one does, and the text for it
RUN_LENGTHS = (9, 1, 70, 40, 33, 16, 5)
RUNS: dict[str, dict[str, Any]] = {
    "documents": {},
    "phases": {"phased_ttt_num_phases": 2, "phased_ttt_prefix_docs": 4},
    "sgd": {"ttt_strategy": "stream", "ttt_optimizer": "sgd", "global_ttt_epochs": 2},
    "adamw": {"ttt_strategy": "stream", "global_ttt_chunk_tokens": 0, "ttt_freeze_blocks": 1}}


def adapt_config(**changes) -> Config:
    """Settings whose adaptation moves the nats of a tiny model by whole percents."""
    return tiny_config(**{
        "eval_mode": "adapted", "eval_seq_len": SEQ_LEN, "eval_stride": 8, "val_batch_tokens": 128, "ttt_batch_size": 4,
        "ttt_chunk_size": 16, "ttt_back_tokens": 5, "ttt_lora_rank": 4, "ttt_lora_alpha": 6.0, "ttt_lora_lr": 0.01,
        "phased_ttt_num_phases": 0, "global_ttt_lr": 0.005, "global_ttt_chunk_tokens": 96} | changes)


def make_text(lengths=LENGTHS, seed: int = 0) -> Dataset:
    """Documents of so many targets; every token depends on the one before it, in a way of the document's own."""
    random, tokens = np.random.default_rng(seed), []
    for length in lengths:
        tokens.append(BOS)
        token, step = int(random.integers(2, VOCAB)), int(random.integers(1, 20))
        for _ in range(length - 1):
            tokens.append(token)
            token = 2 + (token + step + int(random.integers(0, 2))) % (VOCAB - 2)
    val = np.array([*tokens, 5], np.uint16)
    return Dataset(None, val, np.where(val[1:] == BOS, 0, 1 + val[1:].astype(np.int64) % 5), "", "", 0, 0)


def perturbed(text: Dataset, place: int) -> Dataset:
    """The text with another token in that place; no document begins or ends elsewhere."""
    tokens = text.val_tokens.copy()
    assert tokens[place] != BOS
    tokens[place] = 2 + (int(tokens[place]) - 1) % (VOCAB - 2)
    return replace(text, val_tokens=tokens)


def make_model(config: Config, seed: int = 3, dtype: torch.dtype = torch.float32) -> GPT:
    """With loops, if it has any, and no weight that is zero."""
    model = GPT(config, dtype)
    model.init_weights(0)
    randomize(model, seed)
    model.looping = bool(config.num_loops)
    return model.eval()


def make_learner(config: Config, text: Dataset, world: World | None = None, model: GPT | None = None,
                 started: float | None = None, kind: type = TestTimeTrainer) -> TestTimeTrainer:
    evaluator = Evaluator(config, world or single_world(), QuietLog(), text, False)
    started = train_gpt.time.perf_counter() if started is None else started
    return kind(config, evaluator, model or make_model(config), started)


def adapted_nats(config: Config, text: Dataset, **options) -> np.ndarray:
    """Nats of every target, by a model that is made anew."""
    return make_learner(config, text, **options).run().nats


def bounds_of(text: Dataset) -> list[tuple[int, int]]:
    """(first target, last + 1) of every document."""
    bounds = document_bounds(text.val_tokens[:-1]).tolist()
    return list(zip(bounds, bounds[1:]))


def run_rank(folder: Path, environ: dict[str, str]) -> None:
    """Every run as one rank, as torchrun starts it; writes what this rank scored."""
    os.environ.update(environ)
    config, text = adapt_config(), make_text(RUN_LENGTHS)
    world = World.start(replace(config, device="cpu", train_batch_tokens=6 * config.micro_batch_tokens), environ)
    for name, changes in RUNS.items():
        ledger = make_learner(replace(config, **changes), text, world).run()
        times, score = ledger.times.copy(), ledger.score(world)
        np.savez(folder / f"{name}_{world.rank}_of_{world.size}", nats=ledger.nats, times=times,
                 total=[score.nats, score.tokens, score.bytes])
    config = replace(config, **RUNS["phases"])
    found = train_gpt.audit(config, make_learner(config, text, world).evaluator, lambda: make_model(config))
    (folder / f"audit_{world.rank}_of_{world.size}").write_text(json.dumps(found))
    dist.destroy_process_group()


def main(folder: Path) -> int:
    """Forks the ranks: they need not import anything again."""
    torch.set_num_threads(1)
    make_learner(adapt_config(), make_text((1,))).slots_for(1, 1)  # optimizers import half of torch, once
    failed = False
    for size in (2, 3):
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(program.free_port()), "WORLD_SIZE": str(size)}
        context = torch.multiprocessing.get_context("fork")
        ranks = [context.Process(target=run_rank, args=(folder, {"RANK": str(rank), "LOCAL_RANK": "0", **common}))
                 for rank in range(size)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        failed = failed or any(rank.exitcode for rank in ranks)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(Path(os.environ["RESULTS"])))
