"""Copies of a checkpoint's parts on the workers' machines: one is used if every byte is right, and else costs time."""

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import lone_group
from hypothesis import given
from hypothesis import strategies as st

from eiwtrain import checkpoints, storage
from eiwtrain.checkpoints import near
from eiwtrain.checkpoints.writer import CheckpointWriter
from eiwtrain.train import restore

TENSORS = {f"weights/{i}": torch.full((50,), float(i)) for i in range(4)}


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    with lone_group(tmp_path_factory.mktemp("group")):
        yield


def save(folder, *steps, guard=lambda: None):
    """Save checkpoints of these steps with copies; return the last result."""
    writer = CheckpointWriter(f"{folder}/run", 5, 0, guard, f"{folder}/near", ["a"])
    for step in steps:
        writer.begin(step, step, TENSORS.items(), {"skipped_in_row": 0, "saved_at": 0.0})
        result = writer.wait()
    return result


def copies(folder):
    """The files in the folder of copies, and what they hold."""
    return {p.name: p.read_bytes() for p in Path(folder, "near").rglob("*") if p.is_file()}


def resume(folder, monkeypatch):
    """Restore; return the checkpoint, which files of parts were read from storage, and what was said."""
    asked, said, read = [], [], storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda url, *a: asked.append(url.rpartition("/")[2]) or read(url, *a))
    saved, tensors = restore.newest_intact(
        f"{folder}/run", torch.device("cpu"), said.append, False, None, f"{folder}/near"
    )
    monkeypatch.undo()
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], t) for name, t in TENSORS.items())
    return saved, [name for name in asked if name.endswith(".safetensors")], said


def test_a_restart_reads_copies_and_nothing_but_the_manifest_from_storage(tmp_path, monkeypatch):
    result = save(tmp_path, 1)
    (part,) = result.checkpoint.parts
    assert result.near is None
    assert copies(tmp_path) == {part.name: Path(result.checkpoint.url, part.name).read_bytes()}
    Path(result.checkpoint.url, part.name).write_bytes(b"")  # not even damage there matters
    saved, read, said = resume(tmp_path, monkeypatch)
    assert (saved, read) == (result.checkpoint, [])
    assert said == [f"resuming from step 1: {saved.url} (0.0 of 0.0 MB from copies on the workers' machines)"]


def flip(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def link(file):
    elsewhere = file.with_name("elsewhere")
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


def pipe(file):
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize(
    ("spoil", "seen"),
    [
        (flip, True),
        (lambda file: file.write_bytes(b""), False),
        (lambda file: file.write_bytes(file.read_bytes() + b"x"), False),
        (Path.unlink, False),
        (link, False),
        (pipe, False),
        (lambda file: shutil.rmtree(file.parents[2]), False),
    ],
)
def test_what_is_no_copy_costs_a_read_from_storage_and_nothing_else(tmp_path, monkeypatch, spoil, seen):
    result = save(tmp_path, 1)
    (part,) = result.checkpoint.parts
    (copy,) = Path(tmp_path, "near").rglob(part.name)
    spoil(copy)
    saved, read, said = resume(tmp_path, monkeypatch)
    assert (saved, read) == (result.checkpoint, [part.name])
    assert ("checkpoint.near: 1 copies were not what was written, and were not used" in said) is seen
    assert save(tmp_path, 2).near is None  # in its place


def test_a_copy_of_another_run_or_checkpoint_is_not_read(tmp_path, monkeypatch):
    first = save(tmp_path, 1)
    data = copies(tmp_path)
    other = tmp_path / "other"
    save(other, 1)
    shutil.rmtree(tmp_path / "near")
    (other / "near").rename(tmp_path / "near")
    _, read, _ = resume(tmp_path, monkeypatch)
    assert read == [first.checkpoint.parts[0].name]
    second = save(tmp_path, 2)
    here = near.open_folder(f"{tmp_path}/near", f"{tmp_path}/run")
    assert near.held(here, first.checkpoint) == []
    assert near.read(here, first.checkpoint, first.checkpoint.parts[0]) is None
    assert data[first.checkpoint.parts[0].name]
    assert near.held(here, second.checkpoint) == [0]


def test_copies_of_the_newest_checkpoint_alone_are_kept(tmp_path):
    for steps in ((1,), (2, 3), (3,)):  # a step may be saved again, with its score
        last = save(tmp_path, *steps).checkpoint
        (place,) = near.open_folder(f"{tmp_path}/near", f"{tmp_path}/run").iterdir()
        assert place.name == Path(last.url).name

    def refuse():
        raise RuntimeError("the lease is another's")

    assert save(tmp_path, 4, guard=refuse).checkpoint is None
    assert [p.name for p in place.parent.iterdir()] == [place.name]
    near.remove(f"{tmp_path}/near", f"{tmp_path}/run")
    assert copies(tmp_path) == {}
    near.remove(f"{tmp_path}/near", f"{tmp_path}/run")  # another rank of the machine does so, too


def test_copies_are_left_before_old_checkpoints_are_deleted_from_storage(tmp_path, monkeypatch):
    there = []  # deleting takes a far bucket seconds, in which a restart would not find copies
    monkeypatch.setattr(checkpoints, "sweep", lambda *_args, **_named: there.append(len(copies(tmp_path))))
    save(tmp_path, 1)
    assert there == [1]


def test_what_a_run_left_that_never_came_back_is_deleted_by_another(tmp_path):
    old, live, own = (near.open_folder(str(tmp_path), root) for root in ("old", "live", "own"))
    (old / "step-00000001-00000000").mkdir()
    (old.parent / "mine").write_bytes(b"")
    for path in (old, old.parent / "mine"):
        os.utime(path, (0, 0))
    assert near.open_folder(str(tmp_path), "own") == own
    assert sorted(own.parent.iterdir()) == sorted([live, own, own.parent / "mine"])


def half_written(write):
    """Run out of room in the middle."""

    def half(folder, of, part, pieces):
        def until_full():
            yield pieces[0]
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        write(folder, of, part, until_full())

    return half


@pytest.mark.parametrize("full", ["before", "half-way"])
def test_a_full_disk_costs_the_copy_and_nothing_else(tmp_path, monkeypatch, full):
    with monkeypatch.context() as patch:
        if full == "before":
            patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1000, free=100))
        else:
            patch.setattr(near, "write", half_written(near.write))
        result = save(tmp_path, 1)
    assert result.checkpoint is not None
    assert result.exception is None
    assert result.near.startswith("rank 0 on ")
    assert copies(tmp_path) == {}
    _, read, _ = resume(tmp_path, monkeypatch)
    assert len(read) == 1


