import errno
import fcntl
import itertools
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from storage_helpers import Clock, refusal

from eiwtrain import storage
from eiwtrain.storage import retry, swap


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(swap, "_SETTLE_SECONDS", 0.0)


@pytest.fixture(params=["local", "memory"])
def url(request, tmp_path):
    return str(tmp_path / "run" / "f") if request.param == "local" else f"memory://{tmp_path.name}/f"


def test_only_what_is_expected_is_replaced(url):
    assert swap.read(url) is None
    assert not swap.swap(url, b"0", b"1")
    assert swap.read(url) is None
    assert swap.swap(url, None, b"1")
    assert not swap.swap(url, None, b"2")
    assert not swap.swap(url, b"0", b"2")
    assert swap.read(url) == b"1"
    assert swap.swap(url, b"1", b"2")
    assert swap.read(url) == b"2"


def test_bytes_that_are_there_already_count_as_put(url):
    assert swap.swap(url, None, b"1")
    assert swap.swap(url, None, b"1")
    assert swap.swap(url, b"0", b"1")
    assert swap.swap(url, b"1", b"1")


@given(st.lists(st.tuples(st.sampled_from([None, b"0", b"1", b"2"]), st.sampled_from([b"0", b"1", b"2"]))))
def test_it_is_a_register(calls):
    store = Store()
    there = None
    for expected, data in calls:
        there = data if there == expected else there
        assert swap._on_condition(store, "b/f", expected, data) == (there == data)
        assert store.content == there


