"""tools/pack.py: what the minifier leaves, that every text comes back from the coder, and the packed program itself."""
import ast
import contextlib
import dis
import importlib.util
import inspect
import lzma
import os
import re
import signal
import subprocess
import sys
from base64 import b85encode
from dataclasses import fields
from pathlib import Path
from types import CodeType, ModuleType

import pack
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from program import SCRIPT
from test_compress import random_weights, small_config
from test_tools import call, refused

import train_gpt
from train_gpt import Config

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


# --- small programs
def test_packed_script_does_the_same(tmp_path):
    plain, packed = tmp_path / "plain.py", tmp_path / "packed.py"
    plain.write_text(SAMPLE)
    packed.write_bytes(pack.pack(SAMPLE.encode()))
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
    path.write_bytes(pack.pack(b"import traceback\ndef fail():\n    '''Docstring.'''\n    return 1 / 0\n"
                               b"try:\n    fail()\nexcept ZeroDivisionError:\n    print(traceback.format_exc())\n"
                               b"fail()\n"))
    result = run_file(path)
    assert result.returncode == 1 and "return 1/0" in result.stdout
    assert 'fails.py[unpacked]", line 3, in fail' in result.stderr and "ZeroDivisionError" in result.stderr


def test_packing_twice_is_packing_once():
    packed = pack.pack(SAMPLE.encode())
    assert packed.startswith(pack.START) and pack.pack(packed) == packed
    assert pack.pack.__wrapped__(SAMPLE.encode()) == packed


def test_comments_and_docstrings_go_and_nothing_else():
    text = pack.minify(SAMPLE.encode())
    assert "goes" not in text and "Two paragraphs" not in text and "Only a docstring" not in text
    tree = ast.parse(SAMPLE)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) \
                and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    assert_same_code(compile(ast.unparse(tree), "", "exec"), compile(text, "", "exec"))


def test_annotations_go_with_what_only_they_read():
    source = b"""from collections.abc import Callable, Iterable
from typing import NamedTuple
Made = Callable[[int], int]
Used = Made | None
Kept = dict[str, int]
Called = print(Made) or 1
class Pair(NamedTuple):
    size: Kept
    def total(self: "Pair", other: Iterable = ()) -> int:
        found: list[Made] = []
        self.seen: int = 1
        return len(found)
def kernel(a, b: tl.constexpr, *rest: Used): pass
"""
    assert pack.minify(source) == """from collections.abc import Callable
from typing import NamedTuple
Made=Callable[[int],int]
Kept=dict[str,int]
Called=print(Made)or 1
class Pair(NamedTuple):
 size:Kept
 def total(a,b=()):
  c=[]
  a.seen=1
  return len(c)
def kernel(a,b:tl.constexpr,*c):
 pass"""


JUMPS, LOCALS = {*dis.hasjrel, *dis.hasjabs}, {*dis.haslocal, *dis.hasfree}


def assert_same_code(ours: CodeType, theirs: CodeType, around: dict[str, str] | None = None) -> None:
    """Two code objects, and those in them, do the same: only local names differ, each always in the same way."""
    def instructions(code: CodeType) -> list[dis.Instruction]:
        cells = {*code.co_cellvars, *code.co_freevars}  # closures are made in the order of their names
        return [one for one in dis.get_instructions(code)
                if one.opname not in {"COPY_FREE_VARS", "MAKE_CELL", "LOAD_CLOSURE"}
                and not (one.opname == "LOAD_FAST" and one.argval in cells)]
    names, inner = {name: (around or {}).get(name, name) for name in ours.co_freevars}, []
    pairs = [(a, b) for a, b in zip(instructions(ours), instructions(theirs), strict=True)]
    for a, b in [*pairs, *zip(ours.co_varnames, theirs.co_varnames, strict=True)]:
        if isinstance(a, str) or a.opcode in LOCALS:
            a, b = (getattr(x, "argval", x) for x in (a, b))
            assert names.setdefault(a, b) == b
            continue
        assert a.opname == b.opname
        if isinstance(a.argval, CodeType):
            inner.append((a.argval, b.argval))
        elif a.opcode not in JUMPS:
            assert (type(a.argval), a.argval) == (type(b.argval), b.argval)
    assert len({*names.values()}) == len(names), "two variables have become one"
    for a, b in inner:
        assert_same_code(a, b, names)


