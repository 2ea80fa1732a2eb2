"""One worker: the training loop itself, readable from top to bottom.

Ray Train calls `train` in every worker, with the process group up. Rank 0 speaks for all: lines to the driver,
metrics to MLflow. Whatever every rank must do alike (stop, save, evaluate) is decided from numbers that were
all-reduced, so no rank is left waiting in a collective.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eiwtrain import checkpoint, data, evaluate, export, flow, sample, storage
from eiwtrain.config import Config, Train
from eiwtrain.engine import Engine
from eiwtrain.goodput import Clock
from eiwtrain.mailbox import WorkerEnd
from eiwtrain.tracking import TrackedRun, Tracker

_INITIALIZE_IMAGES = 256  # for actnorm's data-dependent initialisation
_EVAL_SEED = 0  # held-out noise is the same for every run, so that runs compare


@dataclass(frozen=True)
class Job:
    """What the driver tells every worker."""

    config: Config
    tracked: TrackedRun
    mailbox: Any
    environment: dict[str, str]
    """Credentials and settings of the driver's environment that workers need."""
    began: float
    """Unix time at which the driver started."""


class Fatal(RuntimeError):
    """The run cannot go on and a restart would not help; the message is for the user."""


def train(job: Job) -> None:
    """Train until `max_steps`, a stop or a failure; Ray Train's entry point in each worker."""
    os.environ.update(job.environment)
    driver = WorkerEnd(job.mailbox)
    try:
        outcome = Trainer(job, driver).run()
    except (Fatal, data.DataError, storage.StorageError) as e:
        # not raised: Ray would start the workers again, to fail in the same way. The driver ends the other ranks.
        driver.finish("end", {"failed": str(e)})
    else:
        if dist.get_rank() == 0:
            driver.finish("end", outcome)


def learning_rate(step: int, train: Train) -> float:
    """The learning rate of optimizer step `step` (the first is 0): linear warm-up, then constant or half a cosine."""
    warmup = min(1.0, (step + 1) / train.warmup_steps) if train.warmup_steps else 1.0
    if train.schedule == "constant" or step < train.warmup_steps:
        return train.lr * warmup
    done = (step - train.warmup_steps) / max(1, train.max_steps - train.warmup_steps)
    return train.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def flow_config(config: Config, channels: int) -> flow.FlowConfig:
    """The model that a config asks for, on square images of `channels` channels."""
    m = config.model
    return flow.FlowConfig(
        image_shape=(channels, config.data.resolution, config.data.resolution),
        levels=m.levels,
        steps=m.steps,
        conditioner=flow.ConditionerConfig(hidden=m.conditioner.hidden, depth=m.conditioner.depth),
        shuffle=m.shuffle,
        backprop=m.backprop,
        conditioner_dtype="bfloat16" if config.train.precision == "bf16" else "float32",
        trunk_dtype=m.trunk_dtype,
        anchor_every=m.anchor_every,
        n_bits=m.n_bits,
    )


