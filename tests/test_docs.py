"""The documentation is true: its pages hang together, its code runs, its tables and its reference are complete."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import re
import subprocess
import sys
import tomllib
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pytest

import freegpt_auth
from freegpt_auth import BearerTokenMiddleware, FileTokenStore, Settings, exceptions
from freegpt_auth.guard.refusal import Reason
from freegpt_auth.tokens import has_valid_checksum
from freegpt_auth.variables import VARIABLES
from tests.helpers.pages import PROJECT, Block, Shell, blocks, command_names, has_guarded_app, only

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.helpers.asgi import Ask


DOCS = PROJECT / "docs"
PAGES = [path.relative_to(PROJECT).as_posix() for path in sorted(DOCS.rglob("*.md"))]
ALL = [(page, block) for page in [*PAGES, "CONTRIBUTING.md"] for block in blocks(page)]
PYTHON = [(page, block) for page, block in ALL if block.language == "python" and block.note is None]
LEFT_OUT = ("not run", "run by")
"""Beginnings of the notes that take a block out of the session of its page."""

SHELL = sorted({page for page, each in ALL if each.language == "sh" and not (each.note or "").startswith(LEFT_OUT)})
NOT_RUN_LIMIT = 6


def text(page: str) -> str:
    """Return a page."""
    return (PROJECT / page).read_text()


# --- The pages


def test_every_page_is_in_the_navigation() -> None:
    """A reader of the site reaches each page from the menu."""

    def listed(entries: list[Any]) -> Iterator[str]:
        for entry in entries:
            for target in entry.values():
                yield from [target] if isinstance(target, str) else listed(target)

    navigation = tomllib.loads((DOCS / "zensical.toml").read_text())["project"]["nav"]
    below_docs = [page.removeprefix("docs/") for page in PAGES]
    assert sorted(listed(navigation)) == sorted([*BUILD.FROM_ROOT.values(), *below_docs])


def _build() -> Any:
    specification: Any = importlib.util.spec_from_file_location("build", DOCS / "build.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


BUILD = _build()


def test_site_has_every_docstring_and_help_text(tmp_path: Path) -> None:
    """No link is broken, and no marker is left where a docstring or a help text belongs."""
    BUILD.write_pages(tmp_path)
    assert ":::" not in "".join(path.read_text() for path in tmp_path.rglob("*.md"))
    assert "public_paths: Iterable[str] | None = None" in (tmp_path / "reference" / "middleware.md").read_text()
    assert "--expires-in TIME" in (tmp_path / "reference" / "cli.md").read_text()


@pytest.mark.parametrize("line", ["[gone](gone.md)", "::: freegpt_auth.Gone", "::: command gone"])
def test_site_refuses_a_broken_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """A link to no file, an unknown name and an unknown command stop the build."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "index.md").write_text(f"{line}\n")
    monkeypatch.setattr(BUILD, "DOCS", tmp_path / "source")
    with pytest.raises(ValueError, match=r"gone|Gone"):
        BUILD.write_pages(tmp_path / "site")


def test_blocks_without_a_run_give_the_reason() -> None:
    """Each block runs in this module or in the named one, except a few whose page says why not."""
    not_run = 0
    for page, block in ALL:
        kind, _, rest = (block.note or "").partition(": ")
        if kind == "run by":
            assert page.removeprefix("docs/") in (PROJECT / rest).read_text(), f"{rest} does not name {page}"
        elif kind == "not run":
            not_run += 1
            assert len(rest.split()) > 2, page
        else:
            assert kind in {"", "in the background"}, page
            assert block.language in {"python", "sh", "text", "json"}, page
    assert not_run <= NOT_RUN_LIMIT


# --- The code


