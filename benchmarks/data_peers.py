"""Run one peer of the data benchmarks: write a data set, read it back, or give batches in training order.

    webdataset 1.0     `ShardWriter` in a multiprocessing pool, a writer a process; `WebDataset` with its shuffle
    LitData            `optimize`; `StreamingDataset` and `StreamingDataLoader`
    MosaicML Streaming `MDSWriter` in a pool, a writer a process, and `merge_index`; `StreamingDataset`

Each peer stores an image, its class and its name, as its documentation recommends. An image is stored

- as "png" with the codec "own": the peer encodes an image of Pillow and decodes it itself (webdataset and MDS: Pillow;
  LitData: Pillow writes, torchvision reads);
- as "png" with the codec "ours": this package's functions encode the same file and imagecodecs decodes it, which
  separates the encoder's part of a difference from the rest;
- as "npy", raw: uint8 (3, H, W), the form that training uses.

The benchmarks run it as `python -m benchmarks.data_peers TASK` with an interpreter that has the peer. It imports only
`data_prep.pixels` of this package, and that only for "ours".
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from benchmarks.environments import versions
from benchmarks.images import Entry, entries
from eiwtrain.data.image_formats import image_formats

PEERS = ("webdataset", "LitData", "MosaicML")
PACKAGES = {"webdataset": "webdataset", "LitData": "litdata", "MosaicML": "mosaicml-streaming"}
CODECS = (("png", "own"), ("png", "ours"), ("npy", "own"))
"""Pairs of (encoding, whose codec)."""

Pixels = npt.NDArray[np.uint8]
_SHUFFLED = 1000  # samples that webdataset mixes at a time, as in its documentation


@dataclass(frozen=True)
class Writing:
    """A data set to write.

    Attributes:
        source: a folder of class folders.
        output: a folder that does not exist yet.
        shard_size: images a shard, where the peer counts images (the others use their default of 64 MB).
    """

    peer: str
    source: str
    output: str
    resolution: int
    processes: int
    encoding: str
    codec: str
    shard_size: int


def write(task: Writing) -> None:
    """Write the data set of a task with its peer."""
    {"webdataset": _write_webdataset, "LitData": _write_litdata, "MosaicML": _write_mosaicml}[task.peer](task)


def read_back(peer: str, folder: str, encoding: str, codec: str) -> Iterator[tuple[str, int, Pixels]]:
    """Yield every image of a data set: its name, its class, its pixels, (H, W, 3)."""
    read = {"webdataset": _read_webdataset, "LitData": _read_litdata, "MosaicML": _read_mosaicml}[peer]
    planes = encoding == "npy" or (peer == "LitData" and codec == "own")
    for name, label, image in read(folder, encoding):
        pixels = np.asarray(image if planes or not isinstance(image, (bytes, memoryview)) else decode_png(image))
        yield name, label, pixels.transpose(1, 2, 0) if planes else pixels


def key_of(name: str) -> str:
    """Return the name of an image file without its suffix, which is a valid webdataset key."""
    return name.rpartition(".")[0]


def digest(pixels: Pixels) -> str:
    """Return a hash of pixels, (H, W, 3)."""
    return hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=8).hexdigest()


def decode_png(data: bytes | memoryview) -> Pixels:
    """Decode a PNG with the decoder of this package."""
    import imagecodecs

    return imagecodecs.png_decode(cast(Any, data))  # it also accepts a memoryview


def epochs(
    peer: str, url: str, cache: str, encoding: str, codec: str, batch: int, workers: int
) -> Callable[[], Iterable[tuple[Any, Any]]]:
    """Return a function that starts an epoch at each call: shuffled batches of uint8 (n, 3, H, W) and classes, (n,).

    Args:
        url: of the data set: a folder, or s3:// with the server and its keys in the environment.
        cache: a folder for fetched files.
        workers: number of processes of the DataLoader.
    """
    make = {"webdataset": _webdataset_loader, "LitData": _litdata_loader, "MosaicML": _mosaicml_loader}[peer]
    return make(url, cache, encoding, codec, batch, workers)


def square(path: str, resolution: int) -> Image.Image:
    """Read an image file as `data_prep` does, with Pillow alone: upright, RGB, the central square resized."""
    with Image.open(path, formats=image_formats()) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    if image.size != (resolution, resolution):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        image = image.resize((resolution, resolution), Image.Resampling.BOX, box=box)
    return image


def _stored(task: Writing, name: str) -> Any:
    """Return the image for the peer to store: an image of Pillow, a PNG's bytes, or uint8 (3, H, W)."""
    path = f"{task.source}/{name}"
    if task.codec == "ours":
        from data_prep.pixels import Preprocess, encode, fit

        return encode(fit(Path(path).read_bytes(), name, Preprocess(task.resolution)), "png")
    image = square(path, task.resolution)
    return image if task.encoding == "png" else np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _in_pool(share: Callable[[Writing, int, Sequence[Entry]], None], task: Writing) -> None:
    everything = entries(task.source)
    with multiprocessing.Pool(task.processes) as pool:
        pool.starmap(share, [(task, i, everything[i :: task.processes]) for i in range(task.processes)])


