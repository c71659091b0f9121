"""``python -m freegpt_auth``: the commands."""

import os
import sys


def _leave_out_working_directory() -> None:
    """Remove the working directory from the module path, where ``-m`` puts it first.

    A ``msgspec.py`` or ``json.py`` in a folder of another user would run with the rights of the operator. At this point
    only this package is imported, and the ``os`` and ``sys`` that Python itself loads.
    """
    try:
        directory = os.getcwd()  # noqa: PTH109  an import of pathlib could load it from there
    except FileNotFoundError:  # deleted: "-m" puts nothing on the path
        return
    if not sys.flags.safe_path and sys.path[0] == directory:  # not with -P or PYTHONSAFEPATH
        del sys.path[0]


if __name__ == "__main__":
    _leave_out_working_directory()
    from .cli import main

    raise SystemExit(main())
