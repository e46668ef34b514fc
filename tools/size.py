"""Where the bytes of the packed program are: for each section its bytes as written, minified and packed.

    python tools/size.py train_gpt.py

A packed byte belongs to the section whose text it decodes: what the model of the packer asks for it, in bits / 8.
"""
import argparse
import ast
import importlib.util
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECTION = re.compile(r"^# (\d+\. \w+)", re.MULTILINE)


def load(path: Path) -> Any:
    """The program as a module."""
    spec = importlib.util.spec_from_file_location("program", path)
    assert spec and spec.loader
    module = sys.modules["program"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def line_bytes(packed: bytes) -> tuple[str, list[float]]:
    """Packed program -> (the text in it, the bytes that each line takes; the first are the words before the text)."""
    start, _, end = packed.decode("latin1").partition("\n")[2].rpartition("s=unpack(")
    space: dict[str, Any] = {"__file__": ""}
    exec(start, space)
    predict, costs = space["predict"], []

    def measuring(code: Callable[[int], int], count: int) -> bytes:
        def measure(chance: int) -> int:
            bit = code(chance)
            costs.append(-math.log2((chance if bit else 65536 - chance) / 65536) / 8)
            return bit
        space["data"] = predict(measure, count)
        return space["data"]
    space["predict"] = measuring
    text = eval("unpack(" + end.partition("\n")[0], space)
    lines, taken = space["data"].split(b"\n"), []
    for line in lines:
        bits = 8 * len(line) + 8 if len(taken) < len(lines) - 1 else 8 * len(line)
        taken.append(math.fsum(costs[:bits]))
        del costs[:bits]
    return text, taken


def section_rows(program: Any, source: bytes) -> list[tuple[str, int, int, float]]:
    """-> rows of (section, bytes as written, minified, packed); the first is what unpacks, with the words."""
    packed, plain = program.pack_source(source), source.decode()
    text, taken = line_bytes(packed)
    heads = [(0, "0. start"), *((match.start(), match[1]) for match in SECTION.finditer(plain))]
    numbers = [plain.count("\n", 0, place) + 1 for place, _ in heads] + [sys.maxsize]
    nodes = [node for node in ast.parse(source).body if not ast.unparse(node).startswith(program.PACKING)
             and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    minified, rows = ast.parse(text).body, []
    assert [type(node) for node in nodes] == [type(node) for node in minified]
    ends = [node.end_lineno or 0 for node in minified]
    lines = text.splitlines(keepends=True)
    for (place, name), after, low, high in zip(heads, [*(place for place, _ in heads[1:]), len(plain)],
                                               numbers, numbers[1:]):
        mine = [i for i, node in enumerate(nodes) if low <= node.lineno < high]
        first, last = (ends[mine[0] - 1] if mine[0] else 0, ends[mine[-1]]) if mine else (0, 0)
        rows.append((name, len(plain[place:after].encode()), len("".join(lines[first:last])),
                     math.fsum(taken[1 + first:1 + last])))
    return [("unpacker, words", 0, 0, len(packed) - math.fsum(row[3] for row in rows)), *rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=Path("train_gpt.py"))
    path = parser.parse_args().file
    rows, write = section_rows(load(path), path.read_bytes()), "{:16} {:>9} {:>9} {:>8} {:>10}".format
    print(write("section", "written", "minified", "packed", "cumulative"))
    total = [0, 0, 0.0]
    for name, *numbers in rows:
        total = [a + b for a, b in zip(total, numbers)]
        print(write(name, *(f"{round(number):,}" for number in (*numbers, total[2]))))
    print(write("sum", *(f"{round(number):,}" for number in total), ""))


if __name__ == "__main__":
    main()
