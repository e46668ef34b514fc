"""Small things that many tests need. Whole programs: program.py; slow versions of the model: reference.py."""
from pathlib import Path

import numpy as np
import program
import torch

from train_gpt import BOS, GPT, Config, Segments, World, cut_segments, make_segments


def tiny_config(**changes) -> Config:
    """All features of the model, in four layers of width 32."""
    base = {"vocab_size": 64, "num_layers": 4, "model_dim": 32, "num_heads": 2, "num_kv_heads": 1, "mlp_mult": 2.0,
            "rope_dims": 8, "xsa_last_n": 2, "parallel_start_layer": 3, "loop_start": 1, "loop_end": 1, "num_loops": 1,
            "train_seq_len": 64, "train_batch_tokens": 512, "micro_batch_tokens": 128, "eval_seq_len": 64,
            "eval_stride": 16, "ngram_order": 0, "eval_mode": "sliding", "softcap_type": "tanh"}
    return Config(**(base | changes))


def tiny_environment(folder: Path, **changes) -> dict[str, str]:
    """The variables of a run of that model on the data in `folder`, which also takes the logs."""
    return program.settings(folder, folder / "logs", **{name.upper(): value for name, value in changes.items()})


def watch_steps(trainer, before=None, after=None) -> None:
    """Keeps the losses of steps in .losses and the micro-batches in .batches; before and after get the trainer."""
    original, trainer.losses = trainer.train_step, []

    def train_step(micro_batches, progress):
        trainer.batches = micro_batches
        if before:
            before(trainer)
        loss = original(micro_batches, progress)
        trainer.losses.append(loss.item())
        if after:
            after(trainer)
        return loss
    trainer.train_step = train_step


class QuietLog:
    """Keeps what was logged."""

    def __init__(self):
        self.lines: list[str] = []

    def __call__(self, text: str, to_terminal: bool = True) -> None:
        self.lines.append(text)

    def progress(self, text: str) -> None:
        pass


def single_world() -> World:
    return World(0, 1, torch.device("cpu"), torch.float32)


def tiny_dataset(folder: Path) -> Path:
    return program.write_data(folder)


def write_shard(path: Path, tokens) -> None:
    program.write_tokens(path, np.asarray(tokens))


def random_segments(random: np.random.Generator, total: int, seq_len: int) -> Segments:
    """Cuts at random places, none further apart than seq_len; sometimes with empty segments behind them."""
    starts = [0]
    while (start := starts[-1] + int(random.integers(1, seq_len + 1))) < total:
        starts.append(start)
    return make_segments(np.array(starts), total, seq_len, int(random.choice([0, len(starts), len(starts) + 5])))


@torch.no_grad()
def randomize(model: GPT, seed: int) -> None:
    """Moves every weight away from its initial value, so that none is zero and no two are equal."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def random_batch(seed: int, total: int, seq_len: int, vocab_size: int = 64, num_segments: int = 0) \
        -> tuple[torch.Tensor, torch.Tensor, Segments]:
    """Tokens with a few documents -> (ids (1, T), targets (1, T), segments)."""
    random = np.random.default_rng(seed)
    ids = random.integers(2, vocab_size, total + 1)
    ids[random.random(total + 1) < 0.05] = BOS
    segments = make_segments(cut_segments(ids[:-1], seq_len, True), total, seq_len, num_segments)
    return torch.from_numpy(ids[None, :-1].copy()), torch.from_numpy(ids[None, 1:].copy()), segments
