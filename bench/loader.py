"""Measures how many tokens a second the training loader makes of a dataset on this machine's cores, order by order.

    DATA_PATH=data/datasets/mine VOCAB_SIZE=4096 python bench/loader.py --seconds 5

Takes the same environment variables as train_gpt.py, and no model: micro-batches are taken as fast as they come, or,
with --step-ms 75, each after a pause as long as a GPU computes: then "slowest" is the longest that a step waits for
one. The first round over the shards reads them from the disk. A step of 786,432 tokens in 120 ms takes 6.6 M tokens a
second.
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


def tokens_a_second(config: Config, world: World, stream: TokenStream, seconds: float,
                    pause: float) -> tuple[float, float]:
    """-> (tokens of this rank in a second of waiting, seconds of the slowest micro-batch), after the first one.

    For `seconds`; before each micro-batch the caller is busy with something else for `pause` seconds.
    """
    loader, count, slowest, waited = TrainLoader(config, world, stream), 0, 0.0, 0.0
    loader.micro(0, config.train_seq_len)
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        count += 1
        time.sleep(pause)
        before = time.perf_counter()
        loader.micro(count, config.train_seq_len)
        taken = time.perf_counter() - before
        slowest, waited = max(slowest, taken), waited + taken
    loader.close()
    return count * config.micro_batch_tokens / waited, slowest


def report(config: Config, world: World, seconds: float, pause: float) -> None:
    """Prints the table."""
    folder = train_gpt.resolve_path(config.data_path or
                                    f"{config.data_dir}/datasets/fineweb10B_sp{config.vocab_size}")
    stream = TokenStream(train_gpt.find_shards(Path(folder))[0])
    rows = []
    for order in train_gpt.CHOICES["train_order"]:
        rate, slowest = tokens_a_second(replace(config, train_order=order), world, stream, seconds, pause)
        rows.append([order, f"{rate / 1e6:.1f}", f"{1e3 * config.micro_batch_tokens / rate:.2f}",
                     f"{1e3 * slowest:.2f}"])
    print(f"{folder}: {len(stream):,} training tokens in {len(stream.shards)} shards, micro-batches of "
          f"{config.micro_batch_tokens:,} tokens on {world.describe()}")
    print(table(["order", "M tokens/s", "ms a micro-batch", "slowest"], rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line -> exit code: 0 done, 2 a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of measuring each order (default 5)")
    parser.add_argument("--step-ms", type=float, default=0.0, help="pause before each micro-batch (default 0)")
    options = parser.parse_args(arguments)
    return speed.with_settings(lambda config, world: report(config, world, options.seconds, options.step_ms / 1000))


if __name__ == "__main__":
    sys.exit(main())
