"""The two entry points of the commands: ``python -m freegpt_auth`` and the script ``freegpt-auth``."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import freegpt_auth
from freegpt_auth.tokens import has_valid_checksum

SCRIPT = str(Path(sysconfig.get_path("scripts")) / "freegpt-auth")


def run(*program: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own."""
    return subprocess.run(program, capture_output=True, text=True, timeout=120, check=False, env=env)


@pytest.mark.parametrize("program", [(sys.executable, "-m", "freegpt_auth"), (SCRIPT,)], ids=["module", "script"])
def test_both_entry_points_are_one_program(program: tuple[str, ...]) -> None:
    """Both create a token in the working directory, print the same help, and exit with 0, 1 or 2."""
    done = run(*program, "create", "ci")
    assert done.returncode == 0
    assert has_valid_checksum(done.stdout.strip())
    assert Path("api_tokens.json").is_file()
    for arguments, status in ((["--help"], 0), (["revoke", "sk-a1b2c3d4e5f"], 1), ([], 2)):
        done = run(*program, *arguments)
        assert done.returncode == status
        assert (done.stdout + done.stderr).startswith(("usage: python -m freegpt_auth ", "freegpt-auth: ", "python -m"))


UNSAFE = {**os.environ, "PYTHONSAFEPATH": ""}
"""The environment of most users: ``-m`` puts the working directory first on the module path."""


def test_working_directory_is_no_module_path() -> None:
    """A command imports no module from the working directory, which may belong to another user."""
    # The interpreter loads a few modules before this package.
    program = "import runpy, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded_by_python = set(run(sys.executable, "-c", program).stdout.split())
    for name in {"msgspec", "filelock", *sys.stdlib_module_names} - loaded_by_python:
        Path(f"{name}.py").write_text(f"raise SystemExit('{name} of the working directory')")
    done = run(sys.executable, "-m", "freegpt_auth", "create", "ci", env=UNSAFE)
    assert done.returncode == 0, done.stderr
    assert has_valid_checksum(done.stdout.strip())


def test_package_in_the_working_directory_runs() -> None:
    """In a clone of the repository the module runs the commands of the clone."""
    for name in ("__init__.py", "__main__.py"):
        Path("freegpt_auth").mkdir(exist_ok=True)
        shutil.copy(Path(freegpt_auth.__file__).with_name(name), "freegpt_auth")
    Path("freegpt_auth", "cli.py").write_text("def main(): print('of the clone')")
    # Coverage could not read the clone later.
    bare = {name: value for name, value in UNSAFE.items() if "COVERAGE" not in name}
    assert run(sys.executable, "-m", "freegpt_auth", env=bare).stdout == "of the clone\n"


def test_deleted_working_directory() -> None:
    """Help is printed although the working directory was deleted, before or after the start."""
    script = 'mkdir gone; cd gone; rmdir "$PWD"; exec "$0" -m freegpt_auth --help'
    assert run("sh", "-c", script, sys.executable, env=UNSAFE).stdout.startswith("usage: ")
    # After the start: coverage cannot start without a working directory.
    leave = "import os, runpy; os.mkdir('late'); os.chdir('late'); os.rmdir('../late')"
    start = "runpy.run_module('freegpt_auth', None, '__main__')"
    assert run(sys.executable, "-c", f"{leave}; {start}", "--help").stdout.startswith("usage: ")


def test_importing_the_module_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """A tool that imports every module of a package starts no command."""
    importlib.import_module("freegpt_auth.__main__")
    assert capsys.readouterr() == ("", "")


def test_list_imports_no_server_side() -> None:
    """A command that only reads imports no web framework, event loop or lock, to start fast."""
    slow = "{'starlette', 'anyio', 'asyncio', 'filelock'}"
    program = f"import sys; from freegpt_auth.cli import main; main(['list']); print({slow} & set(sys.modules))"
    assert run(sys.executable, "-c", program).stdout == "No tokens found.\nset()\n"
