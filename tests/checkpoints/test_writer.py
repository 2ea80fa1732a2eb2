import json
import multiprocessing as mp
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import lone_group
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from safetensors.torch import load_file

from eiwtrain import checkpoints, storage
from eiwtrain.checkpoints import writer
from eiwtrain.checkpoints.writer import CheckpointWriter
from eiwtrain.storage import files as storage_files
from eiwtrain.testing import failpoints

PARTS = ("before-part", "part-half-written", "part-written", "agreed")
LAST = ("manifest-written", "half-deleted", "swept")  # the checkpoint is committed by then
BOUNDARIES = (*PARTS, "before-manifest", "manifest-half-written", *LAST)
"""Every place of a save at which a process may die, in order: fail points, and files of which half is written."""


class Lost(RuntimeError):
    """What a guard raises."""


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    with lone_group(tmp_path_factory.mktemp("group")):
        yield


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return {f"weights/layer{i}.w": torch.randn(i + 1, 7, generator=generator) for i in range(5)}


def state(step, bits=None):
    return {"eval_bits_per_dim": bits, "saved_at": float(step)}


def begin(of, step, what=None):
    return of.begin(step, step * 8, (what or tensors(step)).items(), state(step))


def make(root, keep_last=2, keep_every=0, guard=lambda: None):
    return CheckpointWriter(str(root), keep_last, keep_every, guard)


def steps(root):
    return [c.step for c in checkpoints.committed(str(root))]


def files(root):
    return [name for name, _ in storage.find(str(root))]


def is_whole(saved):
    loaded, expected = checkpoints.load(saved), tensors(saved.step)
    return loaded.keys() == expected.keys() and all(torch.equal(loaded[k], v) for k, v in expected.items())


@pytest.fixture
def gate(monkeypatch):
    """Writes wait until it is set."""
    gate, write = threading.Event(), storage.write_pieces

    def wait(url, pieces):
        assert gate.wait(60)
        write(url, pieces)

    monkeypatch.setattr(storage, "write_pieces", wait)
    yield gate
    gate.set()


def test_training_continues_while_its_state_at_the_step_is_written(tmp_path, gate):
    s, model = make(tmp_path), tensors(3)
    assert not s.busy
    assert s.poll() is None
    assert begin(s, 3, model) is None
    for tensor in model.values():
        tensor.zero_()
    assert s.busy
    assert s.poll() is s.wait(0.01) is None
    assert steps(tmp_path) == []
    gate.set()
    result = s.wait()
    assert not s.busy
    assert s.poll() is s.wait() is None  # a result is returned once
    assert result.checkpoint == checkpoints.committed(str(tmp_path))[0]
    assert (result.error, result.exception) == (None, None)
    assert is_whole(result.checkpoint)
    parts = [p for p in Path(result.checkpoint.url).iterdir() if p.name != "manifest.json"]
    assert result.bytes == sum(p.stat().st_size for p in parts)
    assert 0 <= result.stall <= result.seconds


def test_a_save_waits_for_the_previous_one_and_returns_its_result(tmp_path, gate):
    s = make(tmp_path)
    begin(s, 1)
    threading.Timer(0.1, gate.set).start()
    under_way = []

    def observed():
        under_way.append(s.busy)
        yield from tensors(2).items()

    result = s.begin(2, 16, observed(), state(2))
    assert under_way == [False]
    assert result.checkpoint.step == 1
    assert s.wait().checkpoint.step == 2
    assert steps(tmp_path) == [2, 1]


def test_no_second_copy_of_the_share_is_made(tmp_path, monkeypatch):
    shares, addresses = [], []
    snapshot, write = writer.snapshot, storage.write_pieces

    def remember(*args):
        shares.extend(snapshot(*args))
        addresses.append({t.data_ptr() for t in shares[0].values()})
        return shares

    def look(url, pieces):
        if url.endswith(".safetensors"):
            written = [np.frombuffer(p, np.uint8).ctypes.data for p in list(pieces())[1:]]
            assert set(written) == addresses[0]
            assert len(written) == 5
        write(url, pieces)

    monkeypatch.setattr(writer, "snapshot", remember)
    monkeypatch.setattr(storage, "write_pieces", look)
    s, model = make(tmp_path), tensors(1)
    begin(s, 1, model)
    assert not addresses[0] & {t.data_ptr() for t in model.values()}
    assert s.wait().error is None
    assert shares == [{}]  # written, it is let go


