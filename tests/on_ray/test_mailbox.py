"""The mailbox: the driver's request reaches the workers, and a stop takes precedence."""

from eiwtrain.on_ray.mailbox import Mailbox
from eiwtrain.on_ray.messages import DriverRequest, Note

STOP, AGAIN = DriverRequest("stop", "SIGTERM"), DriverRequest("again", "a node goes")


def test_messages_are_taken_once_and_in_order():
    box = Mailbox()
    box.put(Note("a"))
    box.put(Note("b"))
    assert box.take() == [Note("a"), Note("b")]
    assert box.take() == []


def test_a_stop_replaces_a_request_for_another_attempt():
    box = Mailbox()
    assert box.asked() is None
    box.ask(AGAIN)
    assert box.asked() == AGAIN
    box.ask(STOP)
    box.ask(AGAIN)
    assert box.asked() == STOP
