"""Published quantizers, to be compared with the product's (GPTQ over a trellis, steps by sensitivity).

PUBLISHED_QUANTIZERS has pairs like train_gpt.QUANTIZERS: encode(weights (..., rows, columns), steps (..., rows, 1),
largest code, guide or None) -> arrays, all int8 (entropy coded) or float16 (kept beside); decode(arrays, shape) ->
float32 weights. Weights may lie on any device; decoding is done on the CPU.

What the steps mean, which fit_artifact multiplies until the artifact has its size:

    absmax, percentile, search   their geometric mean gives the number of levels, the rows' own reach the rest
    gptq_plain, act_order, lqer_*, pruned    the grid
    awq_lite                     the grid of all columns but those of the chosen group
    stepped                      what lies between two codes in use, which is four of the int8 grid's steps
    codebook64_entropy           the price of a bit
    the others                   nothing: they have one size, and fit_artifact raises UserError if that is too large
"""
import functools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import train_gpt
from train_gpt import (
    MIN_SCALE,
    Arrays,
    Guide,
    Pair,
    coded,
    nearest,
    round_steps,
    rtn_decode,
    rtn_encode,
    search_codes,
)

NO_CLIP = 120  # the largest code that rounding alone may give int8: what train_gpt.quantize leaves to feedback


def banked(values: Tensor) -> Tensor:
    """(rows, columns) or (..., rows, columns) -> (n, rows, columns)."""
    return values.reshape(-1, *values.shape[-2:])


def bits_as_half(values: Tensor) -> np.ndarray:
    """int16 values -> float16 with the same bits, for the stream beside the codes."""
    return values.to(torch.int16).cpu().numpy().view(np.float16)


# --- what calibration knows
def shaped(error: Tensor, guide: Guide | None) -> Tensor:
    """Errors (n, rows, columns) -> e U^-1, whose squares sum to e H e^T in each row; as they are without a guide."""
    if guide is None:
        return error
    return torch.linalg.solve_triangular(guide.feedback, error, upper=True, left=False)


def row_gains(guide: Guide | None, like: Tensor) -> Tensor:
    """-> (n, rows, 1): E[g^2] of each row's output, 1 without a guide."""
    if guide is None:
        return torch.ones_like(like[..., :1])
    diagonal = guide.feedback.diagonal(dim1=1, dim2=2).log().mean(-1)[:, None, None]
    return (guide.log_sensitivity + 2 * diagonal).exp()


def weighted_errors(error: Tensor, guide: Guide | None) -> Tensor:
    """Errors (n, rows, columns) -> (n,): E[g^2] e H e^T summed over the rows, as bench/compression.py has it."""
    return (row_gains(guide, error) * shaped(error, guide).square()).sum((1, 2))


def hessian_diagonal(feedback: Tensor) -> Tensor:
    """U (n, columns, columns) -> (n, columns): the damped mean squares of the inputs; H = U^-1 U^-T."""
    identity = torch.eye(feedback.size(-1), device=feedback.device).expand_as(feedback)
    return torch.linalg.solve_triangular(feedback, identity, upper=True).square().sum(-1)


# --- plain rounding whose steps follow the reach of each row
def high_quantile(weight: Tensor, share: float) -> Tensor:
    """Weights (..., columns) -> (..., 1): what this share of the row's magnitudes lies below, interpolated."""
    place = (1 - share) * (weight.size(-1) - 1)
    low = int(place)
    top = weight.abs().topk(min(low + 2, weight.size(-1)), dim=-1).values
    return top[..., low, None].lerp(top[..., -1:], place - low)


