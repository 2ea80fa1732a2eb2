"""From a checkpoint to a model folder that loads with torch and safetensors alone: `eiwtrain.flow.load(folder)`.

python -m eiwtrain.export best --run runs/quickstart --output exported
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from eiwtrain import checkpoint, flow, storage


def export(model: flow.EIWFlow, url: str, metadata: dict[str, Any]) -> None:
    """Publish the model at a folder or URL; `metadata` (JSON data) goes into its config.json."""
    with tempfile.TemporaryDirectory() as folder:
        flow.save(model, folder, metadata)
        for file in sorted(Path(folder).iterdir(), reverse=True):  # weights before the config that names them
            storage.put_file(file, storage.join(url, file.name))


def choose(which: str, root: str) -> checkpoint.Checkpoint:
    """The newest checkpoint (`last`), the best by held-out bits/dim (`best`), or that of a step.

    Raises:
        ValueError: there is none.
    """
    found = checkpoint.committed(root)
    if which == "best":
        found = [b] if (b := checkpoint.best(found)) else []
    elif which != "last":
        found = [c for c in found if str(c.step) == which]
    if not found:
        there, unreadable = checkpoint.survey(root)
        bad = "; ".join(u.why for u in unreadable)
        raise ValueError(
            f"{root}: no checkpoint {which!r}; committed: {[c.step for c in there]}" + (bad and f"; {bad}")
        )
    return found[0]


def model_of(saved: checkpoint.Checkpoint) -> flow.EIWFlow:
    """The averaged weights of a checkpoint as a model, in eval mode on CPU."""
    model = flow.EIWFlow(flow.FlowConfig.from_dict(saved.state["flow"]))
    model.load_state_dict(checkpoint.section(checkpoint.load(saved), "ema"))
    return model.eval()


def metadata_of(saved: checkpoint.Checkpoint) -> dict[str, Any]:
    """What an exported model says of its origin."""
    keys = ("data", "data_fingerprint", "eval_bits_per_dim")
    return {"step": saved.step, "samples_seen": saved.samples_seen} | {k: saved.state.get(k) for k in keys}


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m eiwtrain.export", description="Export a checkpoint as a model.")
    parser.add_argument("which", help="best, last or a step")
    parser.add_argument("--run", required=True, help="folder or URL of the run: storage/name")
    parser.add_argument("--output", required=True, help="folder or URL to write")
    args = parser.parse_args(argv)
    try:
        saved = choose(args.which, args.run)
        export(model_of(saved), args.output, metadata_of(saved))
    except (ValueError, OSError, storage.StorageError, checkpoint.DamagedCheckpoint) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(f"step {saved.step} -> {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
