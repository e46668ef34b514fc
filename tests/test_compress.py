"""Section 10, compress: codecs, the artifact's round trip and refusals, and the packed source."""
import ast
import dis
import importlib.util
import inspect
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import zlib
from base64 import b85encode
from dataclasses import fields
from pathlib import Path
from types import CodeType

import numpy as np
import pytest
import reference_unpack
import size
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import (
    ARTIFACT_MAGIC,
    CODECS,
    MODEL_FIELDS,
    PACKED_START,
    QUANTIZERS,
    Config,
    UserError,
    artifact_config,
    pack_artifact,
    pack_source,
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
    assert all(getattr(config, name) == getattr(Config(), name) for name in unset)


def test_every_setting_that_shapes_the_parameters_is_in_the_header():
    """Changing a field changes the shapes or the plan only where the artifact keeps that field."""
    config = small_config(num_layers=4, num_loops=1, loop_start=1, loop_end=1, parallel_start_layer=2)
    for f in fields(Config):
        value = getattr(config, f.name)
        if f.name in MODEL_FIELDS or f.type is str:
            continue
        for other in (not value,) if f.type is bool else (value / 2, value * 2, value + 1):
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


def test_refusals_name_their_reason(artifact, tmp_path):
    assert "no artifact" in refusal(b"") and "no artifact" in refusal(b"PK\3\4 something else, a zip file")
    assert "version 1" in refusal(artifact[:7] + b"\1" + artifact[8:])
    assert "sha256" in refusal(artifact[:-1])
    missing = tmp_path / "none.artifact"
    for path in (missing, tmp_path):
        with pytest.raises(UserError, match=path.name + ".*set ARTIFACT_PATH"):
            read_artifact(path)


# --- packed source
SAMPLE = '''"""Module docstring: goes."""
# comment: goes
import inspect
import sys
from dataclasses import dataclass


@dataclass
class Point:
    """Class docstring: goes."""

    x: int = 1  # comment
    name: str = "a # no comment"


class Empty:
    """Only a docstring."""


def silent():
    """Only a docstring."""


def add(a, b=2, *rest, **named):
    """Docstring.

    Two paragraphs.
    """
    assert a != 13, "unlucky"
    return a + b  # sum


async def later():
    """Docstring."""
    return 5


TEXT = "\\0 \\r \\n \\07 \\0008 \\\\0 \\\\07 ' \\" \\x1a \\u20ac \\U0001f600 \\\\"
RAW = r"\\07\\n'"
BYTES = b"\\x00\\xff\\r\\n0123456789'\\""
"""A string that is no docstring."""
print(repr(TEXT), repr(RAW), BYTES, Point(), Empty.__name__, silent(), add(1), f"{add(2, b=3)!r:>4}{'q'}")
print(len(sys.argv), __name__)
print(inspect.getsource(add))
try:
    add(13)
except AssertionError as error:
    print("asserted", error)
if __name__ == "__main__":
    print("main")
'''


def run_file(path: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, path, *arguments], check=False, capture_output=True, text=True, timeout=60)


def unpacked(packed: bytes) -> str:
    """Packed file -> the source in it, as its own unpacker finds it, without running it."""
    space: dict = {"__file__": "packed"}
    exec(packed.decode("latin1").rpartition("exec(")[0].partition("\n")[2], space)
    return space["s"]


def test_packed_script_does_the_same(tmp_path):
    plain, packed = tmp_path / "plain.py", tmp_path / "packed.py"
    plain.write_text(SAMPLE)
    packed.write_bytes(pack_source(SAMPLE.encode()))
    expected, result = run_file(plain, "a"), run_file(packed, "a")
    assert expected.returncode == result.returncode == 0, result.stderr
    source = expected.stdout[expected.stdout.index("def add"):expected.stdout.index("\n\nasserted")]
    assert "return a + b" in source and "main" in expected.stdout
    start = result.stdout.index("def add")
    inside = result.stdout[start:result.stdout.index("\n\nasserted")]
    assert inside == "def add(a,b=2,*c,**d):\n assert a!=13,'unlucky'\n return a+b"
    assert result.stdout.replace(inside, source) == expected.stdout


