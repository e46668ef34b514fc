"""Measures how many tokens a second the training loader makes of a dataset on this machine's cores, order by order.

    DATA_PATH=data/datasets/mine VOCAB_SIZE=4096 python bench/loader.py --seconds 5

Takes the same environment variables as train_gpt.py, and no model: micro-batches are taken as fast as they come. The
first round over the shards reads them from the disk. A step of 786,432 tokens in 120 ms takes 6.6 M tokens a second.
"""
import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import speed
from run_log import table

import train_gpt
from train_gpt import Config, TokenStream, TrainLoader, World


def tokens_a_second(config: Config, world: World, stream: TokenStream, seconds: float) -> tuple[float, float]:
    """-> (tokens a second of this rank, seconds of the slowest micro-batch) over `seconds`, after the first one."""
    loader, count, slowest = TrainLoader(config, world, stream, 0), 0, 0.0
    loader.micro(0, config.train_seq_len)
    start = now = time.perf_counter()
    while now - start < seconds:
        count += 1
        loader.micro(count, config.train_seq_len)
        before, now = now, time.perf_counter()
        slowest = max(slowest, now - before)
    loader.close()
    return count * config.micro_batch_tokens / (now - start), slowest


def report(config: Config, world: World, seconds: float) -> None:
    """Prints the table."""
    folder = train_gpt.resolve_path(config.data_path or
                                    f"{config.data_dir}/datasets/fineweb10B_sp{config.vocab_size}")
    stream = TokenStream(train_gpt.find_shards(Path(folder))[0])
    rows = []
    for order in train_gpt.CHOICES["train_order"]:
        rate, slowest = tokens_a_second(replace(config, train_order=order), world, stream, seconds)
        rows.append([order, f"{rate / 1e6:.1f}", f"{1e3 * config.micro_batch_tokens / rate:.2f}",
                     f"{1e3 * slowest:.2f}"])
    print(f"{folder}: {len(stream):,} training tokens in {len(stream.shards)} shards, micro-batches of "
          f"{config.micro_batch_tokens:,} tokens on {world.describe()}")
    print(table(["order", "M tokens/s", "ms a micro-batch", "slowest"], rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line -> exit code: 0 done, 2 a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of measuring each order (default 5)")
    seconds = parser.parse_args(arguments).seconds
    return speed.with_settings(lambda config, world: report(config, world, seconds))


if __name__ == "__main__":
    sys.exit(main())
