"""The example of two servers with one database keeps the promises that it prints."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.helpers.asking import is_up, status
from tests.helpers.ports import free_port
from tests.helpers.watch import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EXAMPLE = Path(__file__).parent.parent / "examples" / "two_servers.sh"
COMMAND = re.compile(r'^curl -i (\S+) -H "Authorization: Bearer (\S+)"$', re.MULTILINE)


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

    def found() -> list[tuple[str, str]]:
        assert process.poll() is None, log.read_text()
        return COMMAND.findall(log.read_text())

    wait_until(lambda: len(found()) == 2 and all(is_up(*each) for each in found()), log.read_text)
    yield found()
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(timeout=60)


def test_revoked_token_fails_on_both_servers(
    commands: list[tuple[str, str]], command: Callable[..., subprocess.CompletedProcess[str]], database: str
) -> None:
    """Both servers accept the token, and neither does once revoke has returned."""
    assert [status(*each) for each in commands] == [200, 200]
    assert command("--store", database, "revoke", commands[0][1]).returncode == 0
    assert [status(*each) for each in commands] == [401, 401]
