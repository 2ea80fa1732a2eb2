"""An exported flow as an MLflow model: its MLmodel file, and the function that maps uint8 images to bits per dimension.

The model carries no code and nothing pickled: MLflow calls this module of the installed eiwtrain with the model's
folder, whose weights are stored once. Not for the registry, nor for samples (`eiwtrain.sample`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eiwtrain import __version__
from eiwtrain.flow import EIWFlow, bits_per_dim, load, not_finite

MLMODEL = "MLmodel"
"""The file by which MLflow knows a folder as a model."""

_BATCH = 64  # images at once


def package(folder: Path, model: EIWFlow, examples: npt.NDArray[np.uint8], metadata: dict[str, Any]) -> None:
    """Make the new folder a model for MLflow, except for the weights.

    Args:
        examples: images for the input example, uint8 (n, H, W, C).
        metadata: JSON data that MLflow shows with the model.
    """
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    logging.getLogger("mlflow").setLevel(logging.ERROR)  # after the import, which sets a level of its own
    params = [ParamSpec("draws", DataType.long, 1), ParamSpec("seed", DataType.long, 0)]
    example: Any = examples
    if model.config.classes:
        params.append(ParamSpec("labels", DataType.long, [], shape=(-1,)))
        example = examples, {"labels": [i % model.config.classes for i in range(len(examples))]}
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, *examples.shape[1:]))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1,))]),
        params=ParamSchema(params),
    )
    others = [f"{name}=={_version(name)}" for name in ("mlflow", "numpy", "safetensors", "torch")]
    mlflow.pyfunc.save_model(
        folder,
        loader_module="eiwtrain.exporting.pyfunc",
        signature=signature,
        input_example=example,
        pip_requirements=[f"eiwtrain=={__version__}", *others],
        metadata=metadata,
    )


def note_size(folder: Path) -> None:
    """Write the size of all files of the folder into MLmodel, for MLflow to show."""
    from mlflow.models import Model

    described = Model.load(str(folder / MLMODEL))
    described.model_size_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    described.save(str(folder / MLMODEL))


class Scorer:
    """The model that `mlflow.pyfunc.load_model` wraps."""

    def __init__(self, flow: EIWFlow) -> None:
        self.flow = flow

    def predict(self, images: Any, params: dict[str, Any] | None = None) -> npt.NDArray[np.float32]:
        """Return the bits per dimension of each image, float32 (n,): what the model needs to code it.

        Lower is likelier. The dequantization noise of an image comes from `seed` and its own pixels, so that it scores
        the same, up to rounding, at any place of any batch. The program's setting of TensorFloat-32 stays as it was.

        Args:
            images: uint8 (n, H, W, C).
            params: `draws` of noise an image (1; more give the tighter importance-weighted bound), the `seed` of the
                noise (0), and of a class-conditional model `labels`, a class for each image.

        Raises:
            ValueError: for images of another type or shape, no draws, labels that are missing or out of range.
        """
        pixels, params = self._checked(images), params or {}
        draws, seed = int(params.get("draws", 1)), int(params.get("seed", 0))
        if draws < 1:
            raise ValueError(f"draws: {draws}; give at least 1")
        labels = self._labels(params.get("labels"), len(pixels))
        config, device = self.flow.config, next(self.flow.parameters()).device
        scores = [np.empty(0, np.float32)]
        # cuDNN's default rounds float32 to TensorFloat-32
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            for start in range(0, len(pixels), _BATCH):
                some = pixels[start : start + _BATCH]
                batch = torch.from_numpy(np.ascontiguousarray(some.transpose(0, 3, 1, 2))).to(device)
                of_batch = None if labels is None else labels[start : start + _BATCH].to(device)
                bound = self.flow.iwbo(batch, _noises(some, config.noise_shape, draws, seed, device), of_batch)
                scores.append(bits_per_dim(bound, config.dims, config.n_bits).float().cpu().numpy())
        return np.concatenate(scores)

    def _checked(self, images: Any) -> npt.NDArray[np.uint8]:
        channels, height, width = self.flow.config.image_shape
        array = np.asarray(images)
        if array.dtype != np.uint8 or array.shape[1:] != (height, width, channels):
            raise ValueError(
                f"images of type {array.dtype} and shape {array.shape}; the model takes uint8 "
                f"(n, {height}, {width}, {channels})"
            )
        return array

    def _labels(self, given: Any, n: int) -> Tensor | None:
        classes = self.flow.config.classes
        if not classes:
            return None
        labels = torch.as_tensor([] if given is None else given, dtype=torch.int64)
        if labels.shape != (n,) or bool(((labels < 0) | (labels >= classes)).any()):
            raise ValueError(f"labels: the model takes a class from 0 to {classes - 1} for each of {n} images")
        return labels


def _load_pyfunc(path: str) -> Scorer:
    """Load the model from its folder, for MLflow."""
    device = os.environ.get("MLFLOW_DEFAULT_PREDICTION_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load(path)
    if bad := not_finite(model):
        raise ValueError(f"{path}: {bad}")
    _keep_mlflow_from_rounding()
    return Scorer(model.to(device))


def _keep_mlflow_from_rounding() -> None:
    """Have MLflow refuse numbers that are no pixels: it casts what a request or a table holds to the type of the model,
    before `predict` sees it, so that an image of values from 0 to 1 would be black."""
    from mlflow.models import utils
    from mlflow.utils import proto_json_utils as requests

    if getattr(requests.convert_data_type, "checks_pixels", False):
        return
    convert, reshape = requests.convert_data_type, utils._reshape_and_cast_pandas_column_values

    def check(values: Any, spec: Any) -> None:
        if getattr(spec, "type", None) == np.dtype(np.uint8):
            numbers = np.asarray(values)
            fine = numbers.dtype.kind in "iuf" and np.equal(np.clip(np.trunc(numbers), 0, 255), numbers).all()
            if not fine:
                raise requests.MlflowInvalidInputException("pixels are whole numbers from 0 to 255")

    def convert_checked(data: Any, spec: Any) -> Any:
        check(data, spec)
        return convert(data, spec)

    def reshape_checked(name: Any, column: Any, spec: Any) -> Any:
        check(column.tolist(), spec)
        return reshape(name, column, spec)

    convert_checked.checks_pixels = True  # type: ignore[attr-defined]
    requests.convert_data_type, utils._reshape_and_cast_pandas_column_values = convert_checked, reshape_checked


def _noises(
    images: npt.NDArray[np.uint8], shape: tuple[int, ...], draws: int, seed: int, device: torch.device
) -> Iterator[Tensor]:
    """Yield, `draws` times, uniform noise in [0, 1) for images (n, H, W, C): float32 (n, *shape)."""
    digests = [hashlib.sha256(np.ascontiguousarray(image).data) for image in images]
    generator = torch.Generator()
    for draw in range(draws):
        noise = torch.empty(len(images), *shape)
        for row, digest in zip(noise, digests, strict=True):
            own = digest.copy()
            own.update(f"{seed} {draw}".encode())
            generator.manual_seed(int.from_bytes(own.digest()[:8], "big", signed=True))
            torch.rand(row.shape, generator=generator, out=row)
        yield noise.to(device)


def _version(name: str) -> str:
    """Return the version in use, without the build that it came from (2.13.0+cpu), which a registry may not have."""
    return importlib.metadata.version(name).partition("+")[0]
