"""One worker: the training loop itself, readable from top to bottom.

Ray Train calls `train` in every worker, with the process group up. Rank 0 speaks for all: lines to the driver,
metrics to MLflow. Whatever every rank must do alike (stop, save, evaluate) is decided from numbers that were
all-reduced, so no rank is left waiting in a collective.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import fsspec.config
import torch
import torch.distributed as dist
from PIL.Image import Image
from torch import Tensor, nn

from eiwtrain import data, evaluate, export, flow, report, sample, storage, tracking
from eiwtrain.checkpoint import DamagedCheckpoint
from eiwtrain.config import Config, Train
from eiwtrain.mailbox import WorkerEnd
from eiwtrain.state import TrainState, any_rank, sum_over_ranks
from eiwtrain.tracking import TrackedRun, Tracker

_INITIALIZE_IMAGES = 256  # for actnorm's data-dependent initialisation
_HELD_OUT_SEED = 0  # of held-out noise and of samples: the same for every run, so that runs compare


@dataclass(frozen=True)
class Job:
    """What the driver tells every worker."""

    config: Config
    tracked: TrackedRun
    mailbox: Any
    environment: dict[str, str] = field(repr=False)  # Ray may show what a job was given
    """Credentials and settings of the driver's environment that workers need."""
    began: float
    """Unix time at which the driver started."""


class Fatal(RuntimeError):
    """The run cannot go on and a restart would not help; the message is for the user."""


def train(settings: dict[str, Job]) -> None:
    """Train until `max_steps`, a stop or a failure; Ray Train's entry point in each worker."""
    job = settings["job"]
    os.environ.update(job.environment)
    fsspec.config.set_conf_env(fsspec.config.conf)  # which read the environment when it was imported
    driver = WorkerEnd(job.mailbox)
    try:
        outcome = Worker(job, driver).run()
    except (Fatal, data.DataError, storage.StorageError, DamagedCheckpoint) as e:
        # not raised: Ray would start the workers again, to fail in the same way. The driver ends the other ranks.
        driver.finish("end", {"failed": str(e)})
    else:
        if dist.get_rank() == 0:
            driver.finish("end", outcome)


