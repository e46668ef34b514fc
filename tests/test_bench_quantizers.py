"""bench/quantizers.py: published quantizers against slow versions of them, on hard inputs, and through the artifact."""
# pyright: reportMissingImports=false
import functools
import itertools
import math
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import program
import pytest
import torch

import train_gpt
from train_gpt import MIN_SCALE, Config, Guide, inverse_factor, round_steps, sigma_steps

sys.path.insert(0, str(program.ROOT / "bench"))
import compression
import quantizers
from quantizers import GROUPED, PUBLISHED_QUANTIZERS, Histogram, correct, first_levels, k_means

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
IDEMPOTENT = ["absmax", "percentile", "gptq_plain", "act_order", "awq_lite", "codebook48", "codebook64", "codebook80",
              "codebook64_entropy", "int6", "fp8", "pruned", "stepped"]
REPEATED = {  # the others: most that a second time changes, in parts of the first error, as measured and a fifth more
    "search": 0.2,  # another of the five shares is the best of values that lie on a grid
    "codebook64_rows": 0.3,  # the rows' root mean squares are those of the rounded values
    **dict.fromkeys(("codebook48_linear", "codebook64_linear", "codebook80_linear"), 0.75),  # 20 rounds go on
    **dict.fromkeys(("lqer_sym", "lqer_asym", "lqer_best"), 1.6)}  # corrected weights lie between the codes again
FIXED_SIZE = ["codebook48", "codebook64", "codebook80", "codebook48_linear", "codebook64_linear", "codebook80_linear",
              "codebook64_rows", "int6", "fp8"]
SMALL = Config(num_layers=2, model_dim=64, num_heads=4, num_kv_heads=2, mlp_mult=2.0, vocab_size=64, rope_dims=4,
               xsa_last_n=0, parallel_start_layer=0, num_loops=0, gate_window=8, compressor="zstd",
               softcap_type="tanh")


