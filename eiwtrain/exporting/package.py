"""An exported model in the form that MLflow loads and serves: signature, input example, requirements, code.

Nothing in it is pickled, and the weights are stored once: MLflow gives the loader (`eiwtrain.exporting.pyfunc`) the
model's folder itself. The loader and the flow travel as a package that is named after its content, so that it needs no
eiwtrain, hides none, and models of different versions load in one process. Not for the registry.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eiwtrain import flow
from eiwtrain.exporting import pyfunc

MLMODEL = "MLmodel"
"""The file without which a folder is no model for MLflow."""


def package(folder: Path, model: flow.EIWFlow, examples: npt.NDArray[np.uint8], metadata: dict[str, Any]) -> None:
    """Make the new folder a model for MLflow, but for the weights.

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
    with tempfile.TemporaryDirectory() as scratch:
        code = _code(Path(scratch))
        mlflow.pyfunc.save_model(
            folder,
            loader_module=f"{code.name}.exporting.pyfunc",
            code_paths=[str(code)],
            signature=signature,
            input_example=example,
            pip_requirements=[f"{name}=={_version(name)}" for name in ("mlflow", "numpy", "safetensors", "torch")],
            metadata=metadata,
        )


def note_size(folder: Path) -> None:
    """Have MLmodel say the size of all that is in the folder, as MLflow shows it."""
    from mlflow.models import Model

    described = Model.load(str(folder / MLMODEL))
    described.model_size_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    described.save(str(folder / MLMODEL))


def _code(scratch: Path) -> Path:
    """A package of the loader and a copy of the flow."""
    made = scratch / "code"
    home = Path(flow.__file__).parent
    shutil.copytree(home, made / home.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    (made / "exporting").mkdir()
    (made / "exporting" / "__init__.py").touch()
    shutil.copy(pyfunc.__file__, made / "exporting")
    (made / "__init__.py").write_text('"""The flow of this model, and how MLflow calls it. From eiwtrain."""\n')
    digest = hashlib.sha256()
    for file in sorted(made.rglob("*.py")):
        digest.update(f"{file.relative_to(made)}\0".encode() + file.read_bytes() + b"\0")
    return made.rename(scratch / f"eiwtrain_model_{digest.hexdigest()[:12]}")


def _version(name: str) -> str:
    """As in use, without the build that it came from (2.13.0+cpu), which a registry may not have."""
    return importlib.metadata.version(name).partition("+")[0]