def test_the_comparison_of_code_can_fail():
    plain = "f = lambda a, b: [c := a + b, lambda d: c + d * b]\n"
    for other, same in (("f = lambda x, y: [a := x + y, lambda x: a + x * y]\n", True),
                        ("f = lambda a, b: [c := b + a, lambda d: c + d * b]\n", False),
                        ("f = lambda a, b: [c := a + b, lambda d: c + b * d]\n", False),
                        ("f = lambda a, b: [c := a + b, lambda d: d + c * b]\n", False),
                        ("f = lambda a, b: [b := a + b, lambda d: b + d * b]\n", False),
                        ("f = lambda a, b: [c := a + b, lambda d: c + d * e]\n", False),
                        ("f = lambda a, b: [c := a + b, lambda d: c + d * 2]\n", False),
                        ("f = lambda a, b: [c := a + b, lambda d: c + d]\n", False)):
        with contextlib.nullcontext() if same else pytest.raises((AssertionError, ValueError)):
            assert_same_code(compile(plain, "", "exec"), compile(other, "", "exec"))


SCOPES = """
import math
size = 3
class Pair:
    size = 5
    sizes = [item * 2 for item in range(size)]
    key = staticmethod(lambda item, size=size: item + size)
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
        finally:
            deep = None
    def twice(width, inner=inner):
        return [inner(width, *(found := [width * item for item in size])), found, [[a for a in size] for b in size]]
    return inner(height, *size), inner("a"), (lambda width, a=height: width * a)(2), f"{width=} {height!r:>{width}}", \
        f"{' , '.join(['a ', ' b'])} = {{{f'x {width} ' * 2}}} {'q'}", *twice(4), {inner: 1 for inner in size}
def setup(ctx, inputs, output):
    return {**ctx, "n": inputs + output}
def opened(first, second):
    return first - second
def closed(left, right):
    return [lambda left=left: left - right for right in range(right)][-1]() if left else -right
def loop(count):
    for first in range(count):
        with open("/dev/null") as file:
            for line in file: count += 1
            else: del line if False else file
    return count
print(Pair().scaled(2), Pair().scaled(other=7), Pair.sizes, Pair.key(1), keyword(4, height=3), size)
print(setup(ctx={"a": 1}, output=2, inputs=3), opened(**{"second": 1, "first": 5}), closed(3, 9), closed(0, 9), loop(2))
""".replace("            else: del line if False else file\n", "            else: del file\n")


def test_only_names_that_functions_alone_know_are_renamed(capsys):
    text = pack.minify(SCOPES.encode())
    for source in (SCOPES, text):
        exec(source, {})
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 4 and out[:2] == out[2:] and "'n': 5" in out[1]
    assert re.search(r"def keyword\(a,height\):", text) and "def setup(ctx,inputs,output):" in text
    assert "def opened(first,second):" in text and "def closed(a,b):" in text and "other=1" in text
    for name in ("deep", "factor", "found", "item", "line"):
        assert name not in text
    plain = ast.unparse(pack.Plain().visit(ast.parse(SCOPES)))
    assert_same_code(compile(plain, "", "exec"), compile(text, "", "exec"))


def test_scopes_side_by_side_have_the_same_letters():
    source = b"def f(one):\n    def g(two): return two\n    def h(three): return three + one\n    return g, h\n"
    assert pack.minify(source) == "def f(a):\n def b(a):\n  return a\n def c(b):\n  return b+a\n return(b,c)"


def test_more_names_than_letters():
    names = [f"name{i}" for i in range(570)]
    source = f"def f():\n    {', '.join(names)} = range(570)\n    return [{', '.join(names)}]\n"
    assert_same_code(compile(source, "", "exec"), compile(pack.minify(source.encode()), "", "exec"))


@pytest.mark.parametrize("source, complaint", [
    ("def f():\n    class A:\n        pass\n", "line 2: a class in a function"),
    ("def f():\n    a = 1\n    def g():\n        nonlocal a\n", "line 4: nonlocal is more"),
    ("def f(a):\n    match a:\n        case 1: pass\n", "line 2: match is more"),
    ("def f(a):\n    return locals()\n", "line 2: locals in a function"),
    ("x = (\n", "no Python: '(' was never closed, line 1"), ("x = '\0'\n", "no Python: "),
    ("; ".join(f"x{i} = {i}" for i in range(9000)), "9000 different words are more than")])
def test_what_the_packer_does_not_know_is_refused(source, complaint):
    with pytest.raises(pack.ToolError, match=re.escape(complaint)):
        pack.pack(source.encode())


