"""Names of all curves that a run logs, each with its meaning; docs/mlflow.md lists the same. Not for their values.

MLflow's UI groups curves by the part before the slash. Braces stand for a part that `str.format` fills in.
"""

from __future__ import annotations

MEANINGS: dict[str, str] = {}
"""The meaning of every curve, by its name."""


def _curve(name: str, meaning: str) -> str:
    MEANINGS[name] = meaning
    return name


BITS_PER_DIM = _curve("train/bits_per_dim", "mean over the step's global batch: ELBO, one draw of all noise an image")
GRAD_NORM = _curve("train/grad_norm", "gradient norm before clipping")
LR = _curve("train/lr", "learning rate")
EPOCH = _curve("train/epoch", "how often each training image has been seen")
SKIPPED_STEPS = _curve("train/skipped_steps", "steps so far whose loss or gradient was not finite")

HELD_OUT_BITS_PER_DIM = _curve(
    "eval/bits_per_dim", "held-out score of the averaged weights: ELBO, one draw of all noise an image"
)
HELD_OUT_ERROR = _curve("eval/standard_error", "standard error of that score over images")
CODER_BITS_PER_DIM = {
    "png": _curve("eval/png_bits_per_dim", "PNG on the first of these images, at most 2^19 pixels together"),
    "webp": _curve("eval/webp_bits_per_dim", "lossless WebP on the same images"),
}
"""Curve of each lossless coder."""

IMAGES_PER_SECOND = _curve("time/images_per_second", "over all workers, in the time of steps")
WORKERS = _curve("time/workers", "workers of the attempt")
DATA_WAIT = _curve("time/data_wait", "share of that time spent waiting for data")
GOODPUT = _curve("time/goodput", "share of wall time in steps that count")
LOST_TIME = {
    "startup": _curve("time/lost/startup", "share of wall time before the first step of each attempt"),
    "data_wait": _curve("time/lost/data_wait", "share of wall time spent waiting for data"),
    "checkpoint": _curve("time/lost/checkpoint", "share of wall time in which training waited for checkpoints"),
    "evaluation": _curve("time/lost/evaluation", "share of wall time in evaluations"),
    "lost": _curve("time/lost/work", "share of wall time in steps that were lost and run again"),
    "other": _curve("time/lost/other", "share of wall time in everything else"),
}
"""Curve of each kind of time (`eiwtrain.train.goodput.Kind`) that is not productive."""
STORAGE_FAULTS = _curve("time/storage_faults", "storage failures so far that a retry overcame")
CHECKPOINT_SECONDS = _curve("time/checkpoint_seconds", "seconds in which a checkpoint was written")
CHECKPOINT_STALL = _curve("time/checkpoint_stall_seconds", "seconds for which training waited for it")

COST = _curve("cost/spent", "what the run has cost so far, over all attempts, by `workers.price_per_hour`")
COST_AT_END = _curve("cost/at_end", "what it will have cost at its last step, at the present speed and workers")
COST_WASTED = _curve("cost/wasted", "the part of it for start-up, waiting for data and checkpoints, and lost work")

RANK_COMPUTE = _curve(
    "speed/compute_{rank}", "seconds a step that a rank computes before it waits for others: slowest, median, fastest"
)
RANK_DATA = _curve("speed/data_{rank}", "seconds a step that a rank waits for its data: slowest, median, fastest")
NODE_COMPUTE = _curve("speed/node{node}/compute", "the first of these of the slowest rank of each of several nodes")
NODE_DATA = _curve("speed/node{node}/data", "the second of these of the slowest rank of each of several nodes")

HOST_GB = _curve("memory/host_gb", "memory of the largest worker now, 1e9 bytes")
GPU_PEAK_GB = _curve("memory/gpu_peak_gb", "peak GPU memory of any worker since the last point, 1e9 bytes")

ENTROPY_LEAVES = _curve(
    "flow/entropy_leaves_level{level}", "entropy proxy of what leaves at a split, nats per dimension"
)
ENTROPY_STAYS = _curve("flow/entropy_stays_level{level}", "entropy proxy of what stays there, nats per dimension")
ORDER_ENTROPY = _curve(
    "flow/order_entropy_level{level}", "entropy of the learned order's weights, nats: from 0 to log of the channels"
)
ORDER_CHANGES = _curve("flow/order_changes_level{level}", "steps so far in which the learned order was a new one")
DRIFT = _curve("flow/drift", "relative error of images through the flow and back")
SHUFFLE_PENALTY = _curve("flow/shuffle_penalty", "the shuffle's regulariser")

SYSTEM = _curve(
    "system/{name}", "MLflow's system metrics of a single node; those of GPUs need `pip install -e '.[gpu]'`"
)
NODE_SYSTEM = _curve("system/node{node}/{name}", "the same of each node where there are several")
