"""Prints the results of a finished run as Markdown tables, and how well zlib and xz compress the same validation text.

    python tools/summary.py logs/demo.txt
    python tools/summary.py logs/demo.txt --text-tokenizer data/tokenizers/my.model --data data/datasets/my

Both kinds of numbers are bits per byte of that text. The model's size is not part of them, nor are the compressors'.
"""
import argparse
import itertools
import lzma
import sys
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from run_log import PACKED_FIRST_LINE, Run, ToolError, exit_code, load_program, parse_log, table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
import caseops

COMPRESSORS = {
    "zlib -9": lambda text: zlib.compress(text, 9),
    "xz -9e": lambda text: lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
}


class Compression(NamedTuple):
    """What a compressor makes of the validation text."""

    bpb: float  # bits per byte of the text
    seconds: float


def validation_text(run: Run, folder: Path, tokenizer_path: Path) -> tuple[bytes, bool]:
    """Validation shards -> (all scored text, was it transformed before it was tokenized: there is a byte sidecar).

    Capitals of CaseOps are back in the text; what else the tokenizer normalized is not.
    UserError or ToolError where shards, tokenizer and log do not belong together.
    """
    program = load_program()
    config = program.Config(vocab_size=int(run.settings["vocab_size"]), tokenizer_path=str(tokenizer_path))
    tokenizer, _ = program.load_tokenizer(config, False)
    _, val_paths, sidecar_paths = program.find_shards(folder)
    val = program.TokenStream(val_paths)
    tokens = val.slice(0, len(val))
    program.check_tokens(int(tokens.max()), config, val_paths[0])
    if sidecar_paths:
        counts = program.read_sidecar(val, sidecar_paths, tokenizer)
    else:
        counts = program.table_bytes(tokens, tokenizer)
    found, scored = int(counts.sum()), run.fact("audit")["scored_bytes"]
    if found != scored:
        raise ToolError(f"--data {folder}: {found:,} bytes of validation text, the run scored {scored:,}: "
                        "give the folder and the tokenizer of this run")
    targets = tokens[1:]  # the first token is never scored
    bounds = program.document_bounds(targets).tolist()
    texts = (tokenizer.decode([token for token in targets[start:end].tolist() if token != program.BOS])
             for start, end in itertools.pairwise(bounds))
    if caseops.has_operators(tokenizer):
        texts = (caseops.decode(text, strict=False) for text in texts)
    return "".join(texts).encode(), bool(sidecar_paths)


def compress(text: bytes, count_bytes: int) -> dict[str, Compression]:
    """Text that stands for `count_bytes` bytes -> {compressor: its result}."""
    def measure(name: str) -> Compression:
        start = time.perf_counter()
        size = len(COMPRESSORS[name](text))
        return Compression(8 * size / count_bytes, time.perf_counter() - start)
    with ThreadPoolExecutor() as pool:  # the compressors release the interpreter lock
        return dict(zip(COMPRESSORS, pool.map(measure, COMPRESSORS)))


def verdict(model_bpb: float, compression: dict[str, Compression], count_bytes: int) -> str:
    """'The model beats zlib -9 by 66.1 % and does not beat xz -9e ...'."""
    parts = [f"beats {name} by {100 * (1 - model_bpb / other.bpb):.1f} %" if model_bpb < other.bpb else
             f"does not beat {name}" for name, other in compression.items()]
    return (f"The model {' and '.join(parts)} (bits per byte of the same {count_bytes:,} bytes of text; "
            "the model's size is not counted).")


def summarize(log: Path, tokenizer: Path | None, folder: Path | None) -> str:
    """Log of a finished run -> Markdown. ToolError for a run that did not finish."""
    run = parse_log(log)
    official, notes = run.fact("official_stage"), []
    rows = [[f"model, {name}" + ", the score" * (name == official), f"{stage.val_bpb:.4f}", f"{stage.seconds:.1f}"]
            for name, stage in run.stages.items()]
    if tokenizer and folder:
        count_bytes = run.fact("audit")["scored_bytes"]
        text, transformed = validation_text(run, folder, tokenizer)
        compression = compress(text, count_bytes)
        rows += [[name, f"{other.bpb:.4f}", f"{other.seconds:.1f}"] for name, other in compression.items()]
        notes.append(verdict(run.fact("val_bpb"), compression, count_bytes))
        if transformed:
            notes.append(f"The compressors read the text as the tokenizer's transform left it: {len(text):,} bytes.")
    limit = run.fact("submission_bytes") + run.fact("headroom_bytes")
    packed = run.source.startswith(PACKED_FIRST_LINE)  # else an upper bound was counted
    facts = [["artifact bytes", f"{run.fact('artifact_bytes'):,}"],
             ["code bytes" + ", at most" * (not packed), f"{run.fact('code_bytes'):,}"],
             ["submission bytes", f"{run.fact('submission_bytes'):,}"], ["limit bytes", f"{limit:,}"],
             ["training seconds", f"{run.fact('train_seconds'):,.1f}"], ["steps", f"{run.fact('steps'):,}"],
             ["parameters", f"{run.fact('num_params'):,}"]]
    title = f"Run {run.name} on {run.fact('world_size')} x {run.fact('device')}, seed {run.fact('seed')}"
    scores = table(["stage", "bits per byte", "seconds"], rows)
    return "\n\n".join([title, scores, *notes, table(["run", "value"], facts)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line -> exit code: 0 done, 2 a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("log", type=Path, metavar="LOG", help="log file of train_gpt.py, LOG_DIR/RUN_ID.txt")
    add("--text-tokenizer", type=Path, metavar="MODEL", help="SentencePiece model that made the shards")
    add("--data", type=Path, metavar="DIR", help="folder of the run's shards, fineweb_{train,val}_*.bin")
    config = parser.parse_args(arguments)
    if bool(config.text_tokenizer) != bool(config.data):
        parser.error("--text-tokenizer and --data go together: give both or none")
    return exit_code(lambda: print(summarize(config.log, config.text_tokenizer, config.data)))


if __name__ == "__main__":
    sys.exit(main())
