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
    checked_name,
    digest_of,
    find,
    generate_secret,
    has_valid_checksum,
    issue,
    prefix_of,
    printable,
)

NOW = datetime(2025, 6, 1, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)
BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

quick = settings(max_examples=100, deadline=None)


def _imported(secret: str, token_id: str = "imported") -> tuple[bytes, Token]:
    return digest_of(secret), Token(id=token_id, name="imported", prefix=prefix_of(secret), created_at=NOW)


# --- the secret


def test_a_secret_has_the_documented_shape() -> None:
    """A scanner finds secrets by one pattern: ``sk-`` and 49 base62 characters."""
    secret = generate_secret()
    assert re.fullmatch(r"sk-[0-9A-Za-z]{49}", secret)
    assert len(secret) == SECRET_LENGTH


def test_a_secret_is_256_bits_from_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can guess a secret: 43 characters are drawn one by one from the system's source of randomness."""
    drawn: list[str] = []

    def choice(alphabet: str) -> str:
        drawn.append(alphabet)
        return alphabet[len(drawn) % 62]

    monkeypatch.setattr(secrets_module, "choice", choice)
    secret = generate_secret()
    assert secret[3:-6] == "".join(BASE62[number % 62] for number in range(1, 44))
    assert {"".join(sorted(alphabet)) for alphabet in drawn} == {BASE62}
    assert 62 ** len(drawn) > 2**256


def test_secrets_differ() -> None:
    """No two people get the same secret."""
    assert len({generate_secret() for _ in range(1000)}) == 1000


def test_the_checksum_never_changes() -> None:
    """A secret issued by one release is known as well-formed by every later one, and by a scanner made elsewhere."""
    # CRC-32 of the 46 characters is 3120157252, which is 3P9rQy in six base62 digits.
    assert has_valid_checksum("sk-" + "0" * 43 + "3P9rQy")


@quick
@given(place=st.integers(0, SECRET_LENGTH - 1), character=st.sampled_from(BASE62))
def test_a_typing_error_is_found_by_the_checksum(place: int, character: str) -> None:
    """One mistyped character is told apart from a foreign key without a look-up."""
    secret = generate_secret()
    mistyped = secret[:place] + character + secret[place + 1 :]
    assert has_valid_checksum(secret)
    assert has_valid_checksum(mistyped) == (mistyped == secret)


@quick
@given(text=st.text(max_size=60))
def test_text_of_any_kind_can_be_checked(text: str) -> None:
    """Whatever a client sends, the check of its shape answers no and never fails."""
    assert not has_valid_checksum(text)


def test_a_cut_or_lengthened_secret_is_not_well_formed() -> None:
    """A secret that lost or gained characters while it was copied is not taken for one made here."""
    secret = generate_secret()
    for changed in ("", secret[:-1], secret[1:], secret + "0", " " + secret, secret.swapcase()):
        assert not has_valid_checksum(changed)


# --- what is stored of it


def test_the_digest_is_sha256() -> None:
    """A digest can be checked with any tool: it is the SHA-256 of the secret, as UTF-8."""
    assert digest_of("sk-ä") == sha256("sk-ä".encode()).digest()


def test_bytes_that_are_no_utf_8_have_their_own_digest() -> None:
    """A secret that came as bytes from a command line is digested as those bytes."""
    assert digest_of(b"sk-\xff".decode("utf-8", "surrogateescape")) == sha256(b"sk-\xff").digest()


@quick
@given(secret=st.text(max_size=80))
def test_a_prefix_shows_at_most_a_third(secret: str) -> None:
    """An imported secret, however short, is never shown whole."""
    prefix = prefix_of(secret)
    assert secret.startswith(prefix)
    assert len(prefix) == min(PREFIX_LENGTH, len(secret) // 3)


def test_an_issued_token_holds_nothing_of_its_secret_but_the_prefix() -> None:
    """A record, its repr and its JSON can be shown to anyone: the secret and its digest are not in them."""
    token, secret = issue("ci", now=NOW, expires_at=NOW + SECOND)
    assert token.prefix == secret[:14]
    shown = repr(token) + msgspec.json.encode(token).decode()
    assert secret[:15] not in shown
    assert digest_of(secret).hex() not in shown
    assert (token.name, token.created_at, token.expires_at, token.revoked_at) == ("ci", NOW, NOW + SECOND, None)
    assert (token.scopes, token.models, token.last_used_at) == ((), None, None)


def test_ids_are_random_and_not_made_from_the_secret() -> None:
    """A token id is safe in every log: it is random, and tells nothing about the secret."""
    issued = [issue("ci", now=NOW) for _ in range(100)]
    assert len({token.id for token, _ in issued}) == 100
    assert all(re.fullmatch("[0-9a-f]{12}", token.id) for token, _ in issued)
    assert not any(token.id in digest_of(secret).hex() for token, secret in issued)


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
        (NOW - SECOND, None, "expired"),
        (None, NOW, "revoked"),
        (None, NOW + SECOND, "revoked"),
        (NOW - SECOND, NOW, "revoked"),
    ],
)
def test_the_status_follows_from_the_instants(expires: datetime | None, revoked: datetime | None, status: str) -> None:
    """A token stops working at the very instant it expires, and revoked comes before everything."""
    token, _ = issue("ci", now=NOW, expires_at=expires)
    assert msgspec.structs.replace(token, revoked_at=revoked).status(NOW) == status


