"""Tests of the file store and of its usage database."""
