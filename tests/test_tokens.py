"""What a token is: the shape of its secret, its digest, its prefix, its checksum, and how a reference finds it."""

from __future__ import annotations

import re
import secrets as secrets_module
from datetime import UTC, datetime, timedelta
from hashlib import sha256

import msgspec
import pytest
from hypothesis import given, settings, strategies as st

from freegpt_auth.tokens import (
    PREFIX_LENGTH,
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

quick = settings(max_examples=50, deadline=None)


def _imported(*secrets: str) -> dict[bytes, Token]:
    """Return tokens whose names are their secrets."""
    return {
        digest_of(secret): Token(id=f"id{number}", name=secret, prefix=prefix_of(secret), created_at=NOW)
        for number, secret in enumerate(secrets)
    }


# --- the secret


def test_a_secret_is_256_bits_from_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can guess a secret: 43 characters are drawn one by one from the system's source of randomness."""
    drawn: list[str] = []

    def choice(alphabet: str) -> str:
        drawn.append(alphabet)
        return alphabet[len(drawn) % 62]

    monkeypatch.setattr(secrets_module, "choice", choice)
    assert generate_secret()[3:-6] == "".join(BASE62[number % 62] for number in range(1, 44))
    assert drawn == [BASE62] * 43
    assert 62 ** len(drawn) > 2**256


def test_the_shape_of_a_secret_never_changes() -> None:
    """A scanner finds secrets by one pattern and their checksum, which every later release knows as well."""
    assert re.fullmatch(r"sk-[0-9A-Za-z]{49}", generate_secret())
    # CRC-32 of the 46 characters is 3120157252, which is 3P9rQy in six base62 digits.
    assert has_valid_checksum("sk-" + "0" * 43 + "3P9rQy")


@quick
@given(place=st.integers(0, SECRET_LENGTH - 1), character=st.sampled_from(BASE62), text=st.text(max_size=60))
def test_a_typing_error_is_found_by_the_checksum(place: int, character: str, text: str) -> None:
    """A mistyped, cut or foreign secret is told from one made here without a look-up, whatever a client sends."""
    secret = generate_secret()
    mistyped = secret[:place] + character + secret[place + 1 :]
    assert has_valid_checksum(secret)
    assert has_valid_checksum(mistyped) == (mistyped == secret)
    for changed in (text, text.ljust(SECRET_LENGTH), "\udcff" * SECRET_LENGTH, secret[1:], secret + "0"):
        assert not has_valid_checksum(changed)


# --- what is stored of it


def test_the_digest_is_sha256() -> None:
    """A digest can be checked with any tool: it is the SHA-256 of the secret as UTF-8, or of the bytes that came."""
    for secret in ("sk-ä".encode(), b"sk-\xff"):
        assert digest_of(secret.decode("utf-8", "surrogateescape")) == sha256(secret).digest()


@pytest.mark.parametrize(("length", "shown"), [(0, 0), (2, 0), (8, 2), (41, 13), (42, 14), (80, 14)])
def test_a_prefix_shows_at_most_a_third(length: int, shown: int) -> None:
    """An imported secret, however short, is never shown whole."""
    assert prefix_of("x" * length) == "x" * shown


def test_an_issued_token_holds_nothing_of_its_secret_but_the_prefix() -> None:
    """A record, its id, its repr and its JSON can be shown to anyone: the secret and its digest are not in them."""
    issued = [issue("ci", now=NOW, expires_at=NOW + SECOND) for _ in range(20)]
    assert len({token.id for token, _ in issued}) == 20
    for token, secret in issued:
        assert token == Token(id=token.id, name="ci", prefix=secret[:14], created_at=NOW, expires_at=NOW + SECOND)
        assert re.fullmatch("[0-9a-f]{12}", token.id)
        assert token.id not in digest_of(secret).hex()
        assert secret[:15] not in repr(token) + msgspec.json.encode(token).decode()


def test_a_token_cannot_be_changed() -> None:
    """No code can revive a token in memory: its record is frozen."""
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
def test_the_status_follows_from_the_instants(expires: datetime | None, revoked: datetime | None, status: str) -> None:
    """A token stops working at the very instant it expires, and revoked comes before everything."""
    token, _ = issue("ci", now=NOW, expires_at=expires)
    assert msgspec.structs.replace(token, revoked_at=revoked).status(NOW.timestamp()) == status


# --- references


def test_a_reference_of_any_documented_kind_finds_its_token() -> None:
    """``revoke`` takes the whole secret, the id, the name, the shown prefix, dots or not, or more of the secret."""
    token, secret = issue("one", now=NOW)
    table = {digest_of(secret): token, **_imported(generate_secret())}
    shown = (token.prefix, f"{token.prefix}...", f"{token.prefix}…")
    for reference in (secret, token.id, "one", *shown, secret[:20], secret[:51]):
        assert find(reference, table) == [token]
        assert find(f" {reference}\r\n", table) == [token] * (reference != "one")


SHAPED = "sk-" + "a" * 49


@pytest.mark.parametrize(
    ("reference", "names", "found"),
    [
        pytest.param("ci", ["ci", "web"], ["ci"], id="the only one"),
        pytest.param("ci", ["ci", "web", "ci"], ["ci", "ci"], id="two of one name"),
        pytest.param("id1", ["id1", "web"], ["id1", "web"], id="the id of another"),
        pytest.param("0sk-aaaaaaaaaa", ["0sk-aaaaaaaaaa", "web"], ["0sk-aaaaaaaaaa"], id="the prefix of itself"),
        pytest.param("1sk-aaaaaaaaaa", ["1sk-aaaaaaaaaa", "web"], ["1sk-aaaaaaaaaa", "web"], id="another's prefix"),
        pytest.param("1sk-aaaaaaaaaaX", ["1sk-aaaaaaaaaaX", "web"], ["1sk-aaaaaaaaaaX"], id="a longer part of another"),
        pytest.param("CI", ["ci"], [], id="other case"),
        pytest.param("c", ["ci"], [], id="a part"),
        pytest.param("ci", [" ci "], [], id="without its spaces"),
        pytest.param(" ci ", [" ci ", "ci"], [" ci "], id="with its spaces"),
        pytest.param("J.R.", ["J.R."], ["J.R."], id="with a dot at the end"),
        pytest.param("u\u0308", ["ü"], [], id="another spelling that looks the same"),
        pytest.param(" ", [" ", ""], [], id="blank"),
        pytest.param("", ["", "a"], [], id="an unset variable"),
        pytest.param("x" * 60, ["x" * 60], ["x" * 60], id="as long as a secret"),
        pytest.param(SHAPED, [SHAPED], [], id="as a secret looks"),
    ],
)
def test_exact_name_finds_its_tokens(reference: str, names: list[str], found: list[str]) -> None:
    """A name finds each token that has it, and whatever else it may mean; a mistyped secret is never taken for one."""
    table = {
        bytes([number]) * 32: Token(id=f"id{number}", name=name, prefix=f"{number}sk-aaaaaaaaaa", created_at=NOW)
        for number, name in enumerate(names)
    }
    assert [token.name for token in find(reference, table)] == found


@pytest.mark.parametrize(
    ("reference", "secrets", "found"),
    [
        pytest.param("a.", ["a.", "a.."], ["a."], id="a whole secret that ends in a dot"),
        pytest.param("x" * 80, ["x" * 80, "x" * 81], ["x" * 80], id="a long secret"),
        pytest.param("a" * 14, ["a" * 60, "a" * 61], ["a" * 60, "a" * 61], id="a prefix that may mean two"),
        pytest.param("a" * 16, ["a" * 60, "a" * 61], ["a" * 60, "a" * 61], id="more that may mean two"),
        pytest.param("a" * 13, ["a" * 60], [], id="less than the prefix"),
        pytest.param("a" * 51 + "b", ["a" * 52], [], id="a mistyped secret, beside the right one"),
        pytest.param("…", ["ab"], [], id="nothing but dots, beside a secret too short for a prefix"),
        pytest.param("", ["ab"], [], id="an unset variable"),
        pytest.param("sk-abcdefghijk"[:PREFIX_LENGTH], ["sk-abcdef"], [], id="the prefix of a token that is gone"),
    ],
)
def test_a_reference_reaches_no_token_beside_the_one_meant(
    reference: str, secrets: list[str], found: list[str]
) -> None:
    """Every token that a reference may mean is answered, and a mistyped, short or empty one means none."""
    assert [token.name for token in find(reference, _imported(*secrets))] == found
