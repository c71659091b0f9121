"""The code blocks of the documentation, and a shell that runs them as a reader does."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .asking import status
from .ports import free_port
from .watch import wait_until

if TYPE_CHECKING:
    from .asgi import Ask

PROJECT = Path(__file__).parent.parent.parent

_FENCE = re.compile(r'^(?:<!-- (.+?) -->\n+)?```(\w+)(?: title="(.+?)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
_PORT = "8000"
_CHANGING = {r"sk-[\w-]+": "sk-…", r"\b\d{4}-\d\d-\d\d[T ][\d:,]+": "<time>", r"\b[0-9a-f]{12}\b": "<id>"}
"""Patterns of the text that differs from run to run."""


class Block(NamedTuple):
    """One fenced block.

    Attributes:
        heading: the heading above it.
        language: the word behind the fence.
        code: its text.
        title: the name of the file to save it in.
        note: the HTML comment right above it, for the tests.
    """

    heading: str
    language: str
    code: str
    title: str | None = None
    note: str | None = None


def blocks(page: str) -> list[Block]:
    """Return every block of a page, in order."""
    text = (PROJECT / page).read_text()
    found = []
    for match in _FENCE.finditer(text):
        headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text[: match.start()]), re.MULTILINE)
        note, language, title, code = match.groups()
        found.append(Block(headings[-1], language, code, title, note))
    return found


def only(page: str, heading: str, language: str) -> str:
    """Return the one block of a language under a heading."""
    (code,) = [block.code for block in blocks(page) if (block.heading, block.language) == (heading, language)]
    return code


def command_names() -> set[str]:
    """Return the names of the commands, as ``--help`` lists them."""
    shown = Shell().run("python -m freegpt_auth --help")
    return {*re.findall(r"^    ([a-z]+) ", shown.partition("commands:")[2], re.MULTILINE)}


async def has_guarded_app(code: str, ask: Ask) -> bool:
    """Run Python code as it is; check that its ``app`` refuses a request without the key ``a-key``, and no other.

    Returns:
        whether the code has an ``app``.
    """
    names: dict[str, Any] = {}
    exec(code, names)
    if "app" in names:
        scope = {"http_version": "1.1", "query_string": b"", "server": ("x", 80), "scheme": "http"}
        assert (await ask(names["app"], **scope)).status == 401
        assert (await ask(names["app"], headers=[(b"x-api-key", b"a-key")], **scope)).status in (200, 204, 404)
    return "app" in names


class Shell:
    """A shell in the working directory, whose variables last from block to block.

    ``python`` is the Python that runs the tests. Port 8000 of the pages is replaced by a free port.

    Args:
        environment: further variables.
    """

    def __init__(self, **environment: str) -> None:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = {**os.environ, "TZ": "UTC", **environment, "PATH": path}
        self._port = str(free_port())
        self._servers: list[subprocess.Popen[bytes]] = []

    def run(self, code: str) -> str:
        """Run a block, which must succeed, and return its output, with stderr as a terminal shows it."""
        variables = Path(".variables").absolute()
        script = ["sh", "-aec", f"exec 2>&1\n{self._on_port(code)}\nenv -0 > {variables}"]
        done = subprocess.run(script, capture_output=True, text=True, timeout=120, check=False, env=self.environment)
        assert done.returncode == 0, done.stdout
        self.environment = dict(pair.split("=", 1) for pair in variables.read_text().rstrip("\0").split("\0"))
        return done.stdout

    def serve(self, code: str) -> str:
        """Run a block in the background until :meth:`close`; return its output once its port answers."""
        log, script = Path("server.log"), ["sh", "-c", f"exec >server.log 2>&1\n{self._on_port(code)}"]
        process = subprocess.Popen(script, env=self.environment, start_new_session=True)
        self._servers.append(process)

        def answers() -> int:
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(OSError):
                return status(f"http://127.0.0.1:{self._port}/")
            return 0

        wait_until(answers, log.read_text, within=600)
        return log.read_text()

    def close(self) -> None:
        """Stop the servers."""
        while self._servers:
            process = self._servers.pop()
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=120)

    def normal(self, output: str) -> str:
        """Return *output* without paths of the working directory and without the text that differs from run to run."""
        text = re.sub(rf"\b{self._port}\b", _PORT, output.replace(f"{Path.cwd()}/", ""))
        for pattern, replacement in _CHANGING.items():
            text = re.sub(pattern, replacement, text)
        return text.strip()

    def _on_port(self, code: str) -> str:
        return re.sub(rf"\b{_PORT}\b", self._port, code)
