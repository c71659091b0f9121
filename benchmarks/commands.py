"""How long each command takes: real processes, beside a bare interpreter that imports what the command imports."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from measure import TIMES, Result, in_turns, ratio, spread
from token_file import write_tokens

from freegpt_auth import FileTokenStore
from freegpt_auth.stores.file.usage import UsageDatabase
from freegpt_auth.usage.base import Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

SMALL, LARGE = 1_000, 100_000
ROUNDS = {SMALL: 21, LARGE: 9}
BARE, NOTHING = "a bare interpreter with the imports of ", "a bare interpreter, no imports"
UNWAITED = ", if it did not wait for the servers"
WAITING = ("create", "revoke", "delete")
TARGETS = ("create", "list", "list --json", "revoke")
TIME_LIMIT = 60.0

# What a command does, in a process that then tells which modules it has imported.
_TELL_IMPORTS = """
import sys
before = set(sys.modules)
from runpy import run_module
try:
    run_module("freegpt_auth", run_name="__main__", alter_sys=True)
except SystemExit as exit:
    assert not exit.code, exit.code
ours = [name for name in sys.modules if name not in before and name.partition(".")[0] != "freegpt_auth"]
print(*ours, sep=", ", file=open(sys.argv[-1].rpartition("=")[2] + ".imports", "w"))
"""
_DO_NOT_WAIT = """
from freegpt_auth.stores.file import store as file
from freegpt_auth.cli import main
file.FRESHNESS = 0.0
raise SystemExit(main())
"""


class Site(NamedTuple):
    """A token file, its usage database, and tokens that may be revoked or deleted.

    Attributes:
        path: the token file.
        victims: ids of tokens that nobody has touched yet.
    """

    path: str
    victims: Iterator[str]


def measure() -> Iterator[Result]:
    """Measure the commands on small files and on large ones."""
    for size in (SMALL, LARGE):
        with site(size) as where:
            figures = in_turns(contenders(where), ROUNDS[size])
        yield from _results(size, figures)


def _results(size: int, figures: dict[str, list[float]]) -> Iterator[Result]:
    section = f"Commands, {size:,} tokens"
    unit, factor = ("ms", 1000.0) if size == SMALL else ("s", 1.0)
    for name, seconds in figures.items():
        target = 1.5 if size == LARGE and name in TARGETS else None
        note = "with the 20 ms that it waits for the servers" if name in WAITING else ""
        yield Result(section, name, spread([factor * value for value in seconds]), unit, target, note=note)
    if size == LARGE:  # what is imported no longer matters
        return
    for name in (*COMMANDS, *(command + UNWAITED for command in WAITING)):
        base = figures[BARE + name.removesuffix(UNWAITED)]
        target = 2.0 if name in TARGETS else None
        yield Result(section, f"{name} / its imports", ratio(figures[name], base), TIMES, target)


@contextmanager
def site(size: int) -> Generator[Site]:
    """Make the files of a server whose every token has been used."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "api_tokens.json")
        write_tokens(path, size)
        ids = [token.id for token in FileTokenStore(path).tokens().values()]
        now = time.time()
        uses = {token_id: (1 + number % 1000, now - number) for number, token_id in enumerate(ids)}
        UsageDatabase(str(path.with_suffix(".usage.db"))).add(Batch("bench", 1, uses), 5.0)
        yield Site(str(path), iter(ids[size // 2 :]))


COMMANDS: dict[str, Callable[[Site], list[str]]] = {
    "create": lambda _: ["create", "another client"],
    "list": lambda _: ["list"],
    "list --json": lambda _: ["list", "--json"],
    "revoke": lambda where: ["revoke", next(where.victims)],
    "delete": lambda where: ["delete", next(where.victims)],
}


def contenders(where: Site) -> dict[str, Callable[[], float]]:
    """Return what takes turns: each command, and the interpreters that it is compared with."""
    turns: dict[str, Callable[[], float]] = {NOTHING: lambda: _seconds("-c", "pass")}
    for name, arguments in COMMANDS.items():
        turns |= _command(name, arguments, where)
    return turns


def _command(name: str, arguments: Callable[[Site], list[str]], where: Site) -> dict[str, Callable[[], float]]:
    store = f"--store={where.path}"
    imports = f"import {_imports(arguments(where), where.path)}"
    turns = {
        BARE + name: lambda: _seconds("-c", imports),
        name: lambda: _seconds("-m", "freegpt_auth", *arguments(where), store),
    }
    if name in WAITING:
        turns[name + UNWAITED] = lambda: _seconds("-c", _DO_NOT_WAIT, *arguments(where), store)
    return turns


def _imports(arguments: list[str], path: str) -> str:
    """Return the modules that a command imports beside this package's own and those of every start."""
    _run("-c", _TELL_IMPORTS, *arguments, f"--store={path}")
    return Path(f"{path}.imports").read_text(encoding="utf-8").strip()


def _seconds(*arguments: str) -> float:
    began = time.perf_counter()
    _run(*arguments)
    return time.perf_counter() - began


def _run(*arguments: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "FREEGPT_"))}
    process = subprocess.Popen(  # noqa: S603  our own commands
        [sys.executable, "-P", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    limit = threading.Timer(TIME_LIMIT, process.kill)  # wait(timeout=...) looks only every 50 ms
    limit.start()
    assert process.wait() == 0, arguments
    limit.cancel()
