"""Checks that hold for any input, for hypothesis and for a fuzzer."""
