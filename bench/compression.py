"""Compares quantizers and codecs on the weights of a checkpoint or an artifact, at equal bytes. Three tables.

    set -a; . presets/laptop.env; set +a
    python bench/compression.py logs/demo.checkpoint --eval      and what each quantizer costs in bits per byte
    python bench/compression.py logs/demo.artifact               of weights that have been quantized once
    python bench/compression.py logs/demo.checkpoint --published   the published methods, too
    python bench/compression.py logs/demo.checkpoint --only 'gptq,tcq*'   some of them; of names with ", " too
    python bench/compression.py logs/demo.checkpoint --codecs 'rans,lzma'   these codecs on the codes of all of them
    python bench/compression.py --predict                        bytes of these settings, and the widest model that fits

Takes the same environment variables as train_gpt.py; the model's come from the file. Calibration uses training
text, as in training. Weighted error = sum over rows of E[g^2] e H e^T, what the errors e should cost by calibration:
the loss of a batch of text grows in proportion to it. Entropy is order 0, of each tensor's codes on their own.
The second table follows the error of the last quantizer through the layers, the third compares codecs on its codes,
with --codecs on everyone's.
"""
import argparse
import fnmatch
import functools
import math
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import packers
import quantizers
from pack import pack
from run_log import table
from speed import with_settings

import train_gpt
from train_gpt import GPT, Arrays, Batch, Config, Dataset, Guide, Pair, UserError, World

METHODS = {  # name -> settings
    "rtn": {"matrix_quantizer": "rtn", "embed_quantizer": "rtn"},
    "gptq": {"matrix_quantizer": "gptq", "embed_quantizer": "gptq", "quant_sensitivity": 0.0},
    "tcq": {"matrix_quantizer": "tcq", "embed_quantizer": "tcq", "quant_sensitivity": 0.0},
    "gptq, steps by sensitivity": {"matrix_quantizer": "gptq", "embed_quantizer": "gptq"},
    "tcq, steps by sensitivity": {"matrix_quantizer": "tcq", "embed_quantizer": "tcq"}}


PUBLISHED = {  # the same, at equal bytes; which matrices `lqer` corrects is in Comparison.corrected
    **{name: {"matrix_quantizer": name, "embed_quantizer": name, "quant_sensitivity": 0.0}
       for name in ("absmax", "percentile", "search", "pruned", "stepped", "gptq_plain", "act_order", "awq_lite")},
    **{f"act_order and {name}": {"matrix_quantizer": "act_order", "embed_quantizer": "act_order",
                                 "quant_sensitivity": 0.0}  # the first is R0427
       for name in ("lqer_asym", "lqer_sym", "lqer_best")}}
BOOKS = {"quant_overrides": "*=codebook64_linear,up_proj=codebook48_linear,down_proj=codebook48_linear,"
                            "[qkv]_proj=codebook80_linear"}
TERNARY = {"quant_overrides": "*_proj=rtn/2/0.8", "embed_quantizer": "fp16"}  # steps: the mean magnitude of a row
OWN_SIZE = {  # name -> settings, codec
    "codebooks of #532, huffman": (BOOKS, "huffman"), "codebooks of #532, rans": (BOOKS, "rans"),
    **{f"{name}, {codec}": ({"quant_overrides": f"*={name}"}, codec) for name, codec in (
        ("codebook64_rows", "rans"), ("codebook64_entropy", "rans"), ("int6", "zstd"), ("int6", "rans"),
        ("fp8", "zstd"))},
    **{f"ternary, {codec}": (TERNARY, codec) for codec in ("radix", "bitmask", "radix_lzma", "bitmask_lzma", "rans")}}


def chosen(option: str, patterns: str, names: Iterable[str]) -> list[str]:
    """Those of the names that fit a pattern; patterns end at a comma without a space. UserError where one fits none."""
    names, parts = [*names], re.split(r",(?! )", patterns)
    for part in parts:
        if not fnmatch.filter(names, part):
            raise UserError(f"{option} {part}: fits none of {'; '.join(names)}")
    return [name for name in names if any(fnmatch.fnmatchcase(name, part) for part in parts)]


