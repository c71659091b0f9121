"""The tests of freegpt_auth; their folders mirror those of the package."""