def reach_encode(shares: tuple[float, ...], weight: Tensor, steps: Tensor, levels: int, guide: Guide | None = None) \
        -> Arrays:
    """Rounding to nearest on R levels of each sign between a row's reach and its negative; what lies beyond is clipped.

    The reach is a quantile of the row's magnitudes, of several shares the one with the least (weighted) squared error.
    R, a real number, is one for the whole tensor: the geometric mean over rows of largest magnitude / step. So steps
    twice as coarse halve R, and the rows' own reach decides how the steps of rows relate.

    absmax: share 1; the record of 2026-03-20, int5 and int6. percentile: 99.99984 %, the clip of int8 matrices from
    the first baseline on; short rows have their largest magnitude there. search: GPTQ-lite (record of 2026-03-22,
    1.1233 bits per byte), five shares; published for int6 with R = 31, there one choice for a whole matrix, here for
    each row, and weighted by the Hessian where there is a guide.
    """
    weight, steps = banked(weight), round_steps(banked(steps))
    most = weight.abs().amax(-1, keepdim=True)
    used = most > 0
    number = (torch.where(used, (most / steps).log(), 0.0).sum() / used.sum().clamp_min(1)).exp()
    limit = min(max(round(float(number)), 1), levels)
    codes, scale = torch.zeros_like(weight), torch.full_like(most, MIN_SCALE)
    least = torch.full_like(most, math.inf)
    for share in shares:
        tried = round_steps(high_quantile(weight, share) / number)
        rounded = nearest(weight, tried, limit)
        error = shaped(weight - rounded * tried, guide if len(shares) > 1 else None).square().sum(-1, keepdim=True)
        better = error < least
        codes, scale, least = (torch.where(better, new, old) for new, old in
                               ((rounded, codes), (tried, scale), (error, least)))
    return coded(codes, scale)


# --- GPTQ, and what was put on top of it
def gptq_encode(weight: Tensor, steps: Tensor, levels: int, guide: Guide | None = None) -> Arrays:
    """GPTQ (arXiv:2210.17323): columns in their own order, one step for a row. Without a guide round to nearest."""
    if guide is None:
        return rtn_encode(weight, steps, levels)
    weight, steps = banked(weight), round_steps(banked(steps))
    return coded(search_codes(weight / steps, levels, guide.feedback, 1), steps)


def act_order_encode(weight: Tensor, steps: Tensor, levels: int, guide: Guide | None = None) -> Arrays:
    """GPTQ that codes the columns with the loudest inputs first ("act-order" of the GPTQ code, arXiv:2210.17323).

    In all full-Hessian records from 2026-04-05 on. Codes are stored in the columns' own order, so decoding needs no
    permutation. With U^T U = H^-1, the factor of the permuted problem is the R of the QR decomposition of U with its
    columns permuted: R^T R is the permuted inverse Hessian. Without a guide there is no feedback, and order is nothing.
    """
    if guide is None:
        return rtn_encode(weight, steps, levels)
    weight, steps = banked(weight), round_steps(banked(steps))
    order = hessian_diagonal(guide.feedback).argsort(dim=-1, descending=True, stable=True)[:, None]
    factor = torch.linalg.qr(guide.feedback.gather(2, order.expand_as(guide.feedback)), mode="r").R
    factor = factor * factor.diagonal(dim1=1, dim2=2).sign()[..., None]
    places = order.expand_as(weight)
    codes = search_codes((weight / steps).gather(2, places), levels, factor, 1)
    return coded(torch.empty_like(codes).scatter_(2, places, codes), steps)


