"""A clock that tests move, the errors that an S3 server's refusals become, and a call that fails so."""

from __future__ import annotations

from typing import Any

import pytest

from eiwtrain import storage
from eiwtrain.storage import StorageError


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def refusal(status: int, code: str, message: str = "as the server says") -> Any:
    """Return what s3fs raises for an answer of the server."""
    from botocore.exceptions import ClientError
    from s3fs.errors import translate_boto_error

    answer = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(ClientError(answer, "GetObject"))


def retried(error: BaseException) -> tuple[int, StorageError]:
    """Return how often a call that fails so is made, and the error in the end."""
    calls = []

    def call() -> None:
        calls.append(1)
        raise error

    with pytest.raises(StorageError) as e:
        storage.retrying("s3://b/x", call)
    return len(calls), e.value