def test_packed_traceback_shows_the_source(tmp_path):
    path = tmp_path / "fails.py"
    path.write_bytes(pack_source(b"import traceback\ndef fail():\n    '''Docstring.'''\n    return 1 / 0\n"
                                 b"try:\n    fail()\nexcept ZeroDivisionError:\n    print(traceback.format_exc())\n"
                                 b"fail()\n"))
    result = run_file(path)
    assert result.returncode == 1 and "return 1/0" in result.stdout
    assert 'fails.py[unpacked]", line 3, in fail' in result.stderr and "ZeroDivisionError" in result.stderr


def test_packing_twice_is_packing_once():
    packed = pack_source(SAMPLE.encode())
    assert packed.startswith(PACKED_START) and pack_source(packed) == packed == pack_source(SAMPLE.encode())


class Plain(ast.NodeTransformer):
    """What minify may change, taken out: docstrings, annotations of functions, and how local names are spelled."""

    def generic_visit(self, node):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.arg) and "constexpr" not in ast.dump(node):
            node.annotation = None
        return super().generic_visit(node)


def bindings(code: CodeType) -> list[tuple]:
    """What a code object and those in it do, with the places of local names instead of the names."""
    own = [(op.opname, op.arg if "FAST" in op.opname or "DEREF" in op.opname or "CLOSURE" in op.opname else
            None if isinstance(op.argval, CodeType | tuple) else op.argval) for op in dis.get_instructions(code)
           if op.opname not in ("COPY_FREE_VARS", "MAKE_CELL")]
    return own + [part for inner in code.co_consts if isinstance(inner, CodeType) for part in bindings(inner)]


def test_comments_and_docstrings_go_and_nothing_else():
    source = unpacked(pack_source(SAMPLE.encode()))
    assert "goes" not in source and "Two paragraphs" not in source and "Only a docstring" not in source
    plain = ast.parse(ast.unparse(Plain().visit(ast.parse(SAMPLE))))
    assert bindings(compile(source, "", "exec")) == bindings(compile(plain, "", "exec"))


def test_the_minified_program_is_the_same_but_for_local_names():
    """Attributes, keywords, strings, numbers, global and built-in names: all as in the source, in the same order."""
    def outside(tree: ast.Module) -> list[object]:
        fixed = compile(ast.unparse(tree), "", "exec").co_names
        return [type(node) for node in ast.walk(tree)] + [
            getattr(node, key) for node in ast.walk(tree)
            for key, kind in (("attr", ast.Attribute), ("arg", ast.keyword), ("value", ast.Constant), ("id", ast.Name))
            if isinstance(node, kind) and (kind is not ast.Name or getattr(node, key) in fixed)]
    tree = ast.parse(SCRIPT.read_bytes())
    tree.body = [node for node in tree.body if not ast.unparse(node).startswith(train_gpt.PACKING)]
    assert outside(ast.parse(train_gpt.minify(SCRIPT.read_bytes()))) == outside(Plain().visit(tree))


SCOPES = """
import math
size = 3
class Pair:
    size = 5
    def scaled(self, factor=size, *, other: int = 1) -> int:
        return self.size * factor * other
def keyword(width, height):
    import math as m
    size = [width for width in range(height)]
    def inner(deep, *size):
        try:
            return deep + len(size) + max(size, default=width) + m.floor(math.pi)
        except TypeError as error:
            return str(error)
    return inner(height, *size), inner("a"), (lambda width, a=height: width * a)(2), f"{width=} {height!r:>{width}}", \
        f"{' , '.join(['a ', ' b'])} = {{{f'x {width} ' * 2}}} {'q'}"
def setup(ctx, inputs, output):
    return {**ctx, "n": inputs + output}
print(Pair().scaled(2), Pair().scaled(other=7), keyword(4, height=3), setup(ctx={"a": 1}, output=2, inputs=3), size)
"""


def test_only_names_that_functions_alone_know_are_renamed(capsys):
    small = train_gpt.minify(SCOPES.encode())
    for text in (SCOPES, small):
        exec(text, {})
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2 and out[0] == out[1] and "'n': 5" in out[0]
    assert re.search(r"def keyword\(\w,height\):", small) and "def setup(ctx,inputs,output):" in small
    assert "other=1" in small
    assert "deep" not in small and "error" not in small.replace("TypeError", "") and "factor" not in small


