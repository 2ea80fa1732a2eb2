"""What workers and driver send each other, and how an attempt ends: plain data, from the worker to the exit code.

Not for how it is sent: that is `eiwtrain.on_ray.mailbox`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from eiwtrain.scoring.estimator import Estimator
from eiwtrain.scoring.published import Published
from eiwtrain.terminal.console import TrainingLine

if TYPE_CHECKING:
    from eiwtrain.checkpoints import Survey
    from eiwtrain.config import Config
    from eiwtrain.storage.lease import Guard
    from eiwtrain.tracking import TrackedRun


@dataclass(frozen=True)
class Assignment:
    """What the driver gives every worker."""

    config: Config
    data_fingerprint: str
    """Fingerprint of the data set that the driver has found, and compared with the checkpoint."""
    tracked: TrackedRun
    mailbox: Any
    guard: Guard
    """The guard of the run's lease: asked before anything is written for others to read."""
    environment: dict[str, str] = field(repr=False)  # Ray may show what a worker was given
    """Credentials and settings of the driver's environment that workers need."""
    began: float
    """Unix time at which the driver started."""
    earlier: float
    """Wall time of earlier drivers of this run, seconds."""
    attempt_began: float
    """Unix time at which this attempt began: the driver's start, or the end of the attempt before."""
    failures: int
    """Attempts that have died or failed so far."""
    skip_to: int | None
    """Step to resume at, with the weights of the last good checkpoint; None: that checkpoint's own step."""
    shortages: int = 0
    """Attempts under this driver that have run out of a GPU's memory."""
    spent: float = 0.0
    """What all attempts of this run before this one have cost."""
    hired: float = 0.0
    """Unix time from which this attempt's workers cost money."""
    there: Survey | None = None
    """The run's checkpoints, which the driver has listed under the lease when no commit was under way; None: storage
    did not answer, and the workers look."""


@dataclass(frozen=True)
class DriverRequest:
    """What the driver asks of the workers: a checkpoint, and then to return."""

    kind: Literal["stop", "again"]
    """stop: the run stops, and resumes later. again: it resumes at once with other workers."""
    reason: str
    """A text for people, e.g. SIGTERM."""


@dataclass(frozen=True)
class Training:
    """Training begins: rank 0 has restored or initialised its state."""

    step: int
    of: int
    nodes: list[str]
    """Ray's id of each worker's node, by rank."""
    price: float = 0.0
    """What all workers cost in an hour; 0 without prices."""


@dataclass(frozen=True)
class Note:
    """A line to print."""

    text: str


@dataclass(frozen=True)
class Heard:
    """A worker has seen the driver's request, so workers will return."""


@dataclass(frozen=True)
class Summary:
    """What a finished run has reached and left: the content of `summary.json`."""

    data: str
    steps: int
    images: int
    test_bits_per_dim: float
    test_estimator: Estimator
    test_standard_error: float
    test_images: int
    published: Published
    png_bits_per_dim: float
    webp_bits_per_dim: float
    yardstick_images: int
    images_per_second: float
    goodput: float
    goodput_shares: dict[str, float]
    goodput_line: str
    wall_seconds: float
    cost: float | None
    """What the run has cost; None without prices, as the next two."""
    cost_wasted: float | None
    cost_line: str | None
    skipped_steps: int
    drift: float
    workers: int
    metrics: str
    samples: str
    exported_model: str
    registered: str | None
    checkpoint: str
    mlflow_run_id: str


@dataclass(frozen=True)
class Finished:
    """All steps are made, and the run has left what it should."""

    summary: Summary


@dataclass(frozen=True)
class Stopped:
    """The run stopped before its last step, and the same command resumes it."""

    reason: str
    step: int
    checkpoint: str | None
    """URL of the newest checkpoint; None if there is none."""


@dataclass(frozen=True)
class Again:
    """The workers returned so that another attempt follows at once."""

    reason: str
    skip_to: int | None = None
    """Step to resume at, with the weights of the last good checkpoint; None: that checkpoint's own step."""


@dataclass(frozen=True)
class Failed:
    """The run cannot continue, and another attempt would not help."""

    reason: str


@dataclass(frozen=True)
class Crashed:
    """Workers died or raised; another attempt may do better."""

    reason: str
    short_of_memory: bool = False
    """Whether a GPU's memory was short: the next attempt takes less where the config lets it choose."""


@dataclass(frozen=True)
class Lost:
    """Another driver has taken the run over."""

    reason: str


Outcome = Finished | Stopped | Again | Failed | Crashed | Lost
"""How an attempt ended."""

Message = Training | TrainingLine | Note | Heard | Outcome
"""What a worker sends to the driver; an outcome is its last message."""
