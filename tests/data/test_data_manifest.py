"""The manifest: it survives writing and reading, and errors name the wrong field."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import eiwtrain.data
from eiwtrain.data.fingerprint import fingerprint, first_fingerprint
from eiwtrain.data.manifest import (
    DataError,
    Manifest,
    Sidecar,
    load_manifest,
    load_sidecar,
    manifest_from_json,
    manifest_to_json,
    sidecar_from_json,
    sidecar_to_json,
)
from eiwtrain.data.shards import Shard


def test_manifest_and_sidecar_survive_json(data_set: Path) -> None:
    manifest = load_manifest(str(data_set))
    assert manifest_from_json(manifest_to_json(manifest), "x") == manifest
    sidecar = load_sidecar(str(data_set), "train-000000.tar")
    assert sidecar_from_json(sidecar_to_json(sidecar), "x") == sidecar
    assert manifest.splits["train"].samples == 50


def test_a_folder_without_manifest_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data set at .*: manifest\.json is not there"):
        load_manifest(str(tmp_path))
    with pytest.raises(DataError, match="no data set"):
        load_manifest(str(tmp_path / "nowhere"))


def _set(path: list[Any], value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        if value is None:
            del content[path[-1]]
        else:
            content[path[-1]] = value

    return change


def _nested(depth: int) -> Any:
    """Return lists in one another."""
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _set(["format"], "other-9"),
            "format is 'other-9', this version reads 'eiwtrain-data-2' and",
        ),
        (_set(["resolution"], None), "field 'resolution' is missing"),
        (_set(["resolution"], "32"), "field 'resolution' is '32', not a whole number"),
        (_set(["channels"], True), "field 'channels' is True"),
        (_set(["splits", "train", "shards", 2, "sha256"], None), r"field 'splits.train.shards\[2\].sha256' is missing"),
        (
            _set(["splits", "train", "shards", 0, "samples"], -1),
            r"field 'splits.train.shards\[0\].samples' is negative",
        ),
        (_set(["splits", "test", "samples"], 7), "field 'splits.test.samples' is not the sum"),
        (_set(["splits", "test"], []), "field 'splits.test' is .*, not an object"),
        (_set(["classes"], [1]), r"field 'classes\[0\]' is 1, not str"),
        (_set(["preprocessing", "version"], None), "field 'preprocessing.version' is missing"),
        (_set(["preprocessing", "version"], 2), "field 'fingerprint' does not match"),
        (_set(["preprocessing", "params", "x"], _nested(900)), "field 'preprocessing' nests more than"),
        (_set(["name"], _nested(900)), "field 'name' is a list, not a string"),
        (_set(["resolution"], 1 << 20), "images of 1048576 pixels"),
        (_set(["channels"], 1 << 40), "1099511627776 channels"),
        (_set(["splits", "train", "shards", 0, "bytes"], 1 << 70), "shards.0..bytes' is negative, or far too large"),
        (_set(["splits", "train", "shards", 0, "bytes"], 100), "20 samples cannot be in 100 bytes"),
        (_set(["splits", "train", "shards", 0, "name"], "../x.tar"), "'../x.tar', not the name of a file"),
        (_set(["splits", "train", "shards", 0, "sha256"], "../x"), "checksums of shard .* are no SHA-256"),
    ],
)
def test_a_wrong_field_is_named_in_one_line(
    data_set: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    content = json.loads((data_set / "manifest.json").read_text())
    change(content)
    with pytest.raises(DataError, match=message) as caught:
        manifest_from_json(json.dumps(content).encode(), "here/manifest.json")
    assert "here/manifest.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [1 << 63, -(1 << 70), True, 0.5])
def test_a_sidecar_holds_whole_numbers_that_fit_an_array(data_set: Path, number: Any) -> None:
    content = json.loads((data_set / "train-000000.json").read_text())
    content["index"]["offset"][3] = number
    with pytest.raises(DataError, match=r"field 'index.offset\[3\]' is .*, not int"):
        sidecar_from_json(json.dumps(content).encode(), "x")


@pytest.mark.parametrize(("field", "number"), [("offset", -1), ("size", -5), ("size", 1 << 40), ("offset", 1 << 40)])
def test_a_sidecar_has_its_images_inside_its_shard(data_set: Path, field: str, number: int) -> None:
    content = json.loads((data_set / "train-000000.json").read_text())
    content["index"][field][3] = number
    with pytest.raises(DataError, match=r"^x: image 3 would lie outside the shard$"):
        sidecar_from_json(json.dumps(content).encode(), "x")


@pytest.mark.parametrize("text", [b"[" * 200_000, b'{"a":' * 100_000, b'{"format":' + b"[" * 990 + b"]" * 990 + b"}"])
def test_brackets_without_end_are_refused_in_one_line(text: bytes) -> None:
    for parse in (manifest_from_json, sidecar_from_json):
        with pytest.raises(DataError) as caught:
            parse(text, "x")
        assert len(str(caught.value)) < 200
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_manifest_that_is_not_json_is_refused(text: bytes) -> None:
    with pytest.raises(DataError, match="not "):
        manifest_from_json(text, "x")


def test_fingerprint_follows_images_labels_and_preprocessing_only(
    data_set: Path, tmp_path: Path, new_data_set: Any
) -> None:
    manifest = load_manifest(str(data_set))
    elsewhere = new_data_set(str(tmp_path / "other-name"), {"train": [20, 0, 13, 17], "test": [10, 13]})
    assert elsewhere.fingerprint == manifest.fingerprint
    assert new_data_set(str(tmp_path / "x"), {"train": [20], "test": [10]}).fingerprint != manifest.fingerprint
    other = {**manifest.preprocessing, "version": 2}
    assert fingerprint(manifest.splits, other, manifest.classes) != manifest.fingerprint
    assert fingerprint(manifest.splits, manifest.preprocessing, "bac") != manifest.fingerprint
    train = manifest.splits["train"]
    relabelled = replace(train, shards=(replace(train.shards[0], sidecar_sha256="0" * 64), *train.shards[1:]))
    splits = {**manifest.splits, "train": relabelled}
    assert fingerprint(splits, manifest.preprocessing, manifest.classes) != manifest.fingerprint


@pytest.mark.parametrize("change", ["a sidecar", "the classes"])
def test_swapped_labels_are_not_the_same_data_set(data_set: Path, change: str) -> None:
    content = json.loads((data_set / "manifest.json").read_text())
    if change == "the classes":
        content["classes"].reverse()
    else:
        content["splits"]["train"]["shards"][0]["sidecar_sha256"] = "0" * 64
    with pytest.raises(DataError, match="field 'fingerprint' does not match"):
        manifest_from_json(json.dumps(content).encode(), "x")


def test_a_data_set_of_the_first_format_keeps_its_fingerprint(data_set: Path) -> None:
    new = load_manifest(str(data_set))
    content = json.loads((data_set / "manifest.json").read_text())
    old = content | {"format": "eiwtrain-data-2", "fingerprint": first_fingerprint(new.splits, new.preprocessing)}
    read = manifest_from_json(json.dumps(old).encode(), "x")
    assert read == replace(new, fingerprint=old["fingerprint"])
    assert manifest_from_json(manifest_to_json(read), "x") == read
    assert json.loads(manifest_to_json(read))["format"] == "eiwtrain-data-2"
    for wrong in ({"format": "eiwtrain-data-3"}, {"fingerprint": new.fingerprint}):
        with pytest.raises(DataError, match="fingerprint"):
            manifest_from_json(json.dumps(old | wrong).encode(), "x")


def test_an_absent_or_empty_split_is_refused_with_a_list(tmp_path: Path, new_data_set: Any) -> None:
    manifest = new_data_set(str(tmp_path), {"train": [3], "test": [0]})
    with pytest.raises(DataError, match="no split 'val'; it has train, test"):
        manifest.split("val")
    with pytest.raises(DataError, match=r"'test' .* has no samples"):
        manifest.split("test")


def test_the_package_exports_its_names() -> None:
    for name in eiwtrain.data.__all__:
        assert getattr(eiwtrain.data, name).__name__ == name
    with pytest.raises(AttributeError):
        eiwtrain.data.nothing  # noqa: B018


def test_the_protocol_stands_beside_the_name() -> None:
    params = {"source": {"name": "imagenet", "protocol": "downsampled by somebody"}}
    plain = Manifest("images", 8, 3, {"name": "x", "version": 1, "params": {}}, {}, "f")
    named = replace(plain, preprocessing={"name": "x", "version": 1, "params": params})
    assert (plain.protocol, plain.title) == ("", "images")
    assert (named.protocol, named.title) == ("downsampled by somebody", "images (downsampled by somebody)")


@pytest.mark.parametrize(
    ("params", "protocol"),
    [
        ({"crop": "center"}, ""),
        ({"crop": "random"}, "random squares"),
        ({"crop": "center", "short_side": 96}, "shorter side 96, center squares"),
        ({"crop": "random", "short_side": 96, "source": {"protocol": "LSUN"}}, "LSUN, shorter side 96, random squares"),
    ],
)
def test_the_protocol_names_the_visible_part_of_an_image(params: dict[str, object], protocol: str) -> None:
    assert Manifest("images", 8, 3, {"name": "x", "version": 1, "params": params}, {}, "f").protocol == protocol


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 100_000])
def test_nested_json_is_no_manifest_and_no_sidecar(text: bytes) -> None:
    for parse in (manifest_from_json, sidecar_from_json):
        with pytest.raises(DataError, match="not JSON"):
            parse(text, "here")


@pytest.mark.parametrize("name", ["../x.tar", "/etc/passwd", "a\\b.tar", "x::http://127.0.0.1/y", "..", ""])
def test_a_shard_is_a_file_of_its_folder(name: str) -> None:
    shard = Shard(name, 1, 1, "0" * 64, "0" * 64)
    text = sidecar_to_json(Sidecar(shard, "", keys=("a",), labels=(0,), offsets=(0,), sizes=(1,), digests=("0",)))
    with pytest.raises(DataError, match="not the name of a file"):
        sidecar_from_json(text, "here")
