"""Addresses of shared stores as they may be shown: without whatever could be a password."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlsplit


def masked(url: str) -> str:
    """An address without user, password and query."""
    scheme, separator, rest = url.partition("://")
    place, query, _ = rest.partition("?")
    host, _, path = place.partition("/")
    host = host.rpartition("@")[2]
    return f"{scheme}{separator}{host}{'/' if path else ''}{path}{'?…' if query else ''}"


def unnamed(error: Exception, url: str) -> str:
    """What an error says, without the secrets of an address."""
    text = str(error).replace(url, masked(url))
    place = url.partition("://")[2].partition("?")[0].partition("/")[0]
    secrets = place.rpartition("@")[0].split(":")
    try:
        secrets += [value for _, value in parse_qsl(urlsplit(url).query)]
    except ValueError:
        pass
    for secret in filter(None, secrets):
        text = text.replace(secret, "…")
    return text
