"""What `benchmarks.density` trains: our flow or a peer's model with a recipe, for a time, in this process.

Not for which runs are made, nor for their table.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import measuring, peers
from benchmarks.reference import PublishedAttention
from eiwtrain import data, flow
from eiwtrain.data.augment import vary
from eiwtrain.data.noise import sample_keys
from eiwtrain.flow.dequantization import iwbo
from eiwtrain.flow.fields import Range, check_fields, check_known
from eiwtrain.scoring.estimator import Estimator, estimator_of
from eiwtrain.scoring.scores import mean
from eiwtrain.train.flat import FlatModule
from eiwtrain.train.optimizers import Block, Muon, matrices_of

Row = dict[str, Any]

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
} | {"muon": Muon}
"""All of torch by their names in lower case, but our Muon. LBFGS, which steps otherwise, fails."""

PARTS = ("attention", "norm")
INITIAL = 256  # images from which normalisations start
AT_ONCE = 100  # held-out images in a forward pass


@dataclass(frozen=True)
class Recipe:
    """How a variant is trained. Raises ValueError, naming the field, where it makes no sense."""

    optimizer: str = "adamw"
    """One of `OPTIMIZERS`; muon is the one of the config's `train.optimizer`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the optimizer. Weight decay is 0 unless given here."""
    lr: Annotated[float, Range(0)] = 2e-3
    """Peak learning rate."""
    warmup: Annotated[float, Range(0, below=1)] = 0.05
    """Share of the budget over which the rate rises from zero."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """The rate's course over the budget, which the warm-up multiplies."""
    batch: Annotated[int, Range(1)] = 32
    """Images of a step."""
    clip: Annotated[float, Range(0)] = 50.0
    """Gradient norm above which gradients are scaled down; 0: never."""
    ema: Annotated[float, Range(0, below=1)] = 0.99
    """Decay per step of the averaged weights, which are scored; 0: the weights themselves."""
    augment: Literal["none", "flip", "eta"] = "flip"
    """As the config's `data.augment`."""
    shuffle_penalty: Annotated[float, Range(0)] = 1e-3
    """As the config's `train.shuffle_penalty`."""
    published: tuple[str, ...] = ()
    """Parts of the authors' program in place of ours: attention, whose tokens are runs of one channel's numbers, and
    norm, batch normalisation."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer: {self.optimizer!r} is not one of {', '.join(OPTIMIZERS)}")
        if unknown := set(self.published) - set(PARTS):
            raise ValueError(f"published: {sorted(unknown)[0]!r} is not one of {', '.join(PARTS)}")
        try:
            self.optimize([nn.Parameter(torch.zeros(4))])
        except (TypeError, ValueError) as e:
            raise ValueError(f"options: {self.optimizer}: {e}") from None

    def optimize(self, parameters: list[nn.Parameter], blocks: Sequence[Block] = ()) -> torch.optim.Optimizer:
        """Return the optimizer of these parameters, with the peak learning rate; muon is that of one flat parameter,
        which begins with these blocks of matrices."""
        kind = OPTIMIZERS[self.optimizer]
        needed: dict[str, Any] = {"blocks": blocks} if kind is Muon else {}
        if "weight_decay" in inspect.signature(kind).parameters:
            needed["weight_decay"] = 0.0
        return cast(Any, kind)(parameters, **{"lr": self.lr, **needed, **self.options})

    def rate(self, done: float) -> float:
        """Return the factor on the learning rate after this share of the budget."""
        course = 0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1.0
        return max((min(1.0, done / self.warmup) if self.warmup else 1.0) * course, 1e-3)


@dataclass(frozen=True)
class Subject:
    """A model to train.

    Attributes:
        model: ours, or a peer's.
        bits: a function of the model (or one made alike), pixels and noise: bits/dim and regulariser, (B,) each.
        dims: of an image.
        noise_shape: of an image's noise.
        bound: what k draws of noise give; None where bits are exact.
    """

    model: nn.Module
    bits: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
    dims: int
    noise_shape: tuple[int, ...]
    bound: Callable[[int], Estimator] | None


def divide(given: Row) -> tuple[Recipe, Row]:
    """Return the recipe in the fields of a variant, and the fields that describe the model. Raises ValueError."""
    names = {f.name for f in fields(Recipe)}
    recipe: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return Recipe(**{k: v for k, v in recipe.items() if k in names}), {k: v for k, v in given.items() if k not in names}


def check(given: Row, image_shape: tuple[int, ...], folders: dict[str, Path]) -> None:
    """Raise ValueError unless these fields describe something that can be trained here."""
    _, described = divide(given)
    peer = described.get("peer")
    if peer in folders:
        load_peer(folders[peer])
        return
    if peer is not None:
        described.pop("peer")
        if peer not in peers.PEERS:
            raise ValueError(f"peer: {peer!r} is neither one of {', '.join(peers.PEERS)}, nor given by --peer")
        if not peers.installed(peer):
            raise ValueError(f"peer: {peer} is not installed: pip install --no-deps {peer}")
    known = ("preset", *(f.name for f in fields(flow.FlowConfig)))
    check_known("a variant", described, (*known, "peer", *(f.name for f in fields(Recipe))))
    _config(described, image_shape)


def _config(described: Row, image_shape: tuple[int, ...]) -> flow.FlowConfig:
    values = {"backprop": "stored", **described, "image_shape": list(image_shape)}
    name = values.pop("preset", None)
    return flow.FlowConfig.from_dict(values if name is None else flow.preset(name, values))


def load_peer(folder: Path) -> Callable[..., nn.Module]:
    """Return `make` of a folder's peer.py, which may import what lies beside it. Raises ValueError if it cannot."""
    file = folder / "peer.py"
    spec = importlib.util.spec_from_file_location(f"peer_{digest(folder)}", file)
    assert spec is not None  # it ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
        return cast(Callable[..., nn.Module], module.make)
    except Exception as e:  # a stranger's code
        raise ValueError(f"{file}: {type(e).__name__}: {e}") from None
    finally:
        sys.path.remove(str(folder))


