"""Attacks from outside: faults, crashes, by-passes, floods, a fleet whose links fail."""
