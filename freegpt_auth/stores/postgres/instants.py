"""Instants as integers: microseconds since 1970-01-01 00:00 UTC, which do not depend on session settings.

As text an instant depends on ``DateStyle`` and ``TimeZone``, as a float on ``extra_float_digits``. Python and
PostgreSQL both keep microseconds: no instant is rounded.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def _count(instant: datetime) -> int:
    return (instant - _EPOCH) // _MICROSECOND


_FIRST, _LAST = _count(datetime.min.replace(tzinfo=UTC)), _count(datetime.max.replace(tzinfo=UTC))


def count_of(instant: datetime) -> int:
    """Return the microseconds of an instant, clamped to the years 1 to 9999 in UTC: an offset may lead outside."""
    return min(max(_count(instant), _FIRST), _LAST)


def instant_of(count: int) -> datetime:
    """Return the instant of *count* microseconds, in UTC.

    Raises:
        TypeError: *count* is no number.
        OverflowError: the instant is outside the years 1 to 9999.
    """
    return _EPOCH + timedelta(microseconds=count)


def microseconds(instant: str) -> str:
    """Return the SQL expression that converts the SQL *instant* to microseconds."""
    return f"(extract(epoch FROM {instant}) * 1000000)::bigint"  # numeric since PostgreSQL 14: exact


def instant(count: str) -> str:
    """Return the SQL expression that converts the SQL *count* of microseconds to an instant."""
    # Seconds and microseconds separately: the product with an interval is a float, exact up to 2^53.
    seconds = f"timestamptz 'epoch' + {count} / 1000000 * interval '1 second'"
    return f"({seconds} + mod({count}, 1000000) * interval '1 microsecond')"
