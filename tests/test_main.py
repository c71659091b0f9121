"""The two ways to the commands: ``python -m freegpt_auth`` and the script ``freegpt-auth``."""

from __future__ import annotations

import importlib
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from freegpt_auth.tokens import has_valid_checksum

SCRIPT = str(Path(sysconfig.get_path("scripts")) / "freegpt-auth")


def run(*program: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own."""
    return subprocess.run(program, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize("program", [(sys.executable, "-m", "freegpt_auth"), (SCRIPT,)], ids=["module", "script"])
def test_both_ways_are_one_program(program: tuple[str, ...]) -> None:
    """Both ways make a token in the working directory, show one help, and exit 0 done, 1 could not, 2 wrong usage."""
    done = run(*program, "create", "ci")
    assert done.returncode == 0
    assert has_valid_checksum(done.stdout.strip())
    assert Path("api_tokens.json").is_file()
    for arguments, status in ((["--help"], 0), (["revoke", "sk-a1b2c3d4e5f"], 1), ([], 2)):
        done = run(*program, *arguments)
        assert done.returncode == status
        assert (done.stdout + done.stderr).startswith(("usage: python -m freegpt_auth ", "freegpt-auth: ", "python -m"))


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
    assert run(sys.executable, "-c", program).stdout == "No tokens found.\n[]\n"