def _write_webdataset(task: Writing) -> None:
    Path(task.output).mkdir()
    _in_pool(_webdataset_share, task)


def _webdataset_share(task: Writing, number: int, share: Sequence[Entry]) -> None:
    import webdataset

    pattern = f"{task.output}/{number:02d}-%06d.tar"
    with webdataset.ShardWriter(pattern, maxcount=task.shard_size, verbose=0) as sink:
        for name, label in share:
            sink.write({"__key__": key_of(name), task.encoding: _stored(task, name), "cls": label})


def _read_webdataset(folder: str, encoding: str) -> Iterator[tuple[str, int, Any]]:
    import webdataset

    shards = sorted(str(p) for p in Path(folder).glob("*.tar"))
    dataset = webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8")
    for sample in dataset:
        yield sample["__key__"], sample["cls"], sample[encoding]


def _webdataset_loader(
    url: str, cache: str, encoding: str, codec: str, batch: int, workers: int
) -> Callable[[], Iterable[tuple[Any, Any]]]:
    import fsspec
    import webdataset

    remote = url.startswith("s3://")
    if remote:  # webdataset has no opener for s3://

        def opened(url: str, mode: str = "rb", bufsize: int = 8192, **_: Any) -> Any:
            return fsspec.open(url, mode).open()

        sys.modules["webdataset.gopen"].gopen_schemes["s3"] = opened
    names = fsspec.open(url).fs.ls(url, detail=False)
    shards = sorted(f"s3://{name}" if remote else name for name in names if name.endswith(".tar"))
    decoders = ["torchrgb8"] if codec == "own" else [webdataset.handle_extension("png", _planes)]
    dataset = (
        webdataset.WebDataset(shards, shardshuffle=100, cache_dir=cache if remote else None)
        .shuffle(_SHUFFLED)
        .decode(*decoders)
        .to_tuple(encoding, "cls")
        .map_tuple(torch_from, _same)
        .batched(batch)
    )
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=True)
    return lambda: loader


def _write_litdata(task: Writing) -> None:
    import litdata

    litdata.optimize(
        fn=functools.partial(_litdata_sample, task),
        inputs=entries(task.source),
        output_dir=task.output,
        num_workers=task.processes,
        chunk_bytes="64MB",
        verbose=False,
    )


def _litdata_sample(task: Writing, entry: Entry) -> dict[str, Any]:
    import litdata

    name, label = entry
    image = _stored(task, name)
    if task.codec == "own" and task.encoding == "png":
        image = litdata.Image(image=image, format="PNG")
    return {"image": image, "label": label, "name": key_of(name)}


def _read_litdata(folder: str, encoding: str) -> Iterator[tuple[str, int, Any]]:
    import litdata

    for sample in litdata.StreamingDataset(folder):
        yield sample["name"], sample["label"], sample["image"]


