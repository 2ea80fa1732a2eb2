"""One MLflow run per run name, with metrics that training never waits for. Not for any other tracker.

The driver begins and ends the run (`record`); rank 0 logs into it (`tracker`). Checkpoints and models are named by
their URLs, not uploaded.
"""

from eiwtrain.tracking.record import Status, begin, check, end, end_abandoned, settle
from eiwtrain.tracking.store import TrackedRun, TrackingError, is_local, tracking_uri
from eiwtrain.tracking.tracker import Tracker

__all__ = [
    "Status",
    "TrackedRun",
    "Tracker",
    "TrackingError",
    "begin",
    "check",
    "end",
    "end_abandoned",
    "is_local",
    "settle",
    "tracking_uri",
]