class Trainer:
    """The state of one attempt on one rank, and the loop over it."""

    def __init__(self, job: Job, driver: WorkerEnd) -> None:
        self.job, self.driver = job, driver
        self.config = config = job.config
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = _device(config)
        share = config.train.micro_batch * self.world_size
        self.accumulation = math.ceil(config.train.global_batch / share)
        # no larger than needed, so that little is padded when the world does not divide the batch
        self.micro_batch = math.ceil(config.train.global_batch / (self.world_size * self.accumulation))

        d = config.data
        self.manifest = data.load_manifest(d.path)
        self.train_set, self.eval_set = (
            data.ShardReader(d.path, self.manifest, split, d.cache_dir, d.cache_bytes)
            for split in (d.train_split, d.eval_split)
        )
        torch.manual_seed(config.train.seed)
        self.flow = flow.EIWFlow(flow_config(config, self.manifest.channels)).to(self.device)
        self.step = 0
        self.eval_score: tuple[int, float] | None = None  # (step, held-out bits/dim)
        saved, tensors = self._restore()
        if saved is None:
            self._initialize()
        else:
            self.flow.load_state_dict(checkpoint.section(tensors, "weights"))
            self.step = saved.step
            if (score := saved.state["eval_bits_per_dim"]) is not None:
                self.eval_score = (saved.step, score)
        self.averaged = copy.deepcopy(self.flow).eval().requires_grad_(False)
        self.engine = Engine(self.flow, config.train, self.micro_batch, self.accumulation, self.world_size)
        self.batches = self._train_batches()
        if saved is not None:
            self.averaged.load_state_dict(checkpoint.section(tensors, "ema"))
            any_batch = self._micro_batch(next(iter(self._eval_batches())))
            self.engine.load_moments(checkpoint.section(tensors, "moments"), self.step, any_batch.loss)
        self.clock = Clock.resumed(saved.state["clock"] if saved else None, job.began)
        self.tracker = Tracker(job.tracked) if self.rank == 0 else None
        self.newest = saved
        self.meter = Meter()

    def run(self) -> dict[str, Any]:
        """The loop. Returns `{"finished": summary}`, `{"stopped": ...}`; raises `Fatal` when it cannot go on."""
        c = self.config
        self.say("training", {"step": self.step, "max_steps": c.train.max_steps, "world_size": self.world_size})
        try:
            while self.step < c.train.max_steps:
                stop = self._train_step()
                if not stop and (self.step % c.eval.every == 0 or self.step == c.train.max_steps):
                    stop = self._evaluate() is None
                if stop or self.step % c.checkpoint.every == 0 or self.step == c.train.max_steps:
                    self._save()
                if stop:
                    return self._stopped()
            summary = self._finish()
            return self._stopped() if summary is None else {"finished": summary}
        finally:
            if self.tracker is not None:
                self.tracker.close()

    # --- one step ---------------------------------------------------------------------------------------------

    def _train_step(self) -> bool:
        """One optimizer step on the global batch; returns whether all ranks agreed to stop after it."""
        started = time.perf_counter()
        batches = next(self.batches)
        waited = time.perf_counter() - started
        micro_batches = [self._micro_batch(batch) for batch in batches]
        lr = learning_rate(self.step, self.config.train)
        norm = self.engine.step([m.loss for m in micro_batches], lr)

        bits = sum(m.bits for m in micro_batches)
        penalty = sum(m.penalty for m in micro_batches)
        wants_stop = self._wants_stop()
        bits, penalty, stop = self._sum([bits, penalty, wants_stop])  # over ranks; so all decide alike
        if not (math.isfinite(bits) and math.isfinite(norm)):
            self._fail_on_non_finite(batches, bits, norm)
        self._update_average()
        self.step += 1
        self.clock.productive += time.perf_counter() - started - waited
        self.clock.data_wait += waited
        self.clock.steps_timed += 1
        images = self.config.train.global_batch
        self.meter.add(images, bits / images, penalty / images, waited)
        self._report(norm, lr, micro_batches[-1].entropy)
        return stop > 0

    def _micro_batch(self, batch: data.Batch) -> MicroBatch:
        x = flow.dequantize(batch.images.to(self.device), batch.noise.to(self.device), self.config.model.n_bits)
        return MicroBatch(
            x=x,
            weight=batch.weight.to(self.device),
            n_bits=self.config.model.n_bits,
            global_batch=self.config.train.global_batch,
            penalty_weight=self.config.train.shuffle_penalty,
        )

    def _update_average(self) -> None:
        """Exponential moving average of the weights, with a horizon that grows in the first steps."""
        decay = min(self.config.train.ema, (1 + self.step) / (10 + self.step)) if self.config.train.ema else 0.0
        averaged, weights = list(self.averaged.parameters()), [p.detach() for p in self.flow.parameters()]
        torch._foreach_lerp_(averaged, weights, 1.0 - decay)

    def _fail_on_non_finite(self, batches: list[data.Batch], bits: float, norm: float) -> None:
        shares: list[Any] = [None] * self.world_size
        dist.all_gather_object(shares, [int(i) for b in batches for i in b.indices if i >= 0])
        indices = sorted(i for share in shares for i in share)
        good = self.newest.url if self.newest else "none"
        raise Fatal(
            f"step {self.step}: loss {bits:g} or gradient norm {norm:g} is not finite; samples of "
            f"{self.config.data.train_split}: {indices}; last good checkpoint: {good}. "
            "A lower train.lr or train.clip, or model.trunk_dtype=float64, usually mends it"
        )

    # --- stop -------------------------------------------------------------------------------------------------

    def _wants_stop(self) -> bool:
        """Whether this rank knows of a reason to stop."""
        hours = self.config.train.max_hours
        out_of_time = self.rank == 0 and hours is not None and time.time() - self.job.began > hours * 3600
        return out_of_time or self.driver.reason is not None

    def _all_stop(self) -> bool:
        """`_wants_stop` of any rank; collective."""
        return self._sum([self._wants_stop()])[0] > 0

    def _stopped(self) -> dict[str, Any]:
        reason = self.driver.reason or "time limit (train.max_hours)"
        return {"stopped": reason, "step": self.step, "checkpoint": self.newest.url if self.newest else None}

    # --- checkpoints ------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.newest is not None and self.newest.step == self.step:
            return
        at_this_step = self.eval_score is not None and self.eval_score[0] == self.step
        state = {
            "config": self.config.model_dump(mode="json"),
            "flow": self.flow.config.to_dict(),
            "data_fingerprint": self.manifest.fingerprint,
            "eval_bits_per_dim": self.eval_score[1] if self.eval_score and at_this_step else None,
            "world_size": self.world_size,
            "mlflow_run_id": self.job.tracked.run_id,
            "clock": self.clock.to_json(),
            "saved_at": time.time(),
        }
        samples_seen = self.step * self.config.train.global_batch
        self.newest = checkpoint.save(self.config.root, self.step, samples_seen, self._tensors(), state)
        if self.rank == 0:
            checkpoint.sweep(self.config.root, self.config.checkpoint.keep_last)
        if self.tracker is not None:
            self.tracker.tags({"checkpoint": self.newest.url, "step": str(self.step)})
        self.say("note", f"checkpoint at step {self.step:,}: {self.newest.url}")

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((f"weights/{name}", t) for name, t in self.flow.state_dict().items())
        yield from ((f"ema/{name}", t) for name, t in self.averaged.state_dict().items())
        yield from ((f"moments/{name}", t) for name, t in self.engine.moments())

    def _restore(self) -> tuple[checkpoint.Checkpoint | None, dict[str, Tensor]]:
        """The newest checkpoint whose every byte is as written, the same on all ranks; (None, {}) for a new run."""
        candidates: list[Any] = [checkpoint.committed(self.config.root) if self.rank == 0 else None]
        dist.broadcast_object_list(candidates, src=0)
        for saved in candidates[0]:
            try:
                tensors, damaged = checkpoint.load(saved), None
            except checkpoint.DamagedCheckpoint as e:
                tensors, damaged = {}, str(e)
            if self._sum([damaged is not None])[0] == 0:
                return saved, tensors
            self.say("note", f"damaged checkpoint passed over: {damaged or saved.url}")
        return None, {}

    def _initialize(self) -> None:
        """Actnorm's data-dependent initialisation; the same images on every rank and at any world size."""
        n = min(_INITIALIZE_IMAGES, len(self.train_set))
        images = data.first_images(self.train_set, n).to(self.device)
        noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(self.config.train.seed))
        self.flow.initialize(flow.dequantize(images, noise.to(self.device), self.config.model.n_bits))

    # --- data -------------------------------------------------------------------------------------------------

    def _train_batches(self) -> Iterator[list[data.Batch]]:
        c = self.config
        return data.train_batches(
            self.train_set,
            seed=c.train.seed,
            start_step=self.step,
            global_batch=c.train.global_batch,
            micro_batch=self.micro_batch,
            rank=self.rank,
            world_size=self.world_size,
            workers=c.data.loader_workers,
            flip=c.data.flip,
            lanes=c.data.lanes,
            block=c.data.shuffle_block,
        )

    def _eval_batches(self) -> Iterable[data.Batch]:
        return data.eval_batches(
            self.eval_set,
            images=self.config.eval.images,
            seed=_EVAL_SEED,
            micro_batch=self.micro_batch,
            rank=self.rank,
            world_size=self.world_size,
        )

    # --- evaluation and the end -------------------------------------------------------------------------------

    def _evaluate(self) -> evaluate.Score | None:
        """Held-out bits/dim of the averaged weights; None if stopped meanwhile."""
        score = evaluate.score(self.averaged, self._eval_batches(), self._all_stop)
        if score is None:
            return None
        self.eval_score = (self.step, score.bits_per_dim)
        images, noise = self._held_out(max(1, self.config.eval.samples))
        drift = self.averaged.drift(flow.dequantize(images, noise, self.config.model.n_bits))
        self.say(
            "note",
            f"step {self.step:,}: held-out {score.bits_per_dim:.4f} ± {score.standard_error:.4f} bits/dim "
            f"on {score.images:,} images, drift {drift:.1e}",
        )
        if self.tracker is not None:
            self.tracker.metrics(self.step, {"eval/bits_per_dim": score.bits_per_dim, "flow/drift": drift})
            self.tracker.image(self.step, "samples", self._overview())
        self.drift = drift
        return score

    def _held_out(self, n: int) -> tuple[Tensor, Tensor]:
        """The first n held-out images, and noise for them, on the device."""
        images = data.first_images(self.eval_set, n)
        noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(_EVAL_SEED))
        return images.to(self.device), noise.to(self.device)

    def _overview(self) -> Any:
        e = self.config.eval
        return sample.overview(self.averaged, *self._held_out(e.samples), e.samples, e.temperatures, _EVAL_SEED)

    def _finish(self) -> dict[str, Any] | None:
        """Score, draw, export and sum up; None if stopped meanwhile."""
        score = self._evaluate()
        if score is None or self._all_stop():
            return None
        self.eval_score = (self.step, score.bits_per_dim)
        if self.rank != 0:
            return {}
        c, root = self.config, self.config.root
        png = evaluate.png_bits_per_dim((self.eval_set[i] for i in range(score.images)), c.model.n_bits)
        samples, model = storage.join(root, "samples.png"), storage.join(root, "model")
        storage.write_bytes(samples, _png(self._overview()))
        assert self.newest is not None
        export.export(self.averaged, model, export.metadata_of(self.newest))
        images = self.step * c.train.global_batch
        summary = {
            "steps": self.step,
            "images": images,
            "test_bits_per_dim": score.bits_per_dim,
            "test_standard_error": score.standard_error,
            "test_images": score.images,
            "png_bits_per_dim": png,
            "images_per_second": images / max(1e-9, self.clock.productive + self.clock.data_wait),
            "goodput": self.clock.goodput,
            "drift": self.drift,
            "world_size": self.world_size,
            "samples": samples,
            "exported_model": model,
            "checkpoint": self.newest.url,
            "mlflow_run_id": self.job.tracked.run_id,
        }
        storage.write_bytes(storage.join(root, "summary.json"), json.dumps(summary, indent=1).encode())
        if self.tracker is not None:
            final = {"eval/png_bits_per_dim": png, "time/goodput": self.clock.goodput}
            self.tracker.metrics(self.step, final)
            self.tracker.tags({"exported_model": model})
        return summary

    # --- what a person sees -----------------------------------------------------------------------------------

    def say(self, kind: str, content: Any) -> None:
        """Tell the driver; rank 0 only."""
        if self.rank == 0:
            self.driver.say(kind, content)

    def _report(self, norm: float, lr: float, entropy: Tensor) -> None:
        """The training line every few seconds, the curves every few steps."""
        c, m = self.config, self.meter
        if self.tracker is not None and self.step % c.tracking.log_every == 0:
            values = {
                "train/bits_per_dim": m.bits_per_dim,
                "train/grad_norm": norm,
                "train/lr": lr,
                "flow/shuffle_penalty": m.penalty,
                "time/images_per_second": m.images_per_second,
                "time/data_wait": m.data_wait,
                "time/goodput": self.clock.goodput,
            }
            for level, (leaves, stays) in enumerate(entropy.tolist()):
                values |= {f"flow/entropy_leaves_level{level}": leaves, f"flow/entropy_stays_level{level}": stays}
            self.tracker.metrics(self.step, values)
        if m.seconds >= c.train.log_every_seconds or self.step == c.train.max_steps:
            self.say(
                "progress",
                {
                    "step": self.step,
                    "max_steps": c.train.max_steps,
                    "images": self.step * c.train.global_batch,
                    "bits_per_dim": m.bits_per_dim,
                    "images_per_second": m.images_per_second,
                    "data_wait": m.data_wait,
                    "eta": (c.train.max_steps - self.step) * c.train.global_batch / m.images_per_second,
                },
            )
            self.meter = Meter()

    def _sum(self, values: list[Any]) -> list[float]:
        """Sums over ranks, in float64 where the device has it; collective."""
        tensor = torch.tensor([float(v) for v in values], dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(v) for v in tensor.tolist()]


