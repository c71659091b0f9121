"""Build the site into a folder: ``python docs/build.py FOLDER``. A broken link or anchor is an error.

The pages are copied, so that nothing is written into the checkout. In a copy:

- ``README.md``, ``SECURITY.md``, ``CONTRIBUTING.md`` and ``CHANGELOG.md`` have their places on the site, and links to
  them follow;
- a link to another file of the repository becomes plain text, since the site does not contain that file;
- ``::: freegpt_auth.NAME`` becomes the docstring of a public name, ``::: command NAME`` the help text of a command.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import FunctionType
from unittest.mock import patch

import freegpt_auth
from freegpt_auth.cli import main as run_command
from freegpt_auth.stores.base import CompleteSource

DOCS = Path(__file__).parent
PROJECT = DOCS.parent
FROM_ROOT = {"SECURITY.md": "security.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
CONTRACTS = (freegpt_auth.TokenSource, CompleteSource, freegpt_auth.TokenStore)
SHORT = 4
"""Parameters of a signature in several lines."""

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s#:]+)(#[^)\s]+)?\)")
_MARKER = re.compile(r"^::: (.+)$", re.MULTILINE)
_ROLE = re.compile(r":\w+:`~?(?:[\w.]+\.)?(\w+)`")
_SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Yields):$")
_ITEM = re.compile(r"^ {4}(\S.*?): (.*)$")


def write_pages(folder: Path) -> None:
    """Write the pages of the site, as Markdown, into *folder*.

    Raises:
        ValueError: a link names no file, or a marker no public name or command.
    """
    sources = {path.relative_to(DOCS).as_posix(): path for path in DOCS.rglob("*") if path.suffix in {".md", ".svg"}}
    sources |= {place: PROJECT / name for name, place in FROM_ROOT.items()}
    places = {path.resolve(): place for place, path in sources.items()} | {PROJECT / "README.md": "index.md"}
    for place, source in sources.items():
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".md":
            text = _MARKER.sub(lambda marker: rendered(marker[1]), source.read_text())
            target.write_text(_relinked(text, source, place, places))
        else:
            shutil.copy(source, target)


def rendered(name: str) -> str:
    """Return the Markdown in the place of the marker ``::: name``.

    Raises:
        ValueError: there is no such public name or command.
    """
    if name == "command" or name.startswith("command "):
        return f"```text\n{_help(name.split()[1:])}\n```"
    try:
        described = pkgutil.resolve_name(name)
    except (AttributeError, ImportError):
        raise ValueError(f"{name} is no public name") from None
    parts = [_signature(described), _docstring(described)]
    for attribute, value in vars(described).items():
        if _is_shown(described, attribute, value):
            parts += [f"### {described.__name__}.{attribute}", _signature(value), _docstring(value)]
    return "\n\n".join(filter(None, parts))


def _is_shown(owner: type, attribute: str, value: object) -> bool:
    """Return whether a public method or property has a place of its own. The contracts have those of every store."""
    if attribute.startswith(("_", "after_fork")) or not isinstance(value, (classmethod, property, FunctionType)):
        return False
    return owner in CONTRACTS or not any(hasattr(contract, attribute) for contract in CONTRACTS)


def _help(arguments: list[str]) -> str:
    """Return the help text of a command, as a terminal of 80 columns shows it."""
    output = io.StringIO()
    with patch.dict(os.environ, COLUMNS="80"), contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        run_command([*arguments, "--help"])
    if not output.getvalue():
        raise ValueError(f"there is no command {arguments}")
    return output.getvalue().strip()


def _signature(described: object) -> str:
    if isinstance(described, classmethod):
        described = described.__func__
    if described in CONTRACTS or isinstance(described, property) or not callable(described):
        return ""
    signature = inspect.signature(described)
    parameters = [each for each in signature.parameters.values() if each.name not in {"self", "cls"}]
    shown = [_parameter(each) for each in parameters]
    keyword_only = [each.kind is inspect.Parameter.KEYWORD_ONLY for each in parameters]
    if True in keyword_only:
        shown.insert(keyword_only.index(True), "*")
    inside = ", ".join(shown) if len(shown) < SHORT else "\n" + "".join(f"    {each},\n" for each in shown)
    returned = (
        ""
        if signature.return_annotation in {None, "None", inspect.Signature.empty}
        else f" -> {signature.return_annotation}"
    )
    return f"```python\n{getattr(described, '__name__', '')}({inside}){returned}\n```"


def _parameter(parameter: inspect.Parameter) -> str:
    default = "" if parameter.default is inspect.Parameter.empty else f" = {parameter.default!r}"
    annotation = "" if parameter.annotation is inspect.Parameter.empty else f": {parameter.annotation}"
    return f"{parameter.name}{annotation}{default}"


def _docstring(described: object) -> str:
    """Return a docstring in Google's convention as Markdown."""
    lines = _ROLE.sub(r"`\1`", inspect.getdoc(described) or "").replace("::\n", ":\n").splitlines()
    in_section = False
    for number, line in enumerate(lines):
        if _SECTION.match(line):
            in_section = True
            lines[number] = f"\n**{line.removesuffix(':')}**\n"
        elif in_section:
            lines[number] = _ITEM.sub(r"- `\1`: \2", line)
            in_section = not line or line.startswith(" ")
    return "\n".join(lines)


def _relinked(text: str, source: Path, place: str, places: dict[Path, str]) -> str:
    """Return *text* with its relative links changed from the repository's folders to those of the site."""

    def relink(link: re.Match[str]) -> str:
        words, path, anchor = link[1], link[2], link[3] or ""
        target = (source.parent / path).resolve()
        if target in places:
            return f"[{words}]({os.path.relpath(places[target], Path(place).parent)}{anchor})"
        if not target.exists():
            raise ValueError(f"{source}: the link to {path} is broken")
        return words

    return _LINK.sub(relink, text)


def main() -> None:
    """Write the pages, and build the site from them."""
    folder = Path(sys.argv[1]).absolute()
    for old in ("pages", "site"):
        shutil.rmtree(folder / old, ignore_errors=True)
    write_pages(folder / "pages")
    shutil.copy(DOCS / "zensical.toml", folder)
    sys.exit(subprocess.run(["zensical", "build", "--strict"], cwd=folder, check=False).returncode)  # noqa: S607


if __name__ == "__main__":
    main()
