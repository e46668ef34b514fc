"""Packs a Python program into one small file that does the same: what a submission counts, ships and runs.

    python tools/pack.py train_gpt.py -o build/train_gpt.py
    python tools/pack.py train_gpt.py --size       bytes by section: as written, minified, packed

The packed file unpacks with the standard library alone, and inspect.getsource and tracebacks find the source that it
runs. Four steps lead to it:

1. Minified: docstrings, comments, annotations of functions and spaces go, local names become letters. Asserts stay.
2. Symbols: a character, or a word that has been spelled out before. No list of words has to be sent.
3. A mixture of contexts (`predict`) gives the chance of each bit of a symbol's path through a tree.
4. An arithmetic coder writes one long number with these chances, in base 253, in a string literal.

`predict` and `unpack` are in the packed file too, minified by step 1 and compressed by LZMA. Packing is deterministic.
Python 3.11, 3.12 and 3.13 give the same file, unless an f-string nests all kinds of quotes; a newer one may not.
"""
import argparse
import ast
import contextlib
import functools
import inspect
import itertools
import lzma
import math
import os
import re
import sys
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from run_log import PACKED_FIRST_LINE, ToolError, exit_code, table

START = PACKED_FIRST_LINE.encode() + b"import lzma,linecache\n"  # of a packed file


class OtherUnpacker(ToolError):
    """Another version of this file packed it."""


# --- 1. minified
SAID_BY_OTHERS = {"ctx", "inputs", "output", "acc"}  # parameters that torch (setup_context) and quack say by name
SEES_NAMES = {"locals", "eval", "exec"}
LETTERS = [*map(chr, (*range(97, 123), *range(65, 91)))]
NAMES = LETTERS + [letter + digit for letter in LETTERS for digit in "0123456789"]
COMPREHENSIONS = ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp
SQUEEZED = re.compile(  # string literals, to be left alone; spaces beside signs; indents; empty lines
    r"""(f?'''.*?'''|f?\"{3}.*?\"{3}|f(['"])(?:\\.|\{\{|\{(?:[^{}]|\{[^{}]*\})*\}|(?!\2)[^\\{])*\2"""
    r"""|(['"])(?:\\.|(?!\3)[^\\])*\3)|(?<=[^\w\s]) | (?=[^\w\s'"])|(?<=\n)(?:    )+|(?<=\n)\n""", re.DOTALL)


class Plain(ast.NodeTransformer):
    """Takes docstrings and annotations out. What Triton's constants and the fields of classes are annotated with is
    data, and stays."""

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module) \
                and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.arg) and node.annotation and "constexpr" not in ast.dump(node.annotation):
            node.annotation = None
        return super().visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        node.body = [part if isinstance(part, ast.AnnAssign) else self.visit(part) for part in node.body]
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        return self.visit(ast.Assign([node.target], node.value, lineno=node.lineno)) if node.value else ast.Pass()