def normal(*shape: int, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


def make_guide(n: int, rows: int, columns: int, seed: int = 0, contrast: float = 0.0) -> Guide:
    """Inputs that depend on each other, their columns' sizes e^(contrast x normal), each row with its own gain."""
    mixing = torch.eye(columns) + 0.4 * normal(columns, columns, seed=seed + 1)
    x = normal(n, 4 * columns, columns, seed=seed) @ mixing * (contrast * normal(n, 1, columns, seed=seed + 2)).exp()
    return Guide(inverse_factor(x.mT @ x / x.size(1)), normal(n, rows, 1, seed=seed + 3))


def damped_hessian(guide: Guide) -> np.ndarray:
    """(n, columns, columns) in float64."""
    feedback = guide.feedback.double()
    return torch.linalg.inv(feedback.mT @ feedback).numpy()


def encode(name: str, weight: torch.Tensor, guide: Guide | None = None, steps: torch.Tensor | float = 10.0,
           levels: int = 127):
    """Steps, or standard deviations in 31 of them."""
    return PUBLISHED_QUANTIZERS[name].encode(
        weight, sigma_steps(weight, 6, steps) if isinstance(steps, float) else steps, levels, guide)


def decode(name: str, arrays: dict[str, np.ndarray], shape: tuple[int, ...]) -> torch.Tensor:
    return PUBLISHED_QUANTIZERS[name].decode(arrays, shape)


def round_trip(name: str, weight: torch.Tensor, guide: Guide | None = None, steps: torch.Tensor | float = 10.0):
    return decode(name, encode(name, weight, guide, steps), tuple(weight.shape))


def half(value: float) -> float:
    """As the nearest float16 has it."""
    return float(np.float16(min(max(value, MIN_SCALE), 65504.0)))


def entropy(codes: np.ndarray) -> float:
    share = np.unique(codes, return_counts=True)[1] / codes.size
    return float(-(share * np.log2(share)).sum())


# --- all of them
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", PUBLISHED_QUANTIZERS)
def test_shapes_types_and_hard_rows(name, guided, device):
    """Rows of zeros, of one value, huge and tiny rows, an outlier; banks and single matrices of odd sizes."""
    for shape in [(3, 70), (2, 5, 70), (1, 2, 3), (2, 2), (1, 2), (2, 1, 2), (4, 130)]:
        weight = normal(*shape, seed=1)
        weight[..., 0, :] = 0.0
        if len(shape) == 3:
            weight[-1] = 0.0
        if shape[-2] > 4:
            weight[0, 1], weight[0, 4, 7] = 0.25, 99.0
            weight[0, 2:4] *= torch.tensor([[1e6], [1e-9]])
        guide = make_guide(math.prod(shape[:-2]), *shape[-2:]) if guided else None
        guide = Guide(*(part.to(device) for part in guide)) if guide else None
        arrays = encode(name, weight.to(device), guide)
        decoded = decode(name, arrays, shape)
        assert decoded.shape == shape and decoded.dtype == torch.float32 and decoded.device.type == "cpu"
        assert decoded.isfinite().all()
        assert {str(array.dtype) for array in arrays.values()} <= {"int8", "float16"}
        assert all(array.ndim == 2 for array in arrays.values() if array.dtype == np.int8)
        assert arrays["codes"].shape == (math.prod(shape[:-1]), shape[-1])
        assert all((array >= np.float16(MIN_SCALE)).all() for key, array in arrays.items() if key.endswith("scale"))
        if "codebook" not in name:
            assert decoded[..., 0, :].abs().max() <= 1e-3, shape


@pytest.mark.parametrize("name", PUBLISHED_QUANTIZERS)
def test_a_weight_of_zeros_stays_as_good_as_zero(name):
    for guide in (None, make_guide(2, 3, 66)):
        assert round_trip(name, torch.zeros(2, 3, 66), guide).abs().max() <= MIN_SCALE


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", IDEMPOTENT)
def test_what_was_decoded_is_coded_as_itself(name, guided):
    for shape in [(3, 70), (2, 5, 90)]:
        weight, guide = normal(*shape, seed=2), make_guide(math.prod(shape[:-2]), *shape[-2:]) if guided else None
        steps = sigma_steps(weight, 6, 10.0)
        decoded = round_trip(name, weight, guide, steps)
        assert torch.equal(round_trip(name, decoded, guide, steps), decoded)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", REPEATED)
def test_what_is_coded_twice_changes_little_the_second_time(name, guided):
    changes = []
    for seed, shape in itertools.product(range(3), [(3, 70), (2, 5, 90), (2, 40, 200)]):
        weight, guide = normal(*shape, seed=seed), make_guide(math.prod(shape[:-2]), *shape[-2:]) if guided else None
        steps = sigma_steps(weight, 6, 10.0)
        decoded = round_trip(name, weight, guide, steps)
        again = round_trip(name, decoded, guide, steps)
        changes.append(float((again - decoded).norm() / (decoded - weight).norm()))
    assert 0 < max(changes) < REPEATED[name]


def test_every_quantizer_is_idempotent_or_an_exception():
    assert sorted([*IDEMPOTENT, *REPEATED]) == sorted(PUBLISHED_QUANTIZERS)


@pytest.mark.parametrize("name", PUBLISHED_QUANTIZERS)
def test_round_trip_through_the_artifact(name, monkeypatch):
    for key, quantizer in PUBLISHED_QUANTIZERS.items():
        monkeypatch.setitem(train_gpt.QUANTIZERS, key, quantizer)
    quantized, expected = {}, {}
    for i, (key, shape) in enumerate(train_gpt.param_shapes(SMALL).items()):
        weight, chosen = normal(*shape, seed=i), name if train_gpt.quantizer_of(SMALL, key)[0] != "fp16" else "fp16"
        guide = make_guide(math.prod(shape[:-2]), *shape[-2:]) if chosen == name and shape[-1] <= 64 else None
        steps = sigma_steps(weight, 6, 10.0) if chosen == name else weight
        quantized[key] = chosen, train_gpt.QUANTIZERS[chosen].encode(weight, steps, 127, guide)
        expected[key] = train_gpt.QUANTIZERS[chosen].decode(quantized[key][1], shape)
    _, found = train_gpt.unpack_artifact(train_gpt.pack_artifact(SMALL, quantized, {}), "here")
    assert list(found) == list(expected) and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", sorted(set(PUBLISHED_QUANTIZERS) - set(FIXED_SIZE)))
def test_one_multiplier_of_the_steps_sets_the_size(name, monkeypatch):
    """With an ideal coder of order 0, which is fast and has no steps of its own."""
    def ideal(data: bytes) -> bytes:
        return bytes(round(entropy(np.frombuffer(data, np.int8)) * len(data) / 8)) if data else b""
    monkeypatch.setitem(train_gpt.CODECS, SMALL.compressor, train_gpt.Pair(ideal, bytes))
    monkeypatch.setitem(train_gpt.QUANTIZERS, name, PUBLISHED_QUANTIZERS[name])
    for key in ("matrix_quantizer", "embed_quantizer"):
        monkeypatch.setitem(train_gpt.CHOICES, key, (name,))
    config = Config(**train_gpt.model_fields(SMALL), matrix_quantizer=name, embed_quantizer=name, target_bytes=16_000,
                    compressor=SMALL.compressor)
    weights = {key: normal(*shape, seed=1) * (1 + normal(*shape[:-1], 1, seed=2).abs() if len(shape) > 1 else 1)
               for key, shape in train_gpt.param_shapes(config).items()}
    lines: list[str] = []
    data = train_gpt.fit_artifact(config, weights, {}, {}, 0, lines.append)
    assert 0.98 * 16_000 < len(data) <= 16_000, lines  # so small a file changes by 2 % when rows change their class
    sizes = [len(train_gpt.pack_artifact(config, train_gpt.quantize(config, weights, {}, 2 ** power), {}))
             for power in (-0.5, 0.5, 1.0, 2.0)]
    assert sizes == sorted(sizes, reverse=True), sizes


# --- steps by the reach of each row
@pytest.mark.parametrize("name,shares", [
    ("absmax", [1.0]), ("percentile", [0.9999984]), ("search", [0.999, 0.9995, 0.9999, 0.99999, 1.0])])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("number,levels", [(3.0, 127), (31.0, 31), (40.0, 31)])
def test_reach_against_loops(name, shares, guided, number, levels):
    """Row by row; steps for which the geometric mean of reach / step is `number`."""
    weight, guide = normal(1, 6, 50).sinh(), make_guide(1, 6, 50) if guided else None
    steps = weight.abs().amax(-1, keepdim=True) / number
    arrays = encode(name, weight, guide, steps, levels)
    hessian = damped_hessian(guide)[0] if guide else np.eye(50)
    chosen = set()
    for row, codes, scale in zip(weight[0].double().numpy(), arrays["codes"], arrays["scale"]):
        tries = []
        for share in shares:
            step = half(np.quantile(np.abs(row), share) / number)
            wanted = np.clip(np.rint(row / step), -min(round(number), levels), min(round(number), levels))
            error = row - wanted * step
            tries.append((error @ hessian @ error, wanted, step))
        best = min(range(len(tries)), key=lambda i: tries[i][0])
        chosen.add(best)
        assert scale == pytest.approx(tries[best][2], rel=1e-3) and np.abs(codes - tries[best][1]).max() <= 1
        assert (codes != tries[best][1]).mean() < 0.05
    assert len(chosen) > 1 or name != "search" or not guided or number > 3


def test_steps_of_reach_have_the_mean_of_those_given():
    weight, steps = normal(2, 8, 64).exp(), normal(2, 8, 1).exp()
    weight[0, 3] = 0.0  # counts for nothing
    arrays = encode("absmax", weight, None, steps)
    ratio = torch.from_numpy(arrays["scale"]).float().view(2, 8, 1).log() - steps.log()
    assert arrays["scale"][3] == np.float16(MIN_SCALE)
    ratio[0, 3] = 0.0
    assert abs(float(ratio.mean())) < 1e-3


# --- GPTQ and what is on top of it
def gptq_by_hand(row: np.ndarray, steps: np.ndarray, hessian: np.ndarray, order: list[int]) -> np.ndarray:
    """One row, column by column in this order -> codes; the inverse Hessian of those left is found by elimination."""
    rest, codes, inverse = row.copy(), np.zeros(len(row)), np.linalg.inv(hessian)
    for j in order:
        codes[j] = np.clip(np.rint(rest[j] / steps[j]), -127, 127)
        rest -= (rest[j] - codes[j] * steps[j]) / inverse[j, j] * inverse[j]
        inverse = inverse - np.outer(inverse[j], inverse[j]) / inverse[j, j]
    return codes


def test_act_order_against_loops():
    weight, guide = normal(2, 5, 24), make_guide(2, 5, 24, contrast=1.0)
    steps, hessian = round_steps(sigma_steps(weight, 4, 3.0)), damped_hessian(guide)
    codes = encode("act_order", weight, guide, steps)["codes"].reshape(2, 5, 24)
    for i, j in itertools.product(range(2), range(5)):
        order = sorted(range(24), key=lambda column: -hessian[i, column, column])
        wanted = gptq_by_hand(weight[i, j].double().numpy(), np.full(24, float(steps[i, j])), hessian[i], order)
        assert (codes[i, j] == wanted).mean() > 0.9


def weighted(weight: torch.Tensor, decoded: torch.Tensor, guide: Guide) -> float:
    return compression.weighted_error({"a": weight}, {"a": decoded}, {"a": guide})


def test_act_order_costs_less_than_no_order_where_columns_differ():
    weight, guide = normal(1, 64, 160), make_guide(1, 64, 160, contrast=1.5)
    gptq = PUBLISHED_QUANTIZERS["gptq_plain"]
    plain = gptq.decode(gptq.encode(weight, sigma_steps(weight, 4, 3.0), 127, guide), (1, 64, 160))
    ordered = round_trip("act_order", weight, guide, sigma_steps(weight, 4, 3.0))
    assert weighted(weight, ordered, guide) < 0.8 * weighted(weight, plain, guide)


@pytest.mark.parametrize("columns", [20, 64, 150])
def test_awq_lite_against_loops(columns):
    weight, guide = normal(2, 4, columns), make_guide(2, 4, columns, contrast=0.3)
    steps, hessian = sigma_steps(weight, 6, 10.0), damped_hessian(guide)
    weight[1, 2, :] *= 3  # a row that int8 could not hold with these steps
    arrays = encode("awq_lite", weight, guide, steps)
    decoded, starts = decode("awq_lite", arrays, (2, 4, columns)), arrays["start"].view(np.int16).ravel()
    unguided = round_trip("awq_lite", weight, None, steps)
    for i in range(2):
        saliency = np.sqrt(np.diagonal(hessian[i])) * weight[i].abs().mean(0).numpy()
        start = max(range(0, columns, 64), key=lambda first: saliency[first:first + 64].sum())
        assert starts[i] == start
        for j in range(4):
            row, fine = weight[i, j].double().numpy(), np.arange(columns) // 64 == start // 64
            most = np.abs(np.where(fine, 4 * row, row)).max()
            step = half(max(float(steps[i, j]), most / 120) / 4)
            assert arrays["scale"].reshape(2, 4)[i, j] == pytest.approx(step, rel=1e-3)
            sizes = np.where(fine, step, 4 * step)
            wanted = gptq_by_hand(row, sizes, hessian[i], list(range(columns)))
            close = np.isclose(decoded[i, j], wanted * sizes, rtol=1e-2, atol=step / 10)
            assert close[:16].all() and close.mean() > 0.5  # later codes follow from near ties before
            assert (np.abs(unguided[i, j].double().numpy() - row) <= 2.01 * step).all()


def test_awq_lite_halves_errors_in_the_group():
    weight = normal(8, 256)
    weight[:, 128:192] *= 1.5
    error = (round_trip("awq_lite", weight) - weight).square().mean(0)
    assert 10 * error[128:192].mean() < error[:128].mean()


# --- low-rank correction
def grid_by_hand(values: np.ndarray, group: int, reach: float, low: int, high: int) -> np.ndarray:
    flat = values.ravel()
    out = np.zeros_like(flat)
    for first in range(0, len(flat), group):
        part = flat[first:first + group]
        scale = half(np.abs(part).max() / reach)
        out[first:first + group] = np.clip(np.rint(part / scale), low, high) * scale
    return out.reshape(values.shape)


@pytest.mark.parametrize("name", ["lqer_sym", "lqer_asym"])
@pytest.mark.parametrize("rows,columns", [(20, 32), (9, 21), (3, 50), (2, 2)])
def test_lqer_against_numpy(name, rows, columns):
    weight, guide = normal(2, rows, columns), make_guide(2, rows, columns)
    steps = sigma_steps(weight, 6, 10.0)
    decoded = round_trip(name, weight, guide, steps)
    plain = round_trip("act_order", weight, guide, steps)
    for i in range(2):
        u, size, v = np.linalg.svd((weight - plain)[i].numpy(), full_matrices=False)
        distances = []
        for signs in itertools.product([1, -1], repeat=min(4, len(size))):  # -2 has no counterpart
            left, right = u[:, :4] * size[:4] * signs, v[:4] * np.array(signs)[:, None]
            if name == "lqer_sym":
                product = grid_by_hand(left, left.shape[1], 7, -7, 7) @ grid_by_hand(right, columns, 7, -7, 7)
            else:
                product = grid_by_hand(left, left.size, 1.5, -2, 1) @ grid_by_hand(right, 64, 7.5, -8, 7)
            distances.append(np.abs((decoded - plain)[i].numpy() - product).max())
        assert min(distances) < 1e-4


@pytest.mark.parametrize("name", ["lqer_sym", "lqer_asym"])
def test_lqer_lowers_the_error(name):
    """Of coarse rounding, which leaves more than noise: GPTQ moves errors along the inputs' directions."""
    weight, guide = normal(2, 96, 64), make_guide(2, 96, 64, contrast=1.0)
    steps = sigma_steps(weight, 3, 3.0)
    plain = round_trip("act_order", weight, guide, steps)
    decoded = round_trip(name, weight, guide, steps)
    assert (decoded - weight).square().sum() < 0.95 * (plain - weight).square().sum()


def test_the_weighted_correction_is_the_best_of_its_rank():
    weight, guide = normal(2, 12, 10), make_guide(2, 12, 10, contrast=0.7)
    plain = (2 * weight).round() / 2
    rank = 3
    errors = {}
    for kind in (True, False):
        left, right = correct(weight, plain, guide, rank, kind)
        assert left.shape == (2, 12, 3) and right.shape == (2, 3, 10)
        errors[kind] = weighted(weight, plain + left @ right, guide)
        if kind:  # what is left over are the smaller singular values of the problem in float64
            total = 0.0
            for i in range(2):
                diagonal = guide.feedback[i].diagonal().double().log().mean()
                gain = (guide.log_sensitivity[i].double() + 2 * diagonal).exp().sqrt()
                error = gain * (weight - plain)[i].double() @ torch.linalg.inv(guide.feedback[i].double())
                total += float(torch.linalg.svdvals(error)[rank:].square().sum())
            assert errors[True] == pytest.approx(total, rel=1e-3)
    assert errors[True] < 0.9 * errors[False] < 0.9 * weighted(weight, plain, guide)
    assert torch.equal(correct(weight, plain, None, rank)[0], correct(weight, plain, guide, rank, False)[0])


def test_gain_per_byte():
    weight, guide = normal(2, 40, 30), make_guide(2, 40, 30)
    weight[1] *= 0.01  # whose correction gains next to nothing
    plain = (2 * weight).round() / 2
    plain[1] = weight[1] * 1.001
    gain = quantizers.gain_per_byte(weight, plain, guide)
    arrays = quantizers.factor_arrays(correct(weight, plain, guide, 4), GROUPED)
    fixed = plain + quantizers.factor_product(arrays, GROUPED, 2)
    before, after = (quantizers.weighted_errors(weight - x, guide) for x in (plain, fixed))
    assert float(before.sum()) == pytest.approx(weighted(weight, plain, guide), rel=1e-4)
    for i in range(2):
        size = 2 * sum(arrays[f"{side}_scale"].reshape(2, -1)[i].size for side in ("left", "right"))
        size += sum(entropy(part) * part.size / 8 for side in ("left", "right")
                    for part in [arrays[f"{side}_codes"].reshape(2, 4, -1)[i]])
        assert float(gain[i]) == pytest.approx(float(before[i] - after[i]) / size, rel=1e-3, abs=1e-6)
    assert gain[0] > 100 * gain[1].abs()


def test_lqer_best_lowers_the_weighted_error_by_more_a_byte():
    weight, guide = normal(1, 256, 128), make_guide(1, 256, 128, contrast=0.5)
    steps, found = sigma_steps(weight, 6, 13.0), {}
    plain = round_trip("act_order", weight, guide, steps)
    for name in ("lqer_asym", "lqer_sym", "lqer_best"):
        arrays = encode(name, weight, guide, steps)
        size = sum(entropy(array) * array.size / 8 if "codes" in key else array.nbytes
                   for key, array in arrays.items() if key.startswith(("left", "right")))
        after = weighted(weight, decode(name, arrays, (1, 256, 128)), guide)
        found[name] = (weighted(weight, plain, guide) - after) / size
    assert found["lqer_best"] > max(found["lqer_asym"], found["lqer_sym"], 0)
    assert found["lqer_best"] == pytest.approx(float(quantizers.gain_per_byte(weight, plain, guide)), rel=1e-3)


def test_which_matrices_are_corrected(registries):
    """lqer_best: where a byte gains more than it does, as measured, in finer steps. Others: the three worst."""
    quantizers.register()
    config = replace(SMALL, **compression.PUBLISHED["act_order"])
    shapes = {name: shape for name, shape in train_gpt.param_shapes(config).items() if name.endswith("_proj")}
    weights = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(train_gpt.param_shapes(config).items())}
    guides = {name: make_guide(*shape, seed=i, contrast=0.4 * i) for i, (name, shape) in enumerate(shapes.items())}
    work: Any = object.__new__(compression.Comparison)
    work.world, work.weights, work.guides = SimpleNamespace(device="cpu"), weights, guides
    work.count = sum(weights[name].numel() for name in guides)
    found = {power: train_gpt.quantize(config, weights, guides, 2 ** power) for power in (0, -0.1)}
    errors, sizes, decoded = {}, {}, {}
    for power, quantized in found.items():
        decoded = {name: train_gpt.rtn_decode(quantized[name][1], shape) for name, shape in shapes.items()}
        errors[power] = compression.weighted_error(weights, decoded, guides)
        sizes[power] = compression.entropy_bytes({name: quantized[name] for name in shapes})
    slope = (errors[0] - errors[-0.1]) / (sizes[-0.1] - sizes[0])
    decoded = {name: train_gpt.rtn_decode(found[0][name][1], shape) for name, shape in shapes.items()}
    gains = {f"{name}:{i}": float(gain) / slope for name in shapes
             for i, gain in enumerate(quantizers.gain_per_byte(weights[name], decoded[name], guides[name]))}
    chosen = work.corrected(config, "lqer_best").split(",")
    assert 0 < len(chosen) < len(gains) and all(place.endswith("=lqer_best") for place in chosen)
    chosen = [place.removesuffix("=lqer_best") for place in chosen]
    assert chosen == sorted(chosen, key=lambda place: -gains[place])
    assert all(gains[place] > (0.9 if place in chosen else -math.inf) for place in gains)
    assert all(gains[place] < 1.1 for place in gains if place not in chosen)
    norms = {f"{name}:{i}": float(error.norm()) for name in shapes
             for i, error in enumerate(weights[name] - decoded[name])}
    assert work.corrected(config, "lqer_asym") == ",".join(
        f"{place}=lqer_asym" for place in sorted(norms, key=lambda place: -norms[place])[:3])


