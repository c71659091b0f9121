"""Clients of OpenAI-compatible servers, each in an environment of its own."""