# --- names


@pytest.mark.parametrize("name", ["ci", "Überprüfung 3", "名前", "a" * 200, 'it\'s "quoted"'])
def test_a_name_that_prints_is_kept_as_it_is(name: str) -> None:
    """An operator may call a token anything that a terminal shows."""
    assert checked_name(name) == name


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "must not be empty"),
        (" \t", "must not be empty"),
        ("a" * 201, "longer than 200"),
        ("a\nb", r"control characters: a\\nb"),
        ("\x1b[2Jgone", r"control characters: \\x1b\[2Jgone"),
        ("evil\u202eexe", r"control characters: evil\\u202eexe"),
    ],
)
def test_a_name_that_could_drive_a_terminal_is_refused(name: str, problem: str) -> None:
    """No token can be given a name that clears a screen, forges a line or says nothing."""
    with pytest.raises(ValueError, match=problem):
        issue(name, now=NOW)


@quick
@given(text=st.text(alphabet=st.characters(), max_size=30))
def test_escaped_text_always_prints(text: str) -> None:
    """Whatever stands in a file, nothing of it reaches a terminal or a log but what prints."""
    assert printable(text).isprintable()
    assert not text.isprintable() or printable(text) == text


# --- references


def test_a_reference_of_any_documented_kind_finds_its_token() -> None:
    """``revoke`` takes the whole secret, the id, the shown prefix with or without dots, or more of the secret."""
    token, secret = issue("one", now=NOW)
    other, other_secret = issue("two", now=NOW)
    table = {digest_of(secret): token, digest_of(other_secret): other}
    references = (secret, token.id, token.prefix, f"{token.prefix}...", f"{token.prefix}…", secret[:20], secret[:51])
    for reference in references:
        assert find(reference, table) == [token]


def test_an_imported_secret_is_found_whole() -> None:
    """A secret of any shape, even one that ends in a dot or shows no prefix, finds its own token."""
    table = dict(_imported(secret, str(number)) for number, secret in enumerate(("a.", "x" * 80, "päss…")))
    assert [find(secret, table)[0].id for secret in ("a.", "x" * 80, "päss…")] == ["0", "1", "2"]


def test_every_token_that_a_prefix_may_mean_is_answered() -> None:
    """Where a prefix is not enough to tell two tokens apart, both are answered, and nothing is done to either."""
    table = dict([_imported("sk-" + "a" * 60, "one"), _imported("sk-" + "a" * 61, "two")])
    assert [token.id for token in find("sk-aaaaaaaaaaa", table)] == ["one", "two"]
    assert [token.id for token in find("sk-aaaaaaaaaaaaa", table)] == ["one", "two"]


def test_a_mistyped_secret_means_no_token() -> None:
    """A whole secret with one wrong character never revokes the token beside it."""
    token, secret = issue("one", now=NOW)
    mistyped = secret[:-1] + ("0" if secret[-1] != "0" else "1")
    assert find(mistyped, {digest_of(secret): token}) == []


def test_less_than_the_prefix_means_no_token() -> None:
    """A few characters that happen to fit are no reference."""
    token, secret = issue("one", now=NOW)
    assert find(secret[:13], {digest_of(secret): token}) == []


@pytest.mark.parametrize("reference", ["", "...", "…"])
def test_an_empty_reference_means_no_token(reference: str) -> None:
    """``revoke "$UNSET"`` does nothing, even beside an imported token too short to show a prefix."""
    assert find(reference, dict([_imported("ab")])) == []


def test_a_reference_to_a_token_that_is_gone_means_no_imported_one() -> None:
    """The prefix of a deleted token never reaches an imported token whose own short prefix it begins with."""
    _, gone = issue("gone", now=NOW)
    assert find(gone[:PREFIX_LENGTH], dict([_imported("sk-abcdef")])) == []
