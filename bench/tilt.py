"""Measures the n-gram tilt: how fast hints are found, how many targets have one, how often it is right, what it gains.

    python bench/tilt.py data/datasets/mine/fineweb_val_*.bin --max-tokens 1000000
    python bench/tilt.py data/datasets/stdlib/fineweb_val_*.bin --artifact logs/demo.artifact --seq-len 256

With an artifact, its model scores the windows that hold a hint, once with the targets and once with the hints in their
place (the forms that are compared with ours need p(hint), too). --bytes is the size of the text (here 1217841).
"""
import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from summary import table

import train_gpt
from train_gpt import GPT, UserError, World, ngram_hints

BOOST, THRESHOLD = 2.625, 0.8  # of PR #2135


def forms(nats: np.ndarray, hint_nats: np.ndarray, hints: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    """Name -> nats (n,) of each way to use hints (3, n) that are there: count and seen are above 0."""
    q, hit, reliability = np.exp(-hint_nats), targets == hints[0], hints[1] / hints[2]

    def raised(rho: np.ndarray) -> np.ndarray:
        """p(hint) is at least rho, the others share the rest as before."""
        others = nats + np.log1p(-np.minimum(q, rho)) - np.log1p(-rho)
        return np.where(hit, np.minimum(nats, -np.log(rho)), others)
    boosted = nats - BOOST * hit + np.log1p(q * np.expm1(BOOST))
    return {"published: boost e^2.625": np.where(reliability >= THRESHOLD, boosted, nats),
            "boost where p(hint) < 0.8": np.where((reliability >= THRESHOLD) & (q < 0.8), boosted, nats),
            "boost, seen twice": np.where((reliability >= THRESHOLD) & (hints[2] > 1), boosted, nats),
            "at least (count + 1/2) / (seen + 3/2)": raised((hints[1] + 0.5) / (hints[2] + 1.5)),
            "at least count / (seen + 1)": raised(hints[1] / (hints[2] + 1)),
            "mixture, count / (seen + 2): train_gpt.tilt": train_gpt.tilt(nats, hints, targets)}


def load_model(path: Path, seq_len: int) -> tuple[GPT, bool]:
    """Artifact -> its model on this machine's device, for windows of seq_len tokens; whether they stay in documents."""
    header, weights = train_gpt.read_artifact(path)
    config = replace(train_gpt.artifact_config(header), eval_seq_len=seq_len)
    world = World.start(config, {})
    model = GPT(config, world.dtype)
    model.load_state_dict(weights)
    model.to(world.device).eval().looping = header["looping"]
    return model, config.document_mask


@torch.no_grad()
def score_hints(model: GPT, document_mask: bool, tokens: np.ndarray, hints: np.ndarray, stride: int,
                batch_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """-> nats of the targets and of their hints (n - 1,); both NaN in windows that score no hint."""
    seq_len, world = model.config.eval_seq_len, World(0, 1, next(model.parameters()).device, model.dtype)
    rows = train_gpt.score_windows(tokens[:-1], seq_len, stride, document_mask)
    before = np.append(0, np.cumsum(hints[2] > 0))
    rows = rows[before[rows[:, 1]] > before[rows[:, 2]]]
    out = np.full((2, len(tokens) - 1), np.nan)
    text = train_gpt.Dataset(train_gpt.TokenStream([]), tokens, np.zeros(len(tokens) - 1, np.int64), "", "", 0, 0)
    silent = train_gpt.Log(replace(world, rank=1), model.config)
    evaluator = train_gpt.Evaluator(model.config, world, silent, text, False)
    for group in train_gpt.batch_windows(rows, max(batch_tokens, seq_len)):
        batch, place = evaluator.build(group)
        scored, told = place >= 0, torch.from_numpy(hints[0][place].astype(np.int64))[None]
        for row, targets in zip(out, (batch.targets, told)):
            nats = model(*train_gpt.to_device(batch._replace(targets=targets), world.device)).cpu().double().numpy()
            row[place[scored]] = nats[scored]
    return out[0], out[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line -> exit code: 0 done, 2 a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", type=Path)
    parser.add_argument("--max-tokens", type=int, default=None, help="from the start of the shards (default all)")
    parser.add_argument("--orders", default="16", help="separated by commas (default 16: contexts of 15 tokens)")
    parser.add_argument("--artifact", type=Path)
    parser.add_argument("--seq-len", type=int, default=2048, help="of the windows (default 2048)")
    parser.add_argument("--stride", type=int, default=64)
    parser.add_argument("--batch-tokens", type=int, default=2048, help="scored at once (default 2048)")
    parser.add_argument("--bytes", type=int, default=0, help="of the text, for bits per byte (default: a byte a token)")
    options = parser.parse_args(arguments)
    try:
        tokens = np.concatenate([train_gpt.read_shard(path) for path in sorted(options.shards)])[:options.max_tokens]
        model, document_mask = load_model(options.artifact, options.seq_len) if options.artifact else (None, True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows, gains = [], []
    for order in map(int, options.orders.split(",")):
        start = time.process_time()
        hints = ngram_hints(tokens, order)
        seconds, there = time.process_time() - start, hints[2] > 0
        hit, sure = hints[0] == tokens[1:], there & (hints[1] >= THRESHOLD * hints[2])
        rows.append([str(order), f"{len(tokens) / seconds / 1e6:.1f}", f"{seconds:.2f}", f"{there.sum():,}",
                     f"{hit[there].mean():.3f}", f"{sure.sum():,}", f"{hit[sure].mean():.3f}"])
        if model:
            both = score_hints(model, document_mask, tokens, hints, options.stride, options.batch_tokens)
            nats, hint_nats, told, targets = both[0][there], both[1][there], hints[:, there], tokens[1:][there]
            for name, tilted in forms(nats, hint_nats, told, targets).items():
                gain = float((nats - tilted).sum())
                gains.append([str(order), name, f"{gain:,.1f}", f"{gain / len(nats):.3f}",
                              f"{gain / math.log(2) / (options.bytes or len(tokens)):.5f}"])
    print(f"{len(tokens):,} tokens; fires: count / seen >= {THRESHOLD}")
    print(table(["order", "M tokens/s", "seconds of a core", "hints", "right", "fires", "right"], rows))
    if gains:
        unit = "bits per byte" if options.bytes else "bits a token"
        print(table(["order", "form", "nats gained", "a hint", unit], gains))
    return 0


if __name__ == "__main__":
    sys.exit(main())