def test_strings_that_look_like_code_stay_as_they_are():
    source = r"""a = (f'it"s  {a["b"] + 1} ', f'{", ".join(c)} {{}} {a["b"]}', '# no  comment', "it's",
    'say "x = 1"', '''two
  lines''', f"{a['b'] + 1:>{w + 2}} ' + {{ x }} {x!r}", rb'\d + ', '\t tab', f'{x:%H : %M}', 'caf\xe9 \u20ac', f"\n{x}")
"""
    text = pack.minify(source.encode())
    assert ast.dump(ast.parse(text)) == ast.dump(ast.parse(source)) and text.count("\n") == 0
    assert text.startswith("a=(f") and """,f"{', '.join(c)} {{}} {a['b']}",'# no  comment',""" in text


# --- the coder
@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 65535), st.booleans()), max_size=300))
@example([(1, False)] * 3000 + [(65535, True)] * 3000)
@example([(1, i % 2 == 0) for i in range(2000)])
@example([(65535, i % 2 == 0) for i in range(2000)])
def test_any_bits_come_back_from_the_number(pairs):
    """Whatever is thought of them; carries run through the digits where unlikely bits come late."""
    digits = pack.arithmetic_code([(chance, int(bit)) for chance, bit in pairs])
    assert all(0 <= digit < 253 for digit in digits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "predict", lambda code, *_: "".join("10"[not code(chance)] for chance, _ in pairs))
        text = pack.unpack((digit + 1 for digit in digits), 0, "", "", 0)
    assert text == "".join("01"[bit] for _, bit in pairs) + "\n"


@settings(deadline=None, max_examples=12)
@given(st.lists(st.sampled_from(["word", "other", "of", "(", ")]", "\n", " ", "1", "_", "\u20ac", "'", "\\", "\0"]),
                max_size=60))
@example(["(((" * 9, *map(chr, range(128)), ")))" * 9])
def test_any_text_survives_packing(pieces):
    """All bytes of the literal are read back by Python's own parser; nothing of the text is lost."""
    source = f"x = {''.join(pieces)!r}\nif x:\n    for word in 'other', 'word':\n        x += word\ny = 0x1f, 1e5, _\n"
    packed = pack.pack(source.encode())
    assert not set(packed) & {0, 13}
    space: dict = {"__file__": "packed"}
    exec(packed.decode("latin1").rpartition("exec(")[0].partition("\n")[2], space)
    assert space["s"] == pack.unpacked(packed) == pack.minify(source.encode()) + "\n"


@pytest.mark.parametrize("source", ["", "x = 1", "'docstring'", "# nothing"])
def test_hardly_anything(source):
    packed = pack.pack(source.encode())
    exec(packed.decode("latin1"), {"__file__": ""})
    assert pack.unpacked(packed).strip() == pack.minify(source.encode())


def test_damaged_files_are_no_packed_ones():
    packed = pack.pack(SAMPLE.encode())
    for damaged in (b"x = 1\n", packed[:-1], packed.replace(b"253", b"252"), packed.replace(b"exec(comp", b"evil(comp"),
                    packed[:90] + b"!!!" + packed[93:]):
        with pytest.raises(pack.ToolError):
            pack.unpacked(damaged)
    with pytest.raises(pack.ToolError, match="cannot be unpacked"):
        pack.unpacked(packed[:1500] + packed[1560:])


# --- the command
def test_the_command_writes_a_file_or_says_why_not(tmp_path, capsys):
    path, out = tmp_path / "small.py", tmp_path / "new" / "packed.py"
    path.write_text(SAMPLE)
    code, said, _ = call(pack, capsys, path, "-o", out)
    assert code == 0 and out.read_bytes() == pack.pack(SAMPLE.encode())
    assert said.startswith(f"{out}: {out.stat().st_size:,} bytes, from {len(SAMPLE.encode()):,} in ")
    before = out.read_bytes()
    assert "is packed already" in refused(pack, capsys, out)
    assert "absent.py: No such file" in refused(pack, capsys, tmp_path / "absent.py")
    path.write_text("x = (\n")
    assert f"{path}: no Python: '(' was never closed, line 1" in refused(pack, capsys, path, "-o", out)
    path.write_text("x = 1\n")
    assert "give another place with -o" in refused(pack, capsys, path, "-o", path / "packed.py")
    assert "give another place with -o" in refused(pack, capsys, path, "-o", tmp_path)
    assert out.read_bytes() == before and {p.name for p in tmp_path.rglob("*")} == {"small.py", "new", "packed.py"}