def test_a_part_is_what_safetensors_reads_whatever_the_types(tmp_path):
    what = {
        "half": torch.randn(3).to(torch.bfloat16),
        "flag": torch.tensor([True, False, True]),
        "count": torch.tensor(7),
        "none": torch.empty(0, 4),
        "turned": torch.randn(4, 6, dtype=torch.float64).t()[1:],
        "bytes": torch.arange(5, dtype=torch.uint8),
        "learned": torch.nn.Parameter(torch.randn(2, 2, 2)),
    }
    s = make(tmp_path)
    begin(s, 1, what)
    saved = s.wait().checkpoint
    part = Path(saved.url, saved.parts[0].name)
    header = part.read_bytes()[8 : 8 + int.from_bytes(part.read_bytes()[:8], "little")]
    for name, entry in json.loads(header).items():  # aligned, for readers that map the file
        assert (8 + len(header) + entry["data_offsets"][0]) % what[name].element_size() == 0
    for loaded in (checkpoints.load(saved), load_file(part)):
        assert loaded.keys() == what.keys()
        for name, tensor in what.items():
            assert loaded[name].dtype == tensor.dtype
            assert torch.equal(loaded[name], tensor), name


@given(st.lists(st.binary(max_size=5)), st.integers(0, 20), st.integers(0, 20))
def test_joined_pieces_are_cut_as_one(pieces, start, stop):
    joined, whole = storage_files._Joined(pieces), b"".join(pieces)
    assert len(joined) == len(whole)
    assert joined[start:stop] == whole[start:stop]
    assert joined[:] == whole


def test_a_full_disk_costs_the_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    s = make(tmp_path)
    begin(s, 1)
    before = (s.wait(), files(tmp_path))[1]
    full = True

    def fsync(fd, fsync=os.fsync):
        if full:
            raise OSError(28, "No space left on device")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    begin(s, 2)
    result = s.wait()
    assert result.checkpoint is None
    assert isinstance(result.exception, storage.StorageError)
    assert result.error.startswith("rank 0: ")
    assert "No space left on device" in result.error
    assert files(tmp_path) == before
    full = False
    begin(s, 3)
    assert s.wait().error is None
    assert steps(tmp_path) == [3, 1]


def test_no_manifest_is_published_if_the_guard_refuses(tmp_path):
    def guard():
        raise Lost("taken over")

    s = make(tmp_path, guard=guard)
    begin(s, 1)
    result = s.wait()
    assert (result.checkpoint, result.error, type(result.exception)) == (None, "taken over", Lost)
    assert files(tmp_path) == []


@pytest.mark.parametrize("looks", [1, 2])  # before the manifest of the last save, and before its sweep
def test_the_guard_is_asked_again_before_old_checkpoints_are_deleted(tmp_path, looks):
    left = [100]

    def guard():
        left[0] -= 1
        if left[0] < 0:
            raise Lost("taken over")

    s = make(tmp_path, keep_last=1, guard=guard)
    begin(s, 1)
    begin(s, 2)
    s.wait()
    left[0] = looks
    begin(s, 3)
    result = s.wait()
    assert (result.checkpoint.step, result.error, type(result.exception)) == (3, "taken over", Lost)
    assert steps(tmp_path) == [3, 2]


def test_the_guard_is_asked_again_when_publishing_is_tried_again(tmp_path, monkeypatch):
    root = f"memory://{tmp_path.name}"
    calls, fs = [], type(storage.filesystem(root)[0])
    pipe_file = fs.pipe_file

    def fail_at_manifests(self, path, value, **options):
        if path.endswith("manifest.json"):
            raise ConnectionResetError("reset")
        pipe_file(self, path, value, **options)

    def guard():
        calls.append(1)
        if len(calls) > 1:
            raise Lost("taken over")

    monkeypatch.setattr(fs, "pipe_file", fail_at_manifests)
    s = make(root, guard=guard)
    begin(s, 1)
    result = s.wait()
    assert (result.checkpoint, type(result.exception), len(calls)) == (None, Lost, 2)
    assert files(root) == []


