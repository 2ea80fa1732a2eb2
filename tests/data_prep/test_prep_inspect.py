"""The page of text, the sheet of images and the estimate of the size are right."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from data_prep import prepare
from data_prep.inspect import contact_sheet, describe, size_estimate
from data_prep.items import Item, Source
from data_prep.pixels import Preprocess
from data_prep.shard_check import read_image
from data_prep.sources import read_source
from data_prep.writer import Plan, make_plan, run_plan
from eiwtrain.data.manifest import DataError, Manifest, load_manifest, load_sidecar

SIDE = 8
TILE, LEFT, TOP = 64, 16, 46  # how the sheet is laid out: an image of 8 pixels is enlarged eightfold
STEP_X, STEP_Y = 68, 81


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 50 images of 12x10 noise in two classes and two splits, one copied, and two broken files."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for n in range(50):
        folder = root / ("test" if n % 5 == 0 else "train") / ["ant", "a bee whose name is long"][n % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (10, 12, 3), np.uint8)).save(folder / f"{n:03d}.png")
    shutil.copy(root / "test" / "ant" / "000.png", root / "train" / "ant" / "copy.png")
    for name in ("none.png", "no.png"):
        (root / "train" / "ant" / name).write_bytes(b"no image")
    return root


@pytest.fixture(scope="module", params=["png", "npy"])
def data_set(request: pytest.FixtureRequest, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with four shards for training, and one for testing. Read only."""
    output = tmp_path_factory.mktemp(request.param) / "set"
    options: dict[str, Any] = {"preprocess": {"encoding": request.param}, "drop_duplicates": True}
    prepare("folder", str(output), SIDE, path=str(images), shard_size=12, max_rejects=0.1, **options)
    return output


def _pixels(folder: Path, manifest: Manifest, split: str) -> list[np.ndarray]:
    """Return all images of a split, in order."""
    found = []
    for shard in manifest.splits[split].shards:
        sidecar, data = load_sidecar(str(folder), shard.name), (folder / shard.name).read_bytes()
        for offset, size in zip(sidecar.offsets, sidecar.sizes, strict=True):
            found.append(read_image(data[offset : offset + size], manifest.encoding, SIDE))
    return found


def _tile(sheet: Image.Image, column: int, row: int, top: int = TOP) -> np.ndarray:
    left, upper = LEFT + column * STEP_X, top + row * STEP_Y
    return np.asarray(sheet.crop((left, upper, left + TILE, upper + TILE)))


