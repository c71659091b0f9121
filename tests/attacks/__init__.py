"""Attacks from outside: faults, crashes, bypasses, floods, a fleet whose links fail."""