def test_the_folder_is_for_its_owner_alone(tmp_path):
    before = os.umask(0)
    try:
        folder = near.open_folder(f"{tmp_path}/a/near", "run")
        save(tmp_path, 1)
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in (folder, folder.parent)} == {0o700}
    assert {p.stat().st_mode & 0o077 for p in Path(tmp_path, "near", f"eiwtrain-near-{os.getuid()}").rglob("*")} == {0}


def test_a_folder_in_which_others_could_put_files_is_refused(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(storage.StorageError, match=f"checkpoint.near: others may replace folders in {shared}; name a"):
        near.open_folder(str(shared), "run")
    shared.chmod(0o1777)  # as /tmp and /dev/shm are
    place = near.open_folder(str(shared), "run").parent
    shutil.rmtree(place)
    place.symlink_to(tmp_path)
    with pytest.raises(storage.StorageError, match=f"checkpoint.near: {place} is a link"):
        near.open_folder(str(shared), "run")
    assert near.remove(str(shared), "run") is None
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(storage.StorageError, match=r"checkpoint\.near: .*file cannot be used"):
        near.open_folder(f"{tmp_path}/file", "run")


@given(nodes=st.lists(st.sampled_from("abc"), min_size=1, max_size=9))
def test_a_rank_copies_one_other_on_another_node(nodes):
    wards = {rank: ward for rank in range(len(nodes)) if (ward := near.ward(nodes, rank)) is not None}
    assert len(set(wards.values())) == len(wards)
    assert all(nodes[ward] != nodes[rank] for rank, ward in wards.items())
    assert bool(wards) == (len(set(nodes)) > 1)


@pytest.mark.parametrize("nodes", ["ab", "aabb", "abab", "aaabbbccc", "abc", "aabbccdd"])
def test_with_equally_many_workers_a_node_every_part_outlives_its_node(nodes):
    wards = [near.ward(nodes, rank) for rank in range(len(nodes))]
    assert sorted(wards) == list(range(len(nodes)))


def test_parts_are_read_by_ranks_that_have_them_near_and_dealt_evenly():
    parts = tuple(checkpoints.Part(str(n), 100, "") for n in range(4))
    saved = checkpoints.Checkpoint("x", 1, 1, parts, {})
    assert restore._readers(saved, [[], []]) == [0, 1, 0, 1]
    assert restore._readers(saved, [[0, 1, 2, 3], [0, 1, 2, 3], []]) == [0, 1, 0, 1]
    assert restore._readers(saved, [[], [2], [3]]) == [0, 1, 1, 2]
    assert restore._readers(saved, [[]] * 8) == [0, 1, 2, 3]