def test_the_sizes_of_sections_add_up(capsys, tmp_path):
    source = f"{SAMPLE}\n\n# {'=' * 9}\n# 1. the first part: what it is\n# more\n# {'=' * 9}\nfirst = [1, 2]\n" \
        "for second in first:\n    print(second)\n# 2. empty: nothing\n# 3. last: some\nlast = 3\n"
    rows = pack.section_rows(source.encode())
    assert [row[0] for row in rows] == ["unpacker", "0. start", "1. the first part", "2. empty", "3. last"]
    assert sum(row[1] for row in rows) == len(source.encode())
    assert sum(row[2] for row in rows) == len(pack.minify(source.encode()))
    assert sum(row[3] for row in rows) == pytest.approx(len(pack.pack(source.encode())))
    assert rows[3][2:] == (0, 0) and 1000 < rows[0][3] < 1600 and rows[1][3] > rows[2][3] > rows[4][3] > 2
    path = tmp_path / "sections.py"
    path.write_text(source)
    code, out, _ = call(pack, capsys, path, "--size")
    assert code == 0 and f" {len(pack.pack(source.encode())):,} |            |" in out.splitlines()[-1]


# --- the program
@pytest.fixture(scope="module")
def module(packed_program) -> ModuleType:
    """The packed program, imported. It prints nothing, makes no file, and leaves the environment and signals alone."""
    before = dict(os.environ), signal.getsignal(signal.SIGINT), torch.initial_seed()
    spec = importlib.util.spec_from_file_location("packed_train_gpt", packed_program)
    assert spec and spec.loader
    found = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "packed_train_gpt", found)
        patch.setattr(sys, "dont_write_bytecode", True)
        spec.loader.exec_module(found)
        assert before == (dict(os.environ), signal.getsignal(signal.SIGINT), torch.initial_seed())
        assert [p for p in packed_program.parent.iterdir() if p.name != "__pycache__"] == [packed_program]
        yield found


def test_packed_program_is_small(packed_program):
    size, source = packed_program.stat().st_size, SCRIPT.read_bytes()
    assert size <= 30_000
    assert size < len(b85encode(lzma.compress(pack.minify(source).encode(), preset=9)))
    assert size < len(lzma.compress(source)), "what a run of the readable program counts"


def test_the_minified_program_does_the_same():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "rename_locals", lambda tree: None)
        plain = ast.unparse(pack.stripped(SCRIPT.read_bytes()))
    codes = []
    for source in plain, pack.minify(SCRIPT.read_bytes()):
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.arg):  # in which the code says the argument's name
                node.annotation = None
        codes.append(compile(tree, "", "exec"))
    assert_same_code(*codes)


def test_importing_the_packed_program(module, capfd):
    """It brings the same names, but for those that only annotations read, and writes the same artifact."""
    assert capfd.readouterr() == ("", "")
    public = {name for name in vars(train_gpt) if not name.startswith("__")}
    missing = public - set(vars(module))
    assert not any(re.search(rf"(?m)^(def|class) {name}\b|train_gpt\.{name}\b", SCRIPT.read_text()) for name in missing)
    assert len(missing) < 12 and module.Config().__dict__ == Config().__dict__
    assert inspect.getsource(module.windows).startswith("def windows(a,b,c):\n d=b-c\n")
    config = small_config()
    weights, theirs = random_weights(config), module.Config(**config.__dict__)
    packed = module.pack_artifact(theirs, module.quantize(theirs, weights), {})
    assert packed == train_gpt.pack_artifact(config, train_gpt.quantize(config, weights), {})
    lines = [line.split("=")[0].strip() for line in module.help_text().splitlines()]
    assert set(lines) >= {f.name.upper() for f in fields(Config)}


def test_functions_inside_packed_functions_have_their_source(module):
    """And so have functions of the module: Triton asks for that of its kernels."""
    first, *_, last = inspect.getsource(module.written(print, list)[0]).rstrip().split("\n")
    assert first == " def c(*c):" and last.startswith("  return ")
    assert inspect.getsource(module.mix_norm_kernel).startswith("def mix_norm_kernel(a,b:constexpr,")
    text = pack.minify(SCRIPT.read_bytes())
    assert text.count(":constexpr") == SCRIPT.read_text().count(": constexpr") >= 10
    assert text.count("(acc,slope):") == text.count("(acc,post,slope):") == 1  # quack passes them by these names


def test_packed_program_refuses_like_the_plain_one(packed_program):
    result = subprocess.run([sys.executable, packed_program], check=False, capture_output=True, text=True, timeout=60,
                            env={"NUM_LAYERS": "x", "PATH": ""})
    assert result.returncode == 2 and result.stderr.strip() == "error: NUM_LAYERS=x: must be a whole number"
