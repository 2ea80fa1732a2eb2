"""One worker: the training loop itself, readable from top to bottom.

Ray Train calls `train_worker` in every worker, with the process group up. Rank 0 speaks for all: lines to the driver,
metrics to MLflow. Whatever every rank must do alike (stop, save, evaluate) is decided from numbers that were
all-reduced, so no rank is left waiting in a collective. Not for what a step minimises (`eiwtrain.train.objective`), nor
for how workers are started (`eiwtrain.driver.attempt`).
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from typing import Any, Literal

import fsspec.config
import torch
import torch.distributed as dist
from torch import Tensor

from eiwtrain import data, storage
from eiwtrain.checkpoints import DamagedCheckpoint
from eiwtrain.config import batching
from eiwtrain.on_ray import node_prices, session
from eiwtrain.on_ray.mailbox import WorkerEnd
from eiwtrain.on_ray.messages import (
    Again,
    Assignment,
    Crashed,
    Failed,
    Finished,
    Lost,
    Message,
    Note,
    Outcome,
    Stopped,
    Training,
)
from eiwtrain.scoring.estimator import estimator_of
from eiwtrain.scoring.scores import Score
from eiwtrain.storage.lease import LeaseLost
from eiwtrain.terminal.lines import is_out_of_memory
from eiwtrain.testing import failpoints, timeline
from eiwtrain.testing.audit import Audit
from eiwtrain.tracking import Tracker
from eiwtrain.train import agreed, device, limits, recompute, shortage
from eiwtrain.train.finish import METRICS, finish
from eiwtrain.train.goodput import Clock
from eiwtrain.train.held_out import HeldOut
from eiwtrain.train.keeper import Keeper
from eiwtrain.train.objective import MicroBatch, learning_rate, step_seed
from eiwtrain.train.state import OtherRun, TrainState, flow_config, sum_over_ranks
from eiwtrain.train.stragglers import Stopwatch
from eiwtrain.train.telemetry import Step, Telemetry
from eiwtrain.train.watchdog import Watchdog

_INITIALIZE_IMAGES = 256  # for actnorm's data-dependent initialisation
_FIRST_SEED = 0  # for the noise of these


Ending = Literal["", "again", "stop"]  # what all ranks have agreed to do: continue, or one of the driver's requests


class Fatal(RuntimeError):
    """The run cannot continue and a restart would not help; the message is for the user."""


def train_worker(settings: dict[str, Assignment]) -> None:
    """Train until `max_steps`, a stop or a failure; Ray Train's entry point in each worker."""
    timeline.mark("process group")
    assignment = settings["assignment"]
    os.environ.update(assignment.environment)
    fsspec.config.set_conf_env(fsspec.config.conf)  # fsspec read the environment when it was imported
    driver = WorkerEnd(assignment.mailbox)
    where = f"rank {dist.get_rank()} (process {os.getpid()} on {socket.gethostname()})"
    watchdog = Watchdog(assignment.config.workers.hang_seconds, lambda what: driver.finish(Note(f"{where}: {what}")))
    worker: Worker | None = None
    try:
        worker = Worker(assignment, driver, watchdog)
        outcome = worker.run()
    except LeaseLost as e:
        driver.finish(Lost(str(e)))
    except (Fatal, OtherRun, data.DataError, storage.StorageError, DamagedCheckpoint) as e:
        # not raised: the workers would be started again, to fail in the same way. The driver stops the other ranks.
        driver.finish(Failed(str(e)))
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        did_fit = worker is not None and worker.state.step > worker.first_step
        # a shortage may pass if steps did fit before, or if a process of a failed attempt still held memory
        ended = shortage.outcome(e, assignment.config, may_pass=did_fit or assignment.failures > 0)
        driver.finish(ended)
        if isinstance(ended, Crashed):
            raise RuntimeError(ended.reason) from e
    else:
        if outcome is not None:
            driver.finish(outcome)
    finally:
        watchdog.close()


def same_data(assignment: Assignment) -> data.Manifest:
    """Return the data set, which has to be the one that the driver knows: an attempt must not resume on other images.

    Raises:
        Fatal: it was replaced.
        data.DataError: there is none.
    """
    path, was = assignment.config.data.path, assignment.data_fingerprint
    manifest = data.load_manifest(path)
    if manifest.fingerprint != was:
        raise Fatal(
            f"data.path: {path} was replaced during the run (fingerprint {manifest.fingerprint[:12]}, was "
            f"{was[:12]}); put back what it was, or train on what it is now under another run.name"
        )
    return manifest


