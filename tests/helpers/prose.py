"""Find indirect clauses in docstrings and comments: ``python3 tests/helpers/prose.py FILE…``.

A clause with what, who, whoever or whatever usually stands for a thing that has a name. Questions are left alone.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from pathlib import Path

WORDS_PER_CLAUSE = 1000

_CLAUSE = re.compile(r"\b(?:what|who|whoever|whatever)\b(?![^.?!]*\?)", re.IGNORECASE)


def prose(source: str) -> list[tuple[int, str]]:
    """Return the docstrings and comments of a module, each with its line."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = [(each.start[0], each.string) for each in tokens if each.type == tokenize.COMMENT]
    for node in ast.walk(ast.parse(source)):
        for statement in getattr(node, "body", []) if isinstance(getattr(node, "body", None), list) else []:
            match statement:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    found.append((statement.lineno, text))
    return sorted(found)


def clauses(source: str) -> list[tuple[int, str]]:
    """Return the clauses of a module, each with its line."""
    return [
        (line + text.count("\n", 0, match.start()), match[0])
        for line, text in prose(source)
        for match in _CLAUSE.finditer(text)
    ]


def main(paths: list[str]) -> int:
    """Print each clause; return 1 if there is more than one in :data:`WORDS_PER_CLAUSE` words."""
    words = count = 0
    for path in paths:
        source = Path(path).read_text(encoding="utf-8")
        words += sum(len(text.split()) for _, text in prose(source))
        for line, word in clauses(source):
            count += 1
            sys.stdout.write(f"{path}:{line}: {word}: name the thing\n")
    return int(count * WORDS_PER_CLAUSE > words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
