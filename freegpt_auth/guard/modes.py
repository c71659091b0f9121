"""The modes of a server, and their line in the log at the start."""

from __future__ import annotations

import logging
from enum import StrEnum
from shlex import quote
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..environment_key import EnvironmentKey
    from ..stores.base import Survey

_logger = logging.getLogger("freegpt_auth")


class AuthMode(StrEnum):
    """The credentials that a server accepts. Open mode may end."""

    OPEN = "open"
    """Nothing is configured: every request passes."""
    ENVIRONMENT = "environment"
    """Only the environment key."""
    TOKEN_FILE = "token-file"  # noqa: S105
    """The active tokens of a file or of one's own token source, and the environment key if one is set."""
    DATABASE = "database"
    """The active tokens of a database, and the environment key if one is set."""


def announce(mode: AuthMode, survey: Survey, key: EnvironmentKey | None) -> None:
    """Log the mode, never the key."""
    if mode is AuthMode.OPEN:
        _logger.warning(
            "open mode: every request is let through, since no environment key is set and %s holds no tokens. "
            "To turn authentication on, run: python -m freegpt_auth create NAME",
            survey.source,
        )
        return
    origin = f"the environment key from {key.source}" if key else "no environment key"
    if mode is not AuthMode.ENVIRONMENT and not survey.configured:
        refused = f"{survey.source} is missing or holds no tokens, so requests are refused (there is {origin})"
        way_out = f"To create a first token, run: python -m freegpt_auth --store {quote(survey.source)} create NAME"
        _logger.warning("%s mode: %s. %s", mode, refused, way_out)
        return
    _logger.info("%s mode: %d active token(s) from %s, and %s", mode, survey.active, survey.source, origin)
