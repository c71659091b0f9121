"""CHANGELOG.md keeps its form, and names everything that a user can rely on."""

from __future__ import annotations

import re
import tomllib
from datetime import UTC, date, datetime

from packaging.version import Version

import freegpt_auth
from freegpt_auth.variables import VARIABLES
from tests.helpers.pages import PROJECT, command_names

TEXT = (PROJECT / "CHANGELOG.md").read_text()
SECTIONS = re.findall(r"^## \[?([^\]\n]+?)\]?(?: - (.+))?$", TEXT, re.MULTILINE)
RELEASES = [(Version(name), date.fromisoformat(day)) for name, day in SECTIONS if name != "Unreleased"]


def test_releases_are_in_order() -> None:
    """The newest release stands first, none is dated in the future, and unreleased changes stand above them."""
    assert sorted(RELEASES, reverse=True) == RELEASES
    assert [day for _, day in RELEASES] == sorted((day for _, day in RELEASES), reverse=True)
    assert max(day for _, day in RELEASES) <= datetime.now(UTC).date()
    assert "Unreleased" not in [name for name, _ in SECTIONS[1:]]


def test_this_version_has_an_entry() -> None:
    """The version of pyproject.toml is the newest release."""
    declared = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]
    assert RELEASES[0][0] == Version(declared)


def test_headings_are_those_of_keep_a_changelog() -> None:
    """The changes of a version are grouped under the headings of Keep a Changelog, in its order, each once."""
    order = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
    for section in re.split(r"^## .*$", TEXT, flags=re.MULTILINE)[1:]:
        headings = re.findall(r"^### (.+)$", section, re.MULTILINE)
        assert headings == [each for each in order if each in headings]


def test_every_public_name_has_an_entry() -> None:
    """A new public name, command or variable needs an entry."""
    named = {*re.findall(r"`([^`]+)`", TEXT)}
    assert {*freegpt_auth.__all__, *VARIABLES, *command_names()} - {
        word for each in named for word in re.split(r"[=\s]", each)
    } == set()
