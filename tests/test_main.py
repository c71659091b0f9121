"""The two ways to the commands: ``python -m freegpt_auth`` and the script ``freegpt-auth``."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from freegpt_auth.tokens import has_valid_checksum

if TYPE_CHECKING:
    from collections.abc import Callable

SCRIPT = str(Path(sysconfig.get_path("scripts")) / "freegpt-auth")
MODULE = (sys.executable, "-m", "freegpt_auth")


@pytest.fixture(params=[MODULE, (SCRIPT,)], ids=["module", "script"])
def run(request: pytest.FixtureRequest) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs a command in one of the two ways."""

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*request.param, *arguments], capture_output=True, text=True, timeout=30, check=False)

    return call


def test_a_token_can_be_made(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """Both ways make a token: the secret on stdout, status 0, the record in the working directory."""
    done = run("create", "ci")
    assert done.returncode == 0
    assert has_valid_checksum(done.stdout.strip())
    assert [row["name"] for row in json.loads(Path("api_tokens.json").read_text())["tokens"]] == ["ci"]


@pytest.mark.parametrize(("arguments", "status"), [(["list"], 0), (["revoke", "sk-a1b2c3d4e5f"], 1), ([], 2)])
def test_the_status_tells_how_it_went(
    run: Callable[..., subprocess.CompletedProcess[str]], arguments: list[str], status: int
) -> None:
    """A script can tell done, could not and wrong usage apart by the exit status."""
    done = run(*arguments)
    assert done.returncode == status
    assert "Traceback" not in done.stderr


def test_help_is_the_same_both_ways() -> None:
    """The script and the module are one program: their help does not differ."""
    answers = {
        subprocess.run([*program, "--help"], capture_output=True, text=True, timeout=30, check=True).stdout
        for program in (MODULE, (SCRIPT,))
    }
    assert len(answers) == 1
    assert answers.pop().startswith("usage: python -m freegpt_auth ")


def test_importing_the_module_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Tools that import every module of a package start no command."""
    importlib.import_module("freegpt_auth.__main__")
    assert capsys.readouterr() == ("", "")


def test_commands_start_without_the_server_side() -> None:
    """A command that only reads loads no web framework, event loop or lock: it answers in a blink."""
    program = (
        "import sys; from freegpt_auth.cli import main; main(['list']); "
        "print(sorted({'starlette', 'anyio', 'asyncio', 'filelock'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "No tokens found.\n[]\n"