def digest(folder: Path) -> str:
    """Return the digest of a folder's peer.py: rows of another one are not its rows. Raises ValueError."""
    try:
        return hashlib.sha256((folder / "peer.py").read_bytes()).hexdigest()[:16]
    except OSError as e:
        raise ValueError(f"{folder / 'peer.py'}: {e.strerror}; it has make(image_shape, **fields)") from None


def make(given: Row, image_shape: tuple[int, ...], folder: Path | None) -> Subject:
    """Return what the fields of a variant describe.

    Args:
        folder: of the peer, if it is not one of `benchmarks.peers`.
    """
    recipe, described = divide(given)
    peer, dims = described.pop("peer", None), math.prod(image_shape)
    if peer is None:
        ours = flow.EIWFlow(_config(described, image_shape))
        _publish(ours, recipe.published)

        def bits(model: nn.Module, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
            out: flow.FlowOutput = model(pixels, noise)
            return flow.bits_per_dim(out.log_prob, dims, ours.config.n_bits), out.penalty

        return Subject(ours, bits, dims, ours.config.noise_shape, lambda k: estimator_of(ours.config, k))

    sign, casts = 1, False
    if folder is not None:
        theirs = load_peer(folder)(image_shape, **described)
    else:
        config = _config(described, image_shape)
        sign, casts = -1, config.conditioner_dtype == "bfloat16"
        theirs = peers.glow(peer, config)
    exact = bool(getattr(theirs, "exact", False))

    def of_peer(model: nn.Module, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=casts):
            log_prob = sign * model(pixels if exact else flow.dequantize(pixels, noise))
        log_prob = log_prob.float()
        return flow.bits_per_dim(log_prob, dims, 0 if exact else 8), torch.zeros_like(log_prob)

    def bound(draws: int) -> Estimator:
        return Estimator("ELBO" if draws == 1 else f"IWBO({draws})", draws, "uniform dequantization noise")

    return Subject(theirs, of_peer, dims, image_shape, None if exact else bound)


def _publish(model: flow.EIWFlow, parts: tuple[str, ...]) -> None:
    """Put parts of the authors' program in place of ours: see `Recipe.published`."""
    for module in list(model.modules()):
        if isinstance(module, flow.DenseConditioner):
            hidden = module.first.out_channels
            if "attention" in parts:
                module.attention = PublishedAttention(hidden, hidden // 2)  # type: ignore[assignment]
            if "norm" in parts:
                module.norm = nn.BatchNorm2d(2 * hidden)  # type: ignore[assignment]


def train(job: Row, url: str, folder: Path | None) -> Row:
    """Train one variant with one seed in this process; return the job with its results.

    Outside the clock: reading, building, one step of another model (which pays for what only a process's first
    step does), and scoring.
    Inside it: the normalisations' start, batches with their augmentation, steps, and the average of the weights.
    """
    torch.set_num_threads(1)
    device = torch.device(job["device"])
    recipe, _ = divide(job["fields"])
    manifest = data.load_manifest(url)
    images = _read(url, manifest, "train")

    def made() -> Subject:
        torch.manual_seed(job["seed"])
        return make(job["fields"], (images.shape[3], *images.shape[1:3]), folder)

    subject = made()
    model = subject.model.to(device)
    chosen = np.random.default_rng(job["seed"])  # of its own: all variants see the same images
    drawn = torch.Generator(device).manual_seed(job["seed"])

    def batch(n: int, step: int) -> tuple[Tensor, Tensor]:
        rows = chosen.integers(len(images), size=n)
        pixels = images[rows]
        vary(pixels, sample_keys(job["seed"], 0, np.full(n, step), rows), recipe.augment)
        noise = torch.rand(n, *subject.noise_shape, generator=drawn, device=device)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device), noise

    def loss(module: nn.Module, some: tuple[Tensor, Tensor]) -> Tensor:
        bits, penalty = subject.bits(module, *some)
        return (bits + recipe.shuffle_penalty * penalty).mean()

    first = batch(INITIAL, 0)
    loss(made().model.to(device), (first[0][:2], first[1][:2])).backward()
    averaged = made().model.to(device)  # not a copy: a peer may keep functions of its own parts
    begin = measuring.now(device)
    if isinstance(model, flow.EIWFlow):
        model.initialize(*first)
    else:
        with torch.no_grad():
            subject.bits(model, *first)
    averaged.load_state_dict(model.state_dict())
    flat = FlatModule(model, matrices_of(model))  # as in training
    average = flat.average_in(dict(averaged.named_parameters()))
    optimizer = recipe.optimize([flat.weights], flat.blocks)
    peaks = [group["lr"] for group in optimizer.param_groups]
    steps = skipped = 0
    while (done := (measuring.now(device) - begin) / job["seconds"]) < 1:
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * recipe.rate(done)
        loss(model, batch(recipe.batch, steps + 1)).backward()
        flat.weights.grad = None
        flat.gather()
        norm = float(flat.norm())
        flat.clip_(norm, recipe.clip)
        if math.isfinite(norm):
            optimizer.step()
        else:
            skipped += 1
        average(1 - min(recipe.ema, (1 + steps) / (10 + steps)))
        for mine, its in zip(averaged.buffers(), model.buffers(), strict=True):
            mine.copy_(its)
        steps += 1
    spent = measuring.now(device) - begin
    result = {"steps": steps, "skipped": skipped, "parameters": flat.weights.numel(), "spent": spent}
    held_out = torch.from_numpy(_read(url, manifest, "test", job["images"])).permute(0, 3, 1, 2).contiguous()
    return {**job, **result, **score(subject, averaged.eval(), held_out, job["iwbo"], device)}


def _read(url: str, manifest: data.Manifest, split: str, most: int | None = None) -> np.ndarray[Any, Any]:
    """Return the first images of a split, uint8 (n, H, W, C)."""
    reader = data.ShardReader(url, manifest, split)
    pixels = reader.read(range(len(reader) if most is None else min(most, len(reader))))
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))


