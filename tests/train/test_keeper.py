"""When checkpoints are begun, and what the user reads when one could not be written."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_config

from eiwtrain.checkpoints import Checkpoint
from eiwtrain.checkpoints.writer import RanksApartError, SaveResult
from eiwtrain.config import Config
from eiwtrain.storage.lease import LeaseLost
from eiwtrain.train import keeper
from eiwtrain.train.goodput import Clock
from eiwtrain.train.keeper import Keeper


@dataclass
class FakeSaver:
    """Stands for the thread that writes: a save ends when the test says so. The real one is in test_saver."""

    begun: list[int] = field(default_factory=list)
    waits: list[float | None] = field(default_factory=list)
    takes: float = float("inf")
    """Seconds for which one must be waited for until it is written."""
    busy: bool = False
    outcome: SaveResult | None = None

    def begin(self, step: int, samples_seen: int, tensors: Any, state: dict[str, Any]) -> None:
        self.begun.append(step)
        self.busy = True

    def end(self, error: Exception | None = None) -> None:
        saved = None if error else Checkpoint(f"step-{self.begun[-1]}", self.begun[-1], 0, (), {})
        self.outcome = SaveResult(saved, error, 0.1, 0.2, 0)
        self.busy = False

    def poll(self) -> SaveResult | None:
        outcome, self.outcome = self.outcome, None
        return None if self.busy else outcome

    def wait(self, seconds: float | None = None) -> SaveResult | None:
        self.waits.append(seconds)
        if self.busy and (seconds is None or seconds >= self.takes):
            self.end()
        return self.poll()


@dataclass
class FakeState:
    step: int = 0
    score: object = None
    newest: Checkpoint | None = None
    samples_seen: int = 0
    device: str = "cpu"

    def tensors(self) -> list[Any]:
        return []

    def to_json(self) -> dict[str, Any]:
        return {}


class Guard:
    def check(self) -> None:
        pass


@pytest.fixture
def kept(monkeypatch):
    """A keeper every 10 steps, its state, its saver, and what it has said."""
    saver, state, said = FakeSaver(), FakeState(), []
    monkeypatch.setattr(keeper, "CheckpointWriter", lambda *args: saver)
    monkeypatch.setattr(keeper, "sum_over_ranks", lambda values, device: [float(v) for v in values])
    config = Config.model_validate(tiny_config(Path("/x"), checkpoint={"every": 10}))
    clock = Clock(0.0, 0.0, 0.0)
    return Keeper(config, state, clock, Guard(), None, 0, said.append, "run"), state, saver, said


def train(kept, to):
    """Steps as the loop makes them."""
    k, state, _, _ = kept
    while state.step < to:
        state.step += 1
        state.score = None
        if k.due():
            k.save()
        k.hear()


def test_checkpoints_are_begun_when_they_are_due_and_told_when_they_are_written(kept):
    _, state, saver, said = kept
    train(kept, 10)
    assert (saver.begun, said) == ([10], [])
    saver.end()
    train(kept, 25)
    assert saver.begun == [10, 20]
    assert state.newest.step == 10
    assert len(said) == 1
    assert said[0].startswith("checkpoint at step 10: step-10 (0.0 MB; training waited 0.10 s, written in 0.2 s)")


def test_a_machine_without_room_for_copies_is_reported_once(kept):
    _, state, saver, said = kept
    for step in (10, 20):
        train(kept, step)
        saver.end()
        saver.outcome = replace(saver.outcome, near="rank 1 on b: No space left on device")
    train(kept, 21)
    assert state.newest.step == 20
    assert [line for line in said if "rank 1 on b: No space left" in line] == [said[1]]
    assert said[1].startswith("checkpoint.near: ")


def test_while_one_is_written_the_next_waits_and_training_does_not(kept):
    _, _, saver, _ = kept
    train(kept, 24)
    assert saver.begun == [10]
    saver.end()
    train(kept, 25)
    assert saver.begun == [10, 25]


def test_one_that_could_not_be_written_is_told_and_tried_again_after_a_while(kept, monkeypatch):
    _, state, saver, said = kept
    now = [100.0]
    monkeypatch.setattr(keeper.time, "monotonic", lambda: now[0])
    train(kept, 10)
    saver.end(OSError("no space left on device"))
    train(kept, 25)
    assert "a checkpoint could not be written: no space left on device; training continues" in said[0]
    assert saver.begun == [10]  # each try costs training a copy of its tensors
    now[0] += 30.0
    train(kept, 26)
    assert saver.begun == [10, 26]
    assert state.newest is None


def test_a_step_is_saved_once_and_again_with_its_score(kept):
    k, state, saver, _ = kept
    train(kept, 5)
    for _ in range(2):
        k.save(wait=True)
    assert saver.begun == [5]
    state.score = object()
    k.save(wait=True)
    k.save(wait=True)
    assert saver.begun == [5, 5]


def test_weights_that_went_back_are_saved_under_the_step_that_follows(kept, monkeypatch):
    _, state, saver, _ = kept
    state.step, state.newest = 15, Checkpoint("step-10", 10, 0, (), {})  # as with skip_to=15
    config = Config.model_validate(tiny_config(Path("/x"), checkpoint={"every": 10}))
    Keeper(config, state, Clock(0.0, 0.0, 0.0), Guard(), None, 0, print, "run").save()
    assert saver.begun == [15]


def test_a_save_that_shall_not_wait_is_put_off_while_another_is_written(kept):
    k, state, saver, said = kept
    train(kept, 10)
    saver.takes = 60.0
    state.step = 12
    k.save()
    assert (saver.begun, said) == ([10], [])
    saver.end()
    train(kept, 13)
    assert saver.begun == [10, 13]


def test_a_save_with_a_score_waits_for_the_one_before_as_a_later_one_would_not_have_it(kept):
    k, state, saver, _ = kept
    train(kept, 10)
    saver.takes = 300.0
    state.score = object()
    k.save()
    assert saver.begun == [10, 10]
    assert state.newest.step == 10


def test_a_score_without_a_checkpoint_is_reported_and_training_continues(kept):
    k, state, saver, said = kept
    train(kept, 10)
    state.score = object()
    k.save()
    assert saver.begun == [10]
    assert 20.0 < max(saver.waits) < Config.model_validate(tiny_config(Path("/x"))).workers.hang_seconds
    assert said == [
        "the checkpoint of step 10 with its score is left out, as the previous one is not written after 600 s: "
        "this step cannot be the best that is kept"
    ]
    saver.end()
    train(kept, 11)
    assert saver.begun == [10, 11]


@pytest.mark.parametrize("error", [LeaseLost("taken over"), RanksApartError("Connection closed by peer")])
def test_workers_that_may_not_or_cannot_write_any_more_end(kept, error):
    k, _, saver, said = kept
    train(kept, 10)
    saver.end(error)
    with pytest.raises(type(error), match=str(error)):
        k.hear()
    assert said == []


def test_what_the_store_lacks_and_the_clock_travel_in_the_checkpoint(kept, monkeypatch):
    k, state, saver, _ = kept

    class Tracker:
        def pending(self):
            return {"points": [1]}

    states = []
    monkeypatch.setattr(saver, "begin", lambda step, seen, tensors, about: states.append(about))
    k._tracker = Tracker()
    state.step = 3
    k.save()
    (about,) = states
    assert about["unlogged"] == {"points": [1]}
    assert about["mlflow_run_id"] == "run"
    assert set(about["clock"]) == {"wall", "seconds", "cost", "costs"}