# --- codebooks
def squared_error(values: np.ndarray, levels: np.ndarray) -> float:
    return float(np.square(values[:, None] - levels).min(1).sum())


def best_levels(values: np.ndarray, number: int) -> float:
    """Least squared error of k-means: every way to cut the sorted values into so many cells."""
    values, least = np.sort(values), math.inf
    for cuts in itertools.combinations(range(1, len(values)), number - 1):
        least = min(least, sum(float(np.square(part - part.mean()).sum()) for part in np.split(values, list(cuts))))
    return least


@pytest.mark.parametrize("seed", range(8))
def test_k_means_is_not_worse_than_brute_force(seed):
    """Up to the rounding of the levels to float16."""
    random = np.random.default_rng(seed)
    clusters = np.repeat(np.sort(random.normal(size=3)) + np.array([-10, 0, 10]), 5) + 0.1 * random.normal(size=15)
    for values in (clusters, random.normal(size=15), random.normal(size=15) ** 3, random.integers(-3, 4, 15) / 2.0):
        histogram = Histogram.of(torch.from_numpy(values))
        levels, _ = k_means(histogram, first_levels(histogram, "best", 3, 0.0), 1000)
        assert squared_error(values, levels.astype(float)) <= 1.001 * best_levels(values, 3) + 3e-4