@torch.no_grad()
def score(subject: Subject, model: nn.Module, images: Tensor, draws: int, device: torch.device) -> Row:
    """Return bits/dim of held-out images with the names of their estimators; the noise is the same for every seed.

    A bound has its ELBO under `bits_per_dim` and the one of several draws under `iwbo_bits_per_dim`. Null stands for
    bits that are not finite.
    """
    generator = torch.Generator(device).manual_seed(0)
    parts = []
    for some in images.split(AT_ONCE):
        noises = [
            torch.rand(len(some), *subject.noise_shape, generator=generator, device=device)
            for _ in range(draws if subject.bound else 1)
        ]
        parts.append(torch.stack([subject.bits(model, some.to(device), noise)[0].double() for noise in noises]))
    bits = torch.cat(parts, 1).cpu()
    first = mean(bits[0])
    result: Row = {"estimator": str(subject.bound(1)) if subject.bound else "exact"}
    result |= {"bits_per_dim": _finite(first.bits_per_dim), "standard_error": _finite(first.standard_error)}
    if len(bits) > 1:
        assert subject.bound is not None
        nats = subject.dims * math.log(2)
        tighter = mean(-iwbo(-bits * nats) / nats)
        result |= {"iwbo_estimator": str(subject.bound(draws)), "iwbo_bits_per_dim": _finite(tighter.bits_per_dim)}
    return result


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