def awq_encode(weight: Tensor, steps: Tensor, _levels: int, guide: Guide | None = None, group: int = 64,
               finer: int = 4) -> Arrays:
    """AWQ-lite (PR #1945, after arXiv:2306.00978): GPTQ in which one group of columns of each matrix has finer steps.

    The group of 64 neighboring columns with the most saliency, the sum of root mean square of the input x mean
    magnitude of the column's weights, is int8 where the rest is int6: steps 4 times finer. Published is one group in
    the whole network, always in the embedding, int8 in int7 (finer=2), for 0.0003 bits per byte and 82 KB more: use it
    for the embedding alone to have that. Of what is published there, the group's scales and size are left out: they
    follow from the rows' scales. A row is coarser throughout if int8 could not hold its group otherwise.
    A column with finer steps is a column of larger weights and smaller inputs, so U's columns are scaled with them.
    """
    weight, steps = banked(weight), banked(steps)
    n, _, columns = weight.shape
    size, place = min(group, columns), torch.arange(columns, device=weight.device)
    loudness = hessian_diagonal(guide.feedback).sqrt() if guide else torch.ones_like(weight[:, 0])
    saliency = F.pad(loudness * weight.abs().mean(1), (0, -columns % size)).view(n, -1, size).sum(-1)
    start = saliency.argmax(-1, keepdim=True) * size
    ratio = torch.where((place >= start) & (place < start + size), finer, 1)[:, None]
    weight = weight * ratio
    scale = round_steps(steps.maximum(weight.abs().amax(-1, keepdim=True) / NO_CLIP) / finer)
    feedback = guide.feedback if guide else torch.eye(columns, device=weight.device).expand(n, -1, -1)
    codes = search_codes(weight / (finer * scale), 127, feedback * ratio, 1)
    return coded(codes, scale) | {"start": bits_as_half(start)}


def awq_decode(arrays: Arrays, shape: tuple[int, ...], group: int = 64, finer: int = 4) -> Tensor:
    """Codes times the fine steps, and all but the group `finer` times that."""
    start, place = torch.from_numpy(arrays["start"].view(np.int16)).long(), torch.arange(shape[-1])
    inside = (place >= start) & (place < start + group)
    return rtn_decode(arrays, shape) * torch.where(inside, 1.0, finer)[:, None].view(*shape[:-2], 1, shape[-1])


