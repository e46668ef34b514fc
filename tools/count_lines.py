"""Counts the lines of code of Python files: lines with a token that is no comment and no docstring.

    python tools/count_lines.py train_gpt.py --limit 2500
"""
import argparse
import ast
import io
import sys
import tokenize
from pathlib import Path

SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(source: str) -> int:
    """Python source -> number of physical lines that hold code."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            docstrings |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SILENT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def longest_functions(source: str) -> list[tuple[int, str]]:
    """Python source -> (physical lines, name) of every function, longest first."""
    return sorted(((node.end_lineno or 0) - node.lineno + 1, node.name) for node in ast.walk(ast.parse(source))
                  if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))[::-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--limit", type=int, default=0, help="exit with 1 where a file has more lines of code")
    parser.add_argument("--function-limit", type=int, default=0, help="exit with 1 where a function is longer")
    config, failed = parser.parse_args(), False
    for path in config.files:
        source = path.read_text()
        lines, (longest, name) = code_lines(source), (longest_functions(source) or [(0, "-")])[0]
        print(f"{path}: {lines} lines of code, longest function {name}: {longest} lines")
        failed |= 0 < config.limit < lines or 0 < config.function_limit < longest
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
