"""What is delivered: the wheel, its metadata, the locked versions, and that the project's papers agree with each other."""

from __future__ import annotations

import configparser
import os
import re
import tomllib
from importlib.metadata import distributions, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import freegpt_auth

PROJECT = Path(__file__).parent.parent
ENVIRONMENT = os.environ.get("TOX_ENV_NAME", "")
PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())
LOCKS = {path.stem: path.read_text() for path in (PROJECT / "requirements").iterdir()}
TOX = configparser.ConfigParser(interpolation=None)
TOX.read(PROJECT / "tox.ini")
NEWEST = {"testenv:newest", "testenv:audit"}
"""The environments that exist to meet versions that no lock has yet."""


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
def test_the_tests_run_against_the_installed_wheel() -> None:
    """What is tested is what users install, and not the checkout, which may hold more than the wheel."""
    assert "site-packages" in Path(freegpt_auth.__file__).parts


def test_the_lower_bounds_are_what_was_tested() -> None:
    """Each lower bound in pyproject.toml is the very version that the tests pass with in the environment "lowest"."""
    for requirement in requires("freegpt-auth") or []:
        name, bound = requirement.partition(";")[0].strip().split(">=")
        known = version(name.partition("[")[0])  # without its extras
        installed, lowest = ([int(part) for part in text.split(".")[:3]] for text in (known, bound))
        lowest += [0] * (len(installed) - len(lowest))
        assert installed == lowest or (installed > lowest and ENVIRONMENT != "lowest"), requirement


# --- locked versions


def test_tox_installs_locked_versions() -> None:
    """Each environment but those for the newest versions installs a lock, with every extra that the environment installs."""
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


def test_changelog_covers_this_version() -> None:
    """The changes since the last release stand first, and then those of the release that is declared."""
    sections = re.findall(r"^## \[(.+?)\]", (PROJECT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sections[:2] == ["Unreleased", version("freegpt-auth")]
    assert PYPROJECT["project"]["version"] == version("freegpt-auth")


def test_only_four_packages_are_needed_to_run() -> None:
    """A security library's dependencies are its supply chain: a fifth one does not slip in."""
    names = [re.match(r"[\w-]+", line)[0] for line in requires("freegpt-auth") or [] if "extra ==" not in line]  # type: ignore[index]
    assert sorted(names) == ["anyio", "filelock", "msgspec", "starlette"]


def test_ci_runs_the_command_that_the_readme_gives() -> None:
    """Who copies the test command from the README runs exactly what decides about a change."""
    readme = (PROJECT / "README.md").read_text()
    block = re.search(r"^## Test it\n\n```sh\n(.+?)\n```", readme, re.MULTILINE | re.DOTALL)
    assert block is not None
    assert block[1] in (PROJECT / ".ci" / "run").read_text().splitlines()


def test_nothing_secret_can_be_committed_by_accident() -> None:
    """The token file, its sidecars and .env are ignored by git, as the guide says."""
    ignored = (PROJECT / ".gitignore").read_text().splitlines()
    assert {"api_tokens.json", "api_tokens.json.*", "api_tokens.usage.db*", ".env"} <= set(ignored)
