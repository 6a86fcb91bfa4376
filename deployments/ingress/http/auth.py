"""The key of a caller, in the headers of a request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from deployments.ingress.errors import InvalidApiKey

__all__ = ["API_KEY", "API_KEY_HEADER", "BEARER", "Credential", "credentials_of", "key_in", "missing_key"]

API_KEY_HEADER: Final = "x-llm-api-key"


class Credential(NamedTuple):
    """A header that carries the key: `Bearer KEY`, and the key alone where `bare`."""

    header: str
    bare: bool = False


BEARER: Final = Credential("authorization")
API_KEY: Final = Credential(API_KEY_HEADER, bare=True)


def credentials_of(headers: Mapping[str, str]) -> tuple[Credential, ...]:
    """Where an endpoint without dialects looks."""
    return (API_KEY, BEARER) if API_KEY_HEADER in headers else (BEARER,)


def key_in(headers: Mapping[str, str], credentials: tuple[Credential, ...]) -> str:
    """The first that is there; empty if there is none."""
    for header, bare in credentials:
        value = headers.get(header, "").strip()
        words = value.split(None, 1)
        if words and words[0].lower() == "bearer":
            value = words[1] if len(words) > 1 else ""
        elif not bare:
            value = ""
        if value:
            return value
    return ""


def missing_key(headers: Mapping[str, str], credentials: tuple[Credential, ...]) -> InvalidApiKey:
    """Of `headers` in which `key_in` found none."""
    header, bare = credentials[0]
    usage = f"'{header}: {'' if bare else 'Bearer '}KEY'"
    if value := headers.get(BEARER.header, "").strip():
        scheme = value.split(None, 1)[0].lower()
        wrong = "has no key behind Bearer" if scheme == "bearer" else "does not begin with Bearer"
        return InvalidApiKey(f"The header '{BEARER.header}' {wrong}. Send the API key as {usage}.")
    return InvalidApiKey(f"You didn't provide an API key. Send it in the header {usage}.")
