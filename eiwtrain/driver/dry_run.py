"""Prints what `--dry-run` shows: the resolved config, what it will cost, and whether data, storage and MLflow answer.

Not for the arithmetic, which is `eiwtrain.driver.costs`, nor for the checks, which are `eiwtrain.driver.preflight`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from eiwtrain.config import Config, ConfigError, Train, batching, micro_batches, prices
from eiwtrain.driver import preflight
from eiwtrain.terminal.console import Console, money

if TYPE_CHECKING:
    from eiwtrain.data import Manifest
    from eiwtrain.driver.costs import Costs, Gpu


def plan(config: Config, console: Console) -> Manifest | None:
    """Print the config and its plan: parameters, FLOPs, memory, time; return the data set if there is one.

    Nothing has to exist for it: without a data set its epochs are left out, and three channels are assumed.
    """
    import yaml

    console.note(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).rstrip())
    from eiwtrain.driver import costs  # takes seconds, in which there is already something to read

    try:
        manifest = preflight.find_data(config)
    except ConfigError:
        manifest = None  # an error later, after what can be printed without it
    found = costs.of(config, manifest.channels if manifest else 3)
    for line in lines(config, found, manifest):
        console.note(line)
    return manifest


def lines(config: Config, found: Costs, manifest: Manifest | None) -> list[str]:
    """Return the lines of the plan; `docs/numbers.md` says how its figures are computed."""
    t, most, least = config.train, config.max_workers, config.workers.min
    images = t.max_steps * t.global_batch
    held = ", ".join(f"{what} {_gb(n)}" for what, n in found.state(most).items() if n)
    epoch = manifest.splits[config.data.train_split].samples if manifest else None
    seen = f"; {images / epoch:,.1f} epochs" if epoch else ""
    said = [
        f"model     {found.parameters:,} parameters, {_gb(4 * found.parameters)} in float32",
        f"steps     {t.max_steps:,} of {t.global_batch:,} images: {images:,} images{seen}",
        f"rate      {_rate(config.train, epoch)}",
        *_by_mode(config, found),
        f"state     {_gb(found.state_bytes(most))} a worker at {most}: {held}",
        f"started   {found.operations[found.mode]:,} operations a micro-batch, {found.update_operations:,} more a step "
        "for clip, optimizer and average",
        f"moved     {_gb(found.moved_bytes[found.mode])} are read and written a micro-batch by operations other than "
        "convolutions and products",
        f"network   {_gb(found.gradient_bytes)} of gradients are summed over the workers in a step",
        f"resume    reads a checkpoint of {_gb(found.checkpoint_bytes)}",
    ]
    total = images * found.flops_per_image[found.mode]
    if (price := config.workers.price_per_hour) is not None:
        counts = sorted({most, least}, reverse=True)
        said.append(f"cost      {', '.join(f'{_cost(price, n)} an hour on {n}' for n in counts)} workers")
    if not config.workers.gpus:
        return [*said, f"time      {total:.2e} FLOPs in all; no speed is assumed for CPUs"]
    if t.precision != "bf16":
        return [*said, f"time      {total:.2e} FLOPs in all; a speed is assumed for train.precision=bf16 alone"]
    return [*said, *_by_gpu(found, sorted({most, least}, reverse=True), price)]


def _rate(t: Train, epoch: int | None) -> str:
    """Return how the learning rate changes over the run.

    Args:
        epoch: number of training images, if it is known.
    """
    last = t.max_steps - t.finetune_steps
    tuned = f"; {t.finetune_lr:g} in the last {t.finetune_steps:,} steps" if t.finetune_steps else ""
    if t.warmup_steps > last:
        return f"rises over {t.warmup_steps:,} steps (train.warmup_steps), so train.lr = {t.lr:g} is not reached{tuned}"
    rises = f"rises to {t.lr:g} in {t.warmup_steps:,} steps, then " if t.warmup_steps else f"{t.lr:g}, "
    course = {"cosine": "falls to 0 by half a cosine", "constant": "stays"}
    if t.schedule == "exponential":
        from eiwtrain.train.objective import learning_rate  # imports torch

        end = f", to {learning_rate(last - 1, t, epoch):.2g}" if epoch else ""
        course["exponential"] = f"times {t.lr_decay:g} after each epoch{end}"
    return rises + course[t.schedule] + tuned


def _by_mode(config: Config, found: Costs) -> list[str]:
    """Return a table of the arithmetic and memory of each mode, the config's own marked."""
    from eiwtrain.driver import costs

    most, images = config.max_workers, config.train.micro_batch
    said = [
        f"memory    of one of {most} workers at micro_batch {images}, and FLOPs, by model.backprop",
        "            mode           GFLOP/image   kept/image        kept  recomputed       state       total",
    ]
    for mode in costs.COUNTED_MODES:
        kept, total = found.kept_bytes(mode, images), found.worker_bytes(mode, most)
        state = found.state_bytes(most)
        cells = (found.activation_bytes[mode], kept, total - state - kept, state, total)
        said.append(
            f"          {'*' if mode == found.mode else ' '} {mode:13}{found.flops_per_image[mode] / 1e9:13,.2f} "
            + "".join(f"{_gb(n):>12}" for n in cells)
        )
    if config.model.backprop == "auto":
        budget = config.model.memory_budget
        room = f"{_gb(budget)} (model.memory_budget)" if budget is not None else f"an {costs.REFERENCE.name}"
        kinds = {"stored": "keeps all in", "selective": "keeps what is dear to compute in"}
        which = kinds.get(found.mode, "keeps what fits and inverts the rest in")
        said.append(f"          * auto {which} {room}")
    return said


