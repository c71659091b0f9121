"""``python -m freegpt_auth``: the commands."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
