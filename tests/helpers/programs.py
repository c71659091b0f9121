"""Source text of scripts that start servers which have no ``--host`` and ``--port``."""

from __future__ import annotations

GUNICORN = """
import os, sys
*arguments, _, host, _, port = sys.argv[1:]
command = [sys.executable, "-m", "gunicorn", "app:app", "--workers", "2", *arguments, "--bind", f"{host}:{port}"]
os.environ["HOME"] = os.getcwd()  # gunicorn keeps a socket there
os.execv(sys.executable, [*command, "--worker-class", "uvicorn_worker.UvicornWorker"])
"""
"""Runs ``app:app`` with two workers, and further arguments of gunicorn."""