class Grid(NamedTuple):
    """How a low-rank factor is rounded: in groups, each with a float16 scale, to levels from low to high."""

    group: int  # neighboring values in row-major order; WHOLE: all of a matrix, ROW: those of a row
    reach: float  # the largest magnitude of a group in units of its scale
    low: int
    high: int

    def encode(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(n, rows, columns) -> codes of that shape, scales (n, groups, 1)."""
        size, (n, rows, columns) = self.size(values), values.shape
        groups = F.pad(values.flatten(1), (0, -rows * columns % size)).view(n, -1, size)
        scales = round_steps(groups.abs().amax(-1, keepdim=True) / self.reach)
        codes = (groups / scales).round().clamp(self.low, self.high)
        return codes.flatten(1)[:, :rows * columns].view_as(values), scales

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Codes (n, rows, columns), scales of any shape -> values (n, rows, columns)."""
        spread = scales.reshape(len(codes), -1).repeat_interleave(self.size(codes), 1)
        return codes * spread[:, :codes[0].numel()].view_as(codes)

    def size(self, values: Tensor) -> int:
        """Values of a full group."""
        return {WHOLE: values[0].numel(), ROW: values.size(2)}.get(self.group, self.group)


WHOLE, ROW = 0, -1
SYMMETRIC = Grid(ROW, 7.0, -7, 7), Grid(ROW, 7.0, -7, 7)  # of the left factor (rows, rank), the right (rank, columns)
ASYMMETRIC = Grid(WHOLE, 1.5, -2, 1), Grid(64, 7.5, -8, 7)
GROUPED = Grid(64, 7.0, -7, 7), Grid(64, 7.0, -7, 7)


def correct(weights: Tensor, decoded: Tensor, guide: Guide | None, rank: int, weighted: bool = True) \
        -> tuple[Tensor, Tensor]:
    """What is left of the weights (n, rows, columns) after quantization -> its best product of low rank.

    Left (n, rows, rank), right (n, rank, columns); the rank is at most the smaller side. Unweighted: of the least
    squared error, singular values on the left, as LQER (arXiv:2402.02446) was published here. Weighted: of the least
    E[g^2] e H e^T, so the decomposition is that of sqrt(E[g^2]) e U^-1, taken back to the weights' own scales.
    """
    rest = weights - decoded
    gains = row_gains(guide if weighted else None, rest).sqrt()
    u, size, v = torch.linalg.svd(gains * shaped(rest, guide if weighted else None), full_matrices=False)
    left, right = u[..., :rank] * size[:, None, :rank] / gains, v[:, :rank]
    return left, right @ guide.feedback if weighted and guide else right


def factor_arrays(factors: tuple[Tensor, Tensor], grids: tuple[Grid, Grid]) -> Arrays:
    """Both factors -> codes, n x rank rows each, and scales, all in float16: beside the codes of the weights."""
    arrays = {}
    for side, factor, grid in zip(("left", "right"), factors, grids):
        codes, scales = grid.encode(factor)
        codes = (codes.mT if side == "left" else codes).flatten(0, 1)
        arrays |= {f"{side}_codes": codes.half().cpu().numpy(), f"{side}_scale": scales.flatten().half().cpu().numpy()}
    return arrays


def factor_product(arrays: Arrays, grids: tuple[Grid, Grid], n: int) -> Tensor:
    """What factor_arrays made -> (n, rows, columns)."""
    left, right = (torch.from_numpy(arrays[f"{side}_codes"]).float().view(n, -1, arrays[f"{side}_codes"].shape[1])
                   for side in ("left", "right"))
    scales = [torch.from_numpy(arrays[f"{side}_scale"]).float() for side in ("left", "right")]
    return grids[0].decode(left.mT.contiguous(), scales[0]) @ grids[1].decode(right, scales[1])


def gain_per_byte(weights: Tensor, decoded: Tensor, guide: Guide | None, rank: int = 4) -> Tensor:
    """(n, rows, columns) twice -> (n,): by how much lqer_best's correction lowers each matrix's weighted error, a byte.

    Bytes: entropy of the factors' codes, 2 for each scale.
    """
    n = len(weights)
    arrays = factor_arrays(correct(weights, decoded, guide, rank), GROUPED)
    after = weighted_errors(weights - decoded - factor_product(arrays, GROUPED, n).to(weights.device), guide)
    sizes = np.zeros(n)
    for key, array in arrays.items():
        for i, part in enumerate(array.reshape(n, -1)):
            if key.endswith("codes"):
                share = np.unique(part, return_counts=True)[1] / part.size
                sizes[i] += -(share * np.log2(share)).sum() * part.size / 8
            else:
                sizes[i] += part.nbytes
    return (weighted_errors(weights - decoded, guide) - after) / torch.tensor(sizes, dtype=after.dtype).to(after.device)


def lqer_encode(grids: tuple[Grid, Grid], weight: Tensor, steps: Tensor, levels: int, guide: Guide | None = None,
                rank: int = 4, weighted: bool = False) -> Arrays:
    """GPTQ with act-order, and a product of low rank for every matrix of the bank: LQER (records from 2026-04-27 on).

    lqer_asym: the left factor has 2 bits and one scale, the right one 4 bits and a scale for 64 values; lqer_sym:
    4 bits, a scale for each row of both. Rank 4, without weighting. Published for the three tensors with the largest
    error. lqer_best, not published: the best product for the weighted error, 4 bits and a scale for 64 values of both,
    for the matrices with the largest gain_per_byte.
    """
    bank = banked(weight)
    arrays = act_order_encode(weight, steps, levels, guide)
    decoded = rtn_decode(arrays, tuple(bank.shape)).to(weight.device)
    return arrays | factor_arrays(correct(bank, decoded, guide, rank, weighted), grids)


def lqer_decode(grids: tuple[Grid, Grid], arrays: Arrays, shape: tuple[int, ...]) -> Tensor:
    """Codes times steps plus the product of the factors."""
    matrices = len(arrays["codes"]) // shape[-2] if len(shape) > 2 else 1
    return rtn_decode(arrays, shape) + factor_product(arrays, grids, matrices).view(shape)


# --- codebooks
BINS, PARTS = 65_536, 320


class Histogram(NamedTuple):
    """Of the values of a matrix in BINS bins between the least and the largest."""

    low: float
    width: float
    counts: np.ndarray  # (BINS + 1,): of the values in the bins before
    sums: np.ndarray  # (BINS + 1,): of the same

    @staticmethod
    def of(values: Tensor) -> "Histogram":
        """Values of any shape, finite."""
        values = values.flatten().double()
        low, high = (float(x) for x in values.aminmax())
        width = max((high - low) / BINS, 1e-60)
        bins = ((values - low) / width).long().clamp_(0, BINS - 1)
        counts, sums = (torch.bincount(bins, weights, BINS).cumsum(0).cpu().numpy() for weights in (None, values))
        return Histogram(low, width, np.append(0.0, counts), np.append(0.0, sums))


def first_levels(histogram: Histogram, start: str, number: int, step: float) -> np.ndarray:
    """-> (number or fewer,) ascending, where k-means begins.

    linear: evenly from the least value to the largest. step: multiples of the step, or of less if the levels reach
    further. best: the means of the cells with the least squared error, among those that consist of whole parts, of
    which there are PARTS between quantiles of the cube root of the density (many levels lie so, Panter and Dite 1951).
    By dynamic programming (Wang and Song 2011): the best of all where at most about PARTS values differ.
    """
    ends = histogram.low, histogram.low + BINS * histogram.width
    if start == "linear":
        return np.unique(np.linspace(*ends, number))
    if start == "step":
        return np.unique((np.arange(number) - (number - 1) // 2) * min(step, 2 * max(map(abs, ends)) / (number - 1)))
    mass = np.append(0.0, np.cbrt(np.diff(histogram.counts)).cumsum())
    edges = np.unique(np.append(np.searchsorted(mass, np.linspace(0.0, 1.0, PARTS + 1) * mass[-1]), BINS))
    edges = edges[np.append(True, np.diff(histogram.counts[edges]) > 0)]  # no part is empty
    counts, sums = (torch.from_numpy(x[edges]) for x in (histogram.counts, histogram.sums))
    sizes = counts - counts[:, None]
    gain = torch.where(sizes > 0, (sums - sums[:, None]).square() / sizes, -math.inf)  # of a cell from edge to edge
    best, choices = gain[0], []
    for _ in range(min(number, len(edges) - 1) - 1):
        best, choice = (best[:, None] + gain).max(0)
        choices.append(choice)
    cuts = [len(edges) - 1]
    for choice in reversed(choices):
        cuts.append(int(choice[cuts[-1]]))
    places = [0, *reversed(cuts)]
    return (sums[places].diff() / counts[places].diff()).numpy()


def cells(levels: np.ndarray, bits: np.ndarray, price: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Levels (k,) ascending, their code lengths (k,) -> those that are somewhere the best, and the bounds between them.

    A value x costs (x - level)^2 + price x bits at a level; where the bounds to both neighbors are crossed it is
    nowhere the best.
    """
    while True:
        bounds = (levels[1:] + levels[:-1]) / 2 + price * np.diff(bits) / (2 * np.diff(levels))
        kept = np.ones(len(levels), bool)
        kept[1:-1] = bounds[1:] > bounds[:-1]
        if kept.all():
            return levels, bits, bounds
        levels, bits = levels[kept], bits[kept]


def k_means(histogram: Histogram, levels: np.ndarray, rounds: int, price: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Lloyd's iteration from these ascending levels -> (levels as float16 holds them, bounds between them in float64).

    Minimizes squared error + price x entropy in bits (Chou, Lookabaugh and Gray 1989). A level without values stays
    where it is at price 0, and is dropped at any other.
    """
    bits = np.full(len(levels), math.log2(len(levels)))
    for _ in range(rounds):
        levels, bits, bounds = cells(levels, bits, price)
        inner = np.clip(np.ceil((bounds - histogram.low) / histogram.width), 0, BINS).astype(int)
        edges = np.concatenate([[0], inner, [BINS]])
        count, total = np.diff(histogram.counts[edges]), np.diff(histogram.sums[edges])
        kept = count > 0 if price else np.ones(len(count), bool)
        moved = np.where(count > 0, total / np.maximum(count, 1), levels)[kept]
        lengths = -np.log2(count[kept] / count.sum()) if price else bits
        still = np.array_equal(levels, moved) and np.array_equal(bits, lengths)
        levels, bits = moved, lengths
        if still:
            break
    levels, first = np.unique(np.clip(levels, -65504, 65504).astype(np.float16), return_index=True)
    levels, _, bounds = cells(levels.astype(float), bits[first], price)
    return levels.astype(np.float16), bounds


def codebook_encode(number: int, weight: Tensor, steps: Tensor, _levels: int, _guide: Guide | None = None,
                    by_row: bool = False, start: str = "best", rounds: int = 1000) -> Arrays:
    """A k-means codebook for each matrix, its levels in float16 (PR #532, "PCLL": 1.1511 to 1.16 bits per byte).

    Published: 48 levels in the MLP, 64 in the output projection and the embedding, 80 in query, key and value, 20
    rounds from a linear start on the raw weights, Huffman code; 14.1 MB. That start leaves a lower entropy and a larger
    error than k-means that has converged: codebook64_linear is the published one, others begin well.
    by_row: of rows divided by their root mean squares, which are stored. start="step" (codebook64_entropy) minimizes
    error + price x bits, with the price at which a uniform grid of these steps is the best one: step^2 ln(2) / 6.
    Codes count from the level next to 0, so that rows of small weights have small codes.
    """
    bank, steps = banked(weight), banked(steps)
    arrays, scale = {}, torch.ones_like(bank[..., :1])
    if by_row:
        scale = round_steps(bank.square().mean(-1, keepdim=True).sqrt())
        arrays["scale"] = scale.flatten().half().cpu().numpy()
    codes, books = np.empty(bank.shape, np.int8), np.empty((len(bank), number), np.float16)
    for i, (values, step) in enumerate(zip(bank / scale, round_steps(steps) / scale)):
        mean_square = float(step.double().square().log().mean().exp())
        histogram, price = Histogram.of(values), mean_square * math.log(2) / 6 if start == "step" else 0.0
        levels = first_levels(histogram, start, number, math.sqrt(mean_square))
        levels, bounds = k_means(histogram, levels, rounds, price)
        books[i] = np.pad(levels, (0, number - len(levels)), mode="edge")
        index = torch.bucketize(values, torch.tensor(bounds, dtype=values.dtype, device=values.device), out_int32=True)
        codes[i] = (index - int(np.abs(books[i]).argmin())).to(torch.int8).cpu().numpy()
    columns = np.zeros((1, bank.size(-1)), np.int8)
    return arrays | {"columns": columns, "codes": codes.reshape(-1, bank.size(-1)), "levels": books}


def codebook_decode(arrays: Arrays, shape: tuple[int, ...]) -> Tensor:
    """Levels by codes, times the rows' scales where there are any."""
    books = arrays["levels"].astype(np.float32)
    codes = arrays["codes"].reshape(len(books), -1, shape[-1])
    values = np.stack([book[code.astype(np.int16) + np.abs(book).argmin()] for book, code in zip(books, codes)])
    if "scale" in arrays:
        values *= arrays["scale"].astype(np.float32).reshape(len(books), -1, 1)
    return torch.from_numpy(values).view(shape)


# --- other grids
def int6_encode(weight: Tensor, _steps: Tensor, _levels: int, _guide: Guide | None = None, levels: int = 31) -> Arrays:
    """63 levels down from each row's largest magnitude (record of 2026-03-20)."""
    return rtn_encode(weight, weight.abs().amax(-1, keepdim=True) / levels, levels)


def fp8_encode(weight: Tensor, _steps: Tensor, _levels: int, _guide: Guide | None = None) -> Arrays:
    """Floats of 8 bits, e4m3, with a scale for each row that takes its largest magnitude to 448.

    The ternary record of 2026-03-24 keeps its other matrices so, there without a scale. Codes are the bit patterns.
    """
    scale = round_steps(weight.abs().amax(-1, keepdim=True) / 448)
    floats = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return coded(floats.view(torch.int8), scale)


def fp8_decode(arrays: Arrays, shape: tuple[int, ...]) -> Tensor:
    """The floats that the codes are the bits of, times the scales of their rows."""
    return train_gpt.rescaled(torch.from_numpy(arrays["codes"]).view(torch.float8_e4m3fn).float(), arrays, shape)


def pruned_encode(weight: Tensor, steps: Tensor, levels: int, _guide: Guide | None = None, share: float = 1 / 3) \
        -> Arrays:
    """Magnitude pruning (arXiv:1506.02626), then rounding to nearest: the smallest third of each matrix is 0.

    The record of 2026-03-20 prunes 3 % so before int5 and int6. Never more than the share, whatever is equal in size.
    """
    bank = banked(weight).abs().flatten(1)
    threshold = bank.kthvalue(int(share * bank.size(1)) + 1, dim=1).values[:, None, None]
    kept = banked(weight).abs() >= threshold
    return rtn_encode(banked(weight) * kept, banked(steps), levels)


def stepped_encode(weight: Tensor, steps: Tensor, _levels: int, _guide: Guide | None = None, multiple: int = 4) \
        -> Arrays:
    """int8 codes rounded once more, to multiples of 4 within -127 .. 127 (INT4_STEP, record of 2026-03-19, 1.2147).

    Published with scales of int8, largest magnitude / 127, for the middle layers. Here the steps are those between the
    multiples, so the scale is a quarter of them, or that largest magnitude / 127 if it is more.
    """
    scale = round_steps((steps / multiple).maximum(weight.abs().amax(-1, keepdim=True) / 127))
    return coded(((weight / scale).round() / multiple).round().mul(multiple).clamp(-127, 127), scale)


def codebook(number: int, **options: bool | str | int) -> Pair:
    """Codebooks of at most 128 levels; options of codebook_encode."""
    return Pair(functools.partial(codebook_encode, number, **options), codebook_decode)


def lqer(grids: tuple[Grid, Grid], **options: bool | int) -> Pair:
    """Low-rank correction with factors on these grids; options of lqer_encode."""
    return Pair(functools.partial(lqer_encode, grids, **options), functools.partial(lqer_decode, grids))


PUBLISHED_QUANTIZERS: dict[str, Pair] = {
    "absmax": Pair(functools.partial(reach_encode, (1.0,)), rtn_decode),
    "percentile": Pair(functools.partial(reach_encode, (0.9999984,)), rtn_decode),
    "search": Pair(functools.partial(reach_encode, (0.999, 0.9995, 0.9999, 0.99999, 1.0)), rtn_decode),
    "gptq_plain": Pair(gptq_encode, rtn_decode), "act_order": Pair(act_order_encode, rtn_decode),
    "awq_lite": Pair(awq_encode, awq_decode), "lqer_sym": lqer(SYMMETRIC), "lqer_asym": lqer(ASYMMETRIC),
    "lqer_best": lqer(GROUPED, weighted=True),
    "codebook48": codebook(48), "codebook64": codebook(64), "codebook80": codebook(80),
    **{f"codebook{number}_linear": codebook(number, start="linear", rounds=20) for number in (48, 64, 80)},
    "codebook64_rows": codebook(64, by_row=True),
    "codebook64_entropy": codebook(64, start="step", rounds=200),
    "int6": Pair(int6_encode, rtn_decode), "fp8": Pair(fp8_encode, fp8_decode),
    "pruned": Pair(pruned_encode, rtn_decode), "stepped": Pair(stepped_encode, rtn_decode)}


def register() -> None:
    """Makes them known to the program: as values of MATRIX_QUANTIZER, EMBED_QUANTIZER and QUANT_OVERRIDES."""
    train_gpt.QUANTIZERS.update(PUBLISHED_QUANTIZERS)
    for name in ("matrix_quantizer", "embed_quantizer"):
        train_gpt.CHOICES[name] = tuple(dict.fromkeys((*train_gpt.CHOICES[name], *PUBLISHED_QUANTIZERS)))
