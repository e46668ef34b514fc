"""Compares tokenizers on a text: tokens, what the embedding costs, what is spelled in bytes, which words fall apart.

    python data/tokenizer_report.py docs.jsonl.zst data/tokenizers/a.model data/tokenizers/b.model:fused byte260

Behind a model, :plain or :fused is the form of CaseOps that it is given; without, one that has the operators is given
the published form, plain. Reads the first --bytes of the text. Take text that no tokenizer was trained on.
"""
import argparse
import collections
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import caseops
import numpy as np
import prepare

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from run_log import table

WORD = re.compile(r"\S+")
MAX_WORDS = 100_000  # different ones that are counted, the most frequent


class Candidate(NamedTuple):
    """A tokenizer and the form of text that it is given."""

    name: str
    tokenizer: Any
    mode: str | None


class Result(NamedTuple):
    """What a tokenizer makes of the text."""

    tokens: int
    used: int  # pieces that occur
    byte_tokens: int  # tokens that are single bytes
    changed: int  # documents that do not come back as they were


def load(argument: str) -> Candidate:
    """MODEL, MODEL:plain, MODEL:fused or byte260. InputError for what is none."""
    path, _, mode = argument.rpartition(":")
    if mode not in caseops.MODES:
        path, mode = argument, None
    if path == prepare.BYTE260:
        model = prepare.byte260_model()
    elif Path(path).is_file():
        model = Path(path).read_bytes()
    else:
        raise prepare.InputError(f"tokenizer {path}: no such file; give a SentencePiece model or {prepare.BYTE260}")
    tokenizer: Any = prepare.load_tokenizer(model, path, mode)
    if mode is None and caseops.has_operators(tokenizer):
        mode = "plain"
    return Candidate(Path(path).stem + (f":{mode}" if mode else ""), tokenizer, mode)


def read_texts(argument: str, text_key: str, limit: int) -> Iterator[str]:
    """Documents, up to about `limit` bytes."""
    for path in prepare.find_source(argument).files:
        for text, _ in prepare.read_file(path, text_key):
            if text:
                yield text[:limit].decode(errors="ignore")
                limit -= len(text)
            if limit <= 0:
                return


def measure(candidate: Candidate, texts: list[str]) -> Result:
    tokenizer, mode = candidate.tokenizer, candidate.mode
    counts, changed = np.zeros(tokenizer.vocab_size(), np.int64), 0
    for text in texts:
        ids = tokenizer.encode(prepare.transform(text, mode))
        counts += np.bincount(ids, minlength=len(counts))
        back = tokenizer.decode(ids)
        changed += (caseops.decode(back, strict=False) if mode else back) != text
    byte = [tokenizer.is_byte(i) for i in range(len(counts))]
    return Result(int(counts.sum()), int((counts > 0).sum()), int(counts[byte].sum()), changed)


def fragmented(candidate: Candidate, words: Sequence[tuple[str, int]], top: int) -> list[tuple[str, int, list[str]]]:
    """(word, how often, its pieces) of those that cost most tokens beyond one each, behind a space as in a text."""
    found = []
    for word, count in words:
        pieces = candidate.tokenizer.encode(prepare.transform(f"a {word}", candidate.mode), return_type=str)[1:]
        found.append((count * (len(pieces) - 1), word, count, pieces))
    found.sort(key=lambda row: (-row[0], row[1]))
    return [(word, count, pieces) for cost, word, count, pieces in found[:top] if cost > 0]


def report(config: argparse.Namespace) -> None:
    candidates = [load(argument) for argument in config.tokenizers]
    texts = list(read_texts(config.text, config.text_key, config.bytes))
    size = sum(len(text.encode()) for text in texts)
    if not size:
        raise prepare.InputError(f"source {config.text}: holds no text")
    print(f"{config.text}: {len(texts):,} documents, {size:,} bytes\n")
    rows = []
    for candidate in candidates:
        result, pieces = measure(candidate, texts), candidate.tokenizer.vocab_size()
        rows.append([candidate.name, f"{pieces:,}", f"{result.tokens:,}", f"{size / result.tokens:.4f}",
                     f"{result.tokens / size:.5f}", f"{pieces * config.dim * config.bits // 8:,}",
                     f"{100 * result.used / pieces:.1f} %", f"{100 * result.byte_tokens / result.tokens:.3f} %",
                     f"{result.changed:,}"])
    print(table(["tokenizer", "pieces", "tokens", "bytes a token", "tokens a byte", "embedding bytes", "pieces used",
                 "byte tokens", "documents changed"], rows))
    print(f"embedding bytes: {config.dim} wide, {config.bits} bits a weight, before compression\n")
    words = collections.Counter(word for text in texts for word in WORD.findall(text)).most_common(MAX_WORDS)
    for candidate in candidates:
        rows = [[ascii(word)[1:-1], f"{count:,}", f"{len(pieces)}", ascii(" ".join(pieces))[1:-1]]
                for word, count, pieces in fragmented(candidate, words, config.top)]
        print(f"{candidate.name}: words that cost most tokens beyond one each")
        print(table(["word", "times", "tokens", "pieces"], rows) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 a mistake of the user."""
    parser = prepare.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("text", metavar="TEXT", help="a source as of data/prepare.py: stdlib, .txt, .md, .jsonl, .jsonl.zst, a folder")
    add("tokenizers", nargs="+", metavar="MODEL[:plain|:fused]", help="SentencePiece models, or byte260")
    add("--bytes", type=prepare.positive, default=10_000_000, help="of text to read (default: %(default)s)")
    add("--text-key", default="text", help="key of the text in a line of .jsonl (default: %(default)s)")
    add("--dim", type=prepare.positive, default=512, help="width of the embedding (default: %(default)s)")
    add("--bits", type=prepare.positive, default=7, help="of an embedding weight (default: %(default)s)")
    add("--top", type=prepare.positive, default=12, help="words to show (default: %(default)s)")
    config = parser.parse_args(arguments)
    try:
        report(config)
    except (prepare.InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
