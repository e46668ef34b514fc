"""Measures a training step: every stage's micro-batch, the optimizer, the loader, memory, compile time. One table.

    python bench/speed.py                                   the defaults (R0427's, learned caps) on this device
    set -a; . presets/laptop.env; set +a; python bench/speed.py
    torchrun --standalone --nproc_per_node=2 bench/speed.py two devices; tokens/s of both together

Takes the same environment variables as train_gpt.py. Needs no data: the tokens are random, in documents as long as
FineWeb's (log-normal, median 390 tokens). Times are medians; flops are those of the matrix products and of causal
attention within documents, forward and backward; utilization is against the fastest matrix product measured here.
Where the model has kernels of its own, a second table compares each with the compiled plain form, and with the time
that its bytes take at the rate of a copy, or its products at the fastest rate.
"""
import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from run_log import table

import train_gpt
from train_gpt import Batch, Config, Dataset, Stage, TokenStream, Trainer, UserError, World

MEDIAN_DOCUMENT_TOKENS, SPREAD = 390, 1.15  # of the log-normal distribution; its mean is 755 tokens


def made_up_tokens(config: Config, count: int) -> np.ndarray:
    """(count,) random tokens in documents, each starting with BOS."""
    generator = np.random.default_rng(config.seed)
    tokens = generator.integers(min(4, config.vocab_size - 1), config.vocab_size, count)
    lengths = np.maximum(generator.lognormal(np.log(MEDIAN_DOCUMENT_TOKENS), SPREAD, count // 100), 2).astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    tokens[starts[starts < count]] = train_gpt.BOS
    return tokens


def write_shard(folder: Path, tokens: np.ndarray) -> Path:
    header = np.zeros(train_gpt.SHARD_HEADER_INTS, "<i4")
    header[:3] = train_gpt.SHARD_MAGIC, 1, len(tokens)
    path = folder / "fineweb_train_000000.bin"
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())
    return path


def made_up_dataset(config: Config, folder: Path) -> Dataset:
    """A training stream of a few batches and no validation text."""
    tokens = made_up_tokens(config, max(8 * config.micro_batch_tokens, 1 << 18))
    stream, empty = TokenStream([write_shard(folder, tokens)]), np.zeros(0, np.int64)
    scan = train_gpt.scan_shard(stream, 0, empty, set(), config.micro_batch_tokens, config.seq_lens)
    return Dataset(stream, empty, empty, "", "made up", 0, scan.max_segments)


def median_seconds(world: World, work: Callable[[], Any], repeats: int) -> float:
    """Median of timed calls, each with the device idle before and after."""
    times = []
    for _ in range(repeats):
        world.synchronize()
        start = time.perf_counter()
        work()
        world.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def ceiling_flops(world: World, repeats: int) -> float:
    """Flops a second of the fastest square matrix product in the activations' dtype."""
    best = 0.0
    for size in ((4096, 8192) if world.device.type == "cuda" else (512, 1024)):
        a, b = (torch.randn(size, size, device=world.device, dtype=world.dtype) for _ in range(2))
        for _ in range(3):
            torch.matmul(a, b)
        best = max(best, 2 * size ** 3 / median_seconds(world, lambda a=a, b=b: torch.matmul(a, b), repeats))
    return best


def step_flops(config: Config, batch: Batch, looping: bool) -> float:
    """Flops of a micro-batch, forward and backward: 6 a weight that a token meets, 6 D n^2 for n tokens' attention."""
    shapes, weights = train_gpt.param_shapes(config), 0
    visits = train_gpt.visit_plan(config, looping)
    for role in ("q_proj", "k_proj", "v_proj", "out_proj", "up_proj", "down_proj"):
        weights += len(visits) * int(np.prod(shapes[role][1:]))
    weights += sum(int(np.prod(shapes[name])) for name in ("embedding", "embed_in", "embed_out") if name in shapes)
    lengths = np.diff(batch.segments.boundaries.cpu().numpy().astype(np.float64))
    return 6.0 * weights * batch.ids.numel() + 6.0 * config.model_dim * len(visits) * float((lengths ** 2).sum())


def measure_stage(trainer: Trainer, stage: Stage, repeats: int) -> dict[str, float]:
    """Compile seconds, and seconds of a micro-batch forward, forward and backward, and of the optimizer's step."""
    config, world = trainer.config, trainer.world
    trainer.enter(stage)
    batch = trainer.loader.micro(0, stage.seq_len)
    start = time.perf_counter()
    for _ in range(3):
        trainer.train_step([batch], 0.0)
    trainer.capture(batch)
    world.synchronize()
    compiling = time.perf_counter() - start

    def backward() -> None:
        trainer.micro_step(batch)

    def optimize() -> None:
        trainer.optimizer.step(torch.zeros((), device=world.device), 1.0, config.muon_momentum)

    micro, step = [], []
    for _ in range(repeats):  # the optimizer needs fresh gradients each time
        micro.append(median_seconds(world, backward, 1))
        step.append(median_seconds(world, optimize, 1))
    with torch.no_grad():
        trainer.forward(*batch)  # another graph
        forward = median_seconds(world, lambda: trainer.forward(*batch), repeats)
    count, in_a_row = config.accumulation_steps(world.size, stage.batch_share), 3

    def steps() -> None:  # as in training, where the host launches a step while the device works at the one before
        for _ in range(in_a_row):
            trainer.train_step([batch] * count, 0.0)
    whole = median_seconds(world, steps, max(repeats // 3, 1)) / in_a_row
    return {"compile": compiling, "forward": forward, "micro": statistics.median(micro), "whole": whole / count,
            "optimizer": statistics.median(step), "flops": step_flops(config, batch, stage.looping)}


def measure_loader(trainer: Trainer, repeats: int) -> float:
    """Seconds to build a micro-batch on the host, without waiting ahead."""
    stage, places = trainer.stage, iter(range(10 ** 6))

    def build() -> None:
        trainer.loader.build(next(places), stage.seq_len)
    return median_seconds(trainer.world, build, repeats)


def linear_add_twin(x: torch.Tensor, weight: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
    """What load_linear_add's kernel computes, in plain torch."""
    out = F.linear(x, weight)
    return out if base is None else (base.float() + out).to(x.dtype)


def leaky2_twin(n: torch.Tensor, up: torch.Tensor, down: torch.Tensor, base: torch.Tensor | None,
                slope: float) -> torch.Tensor:
    """What load_leaky2's kernel computes, in plain torch."""
    return linear_add_twin(train_gpt.ACTIVATIONS["leaky2"](F.linear(n, up), slope), down, base)


def rotate_heads_twin(qkv: torch.Tensor, gain: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                      width: int) -> tuple[torch.Tensor, ...]:
    """What load_rotate_heads' kernel computes, in plain torch."""
    heads, kv = len(gain), (qkv.size(1) // width - len(gain)) // 2
    qk, v = qkv.unflatten(-1, (-1, width)).split([heads + kv, kv], 1)
    q, k = train_gpt.rotary(train_gpt.norm(qk), cos, sin).split([heads, kv], 1)
    spread = (x.repeat_interleave(heads // kv, 1) for x in (k, v))
    return q * gain[:, None], k.contiguous(), v.contiguous(), *spread


def exclude_twin(y: torch.Tensor, v: torch.Tensor, opened: torch.Tensor) -> torch.Tensor:
    """What load_exclude's kernel computes, in plain torch."""
    return (train_gpt.exclusive(y, v) * opened[:, :, None]).flatten(1).to(y.dtype)


def cross_entropy_twin(x: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, caps: torch.Tensor,
                       learned: int) -> torch.Tensor:
    """What load_cross_entropy's kernel computes, in plain torch."""
    logits = F.linear(x, head).float()
    cap = torch.where(logits >= 0, *caps) if learned else caps[0].detach()
    return F.cross_entropy(cap * (logits / cap).tanh(), targets, reduction="none", ignore_index=-1)


def mix_norm_twin(a: torch.Tensor | None, b: torch.Tensor, c: torch.Tensor, mix: torch.Tensor, scale: torch.Tensor,
                  chain: torch.Tensor, window: int) -> tuple[torch.Tensor, ...]:
    """What load_mix_norm's kernel computes, in plain torch: the gradient of c is the chain's."""
    mixed = (mix[1] * b + mix[2] * (chain + (c - chain).detach()) + (0 if a is None else mix[0] * a)).to(b.dtype)
    n = train_gpt.norm(mixed, scale)
    return mixed, n, n[:, :window].contiguous(), chain


class Case(NamedTuple):
    """A kernel, its plain twin, the inputs of both, flops forward and backward."""

    kernel: Callable[..., Any]
    twin: Callable[..., Any]
    inputs: Sequence[Any]
    flops: float = 0.0

    @property
    def differentiable(self) -> list[torch.Tensor]:
        return [x for x in self.inputs if isinstance(x, torch.Tensor) and x.requires_grad]


def kernel_cases(config: Config, kernels: train_gpt.Kernels, device: torch.device, dtype: torch.dtype
                 ) -> dict[str, Case]:
    """The kernels that the model has, each with inputs of a micro-batch."""
    tokens, width, hidden, cases = config.micro_batch_tokens, config.model_dim, config.mlp_dim, {}
    heads, qkv = config.num_heads, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim

    def draw(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=kind).requires_grad_()
    if kernels.linear_add:
        for name, out, base in (("linear_add", width, draw(tokens, width)), ("linear_add, to nothing", qkv, None)):
            cases[name] = Case(kernels.linear_add, linear_add_twin, [draw(tokens, width), draw(out, width), base],
                               6.0 * tokens * width * out)
    if kernels.leaky2:
        cases["leaky2"] = Case(kernels.leaky2, leaky2_twin, [
            draw(tokens, width), draw(hidden, width), draw(width, hidden), draw(tokens, width),
            config.leaky_relu_slope], 12.0 * tokens * width * hidden)
    if kernels.rotate_heads:
        angles = train_gpt.rotary_angles(torch.arange(tokens) % config.train_seq_len,
                                         train_gpt.rotary_frequencies(config, True))
        cases["rotate_heads"] = Case(kernels.rotate_heads, rotate_heads_twin, [
            draw(tokens, qkv), draw(heads), *(x.to(device) for x in angles), config.head_dim])
    if kernels.exclude:
        values = draw(tokens, config.num_kv_heads, config.head_dim)
        cases["exclude"] = Case(kernels.exclude, exclude_twin, [
            draw(tokens, heads, config.head_dim), values, draw(tokens, heads, kind=torch.float32)])
    if kernels.cross_entropy:
        targets = torch.randint(config.vocab_size, (tokens,), device=device)
        learned = config.softcap_type == "two_sided"
        caps = torch.full((2,), config.logit_softcap, device=device, requires_grad=learned)
        cases["cross_entropy"] = Case(kernels.cross_entropy, cross_entropy_twin, [
            draw(tokens, width), draw(config.vocab_size, width), targets, caps, int(learned)],
            6.0 * tokens * width * config.vocab_size)
    if kernels.mix_norm:
        scale = torch.tensor(0.7, device=device)
        for name, skipped in (("mix_norm", None), ("mix_norm, with a skip", draw(tokens, width))):
            chain = draw(tokens, width)
            cases[name] = Case(kernels.mix_norm, mix_norm_twin, [
                skipped, draw(tokens, width), chain.detach(), draw(3, width, kind=torch.float32), scale, chain,
                config.gate_window])
    return cases


def replayed(world: World, work: Callable[[], Any]) -> Callable[[], Any]:
    """work, run once; on a GPU as one CUDA graph, as in training: what its launches cost the host does not count."""
    work()
    if world.device.type != "cuda":
        return work
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def measure_kernel(world: World, case: Case, copy_rate: float, ceiling: float, compiled: bool, repeats: int
                   ) -> list[float]:
    """-> seconds of a call: kernel forward, kernel forward + backward, the twin's two, and the floor of both passes."""
    seconds, inputs, calls = [], case.differentiable, 8
    for function in (case.kernel, case.twin):
        run = torch.compile(function, dynamic=False) if compiled else function

        def outputs(run: Any = run) -> list[torch.Tensor]:
            found = run(*case.inputs)
            return [found] if isinstance(found, torch.Tensor) else list(found)
        grads = [torch.ones_like(x) for x in outputs()]

        def forward(outputs: Any = outputs) -> None:
            with torch.no_grad():
                for _ in range(calls):
                    outputs()

        def both(outputs: Any = outputs, grads: Any = grads) -> None:
            for _ in range(calls):
                torch.autograd.grad(outputs(), inputs, grads)
        for work in (forward, both):
            seconds.append(median_seconds(world, replayed(world, work), repeats) / calls)
    size = sum(x.numel() * x.element_size() for x in (*inputs, *grads))  # each is read or written once a pass
    again = sum(x.numel() * x.element_size() for x in inputs)  # their gradients
    return [*seconds, max((2 * size + again) / copy_rate, case.flops / ceiling)]


def report_kernels(config: Config, world: World, kernels: train_gpt.Kernels, ceiling: float, compiled: bool,
                   repeats: int) -> None:
    """Prints the table of kernels; nothing where the model has none of its own."""
    if not (cases := kernel_cases(config, kernels, world.device, world.dtype)):
        return
    source = torch.empty(1 << 26, device=world.device)
    target = torch.empty_like(source)
    rate = 2 * source.numel() * source.element_size() / median_seconds(world, lambda: target.copy_(source), repeats)
    rows = [[name, *(f"{1e3 * x:.3f}" for x in measure_kernel(world, case, rate, ceiling, compiled, repeats))]
            for name, case in cases.items()]
    print(table(["kernel, ms", "forward", "forward + backward", "plain forward", "plain forward + backward", "floor"],
                rows))
    print(f"floor: inputs, outputs and their gradients at {rate / 1e12:.3g} TB/s, or products at the ceiling")


def report(config: Config, world: World, repeats: int) -> None:
    """Measures everything and prints the table on rank 0."""
    name, attention = train_gpt.choose_attention(config.attention, world.device)
    compiled = train_gpt.use_compile(config, world, name)
    log = train_gpt.Log(replace(world, rank=1), config)  # says nothing
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, world, log, made_up_dataset(config, Path(folder)), attention, compiled,
                          train_gpt.fake_quantizer(config))
        ceiling = ceiling_flops(world, repeats)
        measured = {stage: measure_stage(trainer, stage, repeats) for stage in train_gpt.stages(config)}
        loader = measure_loader(trainer, repeats)
        trainer.loader.close()
    if world.rank:
        return
    tokens = config.micro_batch_tokens
    print(f"train_gpt:{train_gpt.VERSION} torch:{torch.__version__} device:{world.describe()} world_size:{world.size} "
          f"attention:{name} compile:{int(compiled)} params:{trainer.num_params:,} "
          f"kernels:{trainer.model.kernels.names}")
    header, rows = ["stage", "tokens/s", "ms a micro-batch", "forward + backward", "forward", "optimizer ms a step",
                    "utilization", "first steps, s"], []
    for stage, m in measured.items():
        what = f"loops {'on' if stage.looping else 'off'}, {stage.seq_len} tokens"
        what += ", QAT" * stage.quantizing
        rows.append([what, f"{world.size * tokens / m['whole']:,.0f}",
                     *(f"{1e3 * m[key]:.1f}" for key in ("whole", "micro", "forward", "optimizer")),
                     f"{100 * m['flops'] / m['micro'] / ceiling:.1f} %", f"{m['compile']:.1f}"])
    print(table(header, rows))
    print(f"micro-batch {tokens:,} tokens; matmul ceiling {ceiling / 1e12:.3g} TFLOP/s in {str(world.dtype)[6:]}; "
          f"loader {tokens / loader / 1e6:.1f} M tokens/s; peak memory {world.peak_memory_bytes() / 2**20:,.0f} MiB")
    report_kernels(config, world, trainer.model.kernels, ceiling, compiled, repeats)


def with_settings(work: Callable[[Config, World], None]) -> int:
    """work(the environment's Config, this process) -> exit code: 0 done, 2 a mistake of the user, told in one line."""
    try:
        config, _ = Config.from_env(os.environ)
        world = World.start(config, os.environ)
        work(config, world)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line -> exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10, help="timed calls of each thing (default 10)")
    repeats = max(parser.parse_args(arguments).repeats, 1)
    return with_settings(lambda config, world: report(config, world, repeats))


if __name__ == "__main__":
    sys.exit(main())