def test_of_many_threads_one_wins(tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "_FIRST_WAIT", 0.01)
    url, there = str(tmp_path / "f"), None
    for turn in range(5):
        won = []

        def take(i, turn=turn, there=there, won=won):
            if swap.swap(url, there, b"%d %d" % (turn, i)):
                won.append(i)

        threads = [threading.Thread(target=take, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        there = b"%d %d" % (turn, won[0])
        assert swap.read(url) == there


def test_a_lock_that_is_held_is_waited_for(tmp_path, monkeypatch):
    url, clock = str(tmp_path / "f"), Clock()
    monkeypatch.setattr(retry, "time", clock)
    with open(tmp_path / ".f.lock", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(storage.StorageError, match=r"f: BlockingIOError"):
            swap.swap(url, None, b"1")
        assert swap.read(url) is None
        clock.sleep = lambda seconds: fcntl.flock(other, fcntl.LOCK_UN)
        assert swap.swap(url, None, b"1")


def test_nothing_but_the_lock_is_left_beside_the_file(tmp_path):
    (tmp_path / f".f.{'0' * 32}.tmp").write_bytes(b"of one that was killed")
    (tmp_path / f".g.{'0' * 32}.tmp").write_bytes(b"of another file")
    assert swap.swap(str(tmp_path / "f"), None, b"1")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".f.lock", f".g.{'0' * 32}.tmp", "f"]


def test_a_file_system_without_locks_is_written_and_looked_at(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    overwritten_by_the_next_writer(str(tmp_path / "f"), monkeypatch)


def test_a_store_without_conditions_is_written_and_looked_at(tmp_path, monkeypatch):
    overwritten_by_the_next_writer(f"memory://{tmp_path.name}/f", monkeypatch)


def overwritten_by_the_next_writer(url, monkeypatch):
    """Put and look: True when no other writer comes, False when one comes in between."""
    assert swap.swap(url, None, b"1")
    assert not swap.swap(url, b"0", b"2")
    clock = Clock()
    monkeypatch.setattr(swap, "time", clock)
    clock.sleep = lambda seconds: storage.write_bytes(url, b"another's")
    assert not swap.swap(url, b"1", b"2")
    assert swap.read(url) == b"another's"


def test_where_nothing_can_be_put_is_one_line(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(storage.StorageError, match="file/f") as e:
        swap.swap(str(tmp_path / "file" / "f"), None, b"1")
    assert "\n" not in str(e.value)


class Store:
    """One S3 object behind the calls of s3fs; `before` is run before each."""

    members = ("Bucket", "Key", "Body", "IfMatch", "IfNoneMatch")

    def __init__(self, before=lambda call: None):
        self.content, self.tag, self.puts, self.before = None, 0, [], before
        self.s3 = self.meta = self.service_model = self.input_shape = self

    def operation_model(self, name):
        return self

    def split_path(self, path):
        return "b", "f", None

    def call_s3(self, method, Bucket, Key, Body=None, **condition):
        self.before(method)
        if method == "head_object":
            if self.content is None:
                raise FileNotFoundError
            return {"ETag": self.tag}
        there = "IfNoneMatch" if self.content is None else "IfMatch"
        if condition.get(there) != ("*" if self.content is None else self.tag):
            raise refusal(404, "NoSuchKey") if self.content is None else refusal(412, "PreconditionFailed")
        self.content, self.tag = Body, self.tag + 1
        self.puts.append(Body)
        return {}

    def cat_file(self, path):
        self.before("cat_file")
        if self.content is None:
            raise FileNotFoundError
        return self.content


@pytest.mark.parametrize("there", [None, b"0"])
@pytest.mark.parametrize("turns", sorted(set(itertools.permutations("aaaabbbb"))), ids="".join)
def test_of_two_that_ask_in_any_order_one_wins(turns, there):
    """Every order in which a server may see the up to four requests of each."""
    waiting, turn = list(turns), threading.Condition()

    def before(call):
        with turn:
            me = threading.current_thread().name
            assert turn.wait_for(lambda: not waiting or waiting[0] == me, 60)
            if waiting:
                waiting.pop(0)
            turn.notify_all()

    store, won = Store(before), []
    store.content = there

    def take():
        me = threading.current_thread().name
        if swap._on_condition(store, "b/f", there, me.encode()):
            won.append(me.encode())
        with turn:
            waiting[:] = [t for t in waiting if t != me]
            turn.notify_all()

    threads = [threading.Thread(target=take, name=name) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == store.puts == [store.content]


def served_by(store, monkeypatch):
    monkeypatch.setattr(storage, "filesystem", lambda url: (store, "b/f"))
    monkeypatch.setattr(retry, "time", Clock())


@pytest.mark.parametrize("error", [ConnectionResetError(), refusal(409, "ConditionalRequestConflict")])
@pytest.mark.parametrize("carried_out", [False, True])
def test_an_answer_that_is_lost_is_found_in_what_is_there(monkeypatch, error, carried_out):
    errors = [error, error]

    class Lossy(Store):
        def call_s3(self, method, **request):
            if method == "put_object" and errors:
                if carried_out and len(errors) == 2:
                    super().call_s3(method, **request)
                raise errors.pop()
            return super().call_s3(method, **request)

    store = Lossy()
    served_by(store, monkeypatch)
    assert swap.swap("s3://b/f", None, b"1")
    assert store.puts == [b"1"]


def test_a_put_that_was_given_up_and_comes_late_is_found_in_what_is_there(monkeypatch):
    """The case that the client's own second try meets the first."""

    def before(call):
        if call == "put_object":
            store.content, store.tag = b"1", 7

    store = Store(before)
    served_by(store, monkeypatch)
    assert swap.swap("s3://b/f", None, b"1")


def test_what_is_deleted_before_the_put_is_not_what_was_expected(monkeypatch):
    def before(call):
        if call == "put_object":
            store.content = None

    store = Store(before)
    store.content = b"0"
    served_by(store, monkeypatch)
    assert not swap.swap("s3://b/f", b"0", b"1")
    assert store.content is None


@pytest.mark.parametrize("why", ["server", "client"])
def test_an_s3_without_conditions_is_written_and_looked_at(monkeypatch, why):
    def before(call):
        if call == "put_object":
            assert why == "server"  # the client would drop the condition in silence
            raise refusal(501, "NotImplemented")

    store = Store(before)
    store.members = Store.members if why == "server" else ("Bucket", "Key", "Body")
    served_by(store, monkeypatch)
    seen = []
    monkeypatch.setattr(swap, "_put_and_look", lambda *args: seen.append(args) or True)
    assert swap.swap("s3://b/f", None, b"1")
    assert seen == [("s3://b/f", None, b"1")]
    assert store.puts == []


@pytest.mark.parametrize(("status", "code"), [(403, "AccessDenied"), (400, "InvalidRequest")])
def test_a_refusal_is_no_answer_to_the_question(monkeypatch, status, code):
    def before(call):
        if call == "put_object":
            raise refusal(status, code)

    served_by(Store(before), monkeypatch)
    with pytest.raises(storage.StorageError, match=code):
        swap.swap("s3://b/f", None, b"1")
