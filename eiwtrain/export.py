"""From a checkpoint to a model folder that loads with torch and safetensors alone: `eiwtrain.flow.load(folder)`.

python -m eiwtrain.export best --run runs/quickstart --output exported
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from eiwtrain import checkpoint, flow, models, storage


def export(model: flow.EIWFlow, url: str, metadata: dict[str, Any]) -> None:
    """Publish the model at a folder or URL; `metadata` (JSON data) goes into its config.json."""
    with tempfile.TemporaryDirectory() as folder:
        flow.save(model, folder, metadata)
        for file in sorted(Path(folder).iterdir(), reverse=True):  # weights before the config that names them
            storage.put_file(file, storage.join(url, file.name))


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m eiwtrain.export", description="Export a checkpoint as a model.")
    parser.add_argument("which", help="best, last or a step")
    parser.add_argument("--run", required=True, help="folder or URL of the run: storage/name")
    parser.add_argument("--output", required=True, help="folder or URL to write")
    args = parser.parse_args(argv)
    try:
        saved = models.choose(args.which, args.run)
        model = models.of_checkpoint(saved)
        export(model.flow, args.output, model.metadata)
    except (ValueError, OSError, storage.StorageError, checkpoint.DamagedCheckpoint) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(f"step {saved.step} -> {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