class Worker:
    """The loop, and what it does between steps."""

    def __init__(self, job: Job, driver: WorkerEnd) -> None:
        self.job, self.driver, self.config = job, driver, job.config
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = _device(job.config)
        self.micro_batch, accumulation = batching(job.config.train, self.world_size)
        d = job.config.data
        manifest = data.load_manifest(d.path)
        self.train_set = data.ShardReader(d.path, manifest, d.train_split, d.cache_dir, d.cache_bytes)
        self.eval_set = data.ShardReader(d.path, manifest, d.eval_split, d.cache_dir, d.cache_bytes)
        self.state = TrainState(
            job.config,
            manifest,
            self.device,
            (self.micro_batch, accumulation),
            job.began,
            first=lambda: self._on_device(self._first(self.train_set, _INITIALIZE_IMAGES)),
            note=self.note,
        )
        self.tracker = Tracker(job.tracked, warn=self.note) if self.rank == 0 else None
        if self.tracker is not None:
            self.tracker.tags({"data": manifest.title, "data_fingerprint": manifest.fingerprint})
        self.meter = report.Meter()
        self.faults = 0

    def run(self) -> dict[str, Any]:
        """The loop. Returns `{"finished": summary}` or `{"stopped": reason, ...}`; raises `Fatal`."""
        c, state = self.config, self.state
        self.say("training", {"step": state.step, "of": c.train.max_steps, "workers": self.world_size})
        batches = self._train_batches()
        try:
            stop = False
            while state.step < c.train.max_steps:
                if self._evaluation_due():  # before a step, as a stop may have cut it short in the last attempt
                    stop = self._evaluate() is None
                    self._save()  # with the score
                stop = stop or self._train_step(batches)
                if stop or (state.step % c.checkpoint.every == 0 and not self._evaluation_due()):
                    self._save()
                if stop:
                    return self._stopped()
            score = self._evaluate()
            self._save()
            if score is None or any_rank(self._wants_stop(), self.device):
                return self._stopped()
            return self._finish(score) if self.rank == 0 else {}
        finally:
            if self.tracker is not None:
                self.tracker.close()

    def _train_step(self, batches: Iterator[list[data.Batch]]) -> bool:
        """One optimizer step on the global batch; returns whether all ranks agreed to stop after it."""
        state, images = self.state, self.config.train.global_batch
        started = time.perf_counter()
        own = next(batches)
        waited = time.perf_counter() - started
        torch.manual_seed(step_seed(self.config.train.seed, state.step, self.rank))  # of dropout: the same on replay
        micro_batches = [MicroBatch(b.weight, self.config, *self._on_device(b)) for b in own]
        lr = learning_rate(state.step, self.config.train)
        norm = state.advance([m.loss for m in micro_batches], lr)

        bits_and_penalty = [sum(m.bits for m in micro_batches), sum(m.penalty for m in micro_batches)]
        measured = [*bits_and_penalty, data.new_faults(), self._wants_stop()]
        bits, penalty, faults, stop = sum_over_ranks(measured, self.device)
        if not (math.isfinite(bits) and math.isfinite(norm)):
            self._fail_on_non_finite(own, bits / images, norm)
        worked = time.perf_counter() - started - waited
        state.clock.productive += worked
        state.clock.data_wait += waited
        self.meter.add(images, bits / images, waited, worked, int(faults))
        self.faults += int(faults)
        if self.tracker is not None and state.step % self.config.tracking.log_every == 0:
            entropy, goodput = micro_batches[-1].entropy, state.clock.goodput
            curves = report.curves(self.meter, bits / images, penalty / images, norm, lr, goodput, entropy, self.faults)
            self.tracker.metrics(state.step, curves)
        self._progress()
        return stop > 0

    def _progress(self) -> None:
        """The training line, every few seconds."""
        t, step = self.config.train, self.state.step
        if self.meter.seconds >= t.log_every_seconds or step == t.max_steps:
            self.say("progress", report.progress(self.meter, step, t.max_steps, t.global_batch))
            self.meter = report.Meter()

    def _fail_on_non_finite(self, batches: list[data.Batch], bits_per_dim: float, norm: float) -> None:
        shares: list[Any] = [None] * self.world_size
        dist.all_gather_object(shares, [int(i) for b in batches for i in b.indices if i >= 0])
        raise Fatal(
            f"step {self.state.step}: {bits_per_dim:g} bits/dim or gradient norm {norm:g} is not finite; samples of "
            f"{self.config.data.train_split}: {sorted(i for share in shares for i in share)}; "
            f"last good checkpoint: {self.state.newest.url if self.state.newest else 'none'}. "
            "A lower train.lr or train.clip, or model.trunk_dtype=float64, usually mends it"
        )

    def _wants_stop(self) -> bool:
        """Whether this rank knows of a reason to stop."""
        hours = self.config.train.max_hours
        out_of_time = self.rank == 0 and hours is not None and time.time() - self.job.began > hours * 3600
        return out_of_time or self.driver.reason is not None

    def _stopped(self) -> dict[str, Any]:
        reason = self.driver.reason or "its time limit (train.max_hours)"
        if self.tracker is not None:
            self.tracker.close()
            # the driver does it too, unless it is killed before it comes to it
            tracking.end(self.job.tracked, "KILLED")
        newest = self.state.newest
        return {"stopped": reason, "step": self.state.step, "checkpoint": newest.url if newest else None}

    def _save(self) -> None:
        if self.tracker is not None:
            self.tracker.flush()
        if not self.state.save(self.job.tracked.run_id):
            return
        assert self.state.newest is not None
        if self.tracker is not None:
            self.tracker.tags({"checkpoint": self.state.newest.url, "step": str(self.state.step)})
        self.note(f"checkpoint at step {self.state.step:,}: {self.state.newest.url}")

    def _evaluation_due(self) -> bool:
        step = self.state.step
        return step > 0 and (step % self.config.eval.every == 0 or step == self.config.train.max_steps)

    def _evaluate(self) -> evaluate.Score | None:
        """Held-out score of the averaged weights at this step; None if stopped meanwhile. Collective."""
        state = self.state
        if state.score is not None:
            return state.score
        batches = data.eval_batches(
            self.eval_set,
            images=self.config.eval.images,
            seed=_HELD_OUT_SEED,
            micro_batch=self.micro_batch,
            rank=self.rank,
            world_size=self.world_size,
        )
        score = evaluate.score(state.averaged, batches, lambda: any_rank(self._wants_stop(), self.device))
        if score is None:
            return None
        state.score = score
        self.note(
            f"step {state.step:,}: held-out {score.bits_per_dim:.4f} ± {score.standard_error:.4f} bits/dim "
            f"on {score.images:,} images of {self.eval_set.manifest.title}"
        )
        if self.tracker is not None:
            drift = self._drift()
            if warning := report.drift_warning(drift, self.config):
                self.note(warning)
            self.tracker.metrics(state.step, {"eval/bits_per_dim": score.bits_per_dim, "flow/drift": drift})
            self.tracker.image(state.step, "samples", self._overview())
        return score

    def _finish(self, score: evaluate.Score) -> dict[str, Any]:
        """Draw, export and sum up, looking between for a stop; rank 0 alone."""
        c, state, root = self.config, self.state, self.config.root
        assert state.newest is not None
        png = evaluate.png_bits_per_dim((self.eval_set[i] for i in range(score.images)), c.model.n_bits)
        samples, model = storage.join(root, "samples.png"), storage.join(root, "model")
        if self._wants_stop():
            return self._stopped()
        storage.write_bytes(samples, _png(self._overview()))
        if self._wants_stop():
            return self._stopped()
        export.export(state.averaged, model, export.metadata_of(state.newest))
        clock = state.clock
        summary = {
            "data": self.eval_set.manifest.title,
            "steps": state.step,
            "images": state.samples_seen,
            "test_bits_per_dim": score.bits_per_dim,
            "test_standard_error": score.standard_error,
            "test_images": score.images,
            "png_bits_per_dim": png,
            "images_per_second": state.samples_seen / max(1e-9, clock.productive + clock.data_wait),
            "goodput": clock.goodput,
            "wall_seconds": clock.wall,
            "drift": self._drift(),
            "workers": self.world_size,
            "samples": samples,
            "exported_model": model,
            "checkpoint": state.newest.url,
            "mlflow_run_id": self.job.tracked.run_id,
        }
        storage.write_bytes(storage.join(root, "summary.json"), json.dumps(summary, indent=1).encode())
        if self.tracker is not None:
            self.tracker.metrics(state.step, {"eval/png_bits_per_dim": png})
            self.tracker.tags({"exported_model": model})
        return {"finished": summary}

    def _train_batches(self) -> Iterator[list[data.Batch]]:
        c = self.config
        return data.train_batches(
            self.train_set,
            seed=c.train.seed,
            start_step=self.state.step,
            global_batch=c.train.global_batch,
            micro_batch=self.micro_batch,
            rank=self.rank,
            world_size=self.world_size,
            workers=c.data.loader_workers,
            flip=c.data.flip,
            lanes=c.data.lanes,
            block=c.data.shuffle_block,
            warn=self.note,
        )

    def _first(self, reader: data.ShardReader, n: int) -> data.Batch:
        """The first n samples of a split."""
        return data.first_batch(reader, n, _HELD_OUT_SEED)

    def _on_device(self, batch: data.Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the flow takes: pixels, noise, labels."""
        return data.flow_inputs(batch, self.config.model.classes, self.device)

    def _drift(self) -> float:
        """Relative error of held-out images through the flow and back."""
        images, noise, labels = self._on_device(self._first(self.eval_set, self.config.eval.samples))
        x = flow.dequantize(images, noise, self.config.model.n_bits)
        return self.state.averaged.drift(x, labels)

    def _overview(self) -> Image:
        e, batch = self.config.eval, self._first(self.eval_set, self.config.eval.samples)
        return sample.overview(self.state.averaged, batch, e.samples, e.temperatures, _HELD_OUT_SEED)

    def note(self, text: str) -> None:
        """Have the driver print a line; from rank 0 only."""
        self.say("note", text)

    def say(self, kind: str, content: Any) -> None:
        """Tell the driver; from rank 0 only."""
        if self.rank == 0:
            self.driver.say(kind, content)


class MicroBatch:
    """One forward pass of one rank: its part of the loss, and what it measured on the way."""

    def __init__(
        self,
        weight: Tensor,
        config: Config,
        images: Tensor,
        noise: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> None:
        self.weight, self.config = weight.to(images.device), config
        self.images, self.noise, self.labels = images, noise, labels
        self.bits = self.penalty = 0.0
        self.entropy = torch.empty(0, 2)

    def loss(self, module: nn.Module) -> Tensor:
        """This micro-batch's share of the mean bits/dim, and of the shuffle's regulariser, over the global batch."""
        t = self.config.train
        out: flow.FlowOutput = module(self.images, self.noise, self.labels)
        bits = flow.bits_per_dim(out.log_prob, self.images[0].numel(), self.config.model.n_bits)
        # a padded row counts zero times; its image is a real one, so its loss is finite
        bits, penalty = (self.weight * bits).sum(), (self.weight * out.penalty).sum()
        self.bits, self.penalty, self.entropy = float(bits.detach()), float(penalty.detach()), out.entropy
        return (bits + t.shuffle_penalty * penalty) / t.global_batch


def batching(train: Train, world_size: int) -> tuple[int, int]:
    """(rows of a micro-batch, micro-batches of a step) of each rank.

    As few micro-batches as `train.micro_batch` allows, and no more rows than they need: what does not divide is padded.
    """
    accumulation = math.ceil(train.global_batch / (train.micro_batch * world_size))
    return math.ceil(train.global_batch / (world_size * accumulation)), accumulation


def step_seed(seed: int, step: int, rank: int) -> int:
    """Of what one rank draws at random in one step, besides its samples' noise: 64 bits, another for each."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:8], "big")


def learning_rate(step: int, train: Train) -> float:
    """Of optimizer step `step` (the first is 0): linear warm-up, then constant or half a cosine down to zero."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.lr
    done = (step - train.warmup_steps) / max(1, train.max_steps - train.warmup_steps)
    return train.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def _device(config: Config) -> torch.device:
    if not config.workers.gpus:
        torch.set_num_threads(config.workers.cpus)  # no more than its own cores: the same sums each time
        return torch.device("cpu")
    from ray.train.torch import get_device

    device = get_device()
    torch.cuda.set_device(device)
    return device


def _png(image: Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
