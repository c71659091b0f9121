"""How tokens are shown: the lines for a person, and the record in JSON."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta, timezone
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings, strategies as st

from freegpt_auth.listing import entry, local, record, title
from freegpt_auth.tokens import Token
from freegpt_auth.usage_database import Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CREATED = datetime(2025, 11, 26, 10, 30, tzinfo=UTC)
NOW = datetime(2025, 12, 1, tzinfo=UTC)
EARLY, LATE = CREATED + timedelta(hours=1), CREATED + timedelta(hours=2)
TOKEN = Token(id="a1b2c3d4e5f6", name="my-application", prefix="sk-a1b2c3d4e5f", created_at=CREATED)


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Return a function that sets the time zone of this machine."""

    def enter(name: str) -> None:
        monkeypatch.setenv("TZ", name)
        time.tzset()

    yield enter
    monkeypatch.undo()
    time.tzset()


def made(**fields: object) -> Token:
    """Return a token like :data:`TOKEN`, with some fields of its own."""
    plain = {name: getattr(TOKEN, name) for name in TOKEN.__struct_fields__}
    return Token(**{**plain, **fields})


def test_an_entry_has_the_lines_of_the_guide(zone: Callable[[str], None]) -> None:
    """A person reads number and prefix, name, status and both times, in the order and layout of the guide."""
    zone("UTC")
    assert entry(1, TOKEN, Usage(3, datetime(2025, 11, 26, 11, 45, 23, 999_999, UTC)), NOW) == (
        "1. sk-a1b2c3d4e5f...\n"
        "   Name: my-application\n"
        "   Status: ✓ Active\n"
        "   Created: 2025-11-26T10:30:00\n"
        "   Last used: 2025-11-26T11:45:23"
    )
    assert entry(12, TOKEN, None, NOW).startswith("12. sk-")
    assert entry(1, TOKEN, None, NOW).endswith("\n   Last used: Never")


@pytest.mark.parametrize(
    ("expires_at", "revoked_at", "shown", "status"),
    [
        (None, None, "✓ Active", "active"),
        (NOW + timedelta(seconds=1), None, "✓ Active", "active"),
        (NOW, None, "✗ Expired", "expired"),
        (EARLY, None, "✗ Expired", "expired"),
        (None, EARLY, "✗ Revoked", "revoked"),
        (EARLY, EARLY, "✗ Revoked", "revoked"),
    ],
)
def test_the_status_is_what_a_server_would_find(
    expires_at: datetime | None, revoked_at: datetime | None, shown: str, status: str
) -> None:
    """A token is shown active exactly while it works, to the second of its end."""
    token = made(expires_at=expires_at, revoked_at=revoked_at)
    assert f"   Status: {shown}\n" in entry(1, token, None, NOW)
    assert record(token, None, NOW)["status"] == status


@pytest.mark.parametrize(
    ("imported", "recorded", "shown"),
    [(None, None, None), (EARLY, None, EARLY), (None, LATE, LATE), (EARLY, LATE, LATE), (LATE, EARLY, LATE)],
)
def test_the_later_of_two_last_uses_counts(
    imported: datetime | None, recorded: datetime | None, shown: datetime | None
) -> None:
    """An imported token shows its last use, whether it was before or after the import."""
    token = made(last_used_at=imported)
    usage = Usage(1, recorded) if recorded else None
    assert record(token, usage, NOW)["last_used_at"] == (shown.isoformat() if shown else None)
    assert entry(1, token, usage, NOW).endswith(f"   Last used: {local(shown) if shown else 'Never'}")


def test_a_record_is_json_with_offsets() -> None:
    """A program finds every documented field, times in UTC with their offset, and the count of uses."""
    elsewhere = timezone(timedelta(hours=2))
    token = made(created_at=CREATED.astimezone(elsewhere), expires_at=LATE.astimezone(elsewhere), revoked_at=EARLY)
    assert json.loads(json.dumps(record(token, Usage(7, LATE), NOW))) == {
        "id": "a1b2c3d4e5f6",
        "name": "my-application",
        "prefix": "sk-a1b2c3d4e5f",
        "status": "revoked",
        "created_at": "2025-11-26T10:30:00+00:00",
        "expires_at": "2025-11-26T12:30:00+00:00",
        "revoked_at": "2025-11-26T11:30:00+00:00",
        "last_used_at": "2025-11-26T12:30:00+00:00",
        "use_count": 7,
    }
    assert record(token, None, NOW)["use_count"] == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [("UTC", "2025-11-26T10:30:00"), ("XXX-05:30", "2025-11-26T16:00:00"), ("XXX+11", "2025-11-25T23:30:00")],
)
def test_a_person_reads_local_time(zone: Callable[[str], None], name: str, expected: str) -> None:
    """Times are shown as the clock on the wall of this machine had them."""
    zone(name)
    assert local(CREATED) == expected


@pytest.mark.parametrize("name", ["UTC", "XXX-14", "XXX+12"])
@pytest.mark.parametrize("offset", [-12, 0, 14])
@pytest.mark.parametrize("naive", [datetime.min, datetime.max])  # noqa: DTZ901  an offset is added
def test_the_ends_of_the_calendar_can_be_shown(
    zone: Callable[[str], None], naive: datetime, offset: int, name: str
) -> None:
    """Every instant that a token file can hold can be shown, in every time zone."""
    zone(name)
    instant = naive.replace(tzinfo=timezone(timedelta(hours=offset)))
    token = made(created_at=instant, revoked_at=instant, expires_at=instant, last_used_at=instant)
    assert "   Created: " in entry(1, token, None, NOW)
    assert isinstance(record(token, None, NOW)["created_at"], str)


def test_a_title_is_prefix_and_name() -> None:
    """A sentence about a token names it by what list shows of it."""
    assert title(TOKEN) == "sk-a1b2c3d4e5f... (my-application)"


@settings(max_examples=100, deadline=None)
@given(name=st.text(), prefix=st.text(max_size=14))
def test_nothing_shown_drives_a_terminal(name: str, prefix: str) -> None:
    """Whatever a file holds for a name or a prefix, a token takes five lines, and all of them print."""
    token = made(name=name, prefix=prefix)
    lines = entry(1, token, None, NOW).split("\n")
    assert len(lines) == 5
    assert all(line.isprintable() for line in [*lines, title(token)])
