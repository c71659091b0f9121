"""``python -m freegpt_auth``: the commands."""

import os
import sys


def _leave_out_working_directory() -> None:
    """Take the working directory off the module path, where ``-m`` puts it first.

    A ``msgspec.py`` or ``json.py`` in a folder of another user would run with the rights of the operator. This package is
    imported by now, from there or elsewhere. Python itself loads ``os`` and ``sys``, and no other module before this one.
    """
    try:
        directory = os.getcwd()  # noqa: PTH109  pathlib is not loaded yet
    except FileNotFoundError:  # deleted: "-m" puts nothing on the path
        return
    if not sys.flags.safe_path and sys.path[0] == directory:  # not with -P or PYTHONSAFEPATH
        del sys.path[0]


if __name__ == "__main__":
    _leave_out_working_directory()
    from .cli import main

    raise SystemExit(main())
