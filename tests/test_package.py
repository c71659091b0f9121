"""The package: its wheel, its metadata, its locked versions and its tools, as CONTRIBUTING.md describes them."""

from __future__ import annotations

import configparser
import os
import re
import tomllib
from importlib import import_module
from importlib.metadata import distributions, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import freegpt_auth
from tests.helpers import prose
from tests.helpers.pages import PROJECT, only

ENVIRONMENT = os.environ.get("TOX_ENV_NAME", "")
PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())
LOCKS = {path.stem: path.read_text() for path in (PROJECT / "requirements").iterdir()}
TOX = configparser.ConfigParser(interpolation=None)
TOX.read(PROJECT / "tox.ini")
NEWEST = {"testenv:newest", "testenv:audit"}
"""The environments for the newest versions, which no lock holds back."""


def pinned(lock: str) -> dict[str, str]:
    """Return the version of each package in a lock."""
    return dict(re.findall(r"^([\w.-]+)==([^ ;]+)", LOCKS[lock], re.MULTILINE))


def required(lock: str) -> list[Requirement]:
    """Return the requirements of pyproject.toml that a lock is compiled from."""
    command = next(line for line in TOX["testenv:lock"]["commands"].splitlines() if line.endswith(f"}}{lock}.txt"))
    base, wanted = command.split()[0], list(PYPROJECT["dependency-groups"][lock])
    project, extras = PYPROJECT["project"], PYPROJECT["project"]["optional-dependencies"]
    wanted += project["dependencies"] * (base != "{[lock]tools}")
    wanted += extras["server"] * (base != "{[lock]tools}") + extras["postgres"] * (base == "{[lock]package}")
    found = []
    while wanted:
        one = wanted.pop()
        if isinstance(one, str):
            found.append(Requirement(one))
        else:
            wanted += PYPROJECT["dependency-groups"][one["include-group"]]
    return found


@pytest.mark.skipif(not ENVIRONMENT, reason="only tox builds a wheel")
def test_tests_import_the_installed_wheel() -> None:
    """The tests import the wheel that users install, not the checkout, which may hold more."""
    assert "site-packages" in Path(freegpt_auth.__file__).parts


def test_lower_bounds_are_tested() -> None:
    """Each lower bound in pyproject.toml is the very version that the tests pass with in the environment "lowest"."""
    for requirement in requires("freegpt-auth") or []:
        name, bound = requirement.partition(";")[0].strip().split(">=")
        known = version(name.partition("[")[0])  # without its extras
        installed, lowest = ([int(part) for part in text.split(".")[:3]] for text in (known, bound))
        lowest += [0] * (len(installed) - len(lowest))
        assert installed == lowest or (installed > lowest and ENVIRONMENT != "lowest"), requirement


# --- locked versions


def test_tox_installs_locked_versions() -> None:
    """Each environment, except for the newest versions, installs a lock that has every extra of the environment."""
    for name, section in TOX.items():
        if name.startswith("testenv") and name not in NEWEST | {"testenv:.pkg"}:
            lock = section.get("deps", TOX["testenv"]["deps"]).removeprefix("-r requirements{/}").removesuffix(".txt")
            assert lock in LOCKS, name
            assert "dependency_groups" not in section, name
            if "skip_install" not in section:
                extras = section.get("extras", TOX["testenv"]["extras"]).split()
                wanted = {one for extra in extras for one in PYPROJECT["project"]["optional-dependencies"][extra]}
                assert wanted <= {str(one) for one in required(lock)}, name
    assert {TOX[name]["deps"] for name in NEWEST} == {""}
    assert not {name.removeprefix("testenv:") for name in NEWEST} & set(TOX["tox"]["env_list"].split())


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_meets_pyproject(lock: str) -> None:
    """After each change of pyproject.toml the locks are renewed: a locked version lies within its bounds."""
    versions = pinned(lock)
    for requirement in required(lock):
        assert requirement.specifier.contains(versions[requirement.name]), requirement


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_names_no_host(lock: str) -> None:
    """A lock has a hash for each package, and works with whichever index pip or uv is set up for."""
    packages = re.split(r"\n(?=[\w.-]+==)", LOCKS[lock])
    assert [one for one in packages if "--hash=sha256:" not in one] == []
    assert re.findall(r"://|--(?:index|extra-index|find-links|trusted)|(?<!\w)/", LOCKS[lock]) == []


@pytest.mark.skipif(ENVIRONMENT in {"", "newest"}, reason="only tox installs a lock")
def test_installed_versions_are_locked() -> None:
    """Installing the wheel moves no version of the lock."""
    lock = pinned(ENVIRONMENT if ENVIRONMENT in LOCKS else "tests")
    installed = {each.name.lower().replace("_", "-"): each.version for each in distributions()}
    del installed["freegpt-auth"]
    assert installed.items() <= lock.items()


def test_four_run_time_dependencies() -> None:
    """A security library's dependencies are its supply chain: a fifth one does not slip in."""
    names = [Requirement(line).name for line in requires("freegpt-auth") or [] if "extra ==" not in line]
    assert sorted(names) == ["anyio", "filelock", "msgspec", "starlette"]


# --- the tools of a contributor


def test_one_command_decides_about_a_change() -> None:
    """CI runs the very command that README.md and CONTRIBUTING.md give."""
    command = only("README.md", "Test it", "sh")
    assert command == only("CONTRIBUTING.md", "Run the tests", "sh")
    assert command.strip() in (PROJECT / ".ci" / "run").read_text().splitlines()


def test_contributing_names_every_environment() -> None:
    """A contributor finds each tox environment in the table, and in the table only those that exist."""
    table = (PROJECT / "CONTRIBUTING.md").read_text().partition("| Environment |")[2].partition("\n\n")[0]
    rows = [row.split("|")[1] for row in table.splitlines()]
    named = {name.partition("-")[0] for row in rows for name in re.findall(r"`([a-z][\w*-]*)`", row)}
    existing = {name.removeprefix("testenv:").partition("-")[0] for name in TOX if name.startswith("testenv:")}
    assert named == {*existing, "py311", "py314"} - {".pkg"}


def test_hooks_run_locked_programs() -> None:
    """Each hook before a commit runs a program of the environment "style"; no hook is downloaded."""
    configuration = import_module("yaml").safe_load((PROJECT / ".pre-commit-config.yaml").read_text())
    assert [each["repo"] for each in configuration["repos"]] == ["local"]
    for hook in configuration["repos"][0]["hooks"]:
        program, *arguments = hook["entry"].split()
        assert Path(program).parent == Path(".tox/style/bin")
        assert Path(program).name in {"python", *pinned("style")}
        assert hook["language"] == "system"
        assert all((PROJECT / each).exists() for each in arguments if each.endswith(".py"))


def test_prose_check_finds_clauses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The hook names the line of a clause without a noun, in docstrings and comments; a question passes."""
    module = tmp_path / "module.py"
    module.write_text('"""Return what is held."""\n\nx = "what"  # who waits?\n')
    assert prose.main([str(module)]) == 1
    assert capsys.readouterr().out == f"{module}:1: what: name the thing\n"


def test_git_ignores_secrets() -> None:
    """The token file, its sidecars and .env cannot be committed by accident."""
    ignored = (PROJECT / ".gitignore").read_text().splitlines()
    assert {"api_tokens.json", "api_tokens.json.*", "api_tokens.usage.db*", ".env"} <= set(ignored)