def _cost(price: prices.Price, hours: float) -> str:
    """Return what this many hours of a worker cost: from the lowest to the highest if that depends on its node."""
    lowest, highest = prices.bounds(price)
    return money(lowest * hours) + (f"-{money(highest * hours)}" if highest > lowest else "")


def _by_gpu(found: Costs, workers: list[int], price: prices.Price | None) -> list[str]:
    """Return a table of speed, time and cost on each kind of GPU for these numbers of workers, the greatest first."""
    from eiwtrain.driver import costs

    t, most = found.train, workers[0]
    said = [
        f"time      assumed: a GPU computes at {costs.MFU:.0%} of its published bfloat16 peak, all the time,",
        f"          or waits for its host, which starts an operation in {costs.LAUNCH * 1e6:g} us",
    ]
    enough = micro_batches(t.global_batch, t.micro_batch, 1)  # for a step of one micro-batch each
    if most > enough:
        rows, _ = batching(t, most)
        said.append(
            f"          {enough} can have a step of one micro-batch each; {most} get {rows} images each, "
            "in no less time where they wait for the host"
        )
    head = "" if price is None else f"{'cost':>20}"
    heads = "".join(f"{f'hours on {n}':>13}  GPU-hours{head}" for n in workers)
    said.append(f"            GPU           images/s each{heads}")
    for gpu in costs.GPUS:
        if not found.fits(gpu, workers[-1]):
            said.append(f"            {gpu.name:13}{'does not fit':>14}{_by_sharding(found, gpu, most)}")
            continue
        each = t.global_batch / found.step_seconds(gpu, most) / most
        hours = [(n, t.max_steps * found.step_seconds(gpu, n) / 3600) for n in workers]
        cells = "".join(
            f"{h:13,.1f}{n * h:11,.0f}" + ("" if price is None else f"{_cost(price, n * h):>20}") for n, h in hours
        )
        said.append(f"            {gpu.name:13}{each:14,.0f}{cells}")
    return said


def _by_sharding(found: Costs, gpu: Gpu, workers: int) -> str:
    """Return which ZeRO stage makes a config that does not fit into a GPU fit, if one does."""
    for stage in () if found.train.optimizer == "muon" else (1, 2, 3):
        train = found.train.model_copy(update={"zero_stage": stage})
        if replace(found, train=train).fits(gpu, workers):
            return f"; on {workers} it does with train.zero_stage={stage}"
    return ""


def look(config: Config, manifest: Manifest | None, console: Console) -> int:
    """Check data, checkpoint, storage and MLflow and print what is found; return the exit code.

    Raises:
        ConfigError: one of them cannot be used.
    """
    from eiwtrain import tracking

    if manifest is None:
        console.note(f"data      none at {config.data.path}; the run writes {config.data.prepare} there first")
    else:
        counts = ", ".join(f"{s.samples:,} {name}" for name, s in manifest.splits.items())
        console.note(f"data      {config.data.path}: {counts} images, fingerprint {manifest.fingerprint[:12]}")
        if manifest.protocol:
            console.note(f"          {manifest.protocol}")
    found = next(iter(preflight.find_checkpoints(config, manifest)), None)
    console.note(f"start     {'a new run' if found is None else f'step {found.step:,}, {found.url}'}")
    preflight.check_storage(config)
    console.note(f"storage   {config.root}: can be written")
    try:
        tracking.check(config)
    except tracking.TrackingError as e:
        raise ConfigError(str(e)) from None
    console.note(f"tracking  {tracking.tracking_uri(config)}: answers; experiment '{config.tracking.experiment}'")
    return 0


def _gb(n: float) -> str:
    """Return a number of bytes as a text, in MB below a GB."""
    return f"{n / 1e9:,.2f} GB" if n >= 1e9 else f"{n / 1e6:,.1f} MB"