@pytest.mark.anyio
@pytest.mark.parametrize("block", PYTHON, ids=lambda each: f"{each[0]}:{each[1].heading}")
async def test_python_block(block: tuple[str, Block], ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each Python block runs as it is; an application in it refuses a request without a token, and no other."""
    monkeypatch.setenv("FREEGPT_API_KEY", "a-key")
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    await has_guarded_app(block[1].code, ask)


@pytest.mark.parametrize("page", SHELL)
def test_shell_session(page: str) -> None:
    """Pasted in order, the blocks of a page print the output that the page shows."""
    output = ""
    with closing(Shell()) as shell:
        for block in blocks(page):
            if (block.note or "").startswith(LEFT_OUT):
                continue
            if block.title:
                Path(block.title).write_text(block.code)
            elif block.note == "in the background":
                shell.serve(block.code)
            elif block.language == "sh":
                output = shell.run(block.code)
            elif block.language == "text":
                assert shell.normal(output) == shell.normal(block.code)


def test_json_of_the_token_format(tmp_path: Path) -> None:
    """The file on docs/concepts/token-format.md is one that the library reads, and the secret has a right checksum."""
    page = "docs/concepts/token-format.md"
    (tmp_path / "file.json").write_text(only(page, "The file", "json"))
    assert [token.name for token in FileTokenStore("file.json").tokens().values()] == ["my-application"]
    assert has_valid_checksum(only(page, "The secret", "text").strip())


def test_vllm_loads_the_middleware_by_name() -> None:
    """The name for vLLM on docs/guide/servers.md is that of a class which needs only an application.

    vLLM imports the name's module, takes the attribute, and adds a class by ``app.add_middleware(class)``.
    """
    variable, serve = only("docs/guide/servers.md", "vLLM", "sh").splitlines()
    name, _, paths = variable.removeprefix("export ").partition("=")
    assert Settings.from_env(environ={name: paths}).public_paths == {"/health", "/ping", "/metrics"}
    assert only("README.md", "Add it to your server", "sh").strip() == serve
    module, _, attribute = serve.split("--middleware ")[1].rpartition(".")
    assert getattr(importlib.import_module(module), attribute) is BearerTokenMiddleware


def test_fail2ban_bans_the_guessing_client() -> None:
    """The filter of the page on fail2ban reads the log of that page; no path makes it ban another client."""
    page = "docs/guide/logging-and-fail2ban.md"
    paths = ["/v1/models", "/x%0A2025-11-26 11:45:23,120 INFO freegpt_auth refused 9.9.9.9 /: unknown"]
    program = (
        f"{only(page, 'Log and fail2ban', 'python')}\n"
        "from starlette.testclient import TestClient\n"
        "client = TestClient(app, client=('203.0.113.7', 1))\n"
        f"for path in {paths}:\n"
        "    for headers in ({}, {'x-api-key': 'guess'}, [('x-api-key', 'a'), ('x-api-key', 'b')]):\n"
        "        client.get(path, headers=headers)\n"
    )
    environment = {**os.environ, "FREEGPT_API_KEY": "a-key", "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, env=environment)
    lines = Path("freegpt_auth.log").read_text().splitlines()
    rule = next(block.code for block in blocks(page) if block.language == "ini").split("failregex = ")[1].strip()
    rule = rule.replace("<ADDR>", r"(?P<address>[0-9a-f:.]+)")
    # fail2ban takes the time out of a line before it matches the rest.
    found = [re.search(rule, re.sub(r"^[\d-]+ [\d:,]+", "", line)) for line in lines]
    assert [match["address"] for match in found if match] == ["203.0.113.7"] * 2 * len(paths)
    example = only(page, "Refusals", "text").splitlines()
    ours = [line for line in lines if " freegpt_auth refused " in line]
    assert re.sub("[0-9]", "0", ours[1]) == re.sub("[0-9]", "0", example[0].replace("chat/completions", "models"))


def test_authentication_is_off_after_the_commands(keep: Callable[..., Any]) -> None:
    """The block of docs/guide/modes.md leaves nothing behind that would ask for a token at the next start."""
    keep(FileTokenStore("api_tokens.json"))
    shell = Shell(**dict.fromkeys(VARIABLES, "x"))
    shell.run(only("docs/guide/modes.md", "Turn authentication off", "sh"))
    assert shell.environment.keys().isdisjoint({"FREEGPT_API_KEY", "OPENAI_API_KEY", "FREEGPT_AUTH_STORE"})
    assert Path("api_tokens.json.backup").exists()
    assert FileTokenStore("api_tokens.json").survey().configured is False


# --- The reference


def test_settings_table_is_complete() -> None:
    """Each variable and each argument of the middleware has a row, with its default."""
    rows = [line.split("|") for line in text("docs/reference/settings.md").splitlines() if line.startswith("| ")]
    rows = [row for row in rows if len(row) == 6 and row[1].strip() != "Variable"]
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row[1])) == sorted(VARIABLES)
    arguments = {name for row in rows for name in re.findall(r"`(\w+)`", row[2])}
    assert arguments == {*inspect.signature(BearerTokenMiddleware).parameters} - {"app"}


def test_public_names_are_in_the_reference() -> None:
    """A program finds each public name, each error and each command on a page of the reference."""
    pages = "".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    errors = {name for name, each in vars(exceptions).items() if isinstance(each, type) and issubclass(each, Exception)}
    for name in {*freegpt_auth.__all__, *errors}:
        assert re.search(rf"`{name}`|freegpt_auth\.{name}\b", pages), name
    assert {*re.findall(r"^::: command (\w+)$", pages, re.MULTILINE)} == command_names()


def test_reasons_are_in_the_table() -> None:
    """A program that reads the log finds each reason of a refusal on the page."""
    table = text("docs/guide/logging-and-fail2ban.md").partition("| Reason |")[2]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`([a-z]+)`", row)} == {*get_args(Reason)}