def lloyd_by_hand(values: np.ndarray, levels: np.ndarray, rounds: int) -> np.ndarray:
    for _ in range(rounds):
        own = np.abs(values[:, None] - levels).argmin(1)
        levels = np.array([values[own == k].mean() if (own == k).any() else level for k, level in enumerate(levels)])
    return levels


def test_the_published_codebook_is_lloyd_from_a_linear_start():
    weight = normal(1, 20, 60)
    weight[0, 3, 3] = 9.0  # leaves levels without values
    arrays, values = encode("codebook64_linear", weight), weight.flatten().double().numpy()
    wanted = lloyd_by_hand(values, np.linspace(values.min(), values.max(), 64), 20)
    np.testing.assert_allclose(arrays["levels"][0], wanted, atol=4e-3)
    decoded = decode("codebook64_linear", arrays, (1, 20, 60)).flatten().numpy()
    np.testing.assert_allclose(decoded, arrays["levels"][0][np.abs(
        values[:, None] - arrays["levels"][0].astype(float)).argmin(1)], atol=1e-5)


def test_k_means_of_normal_values_is_the_quantizer_of_the_tables():
    """Max (1960): 30.89 dB would be a loss of a decibel; 64 levels reach 31.89 dB."""
    weight = normal(1, 256, 4096)
    for name, wanted in (("codebook64", 31.89), ("codebook64_rows", 31.89), ("codebook48", 29.44)):
        error = (round_trip(name, weight) - weight).square().mean()
        assert -10 * math.log10(float(error)) == pytest.approx(wanted, abs=0.06), name


