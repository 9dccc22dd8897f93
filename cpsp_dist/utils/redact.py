"""Passwords, tokens and signatures in texts that are printed or written: one function takes them out of all."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote, unquote

_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*://"
_USER = re.compile(rf"({_SCHEME})([^/\s'\"?#]*)@")
_QUERY = re.compile(rf"({_SCHEME}[^\s?'\"]*)\?([^\s'\"]*)")
#: Environment variables whose value is a secret by itself.
_SECRET_NAME = re.compile(r"(PASSWORD|PASSWD|_TOKEN|_SECRET|SECRET_ACCESS_KEY|API_KEY|^FSSPEC_\w+_KEY)$", re.IGNORECASE)
#: Characters of a secret that is recognised by itself; shorter ones would be found in words.
_SHORTEST = {"password": 5, "query": 8}
HIDDEN = "***"
_known: set[str] = set()


def url_without_secrets(text: str) -> str:
    """`text`, with users, passwords and queries (which hold signatures) removed from the URLs in it."""
    return _QUERY.sub(r"\1", _USER.sub(r"\1", text)) if "://" in text else text


def without_secrets(text: str) -> str:
    """The same, and without what `learn` and the environment know to be secret, wherever it stands in `text`.

    For everything that leaves the process as text: an error of a library may quote half a URL.
    """
    text = url_without_secrets(text)
    for secret in sorted(_known | {*_secrets_of_environment(os.environ)}, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def learn(texts: Iterable[str]) -> None:
    """Remember passwords and signatures of the URLs in arguments, settings and files, as `without_secrets` finds them
    again."""
    for text in texts:
        if "://" in text:
            _known.update(_secrets_of_urls(text))


def plain(value: Any) -> Any:
    """A value made of dicts, lists and texts, with secrets removed from the URLs in it."""
    if isinstance(value, str):
        return url_without_secrets(value)
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    return type(value)(plain(inner) for inner in value) if isinstance(value, list | tuple) else value


def _secrets_of_urls(text: str) -> Iterable[str]:
    for _, user in _USER.findall(text):
        name, colon, password = user.partition(":")
        secret = password if colon else name
        for form in {secret, unquote(secret), quote(unquote(secret), safe="")}:
            if len(form) >= _SHORTEST["password"]:
                yield form
        if colon:
            yield base64.b64encode(f"{unquote(name)}:{unquote(password)}".encode()).decode()
    for _, query in _QUERY.findall(text):
        for part in query.split("&"):
            secret = part.partition("=")[2]
            yield from (form for form in {secret, unquote(secret)} if len(form) >= _SHORTEST["query"])


def _secrets_of_environment(environment: Mapping[str, str]) -> Iterable[str]:
    for name, value in environment.items():
        if "://" in value and not value.startswith(("sqlite:", "file:")):
            yield from _secrets_of_urls(value)
        elif len(value) >= _SHORTEST["password"] and _SECRET_NAME.search(name):
            yield value
