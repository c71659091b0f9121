"""A coverage-guided fuzzer of the checks that the tests share, starting from the corpus.

::

    python tests/fuzz/fuzz.py [TARGET …] [--seconds N | --runs N]

Exits with 0 if every check passed. An input that fails a check is kept in a temporary folder: reproduce the failure
with ``--replay``, and add the input to ``corpus`` once the fault is fixed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import atheris  # type: ignore[import-untyped]

HERE = Path(__file__).parent
TARGETS = sorted(folder.name for folder in (HERE / "corpus").iterdir())
MEMORY = Path("/dev/shm")
HUNG = 60
"""Time limit of one input, in seconds."""


def main() -> int:
    """Fuzz the targets in turn; return 1 if a check failed."""
    parser = argparse.ArgumentParser(description="Fuzz freegpt_auth.")
    parser.add_argument("target", nargs="*", choices=TARGETS, help="what to fuzz; by default everything")
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument("--seconds", type=int, default=60, help="for each target; by default 60")
    limit.add_argument("--runs", type=int, help="inputs for each target")
    parser.add_argument("--replay", type=Path, help="try this one input, for one target")
    options = parser.parse_args()
    limits = [f"-max_total_time={options.seconds}" if options.runs is None else f"-runs={options.runs}"]
    found = [target for target in options.target or TARGETS if in_own_process(target, limits, options.replay)]
    print(f"found something: {', '.join(found)}" if found else "found nothing")  # noqa: T201
    return bool(found)


def in_own_process(target: str, limits: list[str], replay: Path | None) -> int:
    """Fuzz in a child, since the fuzzer ends its process; return the exit status."""
    left = tempfile.mkdtemp(prefix=f"freegpt_auth-fuzz-{target}-")
    with tempfile.TemporaryDirectory() as grown:
        child = os.fork()
        if not child:
            inputs = [str(replay)] if replay else [*limits, grown, str(HERE / "corpus" / target)]
            fuzz(target, [f"-artifact_prefix={left}/", f"-timeout={HUNG}", *inputs])
        _, status = os.waitpid(child, 0)
    if not any(Path(left).iterdir()):
        Path(left).rmdir()
    return os.waitstatus_to_exitcode(status)


def fuzz(target: str, arguments: list[str]) -> None:
    """Run the fuzzer, guided by the branches of the package that an input reaches. It does not return."""
    with atheris.instrument_imports(include=["freegpt_auth"]):
        sys.path.append(str(HERE.parent.parent))
        from tests.fuzz import checks  # noqa: PLC0415  only imports within the block are instrumented
    if MEMORY.is_dir():
        tempfile.tempdir = str(MEMORY)  # three times as many inputs
    words = f"-dict={HERE / f'{target}.dict'}"
    atheris.Setup([sys.argv[0], words, "-max_len=8192", *arguments], checks.TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    raise SystemExit(main())