def _litdata_loader(
    url: str, cache: str, encoding: str, codec: str, batch: int, workers: int
) -> Callable[[], Iterable[tuple[Any, Any]]]:
    import litdata

    options: dict[str, Any] = {}
    if url.startswith("s3://"):
        names = {"endpoint_url": "AWS_ENDPOINT_URL", "region_name": "AWS_DEFAULT_REGION"}
        names |= {"aws_access_key_id": "AWS_ACCESS_KEY_ID", "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY"}
        from litdata.streaming import downloader

        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # it has no setting for a server without TLS
        options = {"cache_dir": cache, "storage_options": {name: os.environ[value] for name, value in names.items()}}
    dataset = litdata.StreamingDataset(url, shuffle=True, drop_last=False, transform=_sample, **options)
    loader = litdata.StreamingDataLoader(dataset, batch_size=batch, num_workers=workers, persistent_workers=True)
    return lambda: loader


def _write_mosaicml(task: Writing) -> None:
    from streaming.base.util import merge_index

    _in_pool(_mosaicml_share, task)
    merge_index(task.output, keep_local=True)


def _mosaicml_share(task: Writing, number: int, share: Sequence[Entry]) -> None:
    import streaming

    side = task.resolution
    kinds = {("png", "own"): "png", ("png", "ours"): "bytes", ("npy", "own"): f"ndarray:uint8:3,{side},{side}"}
    columns = {"image": kinds[task.encoding, task.codec], "label": "int", "name": "str"}
    with streaming.MDSWriter(out=f"{task.output}/{number:02d}", columns=columns) as sink:
        for name, label in share:
            sink.write({"image": _stored(task, name), "label": label, "name": key_of(name)})


def _read_mosaicml(folder: str, encoding: str) -> Iterator[tuple[str, int, Any]]:
    import streaming

    for sample in streaming.LocalDataset(folder):
        yield sample["name"], sample["label"], sample["image"]


def _mosaicml_loader(
    url: str, cache: str, encoding: str, codec: str, batch: int, workers: int
) -> Callable[[], Iterable[tuple[Any, Any]]]:
    import streaming
    from torch.utils.data import DataLoader

    where = {"local": url}
    if url.startswith("s3://"):
        os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]
        where = {"remote": url, "local": cache}
    dataset = streaming.StreamingDataset(**where, shuffle=True, batch_size=batch)
    loader: Any = DataLoader(
        dataset, batch_size=batch, num_workers=workers, persistent_workers=True, collate_fn=_collated
    )
    return lambda: loader


def _collated(samples: list[dict[str, Any]]) -> Any:
    from torch.utils.data import default_collate

    return default_collate([_sample(stored) for stored in samples])


def _sample(stored: dict[str, Any]) -> tuple[Any, int]:
    """Return the pixels, uint8 (3, H, W), and the class of a sample of LitData or MosaicML."""
    image = stored["image"]
    if isinstance(image, (bytes, memoryview)):
        image = _planes(image)
    elif isinstance(image, Image.Image):
        image = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
    return torch_from(image), stored["label"]


def _planes(png: bytes | memoryview) -> Pixels:
    return np.ascontiguousarray(decode_png(png).transpose(2, 0, 1))


def torch_from(image: Any) -> Any:
    """Return the tensor of an array; a tensor is returned unchanged."""
    import torch

    if isinstance(image, torch.Tensor):
        return image
    return torch.from_numpy(image if image.flags.writeable else image.copy())


def _same(thing: Any) -> Any:
    return thing


def main() -> None:
    """Run the task in the arguments and print its result as JSON on the last line."""
    task = json.loads(sys.argv[1])
    what = task.pop("do")
    if what == "write":
        write(Writing(**task))
        print("\nnull")
    elif what == "read":
        found = {name: [label, digest(pixels)] for name, label, pixels in read_back(**task)}
        print("\n" + json.dumps(found))
    elif what == "versions":
        print(json.dumps(versions(*PACKAGES.values(), "torch", "numpy")))


if __name__ == "__main__":
    main()