def test_codebooks_of_few_values_are_exact():
    weight = torch.tensor([0.5, -1.25, 0.0, 3.0])[torch.arange(200) * 7 % 4].view(2, 4, 25)
    for name in ("codebook48", "codebook64", "codebook80", "codebook64_entropy"):
        assert torch.equal(round_trip(name, weight), weight), name
        assert (encode(name, weight)["codes"].reshape(2, 4, 25)[weight == 0] == 0).all()


def test_codebooks_by_row_do_not_see_the_size_of_rows():
    weight = normal(1, 64, 256)
    scaled = weight * (3 * normal(1, 64, 1)).exp()
    plain, rows = (((round_trip(name, scaled) - scaled).square().mean(-1) / scaled.square().mean(-1)).mean()
                   for name in ("codebook64", "codebook64_rows"))
    assert rows < 1e-3 < 0.01 < plain


def test_cells_are_where_a_level_is_the_best():
    random = np.random.default_rng(0)
    for price in (0.0, 0.01, 0.5):
        levels, bits = np.sort(random.normal(size=12)), random.uniform(1, 9, size=12)
        kept, _, bounds = quantizers.cells(levels, bits, price)
        x = random.uniform(-5, 5, size=500)
        best = levels[(np.square(x[:, None] - levels) + price * bits).argmin(1)]
        assert np.array_equal(kept[np.searchsorted(bounds, x)], best)


