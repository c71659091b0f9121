"""Refusals in the log: one record each, and few records for a flood.

A record names the client, the path, the reason and, if known, the token's id; it holds no credential. Text that a
client chose is quoted, without spaces and control characters: no client can forge a line or a part of one.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ..names import printable

if TYPE_CHECKING:
    from .refusal import Refusal

WINDOW = 60.0
"""Length of the period in which refusals are counted, in seconds."""

SHOWN = 10
"""Refusals of one client that are logged within a window. Of the later ones, only the 16th, 32nd, 64th … are logged."""

CLIENT_LIMIT = 256
"""Clients that have their own count within a window. All others share one."""

_CLIENT_LENGTH = 100
_PATH_LENGTH = 200  # quoting a whole path of 60 KB takes milliseconds
_SAFE = "/:@!$&'()*+,;=[]"

_logger = logging.getLogger("freegpt_auth")


class RefusalLog:
    """Logs refusals at level INFO, for operators and for programs such as fail2ban.

    Each record has the attributes ``client``, ``path``, ``reason``, ``token_id`` (or ``None``) and ``left_out``: the
    number of refusals before it that were not logged. A million refusals of one client are 26 records.
    """

    def __init__(self) -> None:
        self._began = float("-inf")
        self._counts: dict[str, int] = {}
        self._left_out = 0

    def log(self, scope: Any, refusal: Refusal) -> None:
        """Log the *refusal* of the request of *scope*, or count it for the next record."""
        if not _logger.isEnabledFor(logging.INFO):
            return
        client = str((scope.get("client") or ("unknown",))[0])[:_CLIENT_LENGTH]
        if not self._is_shown(client):
            self._left_out += 1
            return
        facts = {
            "client": _quoted(client, _CLIENT_LENGTH),  # only here: quoting takes 0.6 µs
            "path": _quoted(scope["path"], _PATH_LENGTH),
            "reason": refusal.reason,
            "token_id": refusal.token_id and printable(refusal.token_id),
            "left_out": self._left_out,
        }
        self._left_out = 0
        message = "refused %(client)s %(path)s: %(reason)s"
        message += " (%(token_id)s)" if refusal.token_id else ""
        message += "; %(left_out)d refusals before it are not shown" if facts["left_out"] else ""
        _logger.info(message, facts, extra=facts)

    def finish(self) -> None:
        """Log the number of refusals that were not logged since the last record. For a server that stops."""
        if self._left_out:
            _logger.info("%d more refusals are not shown", self._left_out, extra={"left_out": self._left_out})
            self._left_out = 0

    def _is_shown(self, client: str) -> bool:
        now = time.monotonic()
        if now - self._began >= WINDOW:
            self._began = now
            self._counts.clear()
        counts = self._counts
        if len(counts) >= CLIENT_LIMIT and client not in counts:
            client = ""
        count = counts[client] = counts.get(client, 0) + 1
        return count <= SHOWN or count & (count - 1) == 0


def _quoted(text: object, length: int) -> str:
    """Return the first *length* characters of *text*, quoted as in a URL."""
    return quote(str(text)[:length], safe=_SAFE, errors="surrogatepass")
