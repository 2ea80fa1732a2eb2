"""Carries messages between the driver and the workers: a tiny Ray actor that lives with the driver.

Downwards goes one request, to return; upwards go the messages of `eiwtrain.on_ray.messages`. A worker asks from a
background thread, so that the training loop reads a plain attribute and never waits for Ray.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from eiwtrain.on_ray import session
from eiwtrain.on_ray.messages import DriverRequest, Heard, Message

POLL_SECONDS = 0.3
_LATE_SECONDS = 5.0  # after which an answer of the mailbox is late, and Ray is looked at


class MailboxLost(RuntimeError):
    """The mailbox cannot be reached: it is gone, or Ray's head was away."""


class Mailbox:
    """Holds messages; every method returns at once. `DriverEnd` makes it an actor."""

    def __init__(self) -> None:
        self._request: DriverRequest | None = None
        self._messages: list[Message] = []

    def ask(self, request: DriverRequest) -> None:
        """Ask the workers to checkpoint and return; a stop is not taken back."""
        if self._request is None or self._request.kind == "again":
            self._request = request

    def asked(self) -> DriverRequest | None:
        """Return what the workers are asked for, or None."""
        return self._request

    def put(self, message: Message) -> None:
        """Leave a message for the driver."""
        self._messages.append(message)

    def take(self) -> list[Message]:
        """Return all messages that the driver has not seen yet, oldest first."""
        messages, self._messages = self._messages, []
        return messages


class DriverEnd:
    """The driver's end of a new mailbox on its node: it asks downwards, and reads what comes up."""

    def __init__(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.mailbox: Any = ray.remote(num_cpus=0, scheduling_strategy=here, runtime_env=session.light())(
            Mailbox
        ).remote()
        """The actor's handle, which may be sent to workers."""

    def ask(self, request: DriverRequest) -> None:
        """Ask the workers. Raises MailboxLost."""
        self._get(self.mailbox.ask.remote(request))

    def take(self) -> list[Message]:
        """Return the messages that are new, oldest first. Raises MailboxLost."""
        messages: list[Message] = self._get(self.mailbox.take.remote())
        return messages

    def _get(self, answer: Any) -> Any:
        while True:
            try:
                return ray.get(answer, timeout=_LATE_SECONDS)
            except ray.exceptions.GetTimeoutError as e:
                if session.has_died():
                    raise MailboxLost("Ray of this machine has died") from e
            except ray.exceptions.RayError as e:
                raise MailboxLost(str(e) or type(e).__name__) from e


class WorkerEnd:
    """A worker's end of the mailbox: `say` upwards, `request` downwards."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox
        self._request: DriverRequest | None = None
        threading.Thread(target=self._poll, daemon=True, name="mailbox").start()

    @property
    def request(self) -> DriverRequest | None:
        """What the driver asks for, as of less than a second ago; None while it asks for nothing."""
        return self._request

    def say(self, message: Message) -> None:
        """Send the driver a message; does not wait."""
        self._mailbox.put.remote(message)

    def finish(self, message: Message) -> None:
        """Send the last message and wait until it has arrived."""
        ray.get(self._mailbox.put.remote(message))

    def _poll(self) -> None:
        while self._request is None or self._request.kind == "again":
            try:
                request = ray.get(self._mailbox.asked.remote())
                if request is not None and request != self._request:
                    self.say(Heard())  # so that the driver knows that some worker will return
                self._request = request
            except ray.exceptions.ActorDiedError:
                return  # the driver is gone, and Ray ends this worker
            except ray.exceptions.RayError:
                pass  # the network, say: ask again
            time.sleep(POLL_SECONDS)
