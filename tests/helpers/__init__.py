"""Servers, databases, proxies and clients that the tests share."""