def test_classes_in_functions_are_refused():
    with pytest.raises(AssertionError):
        train_gpt.minify(b"def f():\n    class A:\n        pass\n")


def test_the_unpacker_is_the_readable_one():
    source = Path(reference_unpack.__file__).read_bytes().partition(b"\n\nif __name__")[0]
    assert train_gpt.minify(source) == train_gpt.UNPACK


@settings(deadline=None, max_examples=30)
@given(st.one_of(st.binary(max_size=60), st.text(max_size=40).map(str.encode),
                 st.lists(st.sampled_from(b"[](){}\n ab_\x80\xff\\'\"\r\0"), max_size=80).map(bytes)))
@example(b"(((((" + bytes(range(256)) + b")))))")
def test_any_bytes_come_back_from_the_coder(data):
    """predict, once with an exact coder of fractions in place of the program's."""
    bits, chances = [byte >> i & 1 for byte in data for i in range(7, -1, -1)], []
    given_bits = iter(bits)
    assert reference_unpack.predict(lambda chance: chances.append(chance) or next(given_bits), len(data)) == data
    assert len(chances) == len(bits) and all(0 < chance < 65536 for chance in chances)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from(["word", "other", "of", "(", ")]", "\n", " ", "1", "_", "\u20ac"]), max_size=60))
def test_any_text_survives_packing(pieces):
    """All bytes of the literal are read back by Python's own parser, words and other characters return."""
    text = f"x = {''.join(pieces)!r}\nfor word in 'other', 'word':\n    x += word\n"
    packed = pack_source(text.encode())
    assert not set(packed) & {0, 13}
    assert unpacked(packed) == train_gpt.minify(text.encode())


@pytest.fixture(scope="module")
def packed_program(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "train_gpt.py"
    path.write_bytes(pack_source(SCRIPT.read_bytes()))
    return path


def test_packed_program_is_small(packed_program):
    size = packed_program.stat().st_size
    source = unpacked(packed_program.read_bytes()).encode()
    assert size < 27_000
    assert size < len(b85encode(train_gpt.lzma.compress(source, preset=9)))
    assert size < len(b85encode(train_gpt.lzma.compress(SCRIPT.read_bytes(), preset=9)))


def test_functions_inside_packed_functions_have_their_source(packed_program):
    """As Triton asks for that of its kernels, which are made inside of functions."""
    code = ("import importlib.util, inspect, sys\n"
            "spec = importlib.util.spec_from_file_location('packed', sys.argv[1])\n"
            "module = sys.modules['packed'] = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(module)\n"
            "print(inspect.getsource(module.written(print, list)))")
    done = subprocess.run([sys.executable, "-c", code, packed_program], check=True, capture_output=True, text=True)
    first, *_, last = done.stdout.rstrip().split("\n")
    assert first == " def a(*inputs):" and last.startswith("  return ")
    source = unpacked(packed_program.read_bytes())
    assert source.count(":tl.constexpr") == SCRIPT.read_text().count(": tl.constexpr") > 20


def test_the_sizes_of_sections_add_up(packed_program):
    rows = size.section_rows(train_gpt, SCRIPT.read_bytes())
    assert sum(row[3] for row in rows) == pytest.approx(packed_program.stat().st_size)
    assert sum(row[1] for row in rows) == SCRIPT.stat().st_size and len(rows) == 14
    text = unpacked(packed_program.read_bytes())
    assert len(text) - 100 < sum(row[2] for row in rows) <= len(text) + 1 and min(row[3] for row in rows) > 100


def test_packed_program_helps(packed_program):
    result = run_file(packed_program, "--help")
    assert result.returncode == 0, result.stderr
    lines = [line.split("=")[0].strip() for line in result.stdout.splitlines()]
    assert set(lines) >= {f.name.upper() for f in fields(Config)}
    assert list(packed_program.parent.iterdir()) == [packed_program]


def test_packed_program_refuses_like_the_plain_one(packed_program):
    result = subprocess.run([sys.executable, packed_program], check=False, capture_output=True, text=True, timeout=60,
                            env={"NUM_LAYERS": "x", "PATH": ""})
    assert result.returncode == 2 and result.stderr.strip() == "error: NUM_LAYERS=x: must be a whole number"


def test_importing_the_packed_program_has_no_side_effects(packed_program, monkeypatch, capfd):
    """It brings the same names, prints nothing, makes no file, and leaves the environment and signals alone."""
    before = dict(os.environ), signal.getsignal(signal.SIGINT), torch.initial_seed()
    spec = importlib.util.spec_from_file_location("packed_train_gpt", packed_program)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "packed_train_gpt", module)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    spec.loader.exec_module(module)
    assert before == (dict(os.environ), signal.getsignal(signal.SIGINT), torch.initial_seed())
    assert capfd.readouterr() == ("", "")
    assert [p for p in packed_program.parent.iterdir() if p.name != "__pycache__"] == [packed_program]
    behind = {piece.split()[-1] if piece.startswith("def") else piece.split()[0] for piece in train_gpt.PACKING}
    public = {name for name in vars(train_gpt) if not name.startswith("__")} - behind
    assert public <= set(vars(module)) and module.Config().__dict__ == Config().__dict__
    assert inspect.getsource(module.windows).startswith("def windows(a,b,c):\n d=b-c\n")
    config = small_config()
    weights = random_weights(config)
    theirs = module.Config(**config.__dict__)
    packed = module.pack_artifact(theirs, module.quantize(theirs, weights), {})
    assert packed == pack_artifact(config, quantize(config, weights), {})