class Worker:
    """The loop, and what it does between steps."""

    def __init__(self, job: Assignment, driver: WorkerEnd, watchdog: Watchdog) -> None:
        """Restore or initialise the state. Collective."""
        self.job, self.driver, self.watchdog, self.config = job, driver, watchdog, job.config
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = device.of_worker(job.config)
        if job.failures:
            shortage.await_memory(self.device)
        self.micro_batch, accumulation = batching(job.config.train, self.world_size)
        d = job.config.data
        manifest = same_data(job)
        self.train_set = data.ShardReader(d.path, manifest, d.train_split, d.cache_dir, d.cache_bytes)
        eval_set = data.ShardReader(d.path, manifest, d.eval_split, d.cache_dir, d.cache_bytes)
        self.flow_config = flow_config(job.config, manifest.channels)
        timeline.mark("data set")
        self.state = TrainState(
            job.config,
            manifest,
            self.device,
            (self.micro_batch, accumulation),
            first=lambda: self._first(_INITIALIZE_IMAGES),
            note=self.note,
            skip_to=job.skip_to,
            memory_share=shortage.memory_share(job.shortages),
            there=job.there,
        )
        if warning := recompute.warning(self.state.averaged, lambda: self._first(self.micro_batch)):
            self.note(warning)
        self.first_step = self.state.step
        self.held_out = HeldOut(job.config, self.state, eval_set, self.device, self.micro_batch)
        saved = self.state.newest.state if self.state.newest else {}
        self.clock = Clock(job.began, job.earlier, job.attempt_began, job.spent, job.hired or None)
        if saved.get("clock"):
            self.clock.resume(saved["clock"])
        self.tracker: Tracker | None = None
        if self.rank == 0:
            journal = storage.join(job.config.root, METRICS)
            self.tracker = Tracker(job.tracked, self.note, job.guard.check, saved.get("unlogged"), journal)
            tags = {"data": manifest.title, "data_fingerprint": manifest.fingerprint}
            if (newest := self.state.newest) is not None:
                tags |= {"checkpoint": newest.url, "step": str(newest.step)}
            self.tracker.tags(tags)
        self.ranks: list[Any] = [None] * self.world_size
        """Ray's id of each rank's node, and that machine's name."""
        dist.all_gather_object(self.ranks, (session.own_node(), socket.gethostname()))
        self.nodes: list[str] = [node for node, _ in self.ranks]
        self.keeper = Keeper(
            job.config, self.state, self.clock, job.guard, self.tracker, job.failures, self.note, job.tracked.run_id,
            self.nodes,
        )  # fmt: skip
        self.audit = Audit(self.rank, self.world_size, self.state.step)
        self.limit = ""
        """The limit that the run has passed, in words."""
        self.skipped: list[int] = []
        """Samples of this rank in the steps just before this one that were skipped."""

    def run(self) -> Outcome | None:
        """Train; return how it ended, on rank 0 at least. Collective. Raises `Fatal`."""
        c, state = self.config, self.state
        price = node_prices.price_of(c.workers, self.nodes) if self.rank == 0 else 0.0
        self.clock.pay(price)
        self.say(Training(state.step, c.train.max_steps, self.nodes, price))
        self.telemetry = Telemetry(state, self.clock, self.tracker, self.say, len(self.train_set), self.ranks)
        self.stopwatch = Stopwatch(self.device)
        state.engine.before_waiting = self.stopwatch.end
        batches = self._train_batches()
        timeline.mark("the rest")
        try:
            if self.job.skip_to is not None:
                self.keeper.save()  # otherwise, after a crash, the next attempt would run the skipped steps again
            while state.step < c.train.max_steps:
                if self._evaluation_due():  # before a step: a stop may have cut it short in the last attempt
                    ending: Ending = "" if self._evaluate() else self._agreed()
                    due = True  # a checkpoint, which then has the score
                else:
                    ending, due = self._train_step(batches)
                    if state.skipped_in_row > c.train.max_skipped:
                        return self._give_up()
                    due = due and not self._evaluation_due()
                if ending or (due and not state.skipped_in_row):  # after skipped steps the last one has these weights
                    self.watchdog.beat(f"the checkpoint of step {state.step}")
                    self.keeper.save(wait=bool(ending))
                if ending:
                    return self._ended(ending)
            score = self._evaluate()
            self.watchdog.beat("the last checkpoint")
            self.keeper.save(wait=True)
            self.keeper.drop_copies()
            if ending := self._agreed():
                return self._ended(ending)
            assert score is not None  # without one, the ranks have agreed on a reason to end
            return self._finish(score) if self.rank == 0 else None
        finally:
            self.telemetry.close()
            if self.tracker is not None:
                self.tracker.close()

    def _train_step(self, batches: Iterator[list[data.Batch]]) -> tuple[Ending, bool]:
        """Make one optimizer step on the global batch; return what all ranks agreed to do after it, and whether a
        checkpoint is due. Collective."""
        state = self.state
        self.watchdog.beat(f"step {state.step}")
        self.clock.training()
        started = time.perf_counter()
        own = next(batches)
        waited = time.perf_counter() - started
        self.stopwatch.begin()
        failpoints.reach("worker.step")
        torch.manual_seed(step_seed(self.config.train.seed, state.step, self.rank))  # of dropout: the same on replay
        micro_batches = [MicroBatch(b.weight, self.config, *self._on_device(b)) for b in own]
        lr = learning_rate(state.step, self.config.train, len(self.train_set))

        norm, applied = state.advance([m.loss for m in micro_batches], lr, lambda: self._report(micro_batches))
        sums, entropy = agreed.unpack(state.engine.reported)

        indices = [i for b in own for i in b.indices[b.indices >= 0].tolist()]
        self.audit.made(state.step - 1, indices)
        self.skipped = [] if applied else self.skipped + indices
        worked = time.perf_counter() - started - waited
        self.clock.spend("productive" if applied else "lost", worked)
        self.clock.spend("data_wait", waited)
        if not applied:
            self.note(
                f"step {state.step:,} skipped: {sums.bits / self.config.train.global_batch:g} bits/dim, "
                f"gradient norm {norm:g} ({state.skipped_in_row} in a row, {state.skipped} in all)"
            )
        self.telemetry.add(Step(sums, entropy, norm, lr, waited, worked, self.stopwatch.seconds()))
        self.keeper.hear()
        self.telemetry.progress()
        return _ending(sums.again, sums.stop), sums.save > 0

    def _report(self, micro_batches: list[MicroBatch]) -> Tensor:
        """Return this rank's part of what the ranks sum up in a step (`agreed.pack`). It is read before the step counts
        as made."""
        save = self.rank == 0 and self.keeper.due(self.state.step + 1)
        look, compare = self.telemetry.looks(self.state.step + 1), self.telemetry.compares()
        return agreed.pack(micro_batches, [data.new_faults(), *self._wants(), save, look, compare], self.rank)

    def _give_up(self) -> Again:
        """Answer too many steps in a row that are not finite: return to good weights if the config allows it, or else
        raise `Fatal`. Collective."""
        state, t = self.state, self.config.train
        self.watchdog.beat("the checkpoint before steps that are not finite")
        self.keeper.settle()
        shares: list[Any] = [None] * self.world_size
        dist.all_gather_object(shares, self.skipped)
        what = (
            f"step {state.step}: loss or gradient was not finite in {state.skipped_in_row} steps in a row; samples of "
            f"{self.config.data.train_split}: {sorted(i for share in shares for i in share)}"
        )
        if state.rollbacks < t.rollbacks:
            return Again(what, state.step)
        raise Fatal(
            f"{what}; last good checkpoint: {state.newest.url if state.newest else 'none'}. "
            "A lower train.lr or train.clip, or model.trunk_dtype=float64, usually fixes it; train.rollbacks=1 resumes "
            "from that checkpoint behind these steps"
        )

    def _wants(self) -> tuple[float, float]:
        """Return two flags, 0 or 1: this rank knows a reason to begin another attempt; it knows a reason to stop."""
        request = self.driver.request
        if self.rank == 0 and not self.limit:
            self.limit = limits.passed(self.config.train, self.job.began, self.clock)
        kind = request.kind if request else ""
        return float(kind == "again"), float(kind == "stop" or bool(self.limit))

    def _agreed(self) -> Ending:
        """Return what to do next; a reason that one rank knows counts for all. Collective."""
        return _ending(*sum_over_ranks([*self._wants()], self.device))

    def _ended(self, ending: Ending) -> Stopped | Again | None:
        """Close what is open, and return the outcome; None on ranks that may not know the reason."""
        if ending == "stop":
            self.keeper.drop_copies()
        if self.rank:
            return None
        reason = self.driver.request.reason if self.driver.request else self.limit
        if self.tracker is not None:
            self.tracker.flush()
            self.tracker.close(0.0)  # points that MLflow does not take now are in the checkpoint
        if ending == "again":
            return Again(reason)
        newest = self.state.newest
        return Stopped(reason, self.state.step, newest.url if newest else None)

    def _evaluation_due(self) -> bool:
        step = self.state.step
        return (
            self.state.score is None
            and step > 0
            and (step % self.config.eval.every == 0 or step == self.config.train.max_steps)
        )

    def _evaluate(self) -> Score | None:
        """Return the held-out score of the averaged weights at this step; None if stopped meanwhile. Collective."""
        state = self.state
        if state.score is not None:
            if self.tracker is not None and self.tracker.lost_images(state.step):
                self.held_out.show(state.score, self.tracker, self.note, self._may_continue)
            return state.score

        def stopped() -> bool:
            self.watchdog.beat(f"the evaluation at step {state.step}")
            return bool(self._agreed())

        failpoints.reach("worker.evaluation")
        with self.clock.spending("evaluation"):
            score = self.held_out.score(stopped)
        if score is None:
            return None
        state.score = score
        self.note(
            f"step {state.step:,}: held-out {score.bits_per_dim:.4f} ± {score.standard_error:.4f} bits/dim "
            f"({estimator_of(self.flow_config)}) on {score.images:,} images of {state.manifest.title}"
        )
        if self.tracker is not None:
            with self.clock.spending("evaluation"):
                self.held_out.show(score, self.tracker, self.note, self._may_continue)
        return score

    def _finish(self, score: Score) -> Outcome | None:
        """Write what the run leaves, looking between for a stop; rank 0 alone."""
        state = self.state
        if state.newest is None or state.newest.step != state.step:
            last = state.newest.url if state.newest else "the beginning"
            raise Fatal(f"the last checkpoint could not be written; the same command resumes from {last}")
        self.watchdog.beat("the end")
        failpoints.reach("worker.finish")
        assert self.tracker is not None
        try:
            summary = finish(
                self.held_out, score, self.clock, self.job.tracked, self.tracker, self.job.guard, self._may_continue
            )
        except (LeaseLost, storage.StorageError):
            raise
        except Exception as e:  # training is done; to start workers again for this would not help
            raise Fatal(f"training is done, but {type(e).__name__}: {e}; the same command tries the end again") from e
        if summary is None:
            return self._ended(_ending(*self._wants()))
        self.watchdog.beat("the last points for MLflow")
        if untaken := self.tracker.close():  # the checkpoint has them, or this step's evaluation draws them again
            return Stopped(f"MLflow, which did not take {untaken}", state.step, state.newest.url)
        return Finished(summary)

    def _may_continue(self, what: str) -> bool:
        """Return whether to begin `what`, as this rank knows no reason to stop. Rank 0 alone."""
        self.watchdog.beat(what)
        return not any(self._wants())

    def _train_batches(self) -> Iterator[list[data.Batch]]:
        c = self.config
        return data.train_batches(
            self.train_set, seed=c.train.seed, start_step=self.state.step, global_batch=c.train.global_batch,
            micro_batch=self.micro_batch, rank=self.rank, world_size=self.world_size, workers=c.data.loader_workers,
            augment=c.data.augment, lanes=c.data.lanes, block=c.data.shuffle_block, warn=self.note,
        )  # fmt: skip

    def _first(self, images: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the first training images, the same on every rank, as the flow takes them."""
        return self._on_device(data.first_batch(self.train_set, images, _FIRST_SEED))

    def _on_device(self, batch: data.Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what the flow takes: pixels, noise, labels."""
        return data.flow_inputs(batch, self.flow_config, self.device)

    def note(self, text: str) -> None:
        """Have the driver print a line; from rank 0 only."""
        self.say(Note(text))

    def say(self, message: Message) -> None:
        """Send the driver a message; from rank 0 only."""
        if self.rank == 0:
            self.driver.say(message)


def _ending(again: float, stop: float) -> Ending:
    return "stop" if stop else "again" if again else ""