def test_the_entropy_constraint_buys_a_better_trade():
    """Error + price x bits is below that of a uniform grid and of k-means; and at the same entropy so is the error."""
    weight, step = normal(1, 64, 1024), torch.full((1, 64, 1), 0.4)
    price, found = 0.16 * math.log(2) / 6, {}
    for name, steps in (("codebook64_entropy", step), ("absmax", step), ("codebook64", step)):
        arrays = encode(name, weight, None, steps)
        error = float((decode(name, arrays, (1, 64, 1024)) - weight).square().mean())
        found[name] = error + price * entropy(arrays["codes"]), error, entropy(arrays["codes"])
    assert found["codebook64_entropy"][0] < min(found["absmax"][0], found["codebook64"][0])
    assert found["codebook64_entropy"][2] == pytest.approx(math.log2(math.sqrt(2 * math.pi * math.e) / 0.4), abs=0.1)


# --- other grids
def test_int6_against_loops():
    weight = normal(2, 3, 21)
    for row, found in zip(weight.view(6, 21).tolist(), round_trip("int6", weight).view(6, 21).tolist()):
        step = half(max(map(abs, row)) / 31)
        assert found == pytest.approx([round(x / step) * step for x in row], abs=1e-5)


def e4m3_values() -> np.ndarray:
    """All magnitudes: 3 bits of fraction, exponents from -6 to 8, below that subnormal; the last pattern is NaN."""
    return np.array([(code % 8 / 8 + (code >= 8)) * 2.0 ** (max(code >> 3, 1) - 7) for code in range(127)])


