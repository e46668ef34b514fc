"""Section 10, compress: codecs, the artifact's round trip and refusals. The packed program: test_pack.py."""
import hashlib
import json
import math
import struct
import zlib
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import (
    ARTIFACT_MAGIC,
    CODECS,
    MODEL_FIELDS,
    QUANTIZERS,
    Config,
    UserError,
    artifact_config,
    pack_artifact,
    param_shapes,
    quantize,
    read_artifact,
    unpack_artifact,
)

SCRIPT = Path(train_gpt.__file__).resolve()
SMALL = {"num_layers": 2, "model_dim": 16, "num_heads": 2, "num_kv_heads": 1, "mlp_mult": 2.0, "vocab_size": 32,
         "rope_dims": 4, "xsa_last_n": 1, "parallel_start_layer": 0, "num_loops": 0, "gate_window": 4}


def small_config(**changes) -> Config:
    return Config(**{**SMALL, **changes})


def random_weights(config: Config, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in param_shapes(config).items()}


def decoded(config: Config, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the quantizers alone make of the weights."""
    return {name: QUANTIZERS[quantizer].decode(arrays, tuple(weights[name].shape))
            for name, (quantizer, arrays) in quantize(config, weights).items()}


# --- bytes
@pytest.mark.parametrize("codec", CODECS)
@settings(deadline=None, max_examples=10)
@given(data=st.one_of(st.binary(max_size=300), st.sampled_from([b"", b"\0", b"\0" * 100_000, bytes(range(256)) * 50])))
def test_codecs_are_inverted_and_deterministic(codec, data):
    packed = CODECS[codec].encode(data)
    assert CODECS[codec].decode(packed) == data and CODECS[codec].encode(data) == packed
    assert len(packed) < (len(data) + 540 if codec == "rans" else 400)  # order 0 sees no repeats; its table


# --- artifact
@settings(deadline=None, max_examples=30)
@given(st.sampled_from(sorted(CODECS)), st.sampled_from(sorted(QUANTIZERS)), st.sampled_from(sorted(QUANTIZERS)),
       st.integers(2, 8), st.integers(2, 8), st.booleans(), st.integers(0, 99))
def test_every_pipeline_gives_back_its_weights_bit_exact(codec, matrix, embed, matrix_bits, embed_bits, gates, seed):
    config = small_config(compressor=codec, matrix_quantizer=matrix, embed_quantizer=embed, matrix_bits=matrix_bits,
                          embed_bits=embed_bits, skip_gates_enabled=gates, smear_gate="off" if gates else "input")
    weights = random_weights(config, seed)
    header, result = unpack_artifact(pack_artifact(config, quantize(config, weights), {"looping": gates}), "here")
    expected = decoded(config, weights)
    assert list(result) == list(weights) and header["looping"] is gates and header["codec"] == codec
    for name, value in result.items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[name]), name


@pytest.fixture(scope="module")
def artifact() -> bytes:
    config = small_config()
    return pack_artifact(config, quantize(config, random_weights(config)), {"looping": True, "note": "x"})


def test_pack_is_deterministic_and_makes_codes_small(artifact):
    config = small_config()
    again = pack_artifact(config, quantize(config, random_weights(config)), {"looping": True, "note": "x"})
    assert again == artifact
    assert len(artifact) < sum(2 * math.prod(shape) for shape in param_shapes(config).values())


def test_layout_is_as_documented(artifact):
    """Magic, header length, zlib-compressed JSON header, streams, sha256."""
    length = int.from_bytes(artifact[8:12], "little")
    header = json.loads(zlib.decompress(artifact[12:12 + length]))
    assert artifact[:8] == ARTIFACT_MAGIC
    assert 12 + length + sum(header["streams"]) + 32 == len(artifact)
    assert header["model"] == {name: getattr(small_config(), name) for name in MODEL_FIELDS}
    assert header["note"] == "x" and [spec[0] for spec in header["tensors"]] == list(param_shapes(small_config()))


def test_the_file_alone_says_which_model_it_is(artifact, tmp_path):
    path = tmp_path / "a.artifact"
    path.write_bytes(artifact)
    header, weights = read_artifact(path)
    config = artifact_config(header)
    assert all(getattr(config, name) == getattr(small_config(), name) for name in MODEL_FIELDS)
    assert {name: tuple(value.shape) for name, value in weights.items()} == param_shapes(config)
    other = artifact_config(header, Config(seed=5, eval_stride=32))
    assert (other.seed, other.eval_stride, other.model_dim) == (5, 32, SMALL["model_dim"])
    unset = [f.name for f in fields(Config) if f.name not in MODEL_FIELDS]
    assert all(getattr(config, name) == getattr(Config(eval_mode="packed"), name) for name in unset)


def test_every_setting_that_shapes_the_parameters_is_in_the_header():
    """Changing a field changes the shapes or the plan only where the artifact keeps that field."""
    config = small_config(num_layers=4, num_loops=1, loop_start=1, loop_end=1, parallel_start_layer=2)
    for f in fields(Config):
        value = getattr(config, f.name)
        if f.name in MODEL_FIELDS or train_gpt.KINDS[f.name] is str:
            continue
        for other in (not value,) if train_gpt.KINDS[f.name] is bool else (value / 2, value * 2, value + 1):
            try:
                changed = Config(**{**config.__dict__, f.name: train_gpt.KINDS[f.name](other)})
            except UserError:
                continue
            assert param_shapes(changed) == param_shapes(config), f.name
            for looping in (False, True):
                assert train_gpt.visit_plan(changed, looping) == train_gpt.visit_plan(config, looping), f.name


def refusal(data: bytes) -> str:
    with pytest.raises(UserError) as caught:
        unpack_artifact(data, "some.artifact")
    assert str(caught.value).startswith("some.artifact: ")
    return str(caught.value)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_altered_byte_is_refused(artifact, data):
    place = data.draw(st.integers(0, len(artifact) - 1))
    change = data.draw(st.integers(1, 255))
    refusal(artifact[:place] + bytes([artifact[place] ^ change]) + artifact[place + 1:])


def test_every_header_byte_is_protected(artifact):
    for place in [*range(60), *range(len(artifact) - 33, len(artifact))]:
        refusal(artifact[:place] + bytes([artifact[place] ^ 1]) + artifact[place + 1:])


def test_any_truncation_is_refused(artifact):
    for length in [*range(80), *range(80, len(artifact), 97), *range(len(artifact) - 40, len(artifact))]:
        refusal(artifact[:length])
    refusal(artifact + b"\0")


@pytest.mark.parametrize("change", [{"codec": "nope"}, {"tensors": [["up_proj", "nope", {}]]}, {"model": {"wings": 2}},
                                    {"tensors": [["wings", "rtn", {}]]}])
def test_another_programs_artifact_is_refused(artifact, tmp_path, change):
    """Sealed with the right sum, but of unknown codecs, quantizers, settings or tensors."""
    start = len(ARTIFACT_MAGIC)
    length = int.from_bytes(artifact[start:start + 4], "little")
    header = json.loads(zlib.decompress(artifact[start + 4:start + 4 + length])) | change
    packed = zlib.compress(json.dumps(header).encode())
    data = artifact[:start] + len(packed).to_bytes(4, "little") + packed + artifact[start + 4 + length:-32]
    (path := tmp_path / "other").write_bytes(data + hashlib.sha256(data).digest())
    with pytest.raises(UserError, match=f"{path}: another program's"):
        read_artifact(path)


def test_refusals_name_their_reason(artifact, tmp_path):
    assert "no artifact" in refusal(b"") and "no artifact" in refusal(b"PK\3\4 something else, a zip file")
    assert "version 01" in refusal(artifact[:7] + b"\1" + artifact[8:])
    assert "sha256" in refusal(artifact[:-1])
    missing = tmp_path / "none.artifact"
    for path in (missing, tmp_path):
        with pytest.raises(UserError, match=path.name + ".*set ARTIFACT_PATH"):
            read_artifact(path)


# --- the entropy coder
@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=300), st.integers(1, 300))
def test_rans_gives_everything_back(data, times):
    packed = train_gpt.rans_encode(data * times)
    assert train_gpt.rans_decode(packed) == data * times
    if data:
        count, first, last = struct.unpack("<QBB", packed[:10])
        symbols = np.frombuffer(data, np.uint8) ^ 0x80
        assert count == times * len(data) and first <= symbols.min() and symbols.max() <= first + last
        counts = np.frombuffer(packed[10:12 + 2 * last], "<u2")
        assert ((counts > 0) == (np.bincount(symbols - np.uint8(first), minlength=last + 1) > 0)).all()
        assert (len(packed) - 12 - 2 * last) % 4 == 0


@pytest.mark.parametrize("sigma", [0.05, 0.6, 2.4, 20.0])
def test_rans_reaches_the_entropy(sigma):
    """Within 0.3 % of order 0, with the side information, for codes like those of the weights."""
    codes = np.random.default_rng(0).normal(0, sigma, 1_000_000).round().clip(-127, 127).astype(np.int8)
    shares = np.unique(codes, return_counts=True)[1] / len(codes)
    entropy_bytes = -(shares * np.log2(shares)).sum() * len(codes) / 8
    packed = train_gpt.rans_encode(codes.tobytes())
    assert len(packed) < 1.003 * entropy_bytes + 600 and train_gpt.rans_decode(packed) == codes.tobytes()
