"""Programs in processes of their own: a script that starts gunicorn, and programs that a test talks with."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

GUNICORN = """
import os, sys
*arguments, _, host, _, port = sys.argv[1:]
command = [sys.executable, "-m", "gunicorn", "app:app", "--workers", "2", *arguments, "--bind", f"{host}:{port}"]
os.environ["HOME"] = os.getcwd()  # gunicorn keeps a socket there
os.execv(sys.executable, [*command, "--worker-class", "uvicorn_worker.UvicornWorker"])
"""
"""Runs ``app:app`` with two workers, and further arguments of gunicorn."""


class Program(subprocess.Popen[str]):
    """A Python program that reads lines of JSON and writes lines of JSON."""

    def __init__(self, source: str, *options: str) -> None:
        pipe = subprocess.PIPE
        command = [sys.executable, *options, "-c", source]
        super().__init__(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def send(self, message: object) -> None:
        """Write one line."""
        assert self.stdin
        self.stdin.write(json.dumps(message) + "\n")
        self.stdin.flush()

    def receive(self) -> Any:
        """Read one line."""
        assert self.stdout
        return json.loads(self.stdout.readline())