def load_weights(path: str, config: Config) -> tuple[Config, dict[str, torch.Tensor], bool, float]:
    """File -> (config of its model, weights, whether its layers loop, temperature of its logits).

    Of a checkpoint the averaged weights, or the last ones; of an artifact those it decodes to. UserError for others,
    and for an artifact that was altered or is of another version.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(len(train_gpt.ARTIFACT_MAGIC) - 1)  # the version stands behind it
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if start == train_gpt.ARTIFACT_MAGIC[:-1]:
        header, weights = train_gpt.read_artifact(Path(path))
        return train_gpt.artifact_config(header, config), weights, header["looping"], header.get("temperature", 1.0)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model = state["model"]
    except Exception as error:  # whatever an unpickler can make of a broken file
        raise UserError(f"{path}: neither a readable checkpoint ({train_gpt.first_line(error):.120}) nor an artifact") \
            from None
    return replace(config, **model), state["averages"] or state["params"], state["looping"], 1.0


def entropy_bytes(quantized: Mapping[str, tuple[str, Arrays]]) -> float:
    """Of an ideal order-0 coder with a table for each tensor, and of the float16 values as they are."""
    total = 0.0
    for _, arrays in quantized.values():
        for array in arrays.values():
            if array.dtype == np.int8:
                share = np.unique(array, return_counts=True)[1] / array.size
                total -= float((share * np.log2(share)).sum()) * array.size / 8
            else:
                total += array.nbytes
    return total


def weighted_error(weights: Mapping[str, torch.Tensor], decoded: Mapping[str, torch.Tensor],
                   guides: Mapping[str, Guide]) -> float:
    total = 0.0
    for name, guide in guides.items():
        feedback = guide.feedback
        error = (decoded[name] - weights[name]).view(len(feedback), -1, feedback.size(-1))
        shaped = torch.linalg.solve_triangular(feedback, error, upper=True, left=False)  # e H e^T = |e U^-1|^2
        diagonal = feedback.diagonal(dim1=1, dim2=2).log().mean(-1)[:, None, None]
        total += float(((guide.log_sensitivity + 2 * diagonal).exp() * shaped.square()).sum())
    return total


def plain_error(weights: Mapping[str, torch.Tensor], decoded: Mapping[str, torch.Tensor],
                guides: Mapping[str, Guide]) -> float:
    """Root of the squared error over the squared weights."""
    errors = sum(float((decoded[name] - weights[name]).square().sum()) for name in guides)
    return math.sqrt(errors / sum(float(weights[name].square().sum()) for name in guides))


@torch.no_grad()
def visit_errors(model: GPT, batch: Batch, weights: Mapping[str, torch.Tensor],
                 decoded: Mapping[str, torch.Tensor]) -> list[tuple[int, float]]:
    """-> (layer, error of its output relative to the output, root mean square) for each visit, in order.

    A loop feeds errors of a layer to the same layer again, which may let them grow (PR #363).
    """
    outputs: list[list[torch.Tensor]] = []
    block = model.block
    for values in (weights, decoded):
        kept: list[torch.Tensor] = []

        def watched(*arguments: Any, kept: list[torch.Tensor] = kept) -> Any:
            lanes, *others = block(*arguments)
            kept.append((lanes[0] + lanes[-1]).float())
            return lanes, *others
        model.load_state_dict(values)
        model.block = watched  # pyright: ignore[reportAttributeAccessIssue]
        try:
            model(*batch)
        finally:
            model.block = block
        outputs.append(kept)
    layers = [visit.layer for visit in model.plans[model.looping]]
    return [(layer, float((b - a).norm() / a.norm())) for layer, a, b in zip(layers, *outputs)]


def growth_rows(errors: Sequence[tuple[int, float]]) -> list[list[str]]:
    """A row for each visit: layer, which visit of it, relative error, and that by the error of its first visit."""
    rows, first, seen = [], {}, []
    for layer, error in errors:
        seen.append(layer)
        first.setdefault(layer, error)
        rows.append([str(layer), str(seen.count(layer)), f"{error:.4f}", f"{error / max(first[layer], 1e-12):.2f}"])
    return rows


def codec_rows(method: str, config: Config, quantized: Mapping[str, tuple[str, Arrays]], codecs: Iterable[str]) \
        -> list[list[str]]:
    """A row for each codec: bytes of the whole artifact, and seconds of packing and of unpacking."""
    rows = []
    for codec in codecs:
        if codec in packers.PER_GROUP:
            files = packers.PER_GROUP[codec]
            tensors = packers.published_names(quantized, train_gpt.param_shapes(config))
            files = Pair(functools.partial(files.encode, *tensors), files.decode)
        else:
            packing = functools.partial(train_gpt.pack_artifact, replace(config, compressor=codec), quantized, {})
            files = Pair(packing, functools.partial(train_gpt.unpack_artifact, where=codec))
        start = time.perf_counter()
        data = files.encode()
        packed = time.perf_counter()
        files.decode(data)
        rows.append([method, codec, f"{len(data):,}", f"{100 * (len(data) / entropy_bytes(quantized) - 1):+.2f} %",
                     f"{packed - start:.2f}", f"{time.perf_counter() - packed:.2f}"])
    return rows


class Comparison:
    """A checkpoint's or artifact's weights, their calibration, and what quantizers make of them."""

    def __init__(self, path: str, config: Config, world: World, target: int, evaluate: bool):
        self.world, self.evaluate, self.dataset = world, evaluate, train_gpt.open_dataset(config, world)
        self.config, weights, looping, temperature = load_weights(path, config)
        self.weights = {name: value.to(world.device) for name, value in weights.items()}
        self.attention, attention = train_gpt.choose_attention(config.attention, world.device)
        self.model = GPT(self.config, world.dtype, attention).to(world.device).eval()
        self.model.looping, self.model.temperature = looping, temperature
        self.model.load_state_dict(self.weights)
        nothing = SimpleNamespace(stream=())  # to fit a temperature to
        trainer: Any = SimpleNamespace(params=self.weights, model=self.model, world=world, log=lambda text: None,
                                       loader=nothing, tokens=0)
        self.guides, self.seconds = train_gpt.calibrate_on_training_text(self.config, trainer, self.dataset)
        self.count = sum(self.weights[name].numel() for name in self.guides)
        plain = replace(self.config, **METHODS["rtn"], target_bytes=0)
        self.target = target or len(train_gpt.pack_artifact(plain, train_gpt.quantize(plain, self.weights), {}))
        self.base = self.bits_per_byte() if evaluate else 0.0
        self.quantized: dict[str, tuple[str, Arrays]] = {}
        self.decoded = self.weights

    def bits_per_byte(self) -> float:
        log: Any = SimpleNamespace(progress=lambda text: None)
        evaluator = train_gpt.Evaluator(self.config, self.world, log, self.dataset, False)
        return evaluator.score(self.model, self.config.eval_seq_len).val_bpb

    def bank(self, name: str) -> torch.Tensor:
        return self.weights[name].view(-1, *self.weights[name].shape[-2:])

    def corrected(self, settings: Config, quantizer: str, matrices: int = 3) -> str:
        """QUANT_OVERRIDES that give this quantizer to the matrices to be corrected.

        lqer_best: to those in which a byte of the correction lowers the weighted error by more than a byte of finer
        steps would. With N weights that is 16 ln(2) error / N, as the error goes with the square of the steps, and a
        bit for each weight, N / 8 bytes, halves them. The others, as published: to the three with the largest errors.
        """
        data = train_gpt.pack_artifact(settings, train_gpt.quantize(settings, self.weights, self.guides), {})
        decoded = {name: x.to(self.world.device) for name, x in train_gpt.unpack_artifact(data, quantizer)[1].items()}
        least, worth = 16 * math.log(2) * weighted_error(self.weights, decoded, self.guides) / self.count, {}
        best = quantizer == "lqer_best"
        for name, guide in self.guides.items():
            bank, rest = self.bank(name), decoded[name].view(self.bank(name).shape)
            found = quantizers.gain_per_byte(bank, rest, guide) - least if best else (bank - rest).norm(dim=(1, 2))
            worth |= {f"{name}:{i}": value for i, value in enumerate(found.tolist()) if value > 0}
        places = sorted(worth, key=lambda place: -worth[place])[:None if best else matrices]
        return ",".join(f"{place}={quantizer}" for place in places)

    def row(self, method: str, settings: Config) -> list[str]:
        """Quantizes, packs, unpacks and scores -> a row of the table."""
        start, guides, tries = time.perf_counter(), {} if "rtn" in method else self.guides, []
        if "lqer" in method:
            settings = replace(settings, quant_overrides=self.corrected(settings, method.split()[-1]))
        data = train_gpt.fit_artifact(settings, self.weights, guides, {}, 0, tries.append)
        taken = (time.perf_counter() - start) / len(tries)
        found = re.search(rf"steps:x(\S+) artifact_bytes:{len(data)} ", "\n".join(tries))
        power = float(found[1]) if found else 1.0
        self.quantized = train_gpt.quantize(settings, self.weights, guides, power)
        before = time.perf_counter()
        decoded = train_gpt.unpack_artifact(data, method)[1]
        unpacked = time.perf_counter() - before
        self.decoded = {name: x.to(self.world.device) for name, x in decoded.items()}
        row = [method, f"{len(data):,}", f"{8 * len(data) / self.count:.3f}", f"{entropy_bytes(self.quantized):,.0f}",
               f"{plain_error(self.weights, self.decoded, self.guides):.4f}",
               f"{weighted_error(self.weights, self.decoded, self.guides):.4g}", f"{taken:.1f}",
               f"{unpacked:.2f}"]
        if self.evaluate:
            self.model.load_state_dict(self.decoded)
            row.append(f"{self.bits_per_byte() - self.base:+.5f}")
        print(f"{method}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        return row


def compare(options: argparse.Namespace, config: Config, world: World) -> None:
    """Prints the tables, of the methods that fit one of the patterns in --only."""
    if options.published:
        quantizers.register()
        packers.register(options.codecs.split(","))
    methods, own = ((PUBLISHED | METHODS, OWN_SIZE) if options.published else (METHODS, {}))
    wanted = chosen("--only", options.only, [*own, *methods])
    codecs = chosen("--codecs", options.codecs or "*",
                    [*train_gpt.CODECS, *(packers.present(packers.PER_GROUP) if options.published else ())])
    work = Comparison(options.weights, config, world, options.bytes, options.eval)
    plans = {name: replace(work.config, **changes, compressor=codec, target_bytes=0)
             for name, (changes, codec) in own.items()}
    plans |= {name: replace(work.config, **changes, target_bytes=work.target) for name, changes in methods.items()}
    rows, packed = {}, []
    for name in wanted:
        rows[name] = work.row(name, plans[name])
        if options.codecs or name == wanted[-1]:
            packed += codec_rows(name, work.config, work.quantized, codecs)
    print(f"{options.weights}: {work.count:,} quantized weights, calibration {work.seconds:.1f} s, attention "
          f"{work.attention}" + f", {work.base:.5f} bits per byte before quantization" * options.eval)
    heads = ["quantizer", "artifact bytes", "bits a weight", "entropy, bytes", "error", "weighted error", "s a try",
             "s to decode", *["bits per byte"] * options.eval]
    if fitted := [row for name, row in rows.items() if name in methods]:
        print(table(heads, fitted))
    if own_size := [row for name, row in rows.items() if name in own]:
        print("\nformats whose levels are given, and so their size")
        print(table(heads, own_size))
    print(f"\nerror of {wanted[-1]}, on one window of validation text")
    errors = visit_errors(work.model, first_window(work.config, world, work.dataset), work.weights, work.decoded)
    print(table(["layer", "visit", "relative error", "by the first visit"], growth_rows(errors)))
    print("\ncodecs, on the same codes; an artifact's rows are coded by class, so it may be below the entropy")
    print(table(["quantizer", "codec", "artifact bytes", "over entropy", "pack s", "unpack s"], packed))


def first_window(config: Config, world: World, dataset: Dataset) -> Batch:
    """The first EVAL_SEQ_LEN tokens of validation, as the model sees them."""
    window = dataset.val_tokens[:config.eval_seq_len + 1]
    starts = train_gpt.cut_segments(window[:-1], config.eval_seq_len, config.document_mask)
    segments = train_gpt.make_segments(starts, len(window) - 1, config.eval_seq_len, 0)
    return train_gpt.to_device(train_gpt.make_batch(window[:-1], window[1:], segments), world.device)


def predict(config: Config) -> None:
    """Prints the bytes of these settings, and the largest MLP_HIDDEN and NUM_LAYERS that fit at the steps they give."""
    code = len(pack(Path(train_gpt.__file__).read_bytes()))
    limit = (config.target_bytes or train_gpt.SIZE_LIMIT_BYTES) - code
    print(f"predicted_artifact_bytes:{train_gpt.predicted_bytes(config)} code_bytes:{code} limit_bytes:{limit + code}")
    for name, first, step in (("mlp_hidden", 16, 16), ("num_layers", max(config.parallel_start_layer + 1, 2), 1)):
        fits = None
        for value in range(first, 100_000, step):
            try:
                bigger = replace(config, **{name: value})
            except UserError:
                continue
            if train_gpt.predicted_bytes(bigger) > limit:
                break
            fits = value
        print(f"largest {name.upper()} that fits: {fits or 'none; TARGET_BYTES makes steps coarser'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line -> exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="?", metavar="CHECKPOINT_OR_ARTIFACT", help="written by train_gpt.py")
    parser.add_argument("--bytes", type=int, default=0, help="of each artifact (default: what rtn takes by itself)")
    parser.add_argument("--eval", action="store_true", help="score the validation text with each")
    parser.add_argument("--published", action="store_true", help="the published quantizers and codecs, too")
    parser.add_argument("--only", default="*", help="methods, as 'tcq,gptq*' (default all)")
    parser.add_argument("--codecs", nargs="?", const="*", default="", metavar="NAMES",
                        help="pack the codes of every method, not of the last alone, with these codecs (default all)")
    parser.add_argument("--predict", action="store_true", help="no file: predict sizes from the settings")
    options = parser.parse_args(arguments)
    if bool(options.weights) == options.predict:
        parser.error("give a checkpoint or an artifact, or --predict")
    if options.predict:
        return with_settings(lambda config, _: predict(config))
    return with_settings(lambda config, world: compare(options, config, world))


if __name__ == "__main__":
    sys.exit(main())
