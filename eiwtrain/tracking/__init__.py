"""MLflow, and nothing but MLflow: one run per run name, found again; metrics that never hold training up.

The driver begins and ends the run (`record`); rank 0 logs into it (`tracker`). Checkpoints and models are referred to
by URL, not uploaded.
"""

from eiwtrain.tracking.record import Status, begin, check, end, reconcile, settle
from eiwtrain.tracking.store import TrackedRun, TrackingError, tracking_uri
from eiwtrain.tracking.tracker import Tracker

__all__ = [
    "Status",
    "TrackedRun",
    "Tracker",
    "TrackingError",
    "begin",
    "check",
    "end",
    "reconcile",
    "settle",
    "tracking_uri",
]
