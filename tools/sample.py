"""Writes text with the model of an artifact.

    python tools/sample.py logs/demo.artifact --tokenizer data/tokenizers/my.model --prompt "def main(" --tokens 200
    python tools/sample.py logs/demo.artifact --tokenizer data/tokenizers/my.model --temperature 0
    python tools/sample.py logs/demo.artifact --tokenizer data/tokenizers/my.model --count 3 --seed 7 --top-p 0.9

The same seed gives the same text on the same machine; sample k of --count has the seed --seed + k. The whole context is
read again for every token: simple, and fast enough for a few hundred tokens. Of a CaseOps tokenizer the capitals are
shown, not the operators.
"""
import argparse
import dataclasses
import hashlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from run_log import ToolError, exit_code, load_program

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
import caseops


def load_tokenizer(path: Path, header: dict[str, Any], bos: int) -> Any:
    """SentencePiece model -> processor. ToolError where it is not the one that the artifact was trained with."""
    import sentencepiece
    try:
        model = path.read_bytes()
    except OSError as error:
        raise ToolError(f"--tokenizer {path}: {error.strerror}; give the SentencePiece model of the shards") from None
    sha256, expected = hashlib.sha256(model).hexdigest(), header["tokenizer_sha256"]
    if expected and sha256 != expected:
        raise ToolError(f"--tokenizer {path}: its sha256 is {sha256[:12]}, the artifact was trained with "
                        f"{expected[:12]}: give that one")
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError:
        raise ToolError(f"--tokenizer {path}: not a SentencePiece model") from None
    if tokenizer.vocab_size() != header["model"]["vocab_size"]:
        raise ToolError(f"--tokenizer {path}: has {tokenizer.vocab_size()} pieces, the artifact "
                        f"{header['model']['vocab_size']}: give the tokenizer of the training data")
    if tokenizer.bos_id() not in (bos, -1):
        raise ToolError(f"--tokenizer {path}: its BOS is {tokenizer.bos_id()}, the artifact's {bos}")
    return tokenizer


def forbidden_ids(tokenizer: Any, bos: int) -> list[int]:
    """Ids that are no text and do not end the document."""
    return [i for i in range(tokenizer.vocab_size()) if i != bos
            and (tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i))]


def pick(logits: Any, temperature: float, top_p: float, generator: Any) -> int:
    """logits (V,) on the CPU -> id; temperature 0 = the likeliest, else drawn from the top_p share of probability."""
    if temperature == 0:
        return int(logits.argmax())
    scaled = logits.double()
    probabilities, order = ((scaled - scaled.max()) / temperature).softmax(0).sort(descending=True, stable=True)
    probabilities[probabilities.cumsum(0) - probabilities >= top_p] = 0.0  # never the first one
    return int(order[probabilities.multinomial(1, generator=generator)])


