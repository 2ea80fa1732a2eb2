"""Writes what a run leaves after its last step: sample grid, exported model, summary. Rank 0 alone does it.

Not for what is written during training: that is `eiwtrain.train.keeper` and `eiwtrain.train.held_out`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict

import torch.distributed as dist

from eiwtrain import storage
from eiwtrain.exporting import assemble, models
from eiwtrain.on_ray.messages import Summary
from eiwtrain.sampling import pictures
from eiwtrain.scoring.estimator import estimator_of
from eiwtrain.scoring.published import Published, Scored, comparable
from eiwtrain.scoring.scores import Score
from eiwtrain.scoring.yardsticks import Yardsticks
from eiwtrain.storage.lease import Guard
from eiwtrain.tracking import TrackedRun, Tracker, TrackingError
from eiwtrain.train import goodput
from eiwtrain.train.goodput import Clock
from eiwtrain.train.held_out import HeldOut

METRICS = "metrics.jsonl"
"""File under the run's root that holds its curves (`eiwtrain.tracking.journal`)."""


def finish(
    held_out: HeldOut,
    score: Score,
    clock: Clock,
    tracked: TrackedRun,
    tracker: Tracker,
    guard: Guard,
    may_continue: Callable[[str], bool],
) -> Summary | None:
    """Draw samples, export the model, write `summary.json` under the run's root, and return the summary; None as soon
    as the run may not continue.

    Args:
        guard: is asked before each of the three is written; raises LeaseLost.
        may_continue: returns whether to continue; called before each, with the name of what comes next.
    """
    config, state = held_out.config, held_out.state
    root = config.root
    assert state.newest is not None
    samples, model = storage.join(root, "samples.png"), storage.join(root, "model")
    if not may_continue("drawing samples"):
        return None
    guard.check()
    storage.write_bytes(samples, pictures.png(held_out.overview()))
    if not may_continue("the export"):
        return None
    guard.check()
    coders = Yardsticks(held_out.yardstick_images, held_out.yardsticks)
    facts = models.metadata_of(state.newest), state.manifest, coders
    registered = None
    with assemble.assembled(state.averaged, *facts) as folder:
        assemble.publish(folder, model)
        if (name := config.tracking.registered_model) is not None:
            if not may_continue("registering the model"):
                return None
            guard.check()
            try:
                registered = str(assemble.register(folder, name, root, state.newest, tracked, state.averaged))
            except (TrackingError, storage.StorageError) as e:
                again = f"python -m eiwtrain.export {state.step} --run {root} --register '{name}'"
                registered = f"not registered: {e}; to do so: {again}"
    summary = _summary(held_out, score, clock, samples, model, registered, tracked.run_id)
    if not may_continue("the summary"):
        return None
    guard.check()
    storage.write_bytes(storage.join(root, "summary.json"), content_of(summary))
    tracker.tags({"exported_model": model})
    return summary


def _summary(
    held_out: HeldOut, score: Score, clock: Clock, samples: str, model: str, registered: str | None, run_id: str
) -> Summary:
    """Return the figures of the run.

    Args:
        samples, model: URLs of the sample grid and of the exported model.
        registered: where the Model Registry has the model, or why it has not; None if it should not.
        run_id: of the run in MLflow.
    """
    config, state = held_out.config, held_out.state
    assert state.newest is not None
    priced = config.workers.price_per_hour is not None
    return Summary(
        data=state.manifest.title,
        steps=state.step,
        images=state.samples_seen,
        test_bits_per_dim=score.bits_per_dim,
        test_estimator=estimator_of(state.flow.config),
        test_standard_error=score.standard_error,
        test_images=score.images,
        published=_published(held_out, score.images),
        png_bits_per_dim=held_out.yardsticks["png"],
        webp_bits_per_dim=held_out.yardsticks["webp"],
        yardstick_images=held_out.yardstick_images,
        images_per_second=state.samples_seen / max(1e-9, clock.seconds("productive") + clock.seconds("data_wait")),
        goodput=clock.goodput,
        goodput_shares=clock.shares(),
        goodput_line=goodput.describe(clock),
        wall_seconds=clock.wall,
        cost=clock.cost if priced else None,
        cost_wasted=clock.wasted if priced else None,
        cost_line=goodput.describe_cost(clock) if priced else None,
        skipped_steps=state.skipped,
        drift=held_out.drift(),
        workers=dist.get_world_size(),
        metrics=storage.join(config.root, METRICS),
        samples=samples,
        exported_model=model,
        registered=registered,
        checkpoint=state.newest.url,
        mlflow_run_id=run_id,
    )


def _published(held_out: HeldOut, images: int) -> Published:
    """Return the published figures that the run's held-out score can be compared with."""
    manifest, of_data, model = held_out.state.manifest, held_out.config.data, held_out.state.flow.config
    trained_on = manifest.fingerprint, of_data.train_split
    scored = Scored(manifest, of_data.eval_split, images, trained_on, model.n_bits, model.classes)
    return comparable(scored, [estimator_of(model).name])


def content_of(summary: Summary) -> bytes:
    """Return the content of `summary.json`, with null for numbers that are not finite."""
    return json.dumps(storage.without_nan(asdict(summary)), indent=1, allow_nan=False).encode()
