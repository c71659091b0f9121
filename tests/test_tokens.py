"""Tokens: the secret, its digest, its prefix, its checksum, and the references that find a token."""

from __future__ import annotations

import re
import secrets as secrets_module
from datetime import UTC, datetime, timedelta
from hashlib import sha256

import msgspec
import pytest
from hypothesis import given, settings, strategies as st

from freegpt_auth.tokens import (
    SECRET_LENGTH,
    Token,
    digest_of,
    find,
    generate_secret,
    has_valid_checksum,
    issue,
    prefix_of,
)

NOW = datetime(2025, 6, 1, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)
BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def test_secret_has_256_random_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret cannot be guessed: the system's source of randomness draws each of its 43 characters."""
    drawn: list[str] = []

    def choice(alphabet: str) -> str:
        drawn.append(alphabet)
        return alphabet[len(drawn) % 62]

    monkeypatch.setattr(secrets_module, "choice", choice)
    assert generate_secret()[3:-6] == "".join(BASE62[number % 62] for number in range(1, 44))
    assert drawn == [BASE62] * 43
    assert 62 ** len(drawn) > 2**256


def test_shape_of_a_secret_is_fixed() -> None:
    """A scanner recognises secrets by one pattern and their checksum, in every release."""
    assert re.fullmatch(r"sk-[0-9A-Za-z]{49}", generate_secret())
    # CRC-32 of the 46 characters is 3120157252, which is 3P9rQy in six base62 digits.
    assert has_valid_checksum("sk-" + "0" * 43 + "3P9rQy")


@settings(max_examples=50, deadline=None)
@given(place=st.integers(0, SECRET_LENGTH - 1), character=st.sampled_from(BASE62), text=st.text(max_size=60))
def test_checksum_finds_typing_errors(place: int, character: str, text: str) -> None:
    """A mistyped, truncated or foreign secret is recognised without a look-up."""
    secret = generate_secret()
    mistyped = secret[:place] + character + secret[place + 1 :]
    assert has_valid_checksum(secret)
    assert has_valid_checksum(mistyped) == (mistyped == secret)
    for changed in (text, text.ljust(SECRET_LENGTH), "\udcff" * SECRET_LENGTH, secret[1:], secret + "0"):
        assert not has_valid_checksum(changed)


def test_digest_is_sha256() -> None:
    """Any tool can compute a digest: it is the SHA-256 of the secret in UTF-8, or of the received bytes."""
    for secret in ("sk-ä".encode(), b"sk-\xff"):
        assert digest_of(secret.decode("utf-8", "surrogateescape")) == sha256(secret).digest()


@pytest.mark.parametrize(("length", "shown"), [(0, 0), (2, 0), (8, 2), (41, 13), (42, 14), (80, 14)])
def test_prefix_shows_at_most_a_third(length: int, shown: int) -> None:
    """An imported secret of any length is not shown whole."""
    assert prefix_of("x" * length) == "x" * shown


def test_token_holds_only_the_prefix_of_its_secret() -> None:
    """A record can be shown to anyone: its id, ``repr`` and JSON hold neither the secret nor the digest."""
    issued = [issue("ci", now=NOW, expires_at=NOW + SECOND) for _ in range(20)]
    assert len({token.id for token, _ in issued}) == 20
    for token, secret in issued:
        assert token == Token(id=token.id, name="ci", prefix=secret[:14], created_at=NOW, expires_at=NOW + SECOND)
        assert re.fullmatch("[0-9a-f]{12}", token.id)
        assert token.id not in digest_of(secret).hex()
        assert secret[:15] not in repr(token) + msgspec.json.encode(token).decode()


def test_token_is_frozen() -> None:
    """No code can un-revoke a token in memory."""
    token, _ = issue("ci", now=NOW)
    with pytest.raises(AttributeError, match="immutable"):
        token.revoked_at = None  # type: ignore[misc]


@pytest.mark.parametrize(
    ("expires", "revoked", "status"),
    [
        (None, None, "active"),
        (NOW + SECOND, None, "active"),
        (NOW, None, "expired"),
        (None, NOW + SECOND, "revoked"),
        (NOW - SECOND, NOW, "revoked"),
    ],
)
def test_status_is_derived(expires: datetime | None, revoked: datetime | None, status: str) -> None:
    """A token is refused from the instant of its expiry on, and "revoked" precedes "expired"."""
    token, _ = issue("ci", now=NOW, expires_at=expires)
    assert msgspec.structs.replace(token, revoked_at=revoked).status(NOW.timestamp()) == status