def late_manifest(monkeypatch, meanwhile):
    """Call `meanwhile` after a writer has checked its parts and the lease, before its manifest."""
    write = storage.write_pieces

    def late(url, pieces):
        if url.endswith(checkpoints.MANIFEST):
            meanwhile()
        write(url, pieces)

    monkeypatch.setattr(storage, "write_pieces", late)


def test_a_listing_that_is_late_deletes_no_committed_checkpoint(tmp_path, monkeypatch):
    root = str(tmp_path)
    s = make(root, keep_last=1)
    begin(s, 1)
    assert s.wait().error is None
    late = storage.find(checkpoints.folder(root))
    find, listdir = storage.find, storage.listdir
    monkeypatch.setattr(storage, "find", lambda url: late if url == checkpoints.folder(root) else find(url))
    begin(s, 2)
    result = s.wait()
    assert (result.error, result.checkpoint.step) == (None, 2)
    monkeypatch.undo()
    assert steps(root) == [2]
    for some in ([], [(name, size) for name, size in find(checkpoints.folder(root)) if "manifest" not in name]):
        monkeypatch.setattr(storage, "find", lambda url, some=some: some)
        checkpoints.clean(root)
        checkpoints.sweep(root, 1)
        monkeypatch.undo()
        assert steps(root) == [2]
    monkeypatch.setattr(storage, "find", lambda url: [])
    monkeypatch.setattr(storage, "listdir", lambda url: [] if url == checkpoints.folder(root) else listdir(url))
    begin(s, 3)
    assert s.wait().error is None
    monkeypatch.undo()
    assert steps(root)[0] == 3


@pytest.mark.parametrize("lost", ["nothing", "half", "other"])
def test_a_manifest_that_storage_lost_is_no_checkpoint(tmp_path, monkeypatch, lost):
    write = storage.write_pieces

    def losing(url, pieces):
        if not url.endswith(checkpoints.MANIFEST):
            write(url, pieces)
        elif lost != "nothing":
            data = b"".join(pieces())
            write(url, lambda: [data[:-9] if lost == "half" else data.replace(b'"step": 1', b'"step": 2')])

    s = make(tmp_path)
    monkeypatch.setattr(storage, "write_pieces", losing)
    begin(s, 1)
    result = s.wait()
    assert (result.checkpoint, type(result.exception)) == (None, storage.StorageError)
    assert checkpoints.MANIFEST in result.error
    assert files(tmp_path) == []
    monkeypatch.undo()
    begin(s, 2)
    assert s.wait().error is None
    assert steps(tmp_path) == [2]


def killed_by_hand(new):
    raise KeyboardInterrupt


@pytest.mark.parametrize("killed", [False, True])
def test_a_manifest_written_after_its_parts_were_deleted_does_not_count(tmp_path, monkeypatch, killed):
    root = str(tmp_path)
    s = make(root, keep_last=1)
    begin(s, 1)
    (before,) = [s.wait().checkpoint]
    late_manifest(monkeypatch, lambda: checkpoints.clean(root))
    if killed:  # as soon as it is written
        written = [writer._check_parts, killed_by_hand]
        monkeypatch.setattr(writer, "_check_parts", lambda new: written.pop(0)(new))
        with pytest.raises(KeyboardInterrupt):
            writer.commit(root, 2, 16, dict(tensors(2)), state(2))
        found, (bad,) = checkpoints.survey(root)
        assert found == [before]
        assert bad.step == 2
        assert "part-00000-of-00001.safetensors is missing" in bad.why
    else:
        begin(s, 2)
        result = s.wait()
        assert result.checkpoint is None
        assert checkpoints.survey(root) == ([before], [])
    monkeypatch.undo()
    begin(s, 3)
    assert s.wait().error is None
    assert steps(root) == [3]
    assert len(storage.listdir(checkpoints.folder(root))) == 1


