"""Tests of usage recording."""