# --- references

SHAPED = "sk-" + "a" * 49


@pytest.mark.parametrize(
    ("reference", "names", "found"),
    [
        pytest.param("ci", ["ci", "web", "ci"], ["ci", "ci"], id="two of one name"),
        pytest.param("id1", ["id1", "web"], ["id1", "web"], id="the id of another"),
        pytest.param("0sk-aaaaaaaaaa", ["0sk-aaaaaaaaaa", "web"], ["0sk-aaaaaaaaaa"], id="its own prefix"),
        pytest.param("1sk-aaaaaaaaaa", ["1sk-aaaaaaaaaa", "web"], ["1sk-aaaaaaaaaa", "web"], id="another's prefix"),
        pytest.param("1sk-aaaaaaaaaaX", ["1sk-aaaaaaaaaaX", "web"], ["1sk-aaaaaaaaaaX"], id="longer part of another"),
        pytest.param("CI", ["ci"], [], id="other case"),
        pytest.param("c", ["ci"], [], id="a part"),
        pytest.param("ci", [" ci "], [], id="without its spaces"),
        pytest.param(" ci ", [" ci ", "ci"], [" ci "], id="with its spaces"),
        pytest.param("J.R.", ["J.R."], ["J.R."], id="final dot"),
        pytest.param("u\u0308", ["ü"], [], id="other spelling of the same text"),
        pytest.param(" ", [" ", ""], [], id="blank"),
        pytest.param("", ["", "a"], [], id="unset variable"),
        pytest.param("x" * 60, ["x" * 60], ["x" * 60], id="longer than a secret"),
        pytest.param(SHAPED, [SHAPED], [], id="shape of a secret"),
    ],
)
def test_name_finds_its_tokens(reference: str, names: list[str], found: list[str]) -> None:
    """A name finds each token that has it, and those it means in other readings; a mistyped secret is no name."""
    table = {
        bytes([number]) * 32: Token(id=f"id{number}", name=name, prefix=f"{number}sk-aaaaaaaaaa", created_at=NOW)
        for number, name in enumerate(names)
    }
    assert [token.name for token in find(reference, table)] == found


LONG = "a" * 60


@pytest.mark.parametrize(
    ("reference", "secrets", "found"),
    [
        pytest.param("id0", [LONG], [LONG], id="id"),
        pytest.param(f" {LONG}\r\n", [LONG], [LONG], id="whole secret"),
        pytest.param(f" {LONG[:14]}...\r\n", [LONG], [LONG], id="prefix as shown"),
        pytest.param(f"{LONG[:14]}…", [LONG], [LONG], id="prefix and ellipsis"),
        pytest.param(LONG[:51], [LONG], [LONG], id="longest part"),
        pytest.param("a.", ["a.", "a.."], ["a."], id="whole secret with a final dot"),
        pytest.param("x" * 80, ["x" * 80, "x" * 81], ["x" * 80], id="long secret"),
        pytest.param("a" * 14, [LONG, "a" * 61], [LONG, "a" * 61], id="prefix of two"),
        pytest.param("a" * 16, [LONG, "a" * 61], [LONG, "a" * 61], id="longer part of two"),
        pytest.param("a" * 13, [LONG], [], id="shorter than the prefix"),
        pytest.param("a" * 51 + "b", ["a" * 52], [], id="mistyped secret"),
        pytest.param("…", ["ab"], [], id="only dots, and a secret without a prefix"),
        pytest.param("sk-abcdefghijk", ["sk-abcdef"], [], id="prefix of a deleted token"),
    ],
)
def test_secret_or_part_finds_its_tokens(reference: str, secrets: list[str], found: list[str]) -> None:
    """Every token that a reference may mean is found; a mistyped, short or empty reference finds none."""
    table = {
        digest_of(secret): Token(id=f"id{number}", name=secret, prefix=prefix_of(secret), created_at=NOW)
        for number, secret in enumerate(secrets)
    }
    assert [token.name for token in find(reference, table)] == found
