"""Servers, databases, proxies and clients that several tests use."""