def names_read(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def drop_unread(tree: ast.Module, before: set[str]) -> None:
    """Drops imports and aliases of types that only annotations read; `before` is what was read with these."""
    size = None
    while size != len(ast.dump(tree)):  # an alias may be the last one to read an import
        size, gone = len(ast.dump(tree)), before - names_read(tree)
        for node in tree.body:
            if isinstance(node, ast.ImportFrom):
                node.names = [name for name in node.names if (name.asname or name.name) not in gone]
        tree.body = [node for node in tree.body if not (isinstance(node, ast.ImportFrom) and not node.names) and not (
            isinstance(node, ast.Assign) and {getattr(target, "id", None) for target in node.targets} <= gone
            and not any(isinstance(part, ast.Call) for part in ast.walk(node)))]


class Scope:
    """The module, a function, lambda or comprehension: names that it binds, all places where it says a name."""

    def __init__(self, node: ast.AST, outer: "Scope | None", keywords: set[str | None]):
        self.node, self.outer, self.keywords = node, outer, keywords
        self.bound: dict[str, str] = {}  # name -> its new one, "" = none yet; in the order of appearance
        self.kept: set[str] = set()  # names that others know
        self.said: list[tuple[Any, str]] = []  # (node, its attribute that holds the name)
        self.inner: list[Scope] = []

    def all(self) -> "Iterator[Scope]":
        yield self
        for scope in self.inner:
            yield from scope.all()

    def owner(self, name: str) -> "Scope":
        """The scope to which a name belongs that is said in this one; the module, too, for what nobody binds."""
        return self if name in self.bound or self.outer is None else self.outer.owner(name)

    def say(self, node: ast.AST, key: str, binds: bool = True) -> None:
        self.said.append((node, key))
        if binds:
            self.bound.setdefault(getattr(node, key), "")

    def open(self, node: ast.AST) -> "Scope":
        self.inner.append(Scope(node, self, self.keywords))
        return self.inner[-1]

    def read(self, *nodes: ast.AST | None) -> None:
        """Takes in nodes and what is in them, in the order in which they are written."""
        for node in nodes:
            match node:
                case ast.Name():
                    self.say(node, "id", not isinstance(node.ctx, ast.Load))
                    if self.outer and node.id in SEES_NAMES:
                        raise ToolError(f"line {node.lineno}: {node.id} in a function: packing renames what it sees")
                case ast.FunctionDef() | ast.AsyncFunctionDef():
                    self.read(*node.decorator_list)
                    self.say(node, "name")
                    self.read_function(node.args, self.open(node), node.body)
                case ast.Lambda():
                    self.read_function(node.args, self.open(node), [node.body])
                case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                    inner = self.open(node)
                    inner.read(*((node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,)))
                    for loop in node.generators:
                        inner.read(loop.target)
                        (self if loop is node.generators[0] else inner).read(loop.iter)  # the first is not inside
                        inner.read(*loop.ifs)
                case ast.NamedExpr():  # in a comprehension it binds a name of the function around
                    function = self
                    while isinstance(function.node, COMPREHENSIONS) and function.outer:
                        function = function.outer
                    function.bound.setdefault(node.target.id, "")
                    self.say(node.target, "id", False)
                    self.read(node.value)
                case ast.IfExp():
                    self.read(node.body, node.test, node.orelse)
                case ast.ExceptHandler():
                    self.read(node.type)
                    if node.name:
                        self.say(node, "name")
                    self.read(*node.body)
                case ast.alias():
                    name = (node.asname or node.name).partition(".")[0]
                    self.bound.setdefault(name, "")
                    self.kept.add(name)
                case ast.Global() | ast.Nonlocal() | ast.Match():
                    raise ToolError(f"line {node.lineno}: {type(node).__name__.lower()} is more than the packer knows")
                case ast.ClassDef() if self.outer:
                    raise ToolError(f"line {node.lineno}: a class in a function is more than the packer knows")
                case ast.ClassDef():  # its names are attributes, and stay as the module's do
                    self.say(node, "name")
                    self.read(*ast.iter_child_nodes(node))
                case ast.AST():
                    self.read(*ast.iter_child_nodes(node))

    def read_function(self, args: ast.arguments, inner: "Scope", body: Sequence[ast.AST]) -> None:
        named = [*args.posonlyargs, *args.args, *args.kwonlyargs]
        self.read(*(arg.annotation for arg in named), *args.defaults, *args.kw_defaults)
        for arg in (*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg):
            if arg:
                inner.say(arg, "arg")
        inner.kept |= {arg.arg for arg in named} & self.keywords
        inner.read(*body)

    def rename(self) -> None:
        """Each name that this scope binds becomes the first letter that nothing in it says: scopes side by side have
        the same letters, and a new name is the next letter."""
        taken = set()
        for scope in self.all():
            taken |= scope.kept
            for node, key in scope.said:
                owner = scope.owner(name := getattr(node, key))
                taken.add(owner.bound[name] if owner.outer else name)
        letters = (name for name in NAMES if name not in taken)
        for name in self.bound:
            self.bound[name] = name if name in self.kept else next(letters)
        for scope in self.inner:
            scope.rename()


def rename_locals(tree: ast.Module) -> None:
    """Names that functions, lambdas and comprehensions bind become letters.

    Not so those of imports, and of parameters that may be passed by keyword: that any call names, or torch, or that
    belong to what is called with ** somewhere.
    """
    keywords: set[str | None] = {*SAID_BY_OTHERS}
    opened, nodes = set(), [*ast.walk(tree)]
    for call in (node for node in nodes if isinstance(node, ast.Call)):
        keywords |= (said := {keyword.arg for keyword in call.keywords})
        if None in said:
            opened.add(getattr(call.func, "id", getattr(call.func, "attr", None)))
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name in opened:
            keywords |= {part.arg for part in ast.walk(node) if isinstance(part, ast.arg)}
    module = Scope(tree, None, keywords)
    module.read(*tree.body)
    for scope in module.inner:
        scope.rename()
    for node, key, name in [(node, key, owner.bound[name]) for scope in module.all() for node, key in scope.said
                            if (owner := scope.owner(name := getattr(node, key))).outer]:
        setattr(node, key, name)


def stripped(source: bytes) -> ast.Module:
    """A program's syntax tree, without what it does not need. ToolError where it is no Python."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise ToolError(f"no Python: {getattr(error, 'msg', error)}, line {getattr(error, 'lineno', 1)}") from None
    before = names_read(tree)
    tree = ast.fix_missing_locations(Plain().visit(tree))
    drop_unread(tree, before)
    rename_locals(tree)
    return tree


def squeezed(tree: ast.Module) -> str:
    """Syntax tree -> ASCII text without spaces that it can do without, each statement on one line."""
    def piece(match: re.Match[str]) -> str:
        if (string := match[1]) is None:
            return " " * (len(match[0]) // 4)
        if match[2] == "'" in string[2:-1] and '"' not in string:  # from 3.12 on; older ones would not read it
            string = f'f"{string[2:-1]}"'
        return string.replace("\n", "\\n")
    plain = ast.unparse(tree).encode("ascii", "backslashreplace").decode()
    text = SQUEEZED.sub(piece, plain)
    if ast.dump(ast.parse(text)) != ast.dump(ast.parse(plain)):
        raise ToolError("this text cannot be squeezed: a string that the packer does not see as one")
    return text


def minify(source: bytes) -> str:
    """A Python file -> text that does the same."""
    return squeezed(stripped(source))


# --- 2. and 3. symbols, and what is likely. These two are in the packed file, too, where they stand first.
def predict(code: Callable[[int], int], count: int, alphabet: str, depths: str, width: int) -> str:
    """-> a text of `count` symbols. Each bit is code(chance of a 1, in 65536): given when packing, decoded later.

    Symbols are the leaves of a binary tree: characters, in the order of `alphabet` and as deep as `depths` says
    (A = 1), and below the last leaf words (identifiers of two characters or more), with numbers of `width` bits in the
    order in which they were first spelled out. A node is named by its path: a 1, then the bits.

    The model is a mixture of contexts, after lpaq (Mahoney, mattmahoney.net/dc). In each of 10 contexts every node has
    a history, its last 11 bits there, and `logits` says what a history makes likely. The prediction is the sum of these
    with weights from three sets, chosen by the last symbol and how many of three contexts are known, by the node, and
    by the node and the last sign. Logits and weights follow the gradient of the nats. Floats are added, multiplied and
    divided, no more: sum() differs between versions of Python in the last bit, functions such as exp between
    processors, and one bit would spoil all that follows.
    """
    leaves, words, node, deep = {}, {}, 0, 0
    for character, letter in zip(alphabet, depths):
        node, deep = (node + 1 << ord(letter) - 64) >> deep, ord(letter) - 64
        leaves[node] = character
    first_word = node << width
    del leaves[node]
    histories, logits, chances, odds = array("H", [1]) * (2**24 + 2**16), [0.0, 0.0], [], 2980.957987  # e^8
    for history in range(2, 4096):  # a 1, then the bits
        logits.append(logits[history // 2] * 0.7 + (history % 2 - 0.5) * 1.7)
    for _ in range(2048):  # of logits from -8 in steps of 1 / 128
        chances.append(int(65536 / (1 + odds)))
        odds *= 0.9922179382602435  # e^(-1/128)
    weights = defaultdict(lambda: [0.044] * 10)
    text, recent, word, run, shape, brackets = "", 0, "", 0, 0, [0]
    for _ in range(count):
        last, node = recent % 65536, 1
        keys = [(context * 16 + i) * 2654435769 % 16777213 for i, context in enumerate((
            recent % 2**48, last, recent % 2**32,  # the last three symbols, one, two: these tell what is known
            recent // 65536,  # three, but for the last one
            run,  # the word so far, where it is spelled out
            shape % 2**12, shape % 2**24,  # signs, five bits each, and two bits for each word between them
            brackets[-1], brackets[-1] * 65536 + last,  # the open bracket, the word before it, the commas in it
            len(brackets) * 65536 + last))]
        while node not in leaves:
            places = [key + node for key in keys]
            states = [histories[place] for place in places]
            inputs = [logits[state] for state in states]
            first = weights[((states[0] > 1) + (states[1] > 1) + (states[2] > 1)) * 65536 + last]
            second, third, mixed, total = weights[-node], weights[(shape % 32 + 4) * 65536 + node], [], 0.0
            for a, b, c, x in zip(first, second, third, inputs):
                a += b + c
                mixed.append(a)
                total += a * x
            chance = chances[max(0, min(2047, int(total * 128) + 1024))]
            bit = code(chance)
            error, i = bit - chance / 65536, 0
            for place, state, a, x in zip(places, states, mixed, inputs):
                logits[state] += 0.15 * error * a
                x *= 0.002 * error
                first[i] += x
                second[i] += x
                third[i] += x
                state += state + bit
                histories[place] = state if state < 4096 else state % 2048 + 2048
                i += 1  # noqa: SIM113
            node += node + bit
        symbol = leaves[node]
        text += symbol
        recent = recent % 2**48 * 65536 + node
        if ("a" + symbol).isidentifier():
            shape = shape if word else shape * 4 + 1
            word += symbol
            run = (run + node) * 2654435769 % 2**32
        else:
            if len(word) > 1 and word.isidentifier() and word not in words:
                leaves[first_word + len(words)] = words[word] = word
            if len(brackets) < 2:
                brackets[0] = brackets[0] or run  # a line is as in brackets behind its first word
            if symbol in "([{":
                brackets.append((run * 65536 + node) * 1024)
            if symbol in ")]}":
                brackets = brackets[:-1] or [0]
            if symbol == ",":
                brackets[-1] += 1
            if symbol == "\n":
                brackets = [0]
            shape, word, run = shape % 2**24 * 32 + ord(symbol) % 32, "", 0
    return text


def unpack(digits: Iterator[int], count: int, alphabet: str, depths: str, width: int) -> str:
    """Digits + 1 of a number in base 253, an arithmetic code -> the text. In what the number codes, a line's indent is
    told by what ends: a tab for each block that does. A colon at the end of a line begins one."""
    interval, text, level = [0, 1], "", 0  # the number's place in it, its size

    def decode(chance: int) -> int:
        value, size = interval
        while size < 2**32:
            value, size = value * 253 + next(digits) - 1, size * 253
        part = (size >> 16) * chance
        interval[:] = (value, part) if value < part else (value - part, size - part)
        return value < part
    for line in predict(decode, count, alphabet, depths, width).split("\n"):
        bare = line.lstrip("\t")
        level -= len(line) - len(bare)
        text += " " * level + bare + "\n"
        level += bare[-1:] == ":"
    return text


@functools.cache
def unpacker() -> str:
    """Both of them, minified."""
    return minify("\n".join(["from array import array", "from collections import defaultdict",
                             inspect.getsource(predict), inspect.getsource(unpack)]).encode())


WORD = re.compile(r"\b[A-Za-z_]\w+")
# the tree's order, found by trying: characters of one use stand side by side
ORDER = ":z\n}]),\t? +%!&/*-<>[=_;|\"$#{\\'(.@~^ACBDEFIGHJONQRKLMPSUTVWXZYabcdefghijklmnoptuqrxvwsy7012539648"
RAREST = 4096  # the tree takes no symbol for rarer than one in this number, so that it does not become too deep


class Model(NamedTuple):
    """A text as symbols, and what predict is given to make it."""

    symbols: list[str]
    paths: list[str]  # the bits of each
    arguments: tuple[int, str, str, int]


def dedented(text: str) -> str:
    """Text with indents of 1 -> that with tabs, of which unpack makes it."""
    lines, level = [], 0
    for line in text.rstrip("\n").split("\n"):
        bare = line.lstrip(" ")
        lines.append("\t" * (level - len(line) + len(bare)) + bare)
        level = len(line) - len(bare) + bare.endswith(":")
    return "\n".join(lines)


def in_symbols(text: str) -> tuple[list[str], dict[str, int]]:
    """-> (symbols, {word: its number}): words are spelled out where they are new."""
    symbols, words, start = [], {}, 0
    for match in WORD.finditer(text):
        symbols += [*text[start:match.start()], *([match[0]] if match[0] in words else match[0])]
        words.setdefault(match[0], len(words))
        start = match.end()
    return [*symbols, *text[start:]], words


def tree_depths(counts: dict[str, int]) -> dict[str, int]:
    """{symbol: how often it comes} -> {symbol: depth} in a tree of this order, whose halves weigh about the same."""
    if len(counts) == 1:
        return dict.fromkeys(counts, 0)
    names, sums = [*counts], [*itertools.accumulate(counts.values())]
    cut = min(range(1, len(names)), key=lambda i: abs(2 * sums[i - 1] - sums[-1]))
    return {name: depth + 1 for part in (names[:cut], names[cut:])
            for name, depth in tree_depths({name: counts[name] for name in part}).items()}


def make_model(text: str) -> Model:
    """ToolError for a text with more words than the model's keys have room for."""
    symbols, words = in_symbols(text)
    counts = Counter(symbol if len(symbol) == 1 else "" for symbol in symbols)  # "" = a word
    alphabet = sorted({*counts} - {""}, key=lambda symbol: (ORDER.find(symbol), symbol))
    depths = tree_depths({symbol: max(counts[symbol], len(symbols) // RAREST + 1) for symbol in (*alphabet, "")})
    width, paths, node, deep = len(words).bit_length(), {}, 0, 0
    for symbol, depth in depths.items():
        node, deep = (node + 1 << depth) >> deep, depth
        paths[symbol] = f"{node:b}"[1:]
    paths |= {word: f"{node << width | number:b}"[1:] for word, number in words.items()}
    if max(map(len, paths.values())) > 15:
        raise ToolError(f"{len(words)} different words are more than the packer's model takes")
    return Model(symbols, [paths[symbol] for symbol in symbols], (
        len(symbols), "".join(alphabet) + " ", "".join(chr(64 + depth) for depth in depths.values()), width))


# --- 4. a number, a file
FORMAT = (b"%sd=iter(r'''%s '''.translate({254:13,255:39}).encode('latin1'))\nx=0\n"
          b"for _ in range(%d):x=x*253+next(d)-1\nexec(lzma.decompress(x.to_bytes(%d)))\nf=__file__+'[unpacked]'\n"
          b"linecache.cache[f]=len(s),None,s.splitlines(True),f\nexec(compile(s,f,'exec'))\n")
FORMAT_PATTERN = re.compile(re.escape(FORMAT).replace(b"%s", b"(.*)").replace(b"%d", b"([0-9]+)"), re.DOTALL)
ESCAPES = {12: 254, 38: 255}  # digits that would be a carriage return and a quote; others are one more, so none is 0


def coded(model: Model) -> list[tuple[int, int]]:
    """-> (chance of a 1, in 65536; the bit) of all bits."""
    pairs, bits = [], map(int, "".join(model.paths))

    def code(chance: int) -> int:
        pairs.append((chance, bit := next(bits)))
        return bit
    text = predict(code, *model.arguments)
    assert text == "".join(model.symbols), "the model does not give its text back"
    return pairs


def in_digits(number: int, count: int) -> list[int]:
    """A number as digits in base 253."""
    digits = []
    for _ in range(count):
        number, digit = divmod(number, 253)
        digits.append(digit)
    return digits[::-1]


def arithmetic_code(pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Chances and bits -> digits in base 253 of the number that unpack reads."""
    low, size, digits, room = 0, 1, [], 253 ** 7  # digits is complete but for a carry, `low` the next seven
    for chance, bit in pairs:
        while size < 2**32:
            digits.append(low * 253 // room)
            low, size = low * 253 % room, size * 253
        part = (size >> 16) * chance
        low, size = (low, part) if bit else (low + part, size - part)
        if low >= room:
            low, place = low - room, len(digits) - 1
            while digits[place] == 252:
                digits[place], place = 0, place - 1
            digits[place] += 1
    return [*digits, *in_digits(low, 7)][7:]


def packed_file(model: Model, pairs: Sequence[tuple[int, int]]) -> bytes:
    """The self-extracting file: one literal holds first the compressed unpacker, then the number."""
    call = f"{unpacker()}\ns=unpack(d,{','.join(map(ascii, model.arguments))})"
    data = lzma.compress(call.encode(), lzma.FORMAT_ALONE, preset=9 | lzma.PRESET_EXTREME)
    head = in_digits(int.from_bytes(data), math.ceil(len(data) * math.log(256, 253)))
    digits = bytes(ESCAPES.get(digit, digit + 1) for digit in (*head, *arithmetic_code(pairs)))
    return FORMAT % (START, digits, len(head), len(data))


@functools.cache
def pack(source: bytes) -> bytes:
    """A Python file -> a smaller one that does the same. Packed stays as it is. ToolError for what cannot be packed."""
    if source.startswith(START):
        return source
    model = make_model(dedented(minify(source)))
    return packed_file(model, coded(model))


def unpacked(packed: bytes) -> str:
    """Packed file -> the text in it; nothing of the file runs. ToolError where another packer made it."""
    found = FORMAT_PATTERN.fullmatch(packed)
    if not found or found[1] != START:
        raise ToolError("not packed by this tools/pack.py")
    digits = iter({escape: digit for digit, escape in ESCAPES.items()}.get(byte, byte - 1) for byte in found[2])
    number = functools.reduce(lambda value, digit: value * 253 + digit, itertools.islice(digits, int(found[3])), 0)
    try:
        call = lzma.decompress(number.to_bytes(int(found[4]))).decode()
        start = unpacker() + "\ns=unpack(d,"
        if not call.startswith(start):
            raise OtherUnpacker("has another unpacker than this tools/pack.py writes")
        return unpack((digit + 1 for digit in digits), *ast.literal_eval(f"({call.removeprefix(start)[:-1]})"))
    except (lzma.LZMAError, OverflowError, SyntaxError, TypeError, ValueError, LookupError,
            StopIteration) as error:
        if isinstance(error, ToolError):
            raise
        raise ToolError(f"cannot be unpacked ({type(error).__name__} {error})") from None


# --- where the bytes are
SECTION = re.compile(r"^# (\d+\. [^:\n]+):", re.MULTILINE)


def section_rows(source: bytes) -> list[tuple[str, int, int, float]]:
    """-> rows of (section, bytes as written, minified, packed); the first is what unpacks.

    A packed byte belongs to the section whose text it codes: what the model asks for a bit, -log2 of its chance.
    """
    tree, plain = stripped(source), source.decode()
    text = squeezed(tree)
    model = make_model(dedented(text))
    pairs = coded(model)
    costs = iter(-math.log2((chance if bit else 65536 - chance) / 65536) / 8 for chance, bit in pairs)
    line_bytes = [0.0]
    for symbol, path in zip(model.symbols, model.paths):
        line_bytes[-1] += math.fsum(itertools.islice(costs, len(path)))
        line_bytes += [0.0] * (symbol == "\n")
    heads = [(0, "0. start"), *((match.start(), match[1]) for match in SECTION.finditer(plain))]
    numbers = [plain.count("\n", 0, place) + 1 for place, _ in heads] + [sys.maxsize]
    lines, ends = text.splitlines(keepends=True), [0, *(node.end_lineno or 0 for node in ast.parse(text).body)]
    rows = []
    for (place, name), (after, _), low, high in zip(heads, [*heads[1:], (len(plain), "")], numbers, numbers[1:]):
        mine = [i for i, node in enumerate(tree.body) if low <= node.lineno < high]
        first, last = (ends[mine[0]], ends[mine[-1] + 1]) if mine else (0, 0)
        rows.append((name, len(plain[place:after].encode()), len("".join(lines[first:last])),
                     math.fsum(line_bytes[first:last])))
    return [("unpacker", 0, 0, len(packed_file(model, pairs)) - math.fsum(row[3] for row in rows)), *rows]


def size_table(source: bytes) -> str:
    """Bytes by section, with running sums of what is packed."""
    rows, sums = [], (0, 0, 0.0)
    for name, written, minified, packed in section_rows(source):
        sums = sums[0] + written, sums[1] + minified, sums[2] + packed
        rows.append([name, *(f"{round(number):,}" for number in (written, minified, packed, sums[2]))])
    return table(["section", "as written", "minified", "packed", "cumulative"],
                 [*rows, ["sum", *(f"{round(number):,}" for number in sums), ""]])


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line -> exit code: 0 done, 2 a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="program to pack")
    parser.add_argument("-o", "--out", type=Path, help="packed file; default: build/ and the program's name")
    parser.add_argument("--size", action="store_true", help="print bytes by section instead")
    config = parser.parse_args(arguments)
    return exit_code(lambda: work(config.file, config.out or Path("build") / config.file.name, config.size))


def work(path: Path, out: Path, size: bool) -> None:
    """Packs a file into another one, which appears whole or not at all, or prints its sizes."""
    start = time.perf_counter()
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ToolError(f"{path}: {error.strerror}") from None
    if source.startswith(START):
        raise ToolError(f"{path}: is packed already; give the readable program")
    try:
        result = size_table(source) if size else pack(source)
    except ToolError as error:
        raise ToolError(f"{path}: {error}") from None
    if isinstance(result, str):
        print(result)
        return
    part = out.with_name(f".{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(result)
        os.replace(part, out)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise ToolError(f"{out}: {error.strerror}; give another place with -o") from None
    print(f"{out}: {len(result):,} bytes, from {len(source):,} in {time.perf_counter() - start:.1f} seconds")


if __name__ == "__main__":
    sys.exit(main())
