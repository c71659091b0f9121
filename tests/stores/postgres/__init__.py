"""Tests of the PostgreSQL store and of its usage tables."""
