"""The code blocks of the documentation, and a shell that runs them as a reader does."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from .asking import status

PROJECT = Path(__file__).parent.parent.parent

_FENCE = re.compile(r'^(?:<!-- (.+?) -->\n+)?```(\w+)(?: title="(.+?)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
_PORT = "8000"
_CHANGING = {
    r"sk-[\w-]+": "sk-…",
    r"\b\d{4}-\d\d-\d\d[T ][\d:,]+": "<time>",
    r"\b[0-9a-f]{12}\b": "<id>",
}
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
    shown = Shell().run("python -m freegpt_auth --help").stdout
    return {*re.findall(r"^    ([a-z]+) ", shown.partition("commands:")[2], re.MULTILINE)}


class Shell:
    """A shell in the working directory, whose variables last from block to block.

    ``python`` is the Python that runs the tests. Port 8000 of the pages is replaced by a free port.

    Args:
        environment: further variables.
    """

    def __init__(self, **environment: str) -> None:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = {**os.environ, "TZ": "UTC", **environment, "PATH": path}
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self._port = str(probe.getsockname()[1])
        self._servers: list[subprocess.Popen[bytes]] = []

    def run(self, code: str) -> subprocess.CompletedProcess[str]:
        """Run a block; its output has stderr too, in the order in which a terminal shows both."""
        variables = Path(".variables").absolute()
        done = subprocess.run(
            ["sh", "-aec", f"{self._on_port(code)}\nenv -0 > {variables}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
            env=self.environment,
        )
        if done.returncode == 0:
            pairs = variables.read_text().rstrip("\0").split("\0")
            self.environment = dict(pair.split("=", 1) for pair in pairs)
        return done

    def serve(self, code: str) -> None:
        """Run a block in the background until :meth:`close`, and wait until its port answers."""
        with Path("server.log").open("wb") as log:
            process = subprocess.Popen(
                ["sh", "-c", self._on_port(code)],
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )
        self._servers.append(process)
        deadline = time.monotonic() + 120
        while not self._answers():
            assert process.poll() is None, Path("server.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def close(self) -> None:
        """Stop the servers."""
        for process in self._servers:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=60)

    def normal(self, output: str) -> str:
        """Return *output* without paths of the working directory and without the text that differs from run to run."""
        text = output.replace(f"{Path.cwd()}/", "").replace(self._port, _PORT)
        for pattern, replacement in _CHANGING.items():
            text = re.sub(pattern, replacement, text)
        return text.strip()

    def _on_port(self, code: str) -> str:
        return code.replace(_PORT, self._port)

    def _answers(self) -> bool:
        try:
            return bool(status(f"http://127.0.0.1:{self._port}/"))
        except OSError:
            return False
