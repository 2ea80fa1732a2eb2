"""Finds passwords and signatures inside URLs, so that such a URL is refused, and hides them where it must be named.

A URL ends up in logs, MLflow, checkpoints and process lists; credentials belong in the environment. Not for hiding
values of environment variables: those are never printed.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

REFUSAL = (
    "a password in a URL would be logged; give it in the environment (MLFLOW_TRACKING_USERNAME and "
    "MLFLOW_TRACKING_PASSWORD, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; before a database put an MLflow server)"
)
"""Why a URL with a secret is refused, and what a user does instead."""

_HIDDEN = "***"
# What stands before the last @ of the host: in an http URL all of it is a credential (also a token alone); elsewhere
# what follows a colon that begins no port, as the container of abfs://container@account is not a credential. A bucket
# has no port, and SQLAlchemy takes what is before an @ for a password, whatever it looks like: 12/ab may be one.
_USER = re.compile(
    r"(?P<start>\b(?:(?P<portless>\w*sql|postgres|mariadb|oracle|s3a?)(?:\+\w+)?|[\w+.-]+)://)"
    r"(?:(?<=http://)[^/?#\s]*|(?<=https://)[^/?#\s]*"
    r"|[^/?#@:\s]*:(?(portless)|(?![1-9]\d{0,4}[/?#]))[^@\s]*(?:@[^/@\s]*)*)@",
    re.IGNORECASE,
)
_PARAMETER = re.compile(r"[?&#;](?P<name>[^=?&#;\s]+)=")
_VALUE = re.compile(r"[^&#\s]*")  # more than the value where others follow it after a semicolon
_MOST_NESTED = 3  # URLs inside each other's parameters

# Names of parameters without all but letters and digits: what they contain, end in, or are. They are no words of their
# own in `author`, `keyword`, `keyspace`, `sort_key`.
_SECRET_PARTS = re.compile(
    r"passw|passphrase|passcode|passkey|pwd|secret|token|jwt|signature|credential|bearer|authorization"
    r"|(?:private|access|account|api|shared|storage|master|session|encryption|signing|subscription|auth)key"
    r"|odbcconnect|connectionstring|(?:pass|pw|psk)$|^(?:sig|key|auth|sas|pin|otp|pat|creds?)$"
)
_SECRET_ENDS = re.compile(r"(?:^|[^a-z0-9])(?:sas|creds?|otp|pat)$")  # as words of their own


def holds_secret(url: str) -> bool:
    """Whether a URL has a password, or a parameter (also after its #) whose name says that it is a secret."""
    return "://" in url and redact(url) != url


def redact(text: str) -> str:
    """Return the text with `***` in the place of each secret of a URL in it; user names before one are also hidden."""
    return _redact(text, _MOST_NESTED)


def _redact(text: str, nested: int) -> str:
    text = _USER.sub(lambda found: f"{found['start']}{_HIDDEN}@", text)
    kept, end = [], 0
    for found in _PARAMETER.finditer(text):
        if found.start() < end:
            continue
        begin, stop = found.end(), _VALUE.match(text, found.end()).end()  # type: ignore[union-attr]  # may be empty
        if stop > begin and (_is_secret(found["name"]) or _holds_encoded(text[begin:stop], nested)):
            kept += [text[end:begin], _HIDDEN]
            end = stop
    return "".join([*kept, text[end:]])


def _is_secret(name: str) -> bool:
    """Return whether a parameter of this name, which may be percent-encoded, is secret."""
    name = unquote(name).lower()
    return bool(_SECRET_PARTS.search(re.sub(r"[^a-z0-9]", "", name)) or _SECRET_ENDS.search(name))


def _holds_encoded(value: str, nested: int) -> bool:
    """Return whether a value is a percent-encoded URL with a secret."""
    if "%" not in value or not nested:
        return False
    plain = unquote(value)
    return plain != value and _redact(plain, nested - 1) != plain
