"""Finds passwords and signatures inside URLs, so that such a URL is refused, and hides them where it must be named.

A URL ends up in logs, MLflow, checkpoints and process lists; credentials belong in the environment. Not for hiding
values of environment variables: those are never printed.
"""

from __future__ import annotations

import re

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
_QUERY = re.compile(
    r"(?P<start>[?&#](?:[^=&#\s]*(?:password|passwd|pwd|secret|token|signature|credential|(?:access|account|api)[_-]?key)"
    r"[^=&#\s]*|sig|key|auth)=)[^&#\s]+",
    re.IGNORECASE,
)


def holds_secret(url: str) -> bool:
    """Whether a URL has a password, or a parameter (also after its #) whose name says that it is a secret."""
    return "://" in url and redact(url) != url


def redact(text: str) -> str:
    """Return the text with `***` in the place of each secret of a URL in it; user names before one are also hidden."""
    text = _USER.sub(lambda found: f"{found['start']}{_HIDDEN}@", text)
    return _QUERY.sub(lambda found: f"{found['start']}{_HIDDEN}", text)
