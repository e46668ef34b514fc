"""Published quantizers, to be compared with the program's own (bench/compression.py --published).

Each is a pair like those of train_gpt.QUANTIZERS, from which it takes the search and the decoder. All of them code with
the steps they are given, which fit_artifact scales until the artifact has its size; what tells them apart is how they
share the steps out over rows and columns, what they do with the error, or which levels they have. Codebooks have a
fixed number of levels and no steps; they are compared at their own size.
"""
import functools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import train_gpt
from train_gpt import (
    MIN_SCALE,
    Arrays,
    Guide,
    Quantizer,
    coded,
    nearest,
    round_steps,
    rtn_decode,
    search_codes,
    search_encode,
)

Measure = Callable[[Tensor, Guide | None], Tensor]  # weights (n, rows, columns), guide -> sizes (n, rows, 1)
gptq_encode = functools.partial(search_encode, 1)


def banked(weight: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and steps of one matrix or of many -> (n, rows, columns) and float16-rounded (n, rows, 1)."""
    weight = weight.view(-1, *weight.shape[-2:])
    return weight, round_steps(steps).view(*weight.shape[:2], 1)


# --- steps by other measures of a row than its standard deviation
def absmax(weight: Tensor, _: Guide | None) -> Tensor:
    """The largest entry: no clipping (naive baseline)."""
    return weight.abs().amax(-1, keepdim=True)


def percentile(weight: Tensor, _: Guide | None, share: float = 0.9999984) -> Tensor:
    """What all but a share of 1.6e-6 of a row's entries stay below, linearly interpolated (2026-03-22 record)."""
    return torch.quantile(weight.abs(), share, dim=-1, keepdim=True)


def clip_search(weight: Tensor, guide: Guide | None, levels: int = 31) -> Tensor:
    """The clip of least squared error at 63 levels, weighted by the Hessian if there is one (GPTQ-lite, 2026-03-22).

    The record takes one of five percentiles for a matrix; here each row takes one of 12 shares of its largest entry.
    """
    most, best = absmax(weight, None).clamp_min(MIN_SCALE), torch.zeros_like(weight[..., :1])
    least = torch.full_like(best, math.inf)
    for share in torch.linspace(0.45, 1.0, 12).tolist():
        steps = most * share / levels
        error = nearest(weight, steps, levels) * steps - weight
        if guide:
            error = torch.linalg.solve_triangular(guide.feedback, error, upper=True, left=False)
        cost = error.square().sum(-1, keepdim=True)
        best, least = torch.where(cost < least, share * most, best), torch.minimum(cost, least)
    return best


def measured_encode(measure: Measure, weight: Tensor, steps: Tensor, _: int, guide: Guide | None = None) -> Arrays:
    """Round to nearest with steps in proportion to a measure of the rows; their geometric mean stays."""
    weight, steps = banked(weight, steps)
    sizes = measure(weight, guide).clamp_min(MIN_SCALE).log()
    steps = round_steps((sizes + (steps.log() - sizes).mean()).exp())
    return coded(nearest(weight, steps, 127), steps)


# --- GPTQ in another order, with other columns
def act_order_encode(weight: Tensor, steps: Tensor, levels: int, guide: Guide | None = None) -> Arrays:
    """GPTQ that codes the columns with the largest inputs first (act-order); the codes keep their places."""
    if not guide:
        return gptq_encode(weight, steps, levels)
    weight, steps = banked(weight, steps)
    inverse = guide.feedback.mT @ guide.feedback
    order = torch.cholesky_inverse(guide.feedback, upper=True).diagonal(dim1=1, dim2=2).argsort(-1, descending=True)
    rows = torch.arange(len(order), device=order.device)[:, None]
    feedback = torch.linalg.cholesky(inverse[rows[..., None], order[:, :, None], order[:, None]], upper=True)
    columns = order[:, None].expand_as(weight)
    codes = search_codes((weight / steps).gather(2, columns), levels, feedback, 1)
    return coded(torch.zeros_like(codes).scatter_(2, columns, codes), steps)


def awq_lite_encode(weight: Tensor, steps: Tensor, levels: int, guide: Guide | None = None, group: int = 64,
                    finer: float = 4.0) -> Arrays:
    """GPTQ with steps `finer` times smaller in the matrix's group of 64 columns that matters most (PR #1945).

    Score of a group: sum over its columns of the input's root mean square times the mean absolute weight. The script
    protects one group of all matrices, with a scale of its own; here each matrix has one and the scale is derived.
    """
    if not guide:
        return gptq_encode(weight, steps, levels)
    weight, steps = banked(weight, steps)
    group = min(group, weight.size(-1))
    size = torch.cholesky_inverse(guide.feedback, upper=True).diagonal(dim1=1, dim2=2).sqrt()
    scores = (size * weight.abs().mean(1)).unfold(-1, group, group).sum(-1)
    start = scores.argmax(-1) * group
    column = torch.arange(weight.size(-1), device=weight.device)
    scale = 1 + (finer - 1) * ((column >= start[:, None]) & (column < start[:, None] + group)).float()
    codes = search_codes(weight * scale[:, None] / steps, levels, guide.feedback * scale[:, None], 1)
    return {**coded(codes, steps), "columns": scale.half().cpu().numpy()}


def awq_lite_decode(arrays: Arrays, shape: tuple[int, ...]) -> Tensor:
    """Codes times the steps of their rows, by the factors of their columns."""
    values = rtn_decode(arrays, shape)
    if "columns" not in arrays:
        return values
    return values / torch.from_numpy(arrays["columns"]).float()[:, None].view(*[-1] * (values.dim() - 2), 1, shape[-1])


# --- low-rank correction of what GPTQ leaves
def correction(error: Tensor, guide: Guide | None, rank: int) -> tuple[Tensor, Tensor]:
    """error (n, rows, columns) -> A (n, rows, rank), B (n, rank, columns) with the least error of A B; A^T A = B B^T.

    With a guide least by the Hessian: the factors of E U^-1, which has the weighted norm, and B U back.
    """
    target = error if not guide else torch.linalg.solve_triangular(guide.feedback, error, upper=True, left=False)
    left, values, right = torch.linalg.svd(target, full_matrices=False)
    root = values[:, :rank].sqrt()
    a, b = left[:, :, :rank] * root[:, None], root[..., None] * right[:, :rank]
    return a, b @ guide.feedback if guide else b


def symmetric(factor: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """(..., n) -> codes and float16-rounded scales (..., 1) of its rows."""
    scale = round_steps(factor.abs().amax(-1, keepdim=True) / levels)
    return nearest(factor, scale, levels), scale


def lqer_encode(weight: Tensor, steps: Tensor, levels: int, guide: Guide | None = None, rank: int = 4,
                weighted: bool = False, asymmetric: bool = True) -> Arrays:
    """GPTQ and a low-rank correction of its error (LQER, arXiv:2402.02446, as in R0427).

    asymmetric: A in 2 bits, {-2 .. 1}, with one scale; B in 4 bits with a scale for 64 values, both unbalanced as
    published. Else both in 4 bits with a scale for each rank, balanced. weighted: the best correction by the Hessian.
    """
    arrays = gptq_encode(weight, steps, levels, guide)
    weight, _ = banked(weight, steps)
    error = weight - rtn_decode(arrays, tuple(weight.shape)).to(weight.device)
    a, b = correction(error, guide if weighted else None, min(rank, *weight.shape[1:]))
    if asymmetric:
        root = a.norm(dim=1, keepdim=True).clamp_min(1e-12)
        a, b = a * root, b / root.mT
        a_scale = round_steps(a.abs().amax((1, 2), keepdim=True) / 1.5)
        a_codes, group = (a / a_scale).round().clamp(-2, 1), math.gcd(b[0].numel(), 64)
        grouped = b.reshape(len(b), -1, group)
        b_scale = round_steps(grouped.abs().amax(-1, keepdim=True) / 7.5)
        b_codes = (grouped / b_scale).round().clamp(-8, 7).view_as(b)
    else:
        (a_codes, a_scale), (b_codes, b_scale) = symmetric(a.mT, 7), symmetric(b, 7)
        a_codes = a_codes.mT
    halves = {"a_scale": a_scale, "b_scale": b_scale}
    bytes_ = {"a": a_codes.flatten(0, 1), "b": b_codes.flatten(0, 1)}
    return {**arrays, **{key: value.to(torch.int8).cpu().numpy() for key, value in bytes_.items()},
            **{key: value.half().flatten().cpu().numpy() for key, value in halves.items()}}


def lqer_decode(arrays: Arrays, shape: tuple[int, ...], asymmetric: bool = True) -> Tensor:
    """Codes times the steps of their rows, plus the product of the factors."""
    values = rtn_decode(arrays, shape)
    rank = arrays["a"].shape[1]
    a, b = (torch.from_numpy(arrays[key]).float() for key in ("a", "b"))
    a, b = a.view(len(b) // rank, -1, rank), b.view(-1, rank, shape[-1])
    a_scale, b_scale = (torch.from_numpy(arrays[key]).float() for key in ("a_scale", "b_scale"))
    if asymmetric:
        a, b = a * a_scale[:, None, None], (b.reshape(len(b_scale), -1) * b_scale[:, None]).view_as(b)
    else:
        a, b = a * a_scale.view(-1, 1, rank), b * b_scale.view(-1, rank, 1)
    return values + (a @ b).view_as(values)


# --- codebooks
BINS = 1 << 16


class Histogram:
    """Values as counts in 65,536 equal bins: what k-means needs of them, in place of all values (PR #532: minutes)."""

    def __init__(self, values: Tensor):
        self.low, high = float(values.min()), float(values.max())
        self.width = max((high - self.low) / BINS, 1e-12)
        self.bins = ((values - self.low) / self.width).long().clamp(0, BINS - 1)
        self.counts = torch.bincount(self.bins.flatten(), minlength=BINS).double()
        place = torch.arange(BINS, dtype=torch.float64, device=values.device)
        self.points = self.low + (place + 0.5) * self.width

    def assign(self, centers: Tensor, cost: Tensor) -> Tensor:
        """-> (65,536,) index of the center with the least squared distance plus cost, for each bin."""
        return ((self.points[:, None] - centers).square() + cost).argmin(1)

    def kmeans(self, levels: int, price: float = 0.0, linear: bool = True, rounds: int = 20) -> tuple[Tensor, Tensor]:
        """-> centers (levels,) in rising order, and the code of each value.

        linear: centers start evenly between the extremes, as published, else at quantiles. price: of a bit of code
        length, in squared error (Chou, Lookabaugh and Gray 1989). A center without values stays where it is.
        """
        centers = torch.linspace(self.low, self.low + BINS * self.width, levels, dtype=torch.float64).to(self.points)
        if not linear:
            ranks = (torch.arange(levels).to(self.points) + 0.5) / levels * self.counts.sum()
            centers = self.points[torch.searchsorted(self.counts.cumsum(0), ranks).clamp_max(BINS - 1)]
        lengths = torch.zeros_like(centers)
        for _ in range(rounds):
            own = self.assign(centers, price * lengths)
            total = torch.zeros_like(centers).index_add_(0, own, self.counts)
            mean = torch.zeros_like(centers).index_add_(0, own, self.counts * self.points) / total.clamp_min(1e-300)
            centers, order = torch.where(total > 0, mean, centers).sort()
            lengths = -(total / total.sum()).clamp_min(2.0 ** -30).log2()[order]
        return centers, self.assign(centers, price * lengths)[self.bins]


def codebook_encode(weight: Tensor, _: Tensor, __: int, ___: Guide | None = None, count: int = 64, rows: bool = False,
                    bits: float = 0.0) -> Arrays:
    """One codebook for the whole bank: PR #532's as it is, or of rows divided by their standard deviation.

    bits > 0: an entropy-constrained codebook instead, with the price of a bit that leads to this entropy.
    """
    weight = weight.flatten(0, -2)
    scale = round_steps(weight.std(-1, keepdim=True) if rows else torch.ones_like(weight[:, :1]))
    values = Histogram(weight / scale)
    centers, codes = values.kmeans(count)
    exponent = math.log2(float((weight / scale).var()) + 1e-30) - 2 * bits  # of the price at high rates
    for step in (2.0, 1.0, 0.5, 0.25, 0.12, 0.06) if bits else ():
        centers, codes = values.kmeans(count, 2.0 ** exponent, linear=False)
        exponent += step if entropy(codes, count) > bits else -step
    codes = (codes - count // 2).to(torch.int8).cpu().numpy()
    arrays = {"codes": codes, "centers": centers.half().cpu().numpy()}
    return {**arrays, "scale": scale.flatten().half().cpu().numpy()} if rows else arrays


def entropy(codes: Tensor, count: int) -> float:
    """Bits a symbol, order 0."""
    share = torch.bincount(codes.flatten(), minlength=count).double() / codes.numel()
    return float(-(share * share.clamp_min(1e-300).log2()).sum())


def codebook_decode(arrays: Arrays, shape: tuple[int, ...]) -> Tensor:
    """Centers of the codes, times their rows' scales if there are some."""
    centers, codes = torch.from_numpy(arrays["centers"]).float(), torch.from_numpy(arrays["codes"]).long()
    values = centers[codes + len(centers) // 2]
    return (values * torch.from_numpy(arrays["scale"]).float()[:, None] if "scale" in arrays else values).view(shape)


# --- formats without a choice of steps
def int6_encode(weight: Tensor, _: Tensor, __: int, ___: Guide | None = None, levels: int = 31) -> Arrays:
    """63 levels from a row's largest entry down (2026-03-20 record)."""
    weight, steps = banked(weight, weight.abs().amax(-1, keepdim=True) / levels)
    return coded(nearest(weight, steps, levels), steps)


def fp8_encode(weight: Tensor, _: Tensor, __: int, ___: Guide | None = None) -> Arrays:
    """8-bit floats (e4m3) of rows scaled to the format's largest value (ternary record: without a scale)."""
    weight = weight.flatten(0, -2)
    scale = round_steps(weight.abs().amax(-1, keepdim=True) / train_gpt.E4M3_MAX)
    values = (weight / scale).clamp(-train_gpt.E4M3_MAX, train_gpt.E4M3_MAX).to(torch.float8_e4m3fn)
    return {"codes": values.view(torch.int8).cpu().numpy(), "scale": scale.flatten().half().cpu().numpy()}


def fp8_decode(arrays: Arrays, shape: tuple[int, ...]) -> Tensor:
    """e4m3 values times the scales of their rows."""
    values = torch.from_numpy(arrays["codes"]).view(torch.float8_e4m3fn).float()
    return (values * torch.from_numpy(arrays["scale"]).float()[:, None]).view(shape)


def pruned_encode(weight: Tensor, steps: Tensor, levels: int, _: Guide | None = None, share: float = 0.03) -> Arrays:
    """The smallest 3 % of each matrix are 0, the others round to nearest (magnitude pruning, 2026-03-20 record)."""
    weight, steps = banked(weight, steps)
    size = weight.abs().flatten(1)
    bound = size.kthvalue(max(round(share * size.size(1)), 1), dim=1).values[:, None, None]
    return coded(nearest(torch.where(weight.abs() <= bound, 0, weight), steps, levels), steps)


def stepped_encode(weight: Tensor, steps: Tensor, levels: int, _: Guide | None = None, step: int = 4) -> Arrays:
    """Codes of a grid 4 times finer, rounded to multiples of 4 (INT4_STEP=4, 2026-03-19 10-layer record)."""
    weight, steps = banked(weight, steps / step)
    return coded((nearest(weight, steps, levels) / step).round() * step, steps)


PUBLISHED_QUANTIZERS: Mapping[str, Quantizer] = {
    **{measure.__name__: Quantizer(functools.partial(measured_encode, measure), rtn_decode)
       for measure in (absmax, percentile, clip_search)},
    "act_order": Quantizer(act_order_encode, rtn_decode),
    "awq_lite": Quantizer(awq_lite_encode, awq_lite_decode),
    "lqer_sym": Quantizer(functools.partial(lqer_encode, asymmetric=False),
                          functools.partial(lqer_decode, asymmetric=False)),
    "lqer_asym": Quantizer(lqer_encode, lqer_decode),
    "lqer_weighted": Quantizer(functools.partial(lqer_encode, weighted=True, asymmetric=False),
                               functools.partial(lqer_decode, asymmetric=False)),
    **{f"codebook{count}": Quantizer(functools.partial(codebook_encode, count=count), codebook_decode)
       for count in (48, 64, 80)},
    "codebook64_rows": Quantizer(functools.partial(codebook_encode, rows=True), codebook_decode),
    "codebook64_entropy": Quantizer(functools.partial(codebook_encode, rows=True, bits=3.6), codebook_decode),
    "int6": Quantizer(int6_encode, rtn_decode), "fp8": Quantizer(fp8_encode, fp8_decode),
    "pruned": Quantizer(pruned_encode, rtn_decode), "stepped": Quantizer(stepped_encode, rtn_decode)}


def register() -> None:
    """Makes them known to the program: as values of MATRIX_QUANTIZER, EMBED_QUANTIZER and QUANT_OVERRIDES."""
    train_gpt.QUANTIZERS.update(PUBLISHED_QUANTIZERS)
    for name in ("matrix_quantizer", "embed_quantizer"):
        train_gpt.CHOICES[name] = tuple(dict.fromkeys((*train_gpt.CHOICES[name], *PUBLISHED_QUANTIZERS)))