# --- the entropy coder
def rans_by_hand(packed: bytes) -> bytes:
    """Decodes symbol by symbol with Python's integers."""
    count, lanes, first, number = struct.unpack("<QHBB", packed[:12])
    frequencies = struct.unpack(f"<{number + 1}H", packed[12:14 + 2 * number])
    states = list(struct.unpack(f"<{lanes}I", packed[14 + 2 * number:][:4 * lanes]))
    rest = packed[14 + 2 * number + 4 * lanes:]
    words = iter(struct.unpack(f"<{len(rest) // 2}H", rest))
    out = bytearray()
    for place in range(-(-count // lanes) * lanes):
        state, lane = states[place % lanes], place % lanes
        slot, symbol, start = state % 16384, 0, 0
        while start + frequencies[symbol] <= slot:
            start += frequencies[symbol]
            symbol += 1
        state = frequencies[symbol] * (state // 16384) + slot - start
        states[lane] = state if state >= 65536 else state * 65536 + next(words)
        out.append((first + symbol) ^ 128)
    assert next(words, None) is None and states == [65536] * lanes
    return bytes(out[:count])


@settings(deadline=None, max_examples=40)
@given(st.binary(min_size=1, max_size=300), st.integers(1, 300))
def test_rans_has_the_documented_layout(data, times):
    packed = train_gpt.rans_encode(data * times)
    assert rans_by_hand(packed) == data * times


def test_rans_of_several_lanes():
    data = bytes(np.random.default_rng(0).integers(100, 140, 100_003).astype(np.uint8))
    packed = train_gpt.rans_encode(data)
    assert struct.unpack("<QH", packed[:10]) == (100_003, 12)
    assert rans_by_hand(packed) == data == train_gpt.rans_decode(packed)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.one_of(st.just(0), st.integers(1, 10 ** 9)), min_size=1, max_size=256).filter(any))
def test_rans_frequencies_are_a_distribution(counts):
    frequencies = train_gpt.rans_frequencies(np.array(counts))
    assert frequencies.sum() == 16384 and ((frequencies > 0) == (np.array(counts) > 0)).all()


@pytest.mark.parametrize("sigma", [0.05, 0.6, 2.4, 20.0])
def test_rans_reaches_the_entropy(sigma):
    """Within 0.3 % of order 0, with the side information, for codes like those of the weights."""
    codes = np.random.default_rng(0).normal(0, sigma, 1_000_000).round().clip(-127, 127).astype(np.int8)
    shares = np.unique(codes, return_counts=True)[1] / len(codes)
    entropy_bytes = -(shares * np.log2(shares)).sum() * len(codes) / 8
    packed = train_gpt.rans_encode(codes.tobytes())
    assert len(packed) < 1.003 * entropy_bytes + 600 and train_gpt.rans_decode(packed) == codes.tobytes()
