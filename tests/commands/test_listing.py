"""The output formats of tokens: lines for a person, and JSON."""

from __future__ import annotations

import json
import re
import time
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from msgspec.structs import replace

from freegpt_auth.commands.listing import as_json, as_text, title
from freegpt_auth.tokens import Token
from freegpt_auth.usage.base import Usage

CREATED = datetime(2025, 11, 26, 22, 30, tzinfo=UTC)
NOW, SECOND = datetime(2025, 12, 1, tzinfo=UTC), timedelta(seconds=1)
EARLY, LATE = CREATED + timedelta(hours=1), CREATED + timedelta(hours=2)
TOKEN = Token(id="a1b2c3d4e5f6", name="my-application", prefix="sk-a1b2c3d4e5f", created_at=CREATED)


@pytest.fixture(params=["XXX-14", "XXX+12"])
def hours(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set the time zone of this process; return its hours ahead of UTC."""
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield -int(request.param[3:])
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("expires_at", "revoked_at", "shown"),
    [(None, None, "✓ Active"), (NOW + SECOND, None, "✓ Active"), (NOW, None, "✗ Expired"), (EARLY, EARLY, "✗ Revoked")],
)
def test_text_has_the_lines_of_the_guide(
    hours: int, expires_at: datetime | None, revoked_at: datetime | None, shown: str
) -> None:
    """A person reads prefix, name and local times, and "active" exactly while the token is accepted.

    A token that expires has one line more than the guide shows.
    """
    token = replace(TOKEN, expires_at=expires_at, revoked_at=revoked_at)

    def by_the_wall(instant: datetime) -> str:
        return (instant + timedelta(hours=hours)).replace(tzinfo=None).isoformat()

    wall = by_the_wall(CREATED)
    expires = f"   Expires: {by_the_wall(expires_at)}\n" if expires_at else ""
    assert as_text(12, token, Usage(3, CREATED.replace(microsecond=999_999)), NOW.timestamp()) == (
        f"12. sk-a1b2c3d4e5f...\n   Name: my-application\n   Status: {shown}\n   Created: {wall}\n"
        f"{expires}   Last used: {wall}"
    )
    assert as_text(1, token, None, NOW.timestamp()).endswith("\n   Last used: Never")
    assert as_json(token, None, NOW.timestamp())["status"] == shown[2:].lower()


@pytest.mark.parametrize(("imported", "recorded"), [(LATE, None), (None, LATE), (EARLY, LATE), (LATE, EARLY)])
def test_json_has_times_with_offsets(hours: int, imported: datetime | None, recorded: datetime | None) -> None:
    """JSON has every field, with times in UTC; the last use is the later of the imported and the recorded one."""
    expires_at = LATE.astimezone(timezone(timedelta(hours=hours)))
    token = replace(TOKEN, expires_at=expires_at, revoked_at=EARLY, last_used_at=imported)
    assert json.loads(json.dumps(as_json(token, Usage(7, recorded) if recorded else None, NOW.timestamp()))) == {
        "id": "a1b2c3d4e5f6",
        "name": "my-application",
        "prefix": "sk-a1b2c3d4e5f",
        "status": "revoked",
        "created_at": "2025-11-26T22:30:00+00:00",
        "expires_at": "2025-11-27T00:30:00+00:00",
        "revoked_at": "2025-11-26T23:30:00+00:00",
        "last_used_at": "2025-11-27T00:30:00+00:00",
        "use_count": 7 if recorded else 0,
    }


@pytest.mark.usefixtures("hours")
@pytest.mark.parametrize("offset", [-12, 14])
@pytest.mark.parametrize("naive", [datetime.min, datetime.max])  # noqa: DTZ901  an offset is added
def test_ends_of_the_calendar_are_shown(naive: datetime, offset: int) -> None:
    """Every instant that a token file can hold is shown, in every time zone."""
    token = replace(TOKEN, created_at=naive.replace(tzinfo=timezone(timedelta(hours=offset))))
    assert re.search(r"^   Created: \d{4}-\d\d-\d\dT[\d:]{8}$", as_text(1, token, None, NOW.timestamp()), re.MULTILINE)
    assert isinstance(as_json(token, None, NOW.timestamp())["created_at"], str)


def test_text_does_not_control_a_terminal() -> None:
    """With any name and prefix in the file, a token is five lines of printable characters."""
    token = replace(TOKEN, name="\x1b[2J\u202eevil\n   Status: ✓ Active", prefix="sk-\x9bA\n")
    lines = as_text(1, token, None, NOW.timestamp()).split("\n")
    assert len(lines) == 5
    assert all(line.isprintable() for line in [*lines, title(token)])
