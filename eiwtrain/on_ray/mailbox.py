"""What the driver and the workers say to each other: a tiny Ray actor that lives with the driver.

Downwards one thing, how to end; upwards lines to print, and the end of the attempt. A worker asks from a background
thread, so that the training loop reads a plain attribute and never waits for Ray.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Literal, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

POLL_SECONDS = 0.3


class Request(NamedTuple):
    """What the driver asks of the workers: a checkpoint, and then to end."""

    kind: Literal["stop", "again"]
    """stop: the run ends, to go on later. again: it goes on at once with other workers."""
    reason: str
    """For people, e.g. SIGTERM."""


class Mailbox:
    """Holds messages; every method returns at once. `start_mailbox` makes it an actor."""

    def __init__(self) -> None:
        self._request: Request | None = None
        self._messages: list[tuple[str, Any]] = []

    def ask(self, request: Request) -> None:
        """Ask the workers to checkpoint and end; a stop is not taken back."""
        if self._request is None or self._request.kind == "again":
            self._request = request

    def asked(self) -> Request | None:
        """How the workers should end, or None."""
        return self._request

    def put(self, kind: str, content: Any) -> None:
        """Leave a message for the driver."""
        self._messages.append((kind, content))

    def take(self) -> list[tuple[str, Any]]:
        """All messages that the driver has not seen yet, oldest first."""
        messages, self._messages = self._messages, []
        return messages


def start_mailbox() -> Any:
    """A mailbox as a Ray actor on this node; its handle may be sent to workers."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Mailbox).remote()


class WorkerEnd:
    """A worker's end of the mailbox: `say` upwards, `request` downwards."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox
        self._request: Request | None = None
        threading.Thread(target=self._poll, daemon=True, name="mailbox").start()

    @property
    def request(self) -> Request | None:
        """How to end, as of less than a second ago; None while there is no reason to."""
        return self._request

    def say(self, kind: str, content: Any) -> None:
        """Send the driver a message; does not wait."""
        self._mailbox.put.remote(kind, content)

    def finish(self, kind: str, content: Any) -> None:
        """Send the last message and wait until it has arrived."""
        ray.get(self._mailbox.put.remote(kind, content))

    def _poll(self) -> None:
        while self._request is None or self._request.kind == "again":
            try:
                request = ray.get(self._mailbox.asked.remote())
                if request is not None and request != self._request:
                    self.say("heard", None)  # so that the driver knows that somebody will end
                self._request = request
            except ray.exceptions.ActorDiedError:
                return  # the driver is gone, and Ray ends this worker
            except ray.exceptions.RayError:
                pass  # the network, say: ask again
            time.sleep(POLL_SECONDS)
