"""One round of the benchmark of following: a process that has read nothing yet. It prints its figures as JSON."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from collections import defaultdict

import psycopg
from database import secret_of
from measure import longest_turn
from reload_round import private_memory

from freegpt_auth.stores.postgres import PostgresTokenStore
from freegpt_auth.tokens import digest_of

CHANGES, RELOADS = 20, 4
IDLE = 5.0
"""Seconds for which nothing is done but to follow."""

_ONE = "UPDATE freegpt_auth.tokens SET name = 'renamed' WHERE digest = %s"
# What the triggers do when so many are changed that every process is to read all tokens again.
_MANY = """
    WITH now_at AS (UPDATE freegpt_auth.state SET revision = revision + 1, mark = gen_random_uuid() RETURNING *),
        noted AS (INSERT INTO freegpt_auth.changes SELECT revision, mark, NULL FROM now_at)
    SELECT pg_notify('freegpt_auth', revision::text) FROM now_at
"""


class Child:
    """A process that follows a database, which it also changes."""

    def __init__(self, url: str) -> None:
        self.store = PostgresTokenStore(url)
        self.admin = psycopg.connect(url, autocommit=True)
        self.figures: dict[str, list[float]] = defaultdict(list)

    def start(self) -> None:
        """Ask for a token, for the first time."""
        gc.collect()
        before, began = private_memory(), time.perf_counter()
        assert self.store.resolve(digest_of(secret_of(1))) is not None
        self.figures["start"].append(time.perf_counter() - began)
        self.figures["memory"].append(private_memory() - before)

    def change(self, statement: str, *values: object) -> float:
        """Change tokens, and return the seconds until this process knows."""
        began = time.perf_counter()
        self.admin.execute(statement.encode(), values or None)
        [revision] = self.admin.execute("SELECT revision FROM freegpt_auth.state").fetchone() or [0]
        while self.store._cache.revision < revision:  # noqa: SLF001
            time.sleep(0.0005)
        return time.perf_counter() - began

    async def watch(self) -> None:
        """See how long the event loop is held while tokens are changed, and while they are not."""
        for number in range(CHANGES):
            one = asyncio.to_thread(self.change, _ONE, digest_of(secret_of(number)))
            seconds, held = await longest_turn(one)
            self.figures["seen"].append(seconds * 1e3)
            self.figures["held_change"].append(held)
        for _ in range(RELOADS):
            seconds, held = await longest_turn(asyncio.to_thread(self.change, _MANY))
            self.figures["reloaded"].append(seconds)
            self.figures["held_reload"].append(held)
            self.figures["quiet"].append((await longest_turn(asyncio.to_thread(time.sleep, seconds)))[1])

    def idle(self) -> None:
        """Do nothing but to follow."""
        began = time.process_time()
        time.sleep(IDLE)
        self.figures["idle"].append((time.process_time() - began) / IDLE * 100)


if __name__ == "__main__":
    child = Child(sys.argv[1])
    child.start()
    child.idle()
    asyncio.run(child.watch())
    child.admin.close()
    child.store.close()
    print(json.dumps(child.figures))
