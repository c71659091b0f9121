"""Revocation: the time until all workers of a server refuse a token that clients use without a pause."""

from __future__ import annotations

import io
import random
import tempfile
import time
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import results
from asking import Answer, answer_of, asking_process, line_to_each, request_with
from measure import significant
from served import GUARDED
from serving import serving
from token_file import write_tokens

from freegpt_auth import cli

if TYPE_CHECKING:
    from collections.abc import Mapping
    from multiprocessing.connection import Connection

WORKERS = 4


class Revocation(NamedTuple):
    """One revocation.

    Attributes:
        began: start of the command.
        returned: its end.
        answers: all requests with the token, from before the command until after it.
    """

    began: float
    returned: float
    answers: list[Answer]

    @property
    def refusals(self) -> list[float]:
        """Milliseconds from the start of the command to the first refusal of each worker."""
        first: dict[int, float] = {}
        for answer in self.answers:
            if not answer.accepted:
                first[answer.worker] = min(answer.ended, first.get(answer.worker, answer.ended))
        return [(ended - self.began) * 1e3 for ended in first.values()]

    @property
    def after(self) -> list[Answer]:
        """The requests that began after the command had returned. There is at least one to each worker."""
        after = [answer for answer in self.answers if answer.began > self.returned]
        assert len({answer.worker for answer in after}) == WORKERS
        return after


def measure(rounds: int) -> list[results.Row]:
    """Revoke *rounds* tokens of a token file, one after another."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "api_tokens.json")
        secrets = write_tokens(path, rounds + 1)
        return revoke_under_load(str(path), {secret: f"client {number}" for number, secret in enumerate(secrets)})


def revoke_under_load(store: str, names: Mapping[str, str]) -> list[results.Row]:
    """Revoke all tokens of *store* but the first, one after another, and return the rows.

    Args:
        store: its location.
        names: the names of the tokens, by their secrets.
    """
    first, *secrets = names
    with serving(GUARDED, store, WORKERS) as server:
        lines = line_to_each(WORKERS, server.port, request_with(first))
        with asking_process(lines) as orders:
            seen = [_revoke(orders, store, secret, names[secret]) for secret in secrets]
    refusals = [delay for revocation in seen for delay in revocation.refusals]
    after = [answer for revocation in seen for answer in revocation.after]
    return [
        results.row("refused", "ms", refusals, p99=significant(sorted(refusals)[int(len(refusals) * 0.99)])),
        results.row("returned", "ms", [(revocation.returned - revocation.began) * 1e3 for revocation in seen]),
        {"name": "accepted after the command", "count": sum(answer.accepted for answer in after), "of": len(after)},
    ]


def _revoke(orders: Connection, store: str, secret: str, name: str) -> Revocation:
    orders.send(secret)
    answer_of(orders)
    # A server checks the file every 10 ms: start at any phase of that.
    time.sleep(random.uniform(0.002, 0.022))  # noqa: S311
    began = time.monotonic()
    with redirect_stderr(io.StringIO()):
        status = cli.main(["--store", store, "revoke", name])
    returned = time.monotonic()
    assert status == 0, name
    time.sleep(0.01)
    orders.send(None)
    return Revocation(began, returned, answer_of(orders))


if __name__ == "__main__":
    results.main("revocation", measure, rounds=1_000)
