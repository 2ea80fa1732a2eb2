import json
import uuid
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import lone_group, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks

from eiwtrain import checkpoints, storage
from eiwtrain.checkpoints import writer
from eiwtrain.config import Config

CONFIG = Config.model_validate(tiny_config(Path("/x")))


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    with lone_group(tmp_path_factory.mktemp("group")):
        yield


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {f"weights/layer{i}.w": torch.randn(i + 1, 7, generator=generator) for i in range(5)} | {
        "ema/layer0.w": torch.randn(1, 7, generator=generator),
        "moments/n": torch.tensor(3.0),
    }


def state(**more):
    return {
        "config": CONFIG.model_dump(mode="json"),
        "data_fingerprint": "f" * 64,
        "eval_bits_per_dim": None,
        "saved_at": 1.0,
    } | more


def save(root, step, **more):
    (share,) = writer.snapshot(tensors(step).items(), [dist.get_rank()], dist.get_world_size())
    return writer.commit(root, step, step * 8, share, state(**more))


def test_a_checkpoint_comes_back_whole(tmp_path):
    save(str(tmp_path), 3)
    (found,) = checkpoints.committed(str(tmp_path))
    assert (found.step, found.samples_seen, found.state) == (3, 24, state())
    loaded = checkpoints.load(found)
    assert loaded.keys() == tensors().keys()
    assert all(torch.equal(loaded[k], v) for k, v in tensors(3).items())
    assert checkpoints.section(loaded, "ema").keys() == {"layer0.w"}


def test_without_its_manifest_there_is_no_checkpoint(tmp_path):
    saved = save(str(tmp_path), 3)
    storage.delete(storage.join(saved.url, "manifest.json"))
    assert checkpoints.committed(str(tmp_path)) == []


def test_a_half_written_manifest_is_no_checkpoint_but_reported(tmp_path):
    saved = save(str(tmp_path), 3)
    manifest = Path(saved.url, "manifest.json")
    data = manifest.read_bytes()
    for left in (data[:-40], b"", b"[]", b"{}", b'{"format": 3}', b"\xff"):
        manifest.write_bytes(left)
        found, (unreadable,) = checkpoints.survey(str(tmp_path))
        assert found == checkpoints.committed(str(tmp_path)) == []
        assert (unreadable.url, unreadable.step) == (saved.url, 3)
        assert unreadable.why.startswith(f"{manifest}: ")


def test_a_checkpoint_of_another_format_is_named_as_such(tmp_path):
    saved = save(str(tmp_path), 3)
    manifest = Path(saved.url, "manifest.json")
    content = json.loads(manifest.read_bytes())
    del content["sha256"]
    manifest.write_text(json.dumps(content | {"format": "eiwtrain-checkpoint/1"}))
    _, (unreadable,) = checkpoints.survey(str(tmp_path))
    assert "'eiwtrain-checkpoint/1', and this version of eiwtrain reads 'eiwtrain-checkpoint/2'" in unreadable.why


