"""What a run that has made its last step leaves: sample grid, exported model, summary. Rank 0 alone does it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from PIL.Image import Image

from eiwtrain import export, goodput, models, storage
from eiwtrain.evaluate import Score
from eiwtrain.goodput import Clock
from eiwtrain.held_out import HeldOut
from eiwtrain.tracking import TrackedRun, Tracker


def finish(
    held_out: HeldOut,
    score: Score,
    clock: Clock,
    tracked: TrackedRun,
    tracker: Tracker,
    may_go_on: Callable[[str], bool],
) -> dict[str, Any] | None:
    """Draw, export and sum up; returns what `summary.json` under the run's root holds, or None if it may not go on.

    Args:
        may_go_on: asked before each thing is written, and told what comes next.
    """
    config, state = held_out.config, held_out.state
    root = config.root
    assert state.newest is not None
    coders = held_out.yardsticks(score.images)
    samples, model = storage.join(root, "samples.png"), storage.join(root, "model")
    if not may_go_on("drawing samples"):
        return None
    storage.write_bytes(samples, _png(held_out.overview()))
    if not may_go_on("the export"):
        return None
    export.export(state.averaged, model, models.metadata_of(state.newest))
    summary = {
        "data": state.manifest.title,
        "steps": state.step,
        "images": state.samples_seen,
        "test_bits_per_dim": score.bits_per_dim,
        "test_standard_error": score.standard_error,
        "test_images": score.images,
        "png_bits_per_dim": coders["png"],
        "webp_bits_per_dim": coders["webp"],
        "images_per_second": state.samples_seen / max(1e-9, clock.seconds("productive") + clock.seconds("data_wait")),
        "goodput": clock.goodput,
        "goodput_shares": clock.shares(),
        "goodput_line": goodput.describe(clock),
        "wall_seconds": clock.wall,
        "skipped_steps": state.skipped,
        "drift": held_out.drift(),
        "workers": dist.get_world_size(),
        "samples": samples,
        "exported_model": model,
        "checkpoint": state.newest.url,
        "mlflow_run_id": tracked.run_id,
    }
    if not may_go_on("the summary"):
        return None
    storage.write_bytes(storage.join(root, "summary.json"), json.dumps(summary, indent=1).encode())
    tracker.metrics(state.step, {f"eval/{coder}_bits_per_dim": bits for coder, bits in coders.items()})
    tracker.tags({"exported_model": model})
    return summary


def _png(image: Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
