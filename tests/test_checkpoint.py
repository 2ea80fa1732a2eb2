from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import run_ranks, tiny_config

from eiwtrain import checkpoint, storage
from eiwtrain.config import Config

CONFIG = Config.model_validate(tiny_config(Path("/x")))


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    file = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


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
    return checkpoint.save(root, step, step * 8, tensors(step).items(), state(**more))


def test_a_checkpoint_comes_back_whole(tmp_path):
    save(str(tmp_path), 3)
    (found,) = checkpoint.committed(str(tmp_path))
    assert (found.step, found.samples_seen, found.state) == (3, 24, state())
    loaded = checkpoint.load(found)
    assert loaded.keys() == tensors().keys()
    assert all(torch.equal(loaded[k], v) for k, v in tensors(3).items())
    assert checkpoint.section(loaded, "ema").keys() == {"layer0.w"}


def test_without_its_manifest_there_is_no_checkpoint(tmp_path):
    saved = save(str(tmp_path), 3)
    storage.delete(storage.join(saved.url, "manifest.json"))
    assert checkpoint.committed(str(tmp_path)) == []


def test_a_half_written_manifest_is_no_checkpoint(tmp_path):
    saved = save(str(tmp_path), 3)
    manifest = Path(saved.url, "manifest.json")
    manifest.write_bytes(manifest.read_bytes()[:-40])
    assert checkpoint.committed(str(tmp_path)) == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_part_is_named(tmp_path, damage):
    saved = save(str(tmp_path), 3)
    part = Path(saved.url, saved.parts[0].name)
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data if damage == "flip" else data[:-1]) if damage != "delete" else part.unlink()
    with pytest.raises(checkpoint.DamagedCheckpoint, match=part.name):
        checkpoint.load(saved)


def test_the_newest_come_first_and_sweep_keeps_them_and_the_best(tmp_path):
    root = str(tmp_path)
    for step, bits in ((1, 5.0), (2, 3.0), (3, None), (4, 4.0), (5, None)):
        save(root, step, eval_bits_per_dim=bits)
    assert [c.step for c in checkpoint.committed(root)] == [5, 4, 3, 2, 1]
    checkpoint.sweep(root, keep_last=2)
    assert [c.step for c in checkpoint.committed(root)] == [5, 4, 2]
    assert len(storage.listdir(checkpoint.folder(root))) == 3
    checkpoint.sweep(root, keep_last=1)
    assert [c.step for c in checkpoint.committed(root)] == [5, 2]


def test_sweep_removes_what_dead_attempts_left_but_nothing_newer_than_the_newest(tmp_path):
    root = str(tmp_path)
    for name in ("step-00000003-deadbeef", "step-00000009-deadbeef", "notes"):
        storage.write_bytes(storage.join(checkpoint.folder(root), name, "part"), b"half")
    checkpoint.sweep(root, keep_last=1)
    assert len(storage.listdir(checkpoint.folder(root))) == 3  # there is no checkpoint yet: all may be under way
    save(root, 5)
    checkpoint.sweep(root, keep_last=1)
    names = [n.rsplit("-", 1)[0] for n in storage.listdir(checkpoint.folder(root))]
    assert names == ["notes", "step-00000005", "step-00000009"]


def test_a_condemned_checkpoint_is_none_any_more_and_keeps_its_bytes(tmp_path):
    saved = save(str(tmp_path), 3)
    before = set(storage.listdir(saved.url))
    checkpoint.condemn(saved)
    assert checkpoint.committed(str(tmp_path)) == []
    assert set(storage.listdir(saved.url)) == before - {"manifest.json"} | {"manifest.damaged.json"}


def test_only_what_shapes_weights_or_order_is_fixed(tmp_path):
    saved = save(str(tmp_path), 1)

    def problems(fingerprint="f" * 64, **sections):
        config = Config.model_validate(tiny_config(Path("/x"), **sections))
        return checkpoint.differences(saved, config, fingerprint)

    assert problems() == []
    assert problems(train={"max_steps": 99, "lr": 0.5, "micro_batch": 2}, workers={"min": 1}) == []
    assert problems(None) == []
    # Other ways to the same gradients; drift is mended by one of them.
    assert problems(model={"backprop": "stored", "anchor_every": 0, "trunk_dtype": "float64"}) == []
    del saved.state["config"]["model"]["coupling"]  # as if it had been saved before there was a choice
    assert problems() == []
    for field, sections in {
        "model.steps": {"model": {"steps": 3}},
        "model.coupling": {"model": {"coupling": "spline"}},
        "model.conditioner.hidden": {"model": {"conditioner": {"hidden": 9}}},
        "train.seed": {"train": {"seed": 1}},
        "train.global_batch": {"train": {"global_batch": 16}},
        "data.lanes": {"data": {"lanes": 8}},
    }.items():
        (line,) = problems(**sections)
        assert line.startswith(field + ":")
    (line,) = problems("0" * 64)
    assert line.startswith("data.path:")


def save_on_two_ranks(root):
    checkpoint.save(root, 4, 32, tensors(4).items(), state())


def test_two_ranks_share_the_bytes_and_one_process_loads_them(tmp_path):
    run_ranks(save_on_two_ranks, 2, str(tmp_path))
    (found,) = checkpoint.committed(str(tmp_path))
    sizes = [p.bytes for p in found.parts]
    assert len(sizes) == 2
    assert max(sizes) < 0.7 * sum(sizes)
    loaded = checkpoint.load(found)
    assert all(torch.equal(loaded[k], v) for k, v in tensors(4).items())