def test_fp8_is_the_nearest_float():
    weight = normal(4, 200).sinh()
    arrays = encode("fp8", weight)
    decoded, scale = decode("fp8", arrays, (4, 200)).double().numpy(), arrays["scale"].astype(float)[:, None]
    exact = weight.double().numpy()
    distance = np.abs(np.abs(exact / scale)[..., None] - e4m3_values()).min(-1)
    np.testing.assert_allclose(np.abs(decoded - exact) / scale, distance, atol=1e-4)
    assert (np.abs(decoded - exact) <= np.abs(exact) / 16 + scale * 2.0 ** -10 + 1e-6).all()


def test_pruning_takes_the_smallest_third_of_each_matrix_and_no_more():
    weight = normal(2, 6, 15)
    fine = torch.full((2, 6, 1), 0.03)
    decoded = round_trip("pruned", weight, None, fine)
    for matrix, found in zip(weight, decoded):
        order = matrix.abs().flatten().argsort()
        assert not found.flatten()[order[:30]].any()
        kept = order[30:]
        assert ((found - matrix).flatten()[kept].abs() <= 0.0151).all()
    assert round_trip("pruned", torch.full((3, 5), 0.5), None, fine[0, :3]).all()  # all equal: which third?


def test_stepped_codes_are_multiples_of_four():
    weight = normal(4, 300)
    weight[3, 7] = 40.0
    steps = sigma_steps(weight, 6, 10.0)
    codes = encode("stepped", weight, None, steps)["codes"].astype(int)
    assert set((np.abs(codes) % 4).ravel()) <= {0, 3} and (np.abs(codes)[np.abs(codes) % 4 == 3] == 127).all()
    for row, step, found in zip(weight.tolist(), steps.flatten().tolist(), codes):
        scale = half(max(step / 4, max(map(abs, row)) / 127))
        wanted = np.array([min(max(round(round(x / scale) / 4) * 4, -127), 127) for x in row])
        assert (np.abs(wanted - found) <= 4).all() and (wanted == found).mean() > 0.98
    assert (round_trip("stepped", weight, None, steps) - weight)[:3].abs().max() <= 0.65 * float(steps[:3].max())


def test_every_entry_says_where_it_is_from():
    for name, quantizer in PUBLISHED_QUANTIZERS.items():
        function = quantizer.encode.func if isinstance(quantizer.encode, functools.partial) else quantizer.encode
        text = function.__doc__ or ""
        assert any(word in text for word in ("PR #", "arXiv:", "record")), name