class MicroBatch:
    """One forward pass of one rank: its part of the loss, and what it measured on the way."""

    def __init__(self, x: Tensor, weight: Tensor, n_bits: int, global_batch: int, penalty_weight: float) -> None:
        self.x, self.weight, self.n_bits = x, weight, n_bits
        self.global_batch, self.penalty_weight = global_batch, penalty_weight
        self.bits = self.penalty = 0.0
        self.entropy = torch.empty(0, 2)

    def loss(self, module: nn.Module) -> Tensor:
        """This micro-batch's share of the mean bits/dim, and of the shuffle's regulariser, over the global batch."""
        out: flow.FlowOutput = module(self.x)
        bits = flow.bits_per_dim(out.log_prob, self.x[0].numel(), self.n_bits)
        # a padded row's loss is multiplied by zero; its image is a real one, so it is finite
        bits, penalty = (self.weight * bits).sum(), (self.weight * out.penalty).sum()
        self.bits, self.penalty, self.entropy = float(bits.detach()), float(penalty.detach()), out.entropy
        return (bits + self.penalty_weight * penalty) / self.global_batch


class Meter:
    """Means since the last training line."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._steps = self._images = 0
        self._bits = self._penalty = self._waited = 0.0

    def add(self, images: int, bits_per_dim: float, penalty: float, waited: float) -> None:
        """Count one step."""
        self._steps += 1
        self._images += images
        self._bits += bits_per_dim
        self._penalty += penalty
        self._waited += waited

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    @property
    def bits_per_dim(self) -> float:
        return self._bits / max(1, self._steps)

    @property
    def penalty(self) -> float:
        return self._penalty / max(1, self._steps)

    @property
    def images_per_second(self) -> float:
        return max(1, self._images) / max(1e-9, self.seconds)

    @property
    def data_wait(self) -> float:
        """Share of the time that was spent waiting for data, 0..1."""
        return self._waited / max(1e-9, self.seconds)


def _device(config: Config) -> torch.device:
    if not config.workers.gpus:
        return torch.device("cpu")
    from ray.train.torch import get_device

    device = get_device()
    torch.cuda.set_device(device)
    return device


def _png(image: Any) -> bytes:
    import io

    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
