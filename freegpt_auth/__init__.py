"""Bearer tokens for any OpenAI-compatible ASGI server."""

from importlib import import_module

# "python -m freegpt_auth" runs this module with the working directory first on the path: a module that the interpreter
# has not loaded itself, such as typing or __future__, would be imported from there.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from .exceptions import ConfigurationError, FreeGPTAuthError, StoreError, StoreUnavailableError
    from .guard.callers import TokenUser
    from .guard.modes import AuthMode
    from .middleware import BearerTokenMiddleware
    from .settings import Settings
    from .stores.base import UNRESOLVED, Survey, TokenSource, TokenStore
    from .stores.file import FileTokenStore
    from .stores.memory import MemoryTokenStore
    from .tokens import Token

__all__ = [
    "UNRESOLVED",
    "AuthMode",
    "BearerTokenMiddleware",
    "ConfigurationError",
    "FileTokenStore",
    "FreeGPTAuthError",
    "MemoryTokenStore",
    "Settings",
    "StoreError",
    "StoreUnavailableError",
    "Survey",
    "Token",
    "TokenSource",
    "TokenStore",
    "TokenUser",
]

_HOMES = {
    "UNRESOLVED": "stores.base",
    "AuthMode": "guard.modes",
    "BearerTokenMiddleware": "middleware",
    "ConfigurationError": "exceptions",
    "FileTokenStore": "stores.file",
    "FreeGPTAuthError": "exceptions",
    "MemoryTokenStore": "stores.memory",
    "Settings": "settings",
    "StoreError": "exceptions",
    "StoreUnavailableError": "exceptions",
    "Survey": "stores.base",
    "Token": "tokens",
    "TokenStore": "stores.base",
    "TokenUser": "guard.callers",
    "TokenSource": "stores.base",
}


def __getattr__(name: str) -> object:
    # Imported on first use: commands need neither starlette nor anyio, whose import takes longer than most commands.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return value
