"""Measures n-gram smoothing: how fast contexts are counted, how many targets have one, what it gains.

    python bench/ngram.py data/datasets/mine/fineweb_val_*.bin --max-tokens 1000000
    python bench/ngram.py fineweb_val_000000.bin --nats nats.npy --bytes 3081622

--nats: a NumPy file of a model's nats for each token but the first; then each row tells what all orders up to it gain.
--bytes: the size of the text, for bits per byte. One thread; seconds are the process's own.
"""
import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from run_log import table

import train_gpt
from train_gpt import NGRAM_ORDERS, UserError, ngram_counts, smoothed


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line -> exit code: 0 done, 2 a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", type=Path)
    parser.add_argument("--max-tokens", type=int, default=None, help="from the start of the shards (default all)")
    parser.add_argument("--orders", default=",".join(map(str, NGRAM_ORDERS)), help="rising, separated by commas")
    parser.add_argument("--nats", type=Path)
    parser.add_argument("--bytes", type=int, default=0, help="of the text (default: a byte a token)")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    try:
        tokens = np.concatenate([train_gpt.read_shard(path) for path in sorted(options.shards)])[:options.max_tokens]
        with train_gpt.refusing((OSError, ValueError), f"--nats {options.nats}: {{}}"):
            nats = torch.from_numpy(np.load(options.nats).astype(np.float64)) if options.nats else None
        train_gpt.require(nats is None or len(nats) == len(tokens) - 1,
                          f"--nats {options.nats}: does not hold a number for each of {len(tokens) - 1:,} targets")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows, text = [], torch.from_numpy(tokens.astype(np.int64)).to(options.device)
    nats = nats if nats is None else nats.to(options.device)
    before, start = nats.sum().item() if nats is not None else 0.0, time.process_time()
    for order, at, *counts in ngram_counts(text, [int(x) for x in options.orders.split(",")]):
        there, gain = int((counts[0] > 0).sum()), ""
        seconds = time.process_time() - start
        if nats is not None:
            nats[at - 1] = smoothed(nats[at - 1], order, *counts)
            gain = f"{(before - nats.sum().item()) / math.log(2) / (options.bytes or len(tokens)):.5f}"
        rows.append([str(order), f"{there:,}", f"{seconds:.2f}", gain])
    torch.set_num_threads(threads)
    print(f"{len(tokens):,} tokens, {len(tokens) / (time.process_time() - start) / 1e6:.1f} M tokens/s in all")
    print(table(["order", "targets with counts", "seconds so far", "bits per byte gained"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
