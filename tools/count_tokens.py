"""Size of the code: ``python tools/count_tokens.py``, or ``make tokens``.

Counts the Python tokens of timm_gac/ and kernels/ without comments and docstrings, and says which function and file
are longest, how many ``# fmt: skip`` are left and how many words README.md has.
"""

from __future__ import annotations

import argparse
import ast
import io
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("timm_gac", "kernels")
# Line ends and indentation: how the code is laid out, not what it says.
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


@dataclass(frozen=True)
class Size:
    """Size of one file.

    Attributes:
        tokens: Python tokens without comments, docstrings and layout.
        lines: All lines.
        skips: Comments ``# fmt: skip`` and ``# fmt: off``.
        function: Lines of the longest function, with its name; decorators not counted.
    """

    tokens: int
    lines: int
    skips: int
    function: tuple[int, str]


def docstring_lines(tree: ast.AST) -> set[int]:
    """First lines of all docstrings in a module."""
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                lines.add(first.lineno)
    return lines


def measure(source: str) -> Size:
    """The size of a module, given as text."""
    tree = ast.parse(source)
    docstrings = docstring_lines(tree)
    tokens = skips = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            skips += token.string.replace(" ", "").startswith(("#fmt:skip", "#fmt:off"))
        docstring = token.type == tokenize.STRING and token.start[0] in docstrings
        tokens += token.type not in LAYOUT and not docstring
    functions = [
        ((node.end_lineno or node.lineno) - node.lineno + 1, node.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return Size(tokens, len(source.splitlines()), skips, max(functions, default=(0, "")))


def main() -> None:
    """Print the figures of a checkout."""
    parser = argparse.ArgumentParser(description="Count the tokens of timm_gac/ and kernels/ and related figures.")
    parser.add_argument("root", nargs="?", type=Path, default=ROOT, help="checkout to measure; this one if left out")
    root = parser.parse_args().root
    sizes: dict[Path, Size] = {}
    for folder in FOLDERS:
        found = {path.relative_to(root): measure(path.read_text("utf-8")) for path in (root / folder).rglob("*.py")}
        print(f"{folder:<18} {sum(size.tokens for size in found.values()):>9,} tokens in {len(found)} files")
        sizes |= found
    print(f"{'both':<18} {sum(size.tokens for size in sizes.values()):>9,} tokens in {len(sizes)} files")
    path, size = max(sizes.items(), key=lambda item: item[1].function)
    print(f"{'longest function':<18} {size.function[0]:>9,} lines: {size.function[1]} in {path}")
    path, size = max(sizes.items(), key=lambda item: item[1].lines)
    print(f"{'longest file':<18} {size.lines:>9,} lines: {path}")
    print(f"{'# fmt: skip or off':<18} {sum(size.skips for size in sizes.values()):>9,}")
    print(f"{'README.md':<18} {len((root / 'README.md').read_text('utf-8').split()):>9,} words")
    print(f"Python {sys.version_info.major}.{sys.version_info.minor}; 3.12 and later split f-strings into more tokens")


if __name__ == "__main__":
    main()
