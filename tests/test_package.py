"""What is delivered: the wheel, its metadata, and that the project's papers agree with each other."""

from __future__ import annotations

import os
import re
import tomllib
from importlib.metadata import requires, version
from pathlib import Path

import pytest

import freegpt_auth

PROJECT = Path(__file__).parent.parent
ENVIRONMENT = os.environ.get("TOX_ENV_NAME", "")


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


def test_the_changelog_begins_with_this_version() -> None:
    """A release is never made without saying what is new in it."""
    newest = re.search(r"^## \[(.+?)\]", (PROJECT / "CHANGELOG.md").read_text(), re.MULTILINE)
    declared = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]
    assert newest is not None
    assert newest[1] == declared == version("freegpt-auth")


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
