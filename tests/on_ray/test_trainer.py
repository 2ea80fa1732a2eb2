"""The line that is reported about workers that Ray gave up on."""

import pytest

from eiwtrain.config import Workers
from eiwtrain.on_ray import trainer
from eiwtrain.on_ray.trainer import cause_of
from eiwtrain.train.watchdog import Watchdog


class TrainingFailed(Exception):
    def __init__(self, failures):
        super().__init__("Training failed due to worker errors:\n[Rank 0 Error Snippet]:\n...")
        self.worker_failures = failures


def test_a_rank_that_died_is_named_before_cut_connections():
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:3293: Connection reset by peer")
    died = RuntimeError(
        "A worker health check failed.\nThe actor died unexpectedly before finishing this task.\n\tpid: 12\n"
        "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: "
        "Worker unexpectedly exits with a connection error code 2. End of file. Some common causes include: ..."
    )
    said = cause_of(TrainingFailed({0: lost, 1: died}))
    assert said == "the process of rank 1 is gone (Worker unexpectedly exits with a connection error code 2)"
    assert cause_of(TrainingFailed({0: lost})) == f"rank 0: {lost}"


def test_a_traceback_is_reported_by_its_last_line():
    raised = RuntimeError('Traceback (most recent call last):\n  File "x.py"\n    f()\nValueError: no such thing\n')
    assert cause_of(TrainingFailed({3: raised})) == "rank 3: ValueError: no such thing"
    assert cause_of(raised) == "ValueError: no such thing"
    assert cause_of(None) == "NoneType"
    assert len(cause_of(RuntimeError("x" * 1000))) == 300


@pytest.mark.parametrize("hang_seconds", [1200.0, 3600.0, 0.5])
def test_a_collective_waits_longer_than_any_watchdog(hang_seconds, monkeypatch):
    given = []
    monkeypatch.setattr(trainer, "_Trainer", lambda *_args, **options: given.append(options["torch_config"]))
    trainer.Fit(print, {}, Workers(hang_seconds=hang_seconds), 1, "x").join()
    dog = Watchdog(hang_seconds, print)
    dog.close()
    (config,) = given
    assert config.timeout_s > dog._allowed >= hang_seconds
