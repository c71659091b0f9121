"""The modes of a server, and the line of the log that states the mode at the start."""

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
    """What a server accepts, found when it starts."""

    OPEN = "open"
    """Nothing is configured: every request passes."""
    ENVIRONMENT = "environment"
    """Only the environment key."""
    TOKEN_FILE = "token-file"  # noqa: S105
    """The active tokens, of a file or of any other store, and the environment key if one is set."""


def announce(mode: AuthMode, survey: Survey, key: EnvironmentKey | None) -> None:
    """Log the mode, once. Never the key."""
    if mode is AuthMode.OPEN:
        _logger.warning(
            "open mode: every request is let through, since no environment key is set and %s holds no tokens. "
            "To turn authentication on, run: python -m freegpt_auth create NAME",
            survey.source,
        )
        return
    kind = "database" if "://" in survey.source else mode.value
    origin = f"the environment key from {key.source}" if key else "no environment key"
    if mode is AuthMode.TOKEN_FILE and not survey.configured:
        refused = f"{survey.source} is missing or holds no tokens, so requests are refused (there is {origin})"
        way_out = f"To create a first token, run: python -m freegpt_auth --store {quote(survey.source)} create NAME"
        _logger.warning("%s mode: %s. %s", kind, refused, way_out)
        return
    _logger.info("%s mode: %d active token(s) from %s, and %s", kind, survey.active, survey.source, origin)
