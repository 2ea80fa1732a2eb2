"""Export a checkpoint as a model folder that loads with torch and safetensors alone: `eiwtrain.flow.load(folder)`.

    python -m eiwtrain.export best --run runs/quickstart --output exported

The same folder is a model that MLflow loads and serves (`eiwtrain.exporting.pyfunc`), laid out as Hugging Face's hub
takes it. `eiwtrain.exporting.assemble` writes it, and `eiwtrain.exporting.registry` registers it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from eiwtrain import storage
from eiwtrain.checkpoints import Checkpoint
from eiwtrain.exporting import models
from eiwtrain.exporting.command import root_of, run_command
from eiwtrain.exporting.models import LoadedModel
from eiwtrain.terminal.output import protect
from eiwtrain.terminal.redact import REFUSAL, holds_secret
from eiwtrain.tracking import TrackingError


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit code."""
    return run_command(_export, _parser().parse_args(argv))


def _export(args: argparse.Namespace) -> int:
    # not earlier: torch takes a second, which `--help` need not
    from eiwtrain.exporting import assemble, onnx, registry

    if args.register is not None:
        registry.check_name(args.register)
    if args.tracking_uri and holds_secret(args.tracking_uri):
        raise ValueError(f"--tracking-uri: {REFUSAL}")
    root = root_of(args.run, args.storage)
    saved = models.choose(args.which, root)
    output = args.output or assemble.place(root, saved)
    with models.about_option("output"):
        assemble.check_place(output, saved, args.overwrite)
    model = models.of_checkpoint(saved)
    if args.onnx:
        onnx.check(model.flow)
    facts = model.metadata, assemble.manifest_of(saved), assemble.yardsticks_of(root, saved)
    with assemble.assembled(model.flow, *facts, with_onnx=args.onnx) as folder:
        assemble.publish(folder, output)
        print(f"step {saved.step:,} -> {output}")
        return 0 if args.no_register else _register(args, root, saved, model, folder, output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eiwtrain.export", description="Export a checkpoint as a model.")
    parser.add_argument("which", help="best, last or a step")
    parser.add_argument("--run", required=True, help="folder or URL of the run, or its name under --storage")
    parser.add_argument("--storage", default="runs", help="where runs are that are given by name (runs)")
    parser.add_argument("--output", help="folder or URL to write (exported/CHECKPOINT under the run's)")
    parser.add_argument("--overwrite", action="store_true", help="replace an export of the same checkpoint")
    parser.add_argument("--onnx", action="store_true", help="also write the encoder as encode.onnx (takes minutes)")
    registering = parser.add_mutually_exclusive_group()
    registering.add_argument("--register", metavar="NAME", help="name in MLflow's Model Registry (the run's name)")
    registering.add_argument("--no-register", action="store_true", help="leave the Model Registry alone")
    parser.add_argument("--tracking-uri", help="URI of MLflow (MLFLOW_TRACKING_URI, or where the run was recorded)")
    return parser


def _register(
    args: argparse.Namespace, root: str, saved: Checkpoint, model: LoadedModel, folder: Path, output: str
) -> int:
    from eiwtrain.exporting import registry

    config = saved.state["config"]
    name = args.register or config["tracking"].get("registered_model") or config["run"]["name"]
    try:
        uri = args.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or registry.store_of(root, config)
        run_id = saved.state.get("mlflow_run_id")
        print(registry.register(name, folder, output, uri, run_id, model.flow, model.metadata))
    except (TrackingError, storage.StorageError) as e:
        again = ["python", "-m", "eiwtrain.export", str(saved.step), "--run", root, "--output", output]
        again += ["--overwrite", "--register", name] + (
            ["--tracking-uri", args.tracking_uri] if args.tracking_uri else []
        )
        print(f"not registered: {e}; to do so: {shlex.join(again)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    protect()
    sys.exit(main())
