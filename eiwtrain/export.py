"""From a checkpoint to a model folder that loads with torch and safetensors alone: `eiwtrain.flow.load(folder)`.

    python -m eiwtrain.export best --run runs/quickstart --output exported

The same folder is a model that MLflow loads and serves (`eiwtrain.exporting.pyfunc`), laid out as Hugging Face's hub
takes it. Registering it is the business of `eiwtrain.exporting.registry`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eiwtrain import checkpoints, data, flow, storage
from eiwtrain.checkpoints import Checkpoint
from eiwtrain.data.manifest import Manifest
from eiwtrain.exporting import models, onnx, registry
from eiwtrain.exporting.assemble import assembled, name_of, place, publish
from eiwtrain.exporting.models import Model
from eiwtrain.scoring.yardsticks import Yardsticks
from eiwtrain.terminal.lines import one_line
from eiwtrain.terminal.redact import REFUSAL, holds_secret
from eiwtrain.tracking import TrackingError


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        if args.register is not None:
            registry.check_name(args.register)
        if args.tracking_uri and holds_secret(args.tracking_uri):
            raise ValueError(f"--tracking-uri: {REFUSAL}")
        root = _root(args.run, args.storage)
        saved = models.choose(args.which, root)
        output = args.output or place(root, saved)
        _refuse_another_model(output, saved)
        model = models.of_checkpoint(saved)
        if args.onnx:
            onnx.check(model.flow)
        facts = model.metadata, _manifest(saved), _yardsticks(root, saved)
        with assembled(model.flow, *facts, with_onnx=args.onnx) as folder:
            publish(folder, output)
            print(f"step {saved.step:,} -> {output}")
            return 0 if args.no_register else _register(args, root, saved, model, folder, output)
    except (ValueError, OSError, storage.StorageError, checkpoints.DamagedCheckpoint) as e:
        print(f"error: {one_line(e, limit=None)}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eiwtrain.export", description="Export a checkpoint as a model.")
    parser.add_argument("which", help="best, last or a step")
    parser.add_argument("--run", required=True, help="folder or URL of the run, or its name under --storage")
    parser.add_argument("--storage", default="runs", help="where a run lies that is given by its name (runs)")
    parser.add_argument("--output", help="folder or URL to write (exported/CHECKPOINT under the run's)")
    parser.add_argument("--onnx", action="store_true", help="also write the encoder as encode.onnx (takes minutes)")
    registering = parser.add_mutually_exclusive_group()
    registering.add_argument("--register", metavar="NAME", help="in MLflow's Model Registry (the run's name)")
    registering.add_argument("--no-register", action="store_true", help="leave the Model Registry alone")
    parser.add_argument("--tracking-uri", help="of MLflow (MLFLOW_TRACKING_URI, or where the run was recorded)")
    return parser


def _root(run: str, under: str) -> str:
    """The run's root: a bare name that is no folder here is one of `under`."""
    bare = "/" not in run and not Path(run).is_dir()
    return storage.join(under, run) if bare else run.rstrip("/")


def _refuse_another_model(output: str, saved: Checkpoint) -> None:
    """Raises ValueError where there is anything but an export of this checkpoint: a registered version may refer to
    another model, and other files are the user's."""
    if not storage.listdir(output):
        return
    try:
        there = json.loads(storage.read_bytes(storage.join(output, flow.CONFIG_FILE)))["metadata"].get("checkpoint")
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"--output: {output} is not empty; name another folder") from None
    if there != name_of(saved):
        raise ValueError(f"--output: {output} holds another model; name another folder, or delete it first")


def _manifest(saved: Checkpoint) -> Manifest | None:
    """Of the data set of a checkpoint, if it is still there and the same."""
    try:
        manifest = data.load_manifest(saved.state["config"]["data"]["path"])
    except (data.DataError, storage.StorageError, OSError):
        return None
    return manifest if manifest.fingerprint == saved.state["data_fingerprint"] else None


def _yardsticks(root: str, saved: Checkpoint) -> Yardsticks | None:
    """As the run's summary has them, if it has one and it is of the same images as the score."""
    try:
        summary = json.loads(storage.read_bytes(storage.join(root, "summary.json")))
        if summary["test_images"] == (saved.state["score"] or {}).get("images"):
            bits = {coder: float(summary[f"{coder}_bits_per_dim"]) for coder in ("png", "webp")}
            return Yardsticks(int(summary["yardstick_images"]), bits)
    except (OSError, ValueError, KeyError, TypeError, storage.StorageError):
        pass
    return None


def _register(args: argparse.Namespace, root: str, saved: Checkpoint, model: Model, folder: Path, output: str) -> int:
    config = saved.state["config"]
    name = args.register or config["tracking"].get("registered_model") or config["run"]["name"]
    try:
        uri = args.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or _store(root, config)
        run_id = saved.state.get("mlflow_run_id")
        print(registry.register(name, folder, output, uri, run_id, model.flow, model.metadata))
    except (TrackingError, storage.StorageError) as e:
        again = ["python", "-m", "eiwtrain.export", str(saved.step), "--run", root, "--output", output]
        again += ["--register", name] + (["--tracking-uri", args.tracking_uri] if args.tracking_uri else [])
        print(f"not registered: {e}; to do so: {shlex.join(again)}", file=sys.stderr)
        return 1
    return 0


def _store(root: str, config: Mapping[str, Any]) -> str:
    """The MLflow in which a run was recorded.

    Raises:
        TrackingError: that is a database beside the run, which is not there any more.
    """
    if config["tracking"]["uri"]:
        return str(config["tracking"]["uri"])
    database = Path(storage.absolute(root)).parent / "mlflow.db"
    if not storage.is_local(root) or not database.is_file():
        raise TrackingError(f"{database if storage.is_local(root) else root}: no MLflow there; give --tracking-uri")
    return f"sqlite:///{database}"


if __name__ == "__main__":
    sys.exit(main())
