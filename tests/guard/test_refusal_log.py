"""The log of refused requests, for operators and for programs such as fail2ban."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from freegpt_auth.guard import refusal_log
from freegpt_auth.guard.refusal import Refusal
from freegpt_auth.guard.refusal_log import CLIENT_LIMIT, SHOWN, WINDOW, RefusalLog

Lines = Callable[[], list[str]]

UNKNOWN = Refusal("unknown")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return the clock by which refusals are counted together, to be turned."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(refusal_log, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    """Return a function that returns the lines logged since its last call."""
    caplog.set_level(logging.INFO, "freegpt_auth")

    def take() -> list[str]:
        taken = caplog.messages
        caplog.clear()
        return taken

    return take


def _scope(client: str | None = "192.0.2.7", path: str = "/v1/models") -> dict[str, Any]:
    return {"path": path, "client": client and (client, 50000)}


def _refuse(log: RefusalLog, times: int = 1, client: str = "192.0.2.7") -> None:
    for _ in range(times):
        log.log(_scope(client), UNKNOWN)


def test_each_refusal_is_a_record_with_its_facts(caplog: pytest.LogCaptureFixture) -> None:
    """A refusal is one record at INFO with client, path, reason and token id, in its text and in its attributes."""
    caplog.set_level(logging.DEBUG, "freegpt_auth")
    log = RefusalLog()
    for refusal in (UNKNOWN, Refusal("revoked", "t1")):
        log.log(_scope("2001:db8::1", "/v1/é?"), refusal)
    first, second = caplog.records
    assert first.getMessage() == "refused 2001:db8::1 /v1/%C3%A9%3F: unknown"
    assert second.getMessage() == "refused 2001:db8::1 /v1/%C3%A9%3F: revoked (t1)"
    facts = [vars(second)[name] for name in ("client", "path", "reason", "token_id", "left_out", "levelname")]
    assert facts == ["2001:db8::1", "/v1/%C3%A9%3F", "revoked", "t1", 0, "INFO"]


@pytest.mark.parametrize(
    ("client", "path"),
    [
        (None, "/"),
        ("192.0.2.7\x9b31m\r\nrefused 9.9.9.9", "/"),
        ("x" * 10_000, "/" + "é" * 60_000),
        ("192.0.2.7", "/: unknown\nrefused 9.9.9.9 /: unknown"),
        ("192.0.2.7", "/ \t\x0b\x85\u2028\u202e\udcff"),
    ],
)
def test_no_client_can_forge_a_line(lines: Lines, client: str | None, path: str) -> None:
    """For any client name and path the record is one short line of four words, the client second."""
    RefusalLog().log(_scope(client, path), UNKNOWN)
    (line,) = lines()
    word, shown, where, reason = line.split(" ")
    assert (word, shown[:9], where[:1], reason) == ("refused", (client or "unknown")[:9], "/", "unknown")
    assert line.isprintable()
    assert line.isascii()
    assert len(line) < 1500


def test_a_million_refusals_are_few_lines(lines: Lines, clock: SimpleNamespace) -> None:
    """A flood does not fill the disk: a client's first ten are logged, then ever fewer, and all of them are counted."""
    log = RefusalLog()
    _refuse(log, 1_000_000)
    _refuse(log, client="192.0.2.8")
    told = lines()
    assert len(told) == 26 + 1
    assert told[SHOWN - 1] == "refused 192.0.2.7 /v1/models: unknown"
    assert told[SHOWN] == "refused 192.0.2.7 /v1/models: unknown; 5 refusals before it are not shown"
    assert told[-1].startswith("refused 192.0.2.8 ")
    left_out = re.findall(r"(\d+) refusals before", "\n".join(told))
    assert len(told) + sum(map(int, left_out)) == 1_000_001
    clock.now += WINDOW
    _refuse(log, 2 * SHOWN)
    assert len(lines()) == SHOWN + 1
    log.finish()
    log.finish()
    assert lines() == ["4 more refusals are not shown"]


def test_a_flood_from_everywhere_takes_little_memory(lines: Lines, clock: SimpleNamespace) -> None:
    """An attacker with very many addresses gets few lines and little memory, and hides others for a minute at most."""
    log = RefusalLog()
    for number in range(100_000):
        _refuse(log, client=f"2001:db8::{number:x}")
    assert len(lines()) == CLIENT_LIMIT + SHOWN + 13
    _refuse(log, SHOWN, client="2001:db8::0")
    assert len(lines()) == SHOWN - 1, "a known client keeps its own count"
    assert len(log._counts) == CLIENT_LIMIT + 1
    clock.now += WINDOW
    _refuse(log, client="192.0.2.9")
    assert lines()[0].startswith("refused 192.0.2.9 ")
    assert len(log._counts) == 1


def test_nothing_is_counted_where_nothing_is_shown(lines: Lines, clock: SimpleNamespace) -> None:
    """A server that logs warnings only spends nothing on refusals."""
    log = RefusalLog()
    logging.getLogger("freegpt_auth").setLevel(logging.WARNING)
    _refuse(log, SHOWN + 1)
    log.finish()
    assert lines() == []
    assert clock.now - log._began == float("inf")