class Sampler:
    """A model, its tokenizer, and how to draw from them."""

    caseops: str | None = None  # how the tokenizer's text writes capitals

    def __init__(self, config: argparse.Namespace):
        import torch
        self.torch, self.program, self.config = torch, load_program(), config
        header, weights = self.program.read_artifact(config.artifact)
        model_config = dataclasses.replace(self.program.artifact_config(header), device=config.device)
        self.bos = self.program.BOS
        self.tokenizer = load_tokenizer(config.tokenizer or self.default_tokenizer(model_config), header, self.bos)
        self.forbidden = forbidden_ids(self.tokenizer, self.bos)
        self.caseops = config.caseops if caseops.has_operators(self.tokenizer) else None
        self.device = self.program.choose_device(model_config, 0)
        half = self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (8, 0)
        self.model = self.program.GPT(model_config, torch.bfloat16 if half else torch.float32)
        self.model.load_state_dict(weights)
        self.model.to(self.device).looping, self.model.temperature = header["looping"], header.get("temperature", 1.0)

    def default_tokenizer(self, model_config: Any) -> Path:
        """Where train_gpt.py looks, too."""
        path = f"{model_config.data_dir}/tokenizers/fineweb_{model_config.vocab_size}_bpe.model"
        return self.program.resolve_path(path)

    def encode(self, prompt: str) -> list[int]:
        """Prompt -> BOS and its ids."""
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise ToolError("--prompt: is no UTF-8 text") from None
        return [self.bos, *self.tokenizer.encode(caseops.encode(prompt, self.caseops) if self.caseops else prompt)]

    def decode(self, ids: Sequence[int]) -> str:
        """BOS and ids -> text."""
        text = self.tokenizer.decode(list(ids[1:]))
        return caseops.decode(text, strict=False) if self.caseops else text

    def next_logits(self, ids: Sequence[int]) -> Any:
        """Ids so far -> logits (V,) float32 on the CPU of the next one."""
        import numpy as np
        context = np.array(ids[-self.config.context:], np.int64)
        segments = self.program.make_segments(np.zeros(1, np.int64), len(context), len(context), 0)
        batch = self.program.to_device(self.program.make_batch(context, context, segments), self.device)
        with self.torch.no_grad():
            logits = self.model.logits(self.model.features(batch.ids, batch.segments)[-1:])[0].float().cpu()
        logits[self.forbidden] = float("-inf")
        return logits

    def generate(self, prompt: Sequence[int], seed: int) -> Iterator[list[int]]:
        """Prompt ids -> the ids so far: first the prompt, then again with every new one, until --tokens or BOS."""
        generator, ids = self.torch.Generator().manual_seed(seed), list(prompt)
        yield ids
        for _ in range(self.config.tokens):
            token = pick(self.next_logits(ids), self.config.temperature, self.config.top_p, generator)
            if token == self.bos:
                return
            ids = [*ids, token]
            yield ids

    def write(self, prompt: Sequence[int], seed: int) -> int:
        """Prints the prompt and its continuation -> number of new tokens. A terminal sees every token as it comes.

        Characters that consist of several tokens are printed when they are whole.
        """
        ids, shown, live = list(prompt), 0, sys.stdout.isatty()
        for ids in self.generate(prompt, seed):
            if live:
                text = self.decode(ids)
                whole = len(text.rstrip("\ufffd"))
                print(text[shown:whole], end="", flush=True)
                shown = max(shown, whole)
        print(self.decode(ids)[shown:], flush=True)
        return len(ids) - len(prompt)


def write_samples(config: argparse.Namespace) -> None:
    """Samples to stdout; how it went to stderr."""
    sampler = Sampler(config)
    prompt = sampler.encode(config.prompt)
    sys.stdout.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]  # for terminals without UTF-8
    if len(prompt) > config.context:
        print(f"note: the prompt has {len(prompt)} tokens, the model reads the last {config.context}", file=sys.stderr)
    for k in range(config.count):
        if config.count > 1:
            print(f"--- sample {k + 1} of {config.count}, seed {config.seed + k}", flush=True)
        start = time.perf_counter()
        tokens = sampler.write(prompt, config.seed + k)
        seconds = time.perf_counter() - start
        end = "" if tokens == config.tokens else "; the document ended"
        print(f"[{tokens} tokens, {tokens / seconds:.1f} a second, {sampler.device}{end}]", file=sys.stderr)


def number(kind: type, low: float, high: float = float("inf")) -> Any:
    """A type for argparse: a number in [low, high]."""
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' * (kind is int)}number") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low:g}, {high:g}]")
        return value
    return parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line -> exit code: 0 done, 2 a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("artifact", type=Path, metavar="ARTIFACT", help="file that train_gpt.py wrote, LOG_DIR/RUN_ID.artifact")
    add("--prompt", default="", metavar="TEXT", help="beginning of the text; empty (default) = begin of a document")
    add("--tokenizer", type=Path, metavar="MODEL", help="default: data/tokenizers/fineweb_VOCAB_SIZE_bpe.model")
    add("--caseops", choices=caseops.MODES, default="plain", help="form of the prompt for a CaseOps tokenizer, as of "
        "data/prepare.py (default plain, the published one)")
    add("--tokens", type=number(int, 0), default=128, metavar="N", help="new tokens at most (default 128)")
    add("--temperature", type=number(float, 0, 100), default=0.8, metavar="T",
        help="0 = the likeliest token (default 0.8)")
    add("--top-p", type=number(float, 1e-6, 1), default=0.95, metavar="P",
        help="draw from the likeliest tokens that have this share of the probability (default 0.95)")
    add("--seed", type=number(int, 0, 2 ** 62), default=0, metavar="S", help="of the first sample (default 0)")
    add("--count", type=number(int, 1), default=1, metavar="K", help="samples (default 1)")
    add("--context", type=number(int, 1), default=1024, metavar="N",
        help="tokens the model reads at most (default 1024)")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: auto, a GPU if there is one")
    config = parser.parse_args(arguments)
    return exit_code(lambda: write_samples(config))


if __name__ == "__main__":
    sys.exit(main())