@pytest.mark.parametrize("collective", ["broadcast_object_list", "all_gather_object"])
def test_ranks_that_lost_one_another_differ_from_failing_storage(tmp_path, monkeypatch, collective):
    def fail(*args, **options):
        raise RuntimeError("Connection closed by peer\n[127.0.0.1]:1234")

    monkeypatch.setattr(dist, collective, fail)
    s = make(tmp_path)
    begin(s, 1)
    result = s.wait()
    assert (result.checkpoint, type(result.exception)) == (None, writer.RanksApartError)
    assert result.error == "the workers lost one another at a checkpoint: Connection closed by peer [127.0.0.1]:1234"


def test_an_exception_that_cannot_be_pickled_is_sent_as_text():
    class Local(Exception):
        pass

    assert str(writer._portable(Local("why"))) == "Local: why"


def test_the_first_checkpoint_of_each_window_stays(tmp_path):
    s = make(tmp_path, keep_last=1, keep_every=10)
    for step in (4, 8, 12, 16, 30, 31, 32):
        begin(s, step)
    assert s.wait().error is None
    assert steps(tmp_path) == [32, 30, 12, 4]


def two_ranks(root):
    rank, write = dist.get_rank(), storage.write_pieces
    full = refused = False

    def write_pieces(url, pieces):
        if full:
            raise storage.StorageError(f"{url}: No space left on device")
        write(url, pieces)

    def guard():
        if refused:
            raise Lost("taken over")

    storage.write_pieces = write_pieces
    s = make(root, guard=guard)

    begin(s, 1)  # whose collectives and training's do not mix
    total = torch.zeros(1)
    for i in range(100):
        part = torch.tensor([float(rank + i)])
        dist.all_reduce(part)
        total += part
    assert total == 100 + 2 * sum(range(100))
    result = s.wait()
    assert result.error is None
    assert len(result.checkpoint.parts) == 2
    assert result.bytes == sum(p.bytes for p in result.checkpoint.parts)

    full = rank == 1
    begin(s, 2)
    result = s.wait()
    assert result.checkpoint is None
    assert result.error.startswith("rank 1: ")
    assert result.error.endswith("No space left on device")
    full = False

    refused = rank == 0
    begin(s, 3)
    result = s.wait()
    assert (result.checkpoint, result.error, type(result.exception)) == (None, "taken over", Lost)
    refused = False

    begin(s, 4)
    result = s.wait()
    assert result.error is None
    assert result.checkpoint.step == 4


@pytest.mark.cluster
def test_a_failure_on_one_rank_is_raised_on_all_and_training_continues(tmp_path):
    run_ranks(two_ranks, 2, str(tmp_path))
    assert steps(tmp_path) == [4, 1]
    assert all(is_whole(c) for c in checkpoints.committed(str(tmp_path)))
    assert len(storage.listdir(checkpoints.folder(str(tmp_path)))) == 2


FORKS = mp.get_context("forkserver")
FORKS.set_forkserver_preload(["eiwtrain.checkpoints.writer", "safetensors.torch", "test_writer"])


def join(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)


def steps_left(boundary, victim):
    """What a reader may find after a death in the save of step 2, at which step 1 is to go."""
    if boundary == "agreed" and victim == 1:  # rank 0 publishes without it
        return [2, 1], [2]
    return ({LAST[0]: [2, 1], LAST[1]: [2], LAST[2]: [2]}.get(boundary, [1]),)


