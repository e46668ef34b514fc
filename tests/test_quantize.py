"""Section 9, quantize: bounds of the rounding error, hard inputs, the settings' choice, predicted size."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import MIN_SCALE, PARAM_TABLE, QUANTIZERS, Config, param_shapes, predicted_bytes, quantize, quantizer_of

BITS = range(2, 9)
HALF_MAX = 65504.0
ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj", "embed_in", "embed_out", "bigram_proj",  # and what is like it
             "q_adapter_in", "q_adapter_out", "v_adapter_in", "v_adapter_out")


def round_trip(weight: torch.Tensor, bits: int, clip_sigmas: float, quantizer: str = "rtn"):
    """-> (arrays, decoded weights)."""
    arrays = QUANTIZERS[quantizer].encode(weight, bits, clip_sigmas)
    return arrays, QUANTIZERS[quantizer].decode(arrays, tuple(weight.shape))


def normal(*shape: int, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


# --- round to nearest
@settings(deadline=None, max_examples=60)
@given(st.integers(0, 1000), st.sampled_from(BITS), st.floats(0.5, 20.0), st.floats(-6.0, 3.0),
       st.sampled_from([(3, 7), (2, 3, 5), (1, 2), (1, 1, 40), (2, 2, 2, 9)]))
def test_error_is_at_most_half_a_step_inside_the_clip(seed, bits, clip_sigmas, exponent, shape):
    weight = normal(*shape, seed=seed, spread=10.0 ** exponent)
    arrays, decoded = round_trip(weight, bits, clip_sigmas)
    levels = 2 ** (bits - 1) - 1
    rows, columns = math.prod(shape[:-1]), shape[-1]
    assert arrays["codes"].dtype == np.int8 and arrays["codes"].shape == (rows, columns)
    assert arrays["scale"].dtype == np.float16 and arrays["scale"].shape == (rows,)
    assert decoded.shape == shape and decoded.dtype == torch.float32
    assert np.abs(arrays["codes"].astype(int)).max() <= levels
    scale = torch.from_numpy(arrays["scale"]).double()[:, None]
    exact, got = weight.reshape(rows, columns).double(), decoded.reshape(rows, columns).double()
    error, reach = (exact - got).abs(), levels * scale
    inside = exact.abs() <= reach
    assert (error <= scale / 2 * (1 + 1e-4)).logical_or(~inside).all()
    assert torch.equal(got[~inside], (exact.sign() * reach)[~inside])  # clipped to the last level
    wanted = clip_sigmas * exact.std(dim=1, keepdim=True) / levels
    fits = (wanted > 2.0 ** -14) & (wanted < HALF_MAX)  # else float16 has fewer bits
    assert ((scale / wanted - 1).abs() < 1e-3).logical_or(~fits).all()


@pytest.mark.parametrize("bits", BITS)
def test_all_levels_are_used_and_symmetric(bits):
    levels = 2 ** (bits - 1) - 1
    weight = torch.linspace(-1.0, 1.0, 4001)[None]
    arrays, decoded = round_trip(weight, bits, 1.0 / float(weight.std()))  # the clip is at 1
    assert set(arrays["codes"].ravel().tolist()) == set(range(-levels, levels + 1))
    assert torch.allclose(decoded.flip(1), -decoded) and abs(float(decoded.max()) - 1.0) < 1e-3


def test_each_row_has_its_own_scale():
    weight = normal(3, 64) * torch.tensor([[1.0], [100.0], [0.01]])
    scale = round_trip(weight, 6, 13.0)[0]["scale"].astype(float)
    assert np.allclose(scale, 13.0 * weight.double().std(dim=1).numpy() / 31, rtol=1e-3)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("values", [
    [0.0] * 6, [0.25] * 6, [1e6] * 6, [-1e6] * 6, [1e6, -1e6] * 3, [1e-9, -1e-9] * 3, [1e-9] * 6, [1e6, 1e-9, 0.0] * 2,
    [1e38, -1e38] * 3, [1e-45] * 6])
def test_hard_rows_give_finite_weights_and_scales(values, bits):
    arrays, decoded = round_trip(torch.tensor([values, [0.5, -0.5] * 3]), bits, 13.0)
    scale = arrays["scale"].astype(np.float64)
    assert np.isfinite(scale).all() and (scale >= MIN_SCALE).all() and decoded.isfinite().all()
    levels = 2 ** (bits - 1) - 1
    assert torch.all(decoded[0].abs() <= levels * scale[0] * (1 + 1e-6))
    assert ((decoded[0].sign() * torch.tensor(values).sign()) >= 0).all()  # no sign flips


def test_zero_rows_stay_zero():
    arrays, decoded = round_trip(torch.zeros(2, 3, 4), 6, 13.0)
    assert not decoded.any() and (arrays["scale"] == np.float16(MIN_SCALE)).all()


def test_smallest_scale_is_the_smallest_float16():
    assert MIN_SCALE == 2.0 ** -24 == float(np.float16(MIN_SCALE)) and np.float16(MIN_SCALE / 2.1) == 0.0
    assert round_trip(torch.tensor([[1e-12, -1e-12]]), 8, 13.0)[0]["scale"][0] == np.float16(MIN_SCALE)


def test_bfloat16_weights_are_computed_in_float32():
    weight = normal(4, 50).bfloat16()
    ours, theirs = round_trip(weight, 8, 12.0)[1], round_trip(weight.float(), 8, 12.0)[1]
    assert torch.equal(ours, theirs) and ours.dtype == torch.float32


def test_more_bits_lose_less():
    weight = normal(8, 256)
    errors = [float((round_trip(weight, bits, 5.0)[1] - weight).square().mean()) for bits in BITS]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3 < 0.1 < errors[0]


# --- float16
@settings(deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8))
def test_fp16_is_the_nearest_half_within_its_range(values):
    arrays, decoded = round_trip(torch.tensor([values]), 16, 0.0, "fp16")
    expected = np.clip(np.array([values], np.float32), -HALF_MAX, HALF_MAX).astype(np.float16)
    assert list(arrays) == ["values"] and arrays["values"].dtype == np.float16
    assert np.array_equal(arrays["values"], expected) and decoded.isfinite().all()
    assert np.array_equal(decoded.numpy(), expected.astype(np.float32)) and decoded.dtype == torch.float32


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 3, 4)])
def test_fp16_keeps_shapes(shape):
    assert round_trip(torch.ones(shape), 16, 0.0, "fp16")[1].shape == shape


# --- choice by the settings
def test_quantizer_of_follows_the_settings():
    config = Config(matrix_bits=5, embed_bits=8, attn_clip_sigmas=9.0, mlp_clip_sigmas=8.0, embed_clip_sigmas=7.0,
                    embed_quantizer="rtn", matrix_quantizer="fp16")
    for name in PARAM_TABLE:
        expected = ("rtn", 8, 7.0) if name in ("embedding", "head") else \
            ("fp16", 5, 7.0) if name == "bigram_table" else ("fp16", 5, 8.0) if name in ("up_proj", "down_proj") else \
            ("fp16", 5, 9.0) if name in ATTENTION else ("fp16", 16, 0.0)
        assert quantizer_of(config, name) == expected, name
    assert quantizer_of(Config(), "q_proj") == ("rtn", 6, 13.0)
    assert quantizer_of(Config(), "embedding") == ("rtn", 7, 14.0)
    assert quantizer_of(Config(), "up_proj") == quantizer_of(Config(), "down_proj") == ("rtn", 6, 11.5)
    assert quantizer_of(Config(), "bigram_table") == ("rtn", 6, 14.0)
    for name in ("embedding", "head"):
        assert quantizer_of(Config(embed_quantizer="fp16"), name)[0] == "fp16"


def test_quantize_uses_the_choice_for_every_parameter():
    config = Config(num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, mlp_mult=2.0, vocab_size=32, rope_dims=4,
                    xsa_last_n=0, parallel_start_layer=0, num_loops=1, loop_start=0, loop_end=0, matrix_bits=4,
                    embed_dim=12, tie_embeddings=False, bigram_hash_buckets=20, bigram_hash_dim=6, depth_lora_rank=2,
                    vocab_bias=True)
    weights = {name: normal(*shape).requires_grad_() for name, shape in param_shapes(config).items()}
    result = quantize(config, weights)
    assert list(result) == list(weights) and {"head", "bigram_table", "embed_in", "q_adapter_out"} < set(result)
    for name, (quantizer, arrays) in result.items():
        chosen, bits, clip_sigmas = quantizer_of(config, name)
        expected = QUANTIZERS[chosen].encode(weights[name].detach(), bits, clip_sigmas)
        assert quantizer == chosen and arrays.keys() == expected.keys()
        assert all(np.array_equal(arrays[key], expected[key]) for key in arrays)


# --- predicted size
def entropy_bytes(config: Config) -> float:
    """Bytes of an ideal coder of each tensor's codes, of scales and of float16 values, for normal weights."""
    total = 0.0
    for name, shape in param_shapes(config).items():
        quantizer, bits, clip_sigmas = quantizer_of(config, name)
        arrays = QUANTIZERS[quantizer].encode(normal(*shape, seed=len(name), spread=0.05), bits, clip_sigmas)
        for key, array in arrays.items():
            if key == "codes":
                p = np.unique(array, return_counts=True)[1] / array.size
                total += float(-(p * np.log2(p)).sum()) * array.size / 8
            else:
                total += array.nbytes
    return total


SMALL = Config(num_layers=2, model_dim=128, num_heads=4, num_kv_heads=2, vocab_size=256, rope_dims=4, xsa_last_n=0,
               parallel_start_layer=0, num_loops=0)


@pytest.mark.parametrize("changes", [
    {}, {"matrix_bits": 5, "attn_clip_sigmas": 8.0, "mlp_clip_sigmas": 8.0}, {"matrix_bits": 8, "embed_bits": 8},
    {"tie_embeddings": False, "embed_dim": 64}, {"bigram_hash_buckets": 300},
    {"matrix_quantizer": "fp16"}, {"embed_quantizer": "fp16", "matrix_bits": 7}])
def test_predicted_bytes_is_about_the_entropy_of_normal_weights(changes):
    config = replace(SMALL, **changes)
    assert predicted_bytes(config) == pytest.approx(entropy_bytes(config), rel=0.03)


def test_predicted_bytes_of_the_default_fits_the_limit():
    assert 13_000_000 < predicted_bytes(Config()) < train_gpt.SIZE_LIMIT_BYTES
    sizes = [predicted_bytes(Config(matrix_bits=bits)) for bits in BITS]
    assert sizes == sorted(sizes) and sizes[0] > 0
