"""Copies of a wrapped application, and its way into another process."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from starlette.responses import PlainTextResponse

from freegpt_auth import AuthMode, BearerTokenMiddleware, FileTokenStore, MemoryTokenStore
from tests.helpers.asgi import statuses

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

APP: Any = print
"""An application that can be pickled."""


@pytest.mark.anyio
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
async def test_copy_has_the_same_tokens(keep: Any, duplicate: Callable[[Any], Any]) -> None:
    """A copy guards with the same token source, also one that is an object; a deep one copies the application."""
    store = MemoryTokenStore()
    guard = BearerTokenMiddleware(PlainTextResponse("ok"), store=store)
    twin = duplicate(guard)
    _, secret = keep(store)
    assert await statuses(guard, secret, None) == await statuses(twin, secret, None) == [200, 401]
    assert (twin.app is guard.app) is (duplicate is copy.copy)


def test_pickle_guards_another_process(keep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process in another directory, without the environment of this one, reads the same tokens and usage."""
    keep(FileTokenStore("api_tokens.json"))
    pickled = pickle.dumps(BearerTokenMiddleware(APP, public_paths=["/health"]))
    program = (
        "import pickle, sys; guard = pickle.loads(sys.stdin.buffer.read()); "
        "source, usage = guard._look_ups.source.path, guard._usage._store.source; "
        "print(guard._authenticator.mode, source, usage, *guard._public_paths)"
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    done = subprocess.run([sys.executable, "-c", program], input=pickled, capture_output=True, check=True, timeout=60)
    expected = f"token-file {tmp_path}/api_tokens.json {tmp_path}/api_tokens.usage.db /health"
    assert done.stdout.decode().strip() == expected


def test_pickle_never_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A middleware closed by its environment key stays closed where the key is missing; an open one stays open."""
    assert pickle.loads(pickle.dumps(BearerTokenMiddleware(APP)))._authenticator.mode is AuthMode.OPEN
    monkeypatch.setenv("FREEGPT_API_KEY", "the-environment-key")
    pickled = pickle.dumps(BearerTokenMiddleware(APP, usage="off"))
    assert b"the-environment-key" not in pickled
    assert pickle.loads(pickled)._usage is None
    monkeypatch.delenv("FREEGPT_API_KEY")
    assert pickle.loads(pickled)._authenticator.mode is AuthMode.TOKEN_FILE


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("reason", "arguments"),
    [("MemoryTokenStore object of this", {"store": MemoryTokenStore()}), ("is required", {"required": True})],
)
async def test_pickling_explains_its_refusal(reason: str, arguments: dict[str, Any]) -> None:
    """A token source that is an object, and settings that cannot be used, are reasons in our own words."""
    with pytest.raises(TypeError, match=reason):
        pickle.dumps(BearerTokenMiddleware(APP, **arguments))


def test_pickle_carries_every_argument() -> None:
    """No argument of the constructor is lost on the way."""
    construct, _ = BearerTokenMiddleware(APP).__reduce__()
    assert {"self", "app", *construct.keywords} == set(inspect.signature(BearerTokenMiddleware.__init__).parameters)