def _enlarged(pixels: np.ndarray) -> np.ndarray:
    return pixels.repeat(TILE // SIDE, 0).repeat(TILE // SIDE, 1)


def test_the_sheet_shows_the_first_images_of_each_split_in_order(data_set: Path) -> None:
    manifest = load_manifest(str(data_set))
    sheet = contact_sheet(str(data_set), manifest, columns=5, rows=3)  # 15 of train: more than the first shard
    top = TOP
    for split, shown in (("train", 15), ("test", 10)):
        images = _pixels(data_set, manifest, split)
        assert len(images) >= shown
        for i in range(shown):
            assert np.array_equal(_tile(sheet, i % 5, i // 5, top), _enlarged(images[i]))
        top += TOP + -(-shown // 5) * STEP_Y
    assert sheet.width == 2 * LEFT + 5 * STEP_X - 4
    assert sheet.height == top - TOP + LEFT


def test_the_sheet_of_a_split_has_a_caption_and_class_names(data_set: Path) -> None:
    manifest = load_manifest(str(data_set))
    sheet = contact_sheet(str(data_set), manifest, "test", columns=4, rows=1)
    assert np.array_equal(_tile(sheet, 3, 0), _enlarged(_pixels(data_set, manifest, "test")[3]))
    paper = sheet.getpixel((0, 0))

    def inked(box: tuple[int, int, int, int]) -> bool:
        return bool((np.asarray(sheet.crop(box)) != paper).any())

    assert inked((LEFT, 10, 200, TOP - 4))  # the caption
    for column in range(4):
        left = LEFT + column * STEP_X
        assert inked((left, TOP + TILE, left + TILE, TOP + STEP_Y))  # the class
        assert not inked((left + TILE, TOP, left + STEP_X, sheet.height))  # a long name is cut
    plain = contact_sheet(str(data_set), replace(manifest, classes=()), "test", columns=4, rows=1)
    assert plain.height == TOP + TILE + 4 + LEFT
    assert np.array_equal(_tile(plain, 3, 0), _tile(sheet, 3, 0))


@pytest.mark.parametrize(("side", "enlarged"), [(1, 64), (20, 60), (48, 48), (80, 80)])
def test_images_are_enlarged_by_whole_factors(images: Path, tmp_path: Path, side: int, enlarged: int) -> None:
    manifest = prepare("folder", str(tmp_path), side, path=str(images), max_rejects=0.1)
    sheet = contact_sheet(str(tmp_path), manifest, "train", columns=10, rows=1)
    assert sheet.width == 2 * LEFT + 10 * (enlarged + 4) - 4


def test_only_the_shown_part_of_a_remote_data_set_is_read(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"memory://{uuid.uuid4().hex}/set"
    fs = fsspec.filesystem("memory")
    for path in data_set.iterdir():
        if path.stem in ("manifest", "train-000000", "train-000001"):
            fs.pipe_file(f"{url}/{path.name}", path.read_bytes())
    manifest = load_manifest(url)
    read: list[tuple[str, int]] = []
    cat_file = type(fs).cat_file

    def note(self: Any, path: str, start: int | None = None, end: int | None = None, **more: Any) -> bytes:
        data: bytes = cat_file(self, path, start=start, end=end, **more)
        read.append((path.rsplit("/", 1)[-1], len(data)))
        return data

    monkeypatch.setattr(type(fs), "cat_file", note)
    remote = contact_sheet(url, manifest, "train", columns=7, rows=2)
    assert remote == contact_sheet(str(data_set), manifest, "train", columns=7, rows=2)
    first, second = (shard.name for shard in manifest.splits["train"].shards[:2])
    assert [name for name, _ in read if name.endswith(".tar")] == [first, second]
    assert dict(read)[second] < manifest.splits["train"].shards[1].bytes / 2
    fs.rm(url, recursive=True)


def test_an_image_that_cannot_be_shown_is_named(data_set: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(data_set, tmp_path / "set"))
    manifest = load_manifest(str(folder))
    with pytest.raises(DataError, match="has no split 'val'"):
        contact_sheet(str(folder), manifest, "val")
    with pytest.raises(DataError, match="has no images"):
        contact_sheet(str(folder), replace(manifest, splits={}))
    shard = manifest.splits["test"].shards[0].name
    sidecar, data = load_sidecar(str(folder), shard), bytearray((folder / shard).read_bytes())
    data[sidecar.offsets[1]] ^= 255
    (folder / shard).write_bytes(data)
    with pytest.raises(DataError, match=f"shard {shard}: image {sidecar.keys[1]} "):
        contact_sheet(str(folder), manifest)
    (folder / shard).unlink()
    with pytest.raises(DataError, match=f"shard {shard} is missing"):
        contact_sheet(str(folder), manifest)


def test_the_page_shows_counts_sizes_and_what_was_left_out(data_set: Path) -> None:
    manifest = load_manifest(str(data_set))
    page = describe(manifest, str(data_set))
    megabytes = sum(shard.bytes for shard in manifest.splits["train"].shards) / 1e6
    for part in (
        f"set: 8x8x3, {manifest.encoding}, at {data_set}",
        "classes: 2 (a bee whose name is long, ant)",
        f"train: 40 images in 4 shards, {megabytes:.1f} MB (a shard ",
        "    2 rejects, 1 duplicates, 1 of them dropped",
        "    rejects: 2 x ",
        "    dropped: 1 x same pixels as test/0000000",
        "test: 10 images in 1 shards",
        "    0 rejects, 0 duplicates",
        "preprocessing: center-crop-resize v",
        f'"encoding": "{manifest.encoding}"',
        manifest.fingerprint,
    ):
        assert part in page
    assert "protocol" not in page
    assert len(page.splitlines()) < 24
    source = manifest.preprocessing["params"]["source"] | {"protocol": "downsampled, 49,999 images"}
    params = manifest.preprocessing["params"] | {"source": source}
    of_protocol = replace(manifest, preprocessing=manifest.preprocessing | {"params": params})
    assert "protocol: downsampled, 49,999 images" in describe(of_protocol, str(data_set))


def test_reasons_are_counted_and_the_rarest_are_not_printed(data_set: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(data_set, tmp_path / "set"))
    path = folder / "test-000000.json"
    sidecar = json.loads(path.read_text())
    reasons = [f"{n} pixels are too few" for n in range(5)] + ["bad"] * 3 + ["worse"] * 2 + ["a", "b"]
    sidecar["rejects"] = [{"key": str(n), "source": "x", "reason": reason} for n, reason in enumerate(reasons)]
    path.write_text(json.dumps(sidecar))
    (folder / "train-000002.json").unlink()
    lines = describe(load_manifest(str(folder)), str(folder)).splitlines()
    assert [line.strip() for line in lines if line.startswith("    ")][-5:] == [
        "12 rejects, 0 duplicates",
        "rejects: 5 x 0 pixels are too few",
        "rejects: 3 x bad",
        "rejects: 2 x worse",
        "rejects: 2 for other reasons",
    ]
    assert sum("1 sidecars cannot be read, the first: shard train-000002.tar" in line for line in lines) == 1


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize(("encoding", "shard_size"), [("png", 12), ("npy", 12), ("png", 1000)])
def test_the_estimated_size_is_near_and_nothing_is_written(
    images: Path, tmp_path: Path, encoding: str, shard_size: int
) -> None:
    source = read_source("folder", SIDE, str(images))
    plan = make_plan(source, str(tmp_path / "set"), Preprocess(SIDE, encoding=encoding), shard_size)
    size = size_estimate(plan)
    assert size.images == 51  # all but two rejects
    assert list(tmp_path.iterdir()) == []
    run_plan(plan, max_rejects=0.1)
    # sizes of shards are rounded up to 10,240 bytes, of which an estimate adds half
    assert abs(size.bytes - _bytes(tmp_path / "set")) < 6_000 * sum(plan.shards().values())


@pytest.fixture
def plan_of(tmp_path: Path) -> Callable[[Callable[[int], Any], int], Plan]:
    """Make a plan of many items, which are loaded by their numbers."""

    def make(load: Callable[[int], Any], number: int) -> Plan:
        items = [Item(-1, str(n), 0, lambda n=n: load(n)) for n in range(number)]
        return make_plan(Source("made", {"train": items}), str(tmp_path / "set"), Preprocess(16))

    return make


def test_the_estimate_tries_the_same_few_items_every_time(plan_of: Callable[..., Plan]) -> None:
    loaded: list[int] = []

    def load(n: int) -> np.ndarray:
        loaded.append(n)
        return np.random.default_rng(n).integers(0, 256, (16, 16, 3), np.uint8)

    plan = plan_of(load, 3000)
    loaded.clear()  # the plan itself has loaded some
    first = size_estimate(plan, images=20)
    tried, loaded[:] = loaded[:], []
    assert size_estimate(plan, images=20) == first
    assert loaded == tried
    assert len(set(tried)) == first.images == 20
    assert max(tried) > 1500  # from everywhere, not only from the beginning
    assert size_estimate(plan, images=5000).images == 3000


def test_rejects_make_the_estimate_smaller(plan_of: Callable[..., Plan]) -> None:
    def load(n: int) -> Any:
        return b"no image" if n % 2 else np.zeros((16, 16, 3), np.uint8)

    half, whole = size_estimate(plan_of(load, 400), 400), size_estimate(plan_of(lambda n: load(0), 400), 400)
    assert half.images == 200
    assert 0.45 < half.bytes / whole.bytes < 0.55
    assert size_estimate(plan_of(lambda n: load(1), 400)).images == 0