def test_a_file_in_place_of_a_checkpoint_is_passed_over(tmp_path):
    storage.write_bytes(storage.join(checkpoints.folder(str(tmp_path)), "step-00000003-deadbeef"), b"1")
    assert checkpoints.survey(str(tmp_path)) == ([], [])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint, its root and its files."""
    root = str(tmp_path_factory.mktemp("whole"))
    saved = save(root, 3)
    return root, saved, {path: path.read_bytes() for path in sorted(Path(saved.url).iterdir())}


def is_as_written_or_refused(root, saved):
    found, unreadable = checkpoints.survey(root)
    assert len(found) + len(unreadable) == 1
    if found:  # what was altered says the same: the layout of the manifest
        assert (found[0].step, found[0].parts, found[0].state) == (saved.step, saved.parts, saved.state)
        try:
            loaded = checkpoints.load(found[0])
        except checkpoints.DamagedCheckpoint:
            return
        assert all(torch.equal(loaded[k], v) for k, v in tensors(3).items())


@given(st.data())
def test_no_altered_byte_goes_unnoticed(whole, data):
    root, saved, files = whole
    path = data.draw(st.sampled_from(list(files)))
    where = data.draw(st.integers(0, len(files[path]) - 1))
    altered = bytearray(files[path])
    altered[where] ^= data.draw(st.integers(1, 255))
    path.write_bytes(altered)
    try:
        is_as_written_or_refused(root, saved)
        if path.name != "manifest.json":
            with pytest.raises(checkpoints.DamagedCheckpoint, match=path.name):
                checkpoints.load(saved)
    finally:
        path.write_bytes(files[path])


@given(st.data())
def test_no_missing_end_goes_unnoticed(whole, data):
    root, saved, files = whole
    path = data.draw(st.sampled_from(list(files)))
    path.write_bytes(files[path][: data.draw(st.integers(0, len(files[path]) - 1))])
    try:
        is_as_written_or_refused(root, saved)
        if path.name == "manifest.json":
            assert checkpoints.committed(root) == []
    finally:
        path.write_bytes(files[path])


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_part_is_named(tmp_path, damage):
    saved = save(str(tmp_path), 3)
    part = Path(saved.url, saved.parts[0].name)
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data if damage == "flip" else data[:-1]) if damage != "delete" else part.unlink()
    with pytest.raises(checkpoints.DamagedCheckpoint, match=part.name):
        checkpoints.load(saved)


def test_one_bad_read_condemns_nothing(tmp_path, monkeypatch):
    saved = save(str(tmp_path), 3)
    read, seen, before = storage.read_bytes, set(), storage.faults()

    def bad_at_first(url):
        if url in seen:
            return read(url)
        seen.add(url)
        data = bytearray(read(url))
        data[len(data) // 2] ^= 1
        return bytes(data)

    monkeypatch.setattr(storage, "read_bytes", bad_at_first)
    (found,), unreadable = checkpoints.survey(str(tmp_path))
    assert (found, unreadable) == (saved, [])
    assert all(torch.equal(checkpoints.load(found)[k], v) for k, v in tensors(3).items())
    assert storage.faults() == before + 2  # the manifest and a part
    seen.clear()
    assert checkpoints.at(saved.url) == saved


def test_a_manifest_is_json_though_numbers_are_not_finite(tmp_path):
    nan = float("nan")
    score = {"bits_per_dim": float("inf"), "standard_error": nan, "images": 1}
    save(str(tmp_path), 3, score=score, eval_bits_per_dim=nan)
    (found,) = checkpoints.committed(str(tmp_path))
    text = Path(found.url, "manifest.json").read_text()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert found.state["score"] == {"bits_per_dim": None, "standard_error": None, "images": 1}
    assert checkpoints.best([found]) is None


@pytest.mark.parametrize("changed", ["images", "split", "data"])
def test_the_best_is_the_best_of_one_kind_of_evaluation(tmp_path, changed):
    def scored(step, bits, kind):
        config = {"data": {"eval_split": "val" if changed == "split" and kind else "test"}}
        score = {"images": 8 if changed == "images" and kind else 2048}
        fingerprint = "g" if changed == "data" and kind else "f"
        saved = {"eval_bits_per_dim": bits, "score": score, "config": config, "data_fingerprint": fingerprint}
        return checkpoints.Checkpoint(str(step), step, 0, (), saved)

    one, other = 0, 1
    saves = [(500, None, one), (400, 3.2, one), (300, 3.1, one), (200, 2.0, other), (100, 1.0, other)]
    found = [scored(*s) for s in saves]
    assert checkpoints.best(found).step == 300
    assert checkpoints.best(found[3:]).step == 100
    assert checkpoints.kept(found, 1, 0) == {"500", "300", "100"}


def test_the_newest_come_first_and_sweep_keeps_them_and_the_best(tmp_path):
    root = str(tmp_path)
    for step, bits in ((1, 5.0), (2, 3.0), (3, None), (4, 4.0), (5, None)):
        save(root, step, eval_bits_per_dim=bits)
    assert [c.step for c in checkpoints.committed(root)] == [5, 4, 3, 2, 1]
    checkpoints.sweep(root, keep_last=2)
    assert [c.step for c in checkpoints.committed(root)] == [5, 4, 2]
    assert len(storage.listdir(checkpoints.folder(root))) == 3
    checkpoints.sweep(root, keep_last=1)
    assert [c.step for c in checkpoints.committed(root)] == [5, 2]


@given(
    st.lists(st.tuples(st.integers(0, 60), st.none() | st.floats(0, 9) | st.just(float("nan"))), min_size=1),
    st.integers(1, 4),
    st.integers(0, 20),
)
def test_the_newest_the_best_and_the_first_of_each_window_stay(saves, keep_last, keep_every):
    found = [
        checkpoints.Checkpoint(str(i), step, 0, (), {"eval_bits_per_dim": bits, "saved_at": i})
        for i, (step, bits) in enumerate(saves)
    ]
    found.sort(key=lambda c: (c.step, c.state["saved_at"]), reverse=True)
    last = {c.step: c for c in reversed(found)}  # the newest of each step
    steps = sorted(last)
    scores = {s: b for s in steps if (b := last[s].state["eval_bits_per_dim"]) is not None and b == b}
    keep = checkpoints.kept(found, keep_last, keep_every)
    of_which = {s for s in steps if last[s].url in keep}
    assert len(of_which) == len(keep)
    windows = (
        {min(s for s in steps if s // keep_every == w) for w in {s // keep_every for s in steps}}
        if keep_every
        else set()
    )
    must = {*steps[-keep_last:], *windows}
    assert must <= of_which
    extra = of_which - must
    assert len(extra) <= 1
    if scores:
        assert min(scores.values()) in {scores.get(s) for s in of_which}
        assert all(scores[s] == min(scores.values()) for s in extra)
    else:
        assert not extra
    # once more, from what is left: nothing that must stay forever is deleted
    assert checkpoints.kept([c for c in found if c.url in keep], keep_last, keep_every) == keep


def names_in(url):
    return sorted(storage.listdir(url))


def test_what_dead_attempts_left_goes_and_what_is_not_ours_stays(tmp_path):
    root, random = str(tmp_path), uuid.uuid4().hex
    stray = [f".run.json.{random}.tmp", f".probe-{random}"]
    others = [".hidden", "run.json", "notes.tmp", f".lease.json.{random}.tmp"]
    for name in stray + others:
        storage.write_bytes(storage.join(root, name), b"1")
        storage.write_bytes(storage.join(checkpoints.folder(root), name), b"1")
    for name in ("step-00000003-deadbeef", "step-00000009-deadbeef", "notes"):
        storage.write_bytes(storage.join(checkpoints.folder(root), name, "part"), b"half")
    Path(checkpoints.folder(root), "step-00000004-deadbeef").mkdir()
    saved = save(root, 5)
    checkpoints.clean(root)
    assert names_in(root) == sorted([*others, "checkpoints"])
    left = [n for n in names_in(checkpoints.folder(root)) if n not in others]
    assert left == ["notes", saved.url.rsplit("/")[-1]]
    checkpoints.load(saved)


@pytest.mark.parametrize("make_bad", ["condemned", "unreadable"])
def test_a_bad_checkpoint_stays_until_training_has_passed_its_step(tmp_path, make_bad):
    root = str(tmp_path)
    save(root, 3)
    bad = save(root, 7)
    if make_bad == "condemned":
        checkpoints.condemn(bad)
    else:
        Path(bad.url, "manifest.json").write_bytes(b"")
    before = {p: p.read_bytes() for p in Path(bad.url).iterdir()}
    for step in (5, 6):
        save(root, step)
        checkpoints.sweep(root, keep_last=1)
        assert [c.step for c in checkpoints.committed(root)] == [step]
        assert {p: p.read_bytes() for p in Path(bad.url).iterdir()} == before
    new = save(root, 7)
    checkpoints.sweep(root, keep_last=1)
    assert names_in(checkpoints.folder(root)) == [new.url.rsplit("/")[-1]]


def test_a_condemned_checkpoint_no_longer_counts_and_keeps_its_bytes(tmp_path):
    saved = save(str(tmp_path), 3)
    before = set(storage.listdir(saved.url))
    checkpoints.condemn(saved)
    assert checkpoints.committed(str(tmp_path)) == []
    assert set(storage.listdir(saved.url)) == before - {"manifest.json"} | {"manifest.damaged.json"}


def test_only_what_shapes_weights_or_order_is_fixed(tmp_path):
    saved = save(str(tmp_path), 1)

    def problems(fingerprint="f" * 64, **sections):
        config = Config.model_validate(tiny_config(Path("/x"), **sections))
        return checkpoints.differences(saved, config, fingerprint)

    assert problems() == []
    assert problems(train={"max_steps": 99, "lr": 0.5, "micro_batch": 2}, workers={"min": 1}) == []
    assert problems(None) == []
    # Other ways to the same gradients; one of them fixes drift.
    assert problems(model={"backprop": "stored", "anchor_every": 0, "trunk_dtype": "float64"}) == []
    # as if it had been saved before there was a choice
    del saved.state["config"]["model"]["coupling"], saved.state["config"]["train"]["optimizer"]
    assert problems() == []
    for field, sections in {
        "model.steps": {"model": {"steps": 3}},
        "model.coupling": {"model": {"coupling": "spline"}},
        "model.conditioner.hidden": {"model": {"conditioner": {"hidden": 9}}},
        "data.augment": {"data": {"augment": "eta"}},
        "train.seed": {"train": {"seed": 1}},
        "train.optimizer": {"train": {"optimizer": "adamax"}},
        "train.global_batch": {"train": {"global_batch": 16}},
        "data.lanes": {"data": {"lanes": 8}},
    }.items():
        (line,) = problems(**sections)
        assert line.startswith(field + ":")
    (line,) = problems("0" * 64)
    assert line.startswith("data.path:")
    del saved.state["config"]["data"]["augment"]
    for flip, augment in ((True, "flip"), (False, "none")):  # as an older version named the choice
        saved.state["config"]["data"]["flip"] = flip
        assert problems(data={"augment": augment}) == []
        assert problems(data={"augment": "eta"}) != []


def save_on_two_ranks(root):
    save(root, 4)


def test_two_ranks_share_the_bytes_and_one_process_loads_them(tmp_path):
    run_ranks(save_on_two_ranks, 2, str(tmp_path))
    (found,) = checkpoints.committed(str(tmp_path))
    sizes = [p.bytes for p in found.parts]
    assert len(sizes) == 2
    assert max(sizes) < 0.7 * sum(sizes)
    loaded = checkpoints.load(found)
    assert all(torch.equal(loaded[k], v) for k, v in tensors(4).items())
