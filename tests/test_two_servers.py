"""The example of two servers with one database keeps the promises that it prints."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.helpers.asking import status
from tests.helpers.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EXAMPLE = Path(__file__).parent.parent / "examples" / "two_servers.sh"
COMMAND = re.compile(r'^curl -i (\S+) -H "Authorization: Bearer (\S+)"$', re.MULTILINE)


def is_up(url: str, token: str) -> bool:
    """Return whether a server answers at all."""
    try:
        return bool(status(url, token))
    except OSError:
        return False


@pytest.fixture
def commands(cluster: object, database: str, tmp_path: Path) -> Iterator[list[tuple[str, str]]]:
    """Run the example, and yield each URL that it prints with its token."""
    assert cluster
    log = tmp_path / "log"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["sh", EXAMPLE, str(free_port()), str(free_port())],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PATH": path, "FREEGPT_AUTH_STORE": database},
            start_new_session=True,
        )
    deadline = time.monotonic() + 60
    while len(found := COMMAND.findall(log.read_text())) < 2 or not all(is_up(*each) for each in found):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    yield found
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(timeout=60)


def test_revoked_token_fails_on_both_servers(
    commands: list[tuple[str, str]], command: Callable[..., subprocess.CompletedProcess[str]], database: str
) -> None:
    """Both servers accept the token, and neither does once revoke has returned."""
    assert [status(*each) for each in commands] == [200, 200]
    assert command("--store", database, "revoke", commands[0][1]).returncode == 0
    assert [status(*each) for each in commands] == [401, 401]