def die_at(boundary):
    """Make this process kill itself there."""
    if not boundary.endswith("-half-written"):
        os.environ["EIWTRAIN_FAILPOINTS"] = f"checkpoint.{boundary}=kill"
        failpoints._reached.clear()
        return
    write = storage.write_pieces

    def write_half(url, pieces):
        def half():
            data = b"".join(pieces())
            yield data[: len(data) // 2]
            os.kill(os.getpid(), signal.SIGKILL)

        write(url, half if Path(url).name.startswith(boundary.partition("-")[0]) else pieces)

    storage.write_pieces = write_half


def die_in_second_save(rank, folder, boundary, victim):
    join(rank, folder)
    s = make(f"{folder}/run", keep_last=1)
    begin(s, 1)
    assert s.wait().checkpoint.step == 1
    dist.barrier()
    if rank == victim:
        die_at(boundary)
    begin(s, 2)
    result = s.wait()
    if steps_left(boundary, victim) == ([1],):
        assert result.checkpoint is None
        assert isinstance(result.exception, writer.RanksApartError)


def leave_in_a_save(rank, folder):
    join(rank, folder)
    s = make(f"{folder}/run")
    if rank == 0:
        begin(s, 1)  # whose thread waits for that of rank 1
        dist.barrier()
        assert s.busy
        Path(folder, "left").touch()
        return
    dist.barrier()
    signal.pause()


def start(work, folder, *args):
    ranks = [FORKS.Process(target=work, args=(rank, str(folder), *args)) for rank in range(2)]
    for process in ranks:
        process.start()
    return ranks


@pytest.mark.cluster
@pytest.mark.parametrize(("boundary", "victim"), [(b, 0) for b in BOUNDARIES] + [(b, 1) for b in PARTS])
def test_a_death_anywhere_leaves_the_old_or_the_new_checkpoint_whole(tmp_path, boundary, victim):
    ranks = start(die_in_second_save, tmp_path, boundary, victim)
    for process in ranks:
        process.join(120)
    assert ranks[victim].exitcode == -signal.SIGKILL
    assert ranks[1 - victim].exitcode == 0  # it neither waits for the other nor hangs at its exit
    root = str(tmp_path / "run")
    found = checkpoints.committed(root)
    assert [c.step for c in found] in steps_left(boundary, victim)
    assert all(is_whole(c) for c in found)
    s = make(root, keep_last=1)
    begin(s, 3)
    saved = s.wait().checkpoint
    folder = saved.url.rsplit("/", 1)[-1]
    assert files(root) == sorted(f"checkpoints/{folder}/{n}" for n in ("manifest.json", saved.parts[0].name))
    assert is_whole(saved)


def come_late(rank, folder):
    join(rank, folder)
    writer._TIMEOUT = timedelta(seconds=1)
    s = make(f"{folder}/run")
    if rank == 0:
        begin(s, 1)
        assert isinstance(s.wait().exception, writer.RanksApartError)
    dist.barrier()
    began = time.monotonic()
    begin(s, 2)
    assert isinstance(s.wait().exception, writer.RanksApartError)
    assert time.monotonic() - began < 30
    dist.barrier()  # training's own group is as it was


@pytest.mark.cluster
def test_after_one_timeout_every_rank_knows_that_none_can_be_written(tmp_path):
    ranks = start(come_late, tmp_path)
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    assert steps(tmp_path / "run") == []


@pytest.mark.cluster
def test_a_process_exits_though_its_writer_waits_for_another(tmp_path):
    ranks = start(leave_in_a_save, tmp_path)
    try:
        ranks[0].join(120)
        assert ranks[0].exitcode == 0
        assert (tmp_path / "left").exists()
        assert ranks[1].is_alive()
    finally:
        for process in ranks:
            process.kill()
            process.join()


@pytest.mark.cluster
def test_on_s3_a_large_part_goes_in_parts_and_stale_uploads_are_aborted(s3):
    root, what = storage.join(s3, "run"), {f"w{i}": torch.full((12_000_000,), float(i)) for i in range(3)}
    s = make(root, keep_last=1)
    assert sum(t.nbytes for t in what.values()) > storage_files._LARGE
    fs, path = storage.filesystem(s3)
    bucket, prefix, _ = fs.split_path(path)
    for key in ("run/checkpoints/step-00000001-deadbeef/part", "runs/other"):
        fs.call_s3("create_multipart_upload", Bucket=bucket, Key=f"{prefix}/{key}")
    storage.write_bytes(storage.join(root, "checkpoints/step-00000001-deadbeef/part-2"), b"half")
    begin(s, 2, what)
    result = s.wait()
    assert result.error is None
    loaded = checkpoints.load(result.checkpoint)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in what.items())
    assert len(files(root)) == 2
    left = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix).get("Uploads", [])
    assert [upload["Key"] for upload in left] == [f"{prefix}/runs/other"]
