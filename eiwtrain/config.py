"""The one typed config: YAML, then `section.field=value` overrides, then checks that name what would be right.

Not for looking at the world (is there a GPU, does the data exist): that is `eiwtrain.preflight`.
Imports neither torch nor Ray, so that a typo is reported in well under a second.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic import ValidationError as PydanticError

from eiwtrain.storage import is_local

MAX_ERROR_LINES = 4


class ConfigError(ValueError):
    """The config cannot be used; the message is at most `MAX_ERROR_LINES` lines, each naming a field and the remedy."""


Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """Base of every section: unknown fields are refused, the docstring under a field is its meaning."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _a_bool_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("a number or a word is wanted here, not true or false")
        return value


class Run(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run: its folder under `storage`, its MLflow run; the same name goes on where it stopped."""
    storage: Text = "runs"
    """Folder or fsspec URL (s3://...) under which checkpoints, samples and the exported model of each run live."""
    max_failures: NonNegativeInt = 3
    """How often Ray may restart the workers after a crash before the run counts as failed."""


class Data(Section):
    path: Text
    """Folder or fsspec URL that holds the data set's manifest.json (written by `python -m data_prep`)."""
    resolution: PositiveInt
    """Side of the square images, pixels; must be the data set's."""
    prepare: Literal["photos"] | None = None
    """Source that `data_prep` writes to `path` first when no data set is there; null: the data set must exist."""
    train_split: Text = "train"
    """Name of the split to train on."""
    eval_split: Text = "test"
    """Name of the held-out split."""
    flip: bool = True
    """Mirror each training image left-right with probability 1/2."""
    lanes: PositiveInt = 64
    """Slices of an epoch that are read side by side; part of the sample order, so fixed for a run."""
    shuffle_block: PositiveInt = 1024
    """Samples that are shuffled together inside a lane; part of the sample order, so fixed for a run."""
    cache_dir: Text | None = None
    """Local folder for shards fetched from remote storage; null: a folder of the system's temporary directory."""
    cache_bytes: PositiveInt = 64 << 30
    """Upper bound of that cache on each node, bytes."""
    loader_workers: NonNegativeInt = 0
    """Processes per training worker that read and decode; 0: in the training process itself."""


class Conditioner(Section):
    kind: Literal["conv", "residual", "transformer"] = "conv"
    """The network inside each coupling: conv (Glow's), residual (gated blocks), transformer (on patches, as Jet's)."""
    hidden: PositiveInt = 128
    """Its channels."""
    depth: NonNegativeInt = 1
    """conv: 1x1 convolutions between its first and its last 3x3 convolution; otherwise: blocks."""
    activation: Literal["relu", "gelu", "silu"] = "relu"
    """Between convolutions; a transformer has gelu."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of activations set to zero while training."""
    heads: PositiveInt = 4
    """Of a transformer's attention; must divide `hidden`."""
    patch: PositiveInt = 2
    """Side of a transformer's patches, in places of a level's grid (each level halves the image's side)."""


class Model(Section):
    preset: Literal["glow", "eiw", "jet"] | None = None
    """A published size (`eiwtrain/flow/presets.py`) in place of the defaults here; what is set beside it counts."""
    levels: PositiveInt = 3
    """Scales: each halves the side of the image and, but for the last, factors out half of the channels."""
    steps: PositiveInt = 8
    """Flow steps (actnorm, invertible 1x1 convolution, affine coupling) on each level."""
    conditioner: Conditioner = Conditioner()
    """The network inside each coupling and each split's prior."""
    coupling: Literal["affine", "spline"] = "affine"
    """What a coupling does: an affine map, or one followed by a rational-quadratic spline."""
    bins: int = Field(default=8, ge=2)
    """Of each spline."""
    shuffle: Literal["none", "fixed", "hard", "soft"] = "soft"
    """Entropy-informed weighting shuffle before each split: none, fixed, hard (per-sample sort), soft (rotation)."""
    dequantization: Literal["uniform", "variational"] = "uniform"
    """Noise under the pixels: uniform, or from a small flow that is trained along."""
    classes: NonNegativeInt = 0
    """Of a class-conditional model, as many as the data set has; 0: labels play no part."""
    backprop: Literal["stored", "checkpointed", "invertible", "auto"] = "invertible"
    """How backward gets activations: keep them, recompute each step, invert the flow (memory constant in depth), or
    keep as many as fit and invert the rest."""
    memory_budget: NonNegativeInt | None = None
    """With `backprop: auto`, bytes of activations that a worker may keep; null: what is free when it starts."""
    trunk_dtype: Literal["float32", "float64"] = "float32"
    """Precision of what flows between couplings and of log-determinants."""
    anchor_every: NonNegativeInt = 0
    """Where backward inverts, keep a true activation every n steps, which bounds drift; 0: only one a level."""
    n_bits: int = Field(default=8, ge=1, le=8)
    """Bits per channel that are modelled; 5 is usual for LSUN and CelebA-HQ."""

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, values: Any) -> Any:
        name = values.get("preset") if isinstance(values, dict) else None
        if not isinstance(name, str) or not isinstance(values.get("conditioner", {}), dict):
            return values
        from eiwtrain.flow.presets import PRESETS, preset  # not above: it imports torch, which takes seconds

        return preset(name, **values) if name in PRESETS else values


class Train(Section):
    global_batch: PositiveInt = 64
    """Images per optimizer step over all workers; the samples of a step do not depend on the number of workers."""
    micro_batch: PositiveInt = 32
    """Images per forward pass of one worker; gradients accumulate until `global_batch` is reached."""
    max_steps: PositiveInt = 1000
    """Optimizer steps after which the run is finished."""
    max_hours: PositiveFloat | None = None
    """Wall time of one attempt, hours, after which it checkpoints and stops, to go on later; null: no limit."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate of AdamW."""
    warmup_steps: NonNegativeInt = 100
    """Steps over which the learning rate rises linearly from zero."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Learning rate after the warm-up: constant, or half a cosine down to zero at `max_steps`."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of AdamW."""
    clip: NonNegativeFloat = 50.0
    """Gradient norm (loss in bits/dim) above which gradients are scaled down; 0: never."""
    shuffle_penalty: NonNegativeFloat = 1e-3
    """Weight of the shuffle's regulariser (mean squared log-weight) in the loss, bits/dim per unit."""
    ema: float = Field(default=0.999, ge=0, lt=1)
    """Decay per step of the averaged weights that are evaluated and exported; 0: the weights themselves."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of the conditioners; the trunk has its own (`model.trunk_dtype`), parameters stay float32."""
    compile: bool = False
    """Compile the conditioners by torch.compile: minutes at the start, fewer and faster kernels after."""
    zero_stage: Literal[0, 1, 2] = 1
    """DeepSpeed ZeRO: 0 replicates the optimizer state, 1 shards it over workers, 2 also shards gradients."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of initial weights, sample order, dequantisation noise and flips."""
    log_every_seconds: PositiveFloat = 5.0
    """Time between two training lines, seconds."""


class Workers(Section):
    min: PositiveInt = 1
    """Workers needed to start."""
    max: PositiveInt | None = None
    """Workers to use when the cluster has room; null: as `min`."""
    gpus: Literal[0, 1] = 0
    """GPUs per worker; 0: CPU and gloo."""
    cpus: PositiveInt = 1
    """CPU cores per worker."""


class Checkpoint(Section):
    every: PositiveInt = 500
    """Steps between two checkpoints; one is also written after each evaluation, on a stop and at the end."""
    keep_last: PositiveInt = 2
    """Newest checkpoints to keep; the best by held-out bits/dim is kept besides."""


class Tracking(Section):
    uri: Text | None = None
    """MLflow tracking URI; null: sqlite in a local `run.storage`."""
    experiment: Text = "eiwtrain"
    """MLflow experiment of the run."""
    log_every: PositiveInt = 10
    """Steps between two points of the training curves."""


class Eval(Section):
    every: PositiveInt = 1000
    """Steps between two evaluations on the held-out split; one is also made at the end."""
    images: PositiveInt = 2048
    """Held-out images scored (the first of the split; all when it has fewer)."""
    samples: PositiveInt = 16
    """Images drawn at each temperature, and reconstructions, in the sample grid."""
    temperatures: tuple[PositiveFloat, PositiveFloat] = (0.7, 1.0)
    """The two scales of the latents that the sample grid shows."""
    drift_warning: PositiveFloat = 1e-2
    """Drift (relative error of held-out images through the flow and back) above which a warning names the remedy."""


class Config(Section):
    """Everything a run needs to know. See DESIGN: the fields that shape samples or weights are fixed for a run."""

    run: Run
    data: Data
    model: Model = Model()
    train: Train = Train()
    workers: Workers = Workers()
    checkpoint: Checkpoint = Checkpoint()
    tracking: Tracking = Tracking()
    eval: Eval = Eval()

    @property
    def root(self) -> str:
        """URL of this run's folder."""
        return f"{self.run.storage.rstrip('/')}/{self.run.name}"

    @property
    def max_workers(self) -> int:
        """The most workers the run may use."""
        return self.workers.max or self.workers.min


def load_config(path: str, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply `section.field=value` overrides and validate.

    Values are YAML; `${NAME}` and `${NAME:-default}` stand for environment variables. Relative local paths become
    absolute: under the working directory, or under `~/eiwtrain` inside a Ray job, whose working directory is a
    temporary copy.

    Raises:
        ConfigError: with at most `MAX_ERROR_LINES` lines, each a field, what is wrong and what would be right.
    """
    raw = _read_yaml(path)
    for override in overrides or []:
        _override(raw, override)
    raw = _expand(raw, "")
    try:
        config = Config.model_validate(raw)
    except PydanticError as e:
        raise ConfigError(_limit([_explain(dict(err)) for err in e.errors()])) from None
    if problems := _impossible(config):
        raise ConfigError(_limit(problems))
    return _absolute_paths(config)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def describe_fields() -> str:
    """One line a field: name, default, meaning."""
    lines = []
    for name, default, meaning in _fields(Config):
        lines.append(f"{name} = {default}\n    {meaning}")
    return "\n".join(lines)


def _read_yaml(path: str) -> dict[str, Any]:
    file = Path(path)
    if not file.is_file():
        near = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.yaml")], 1, 0.4)
        hint = f"; did you mean {file.parent / near[0]}?" if near else "; give the path of a YAML file"
        what = "is a folder" if file.is_dir() else "no such config file"
        raise ConfigError(f"{path}: {what}{hint}")
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(e).split())[:200]}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must hold sections (run:, data:, ...), but holds {type(raw).__name__}")
    return raw


def _override(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"{text!r} is not an override; write section.field=value, e.g. train.max_steps=100")
    *sections, field = key.split(".")
    here = raw
    for section in sections:
        if not isinstance(here.get(section), dict):
            here[section] = {}
        here = here[section]
    try:
        here[field] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"{key}: {value!r} is not valid YAML; quote it") from None


def _expand(value: Any, where: str) -> Any:
    """Replace `${NAME}` and `${NAME:-default}` in every string below `value`."""
    if isinstance(value, dict):
        return {k: _expand(v, f"{where}.{k}".lstrip(".")) for k, v in value.items()}
    if isinstance(value, list):
        return [_expand(v, where) for v in value]
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        found = os.environ.get(name) or default
        if found is None:
            raise ConfigError(f"{where}: environment variable {name} is not set; export {name}=...")
        return found

    return re.sub(r"\$\{(?P<name>\w+)(?::-(?P<default>[^}]*))?\}", variable, value)


def _explain(error: dict[str, Any]) -> str:
    """One line for one pydantic error: the field, what is wrong, what would be right."""
    location = [str(p) for p in error["loc"]]
    name = ".".join(location)
    known = {n: (default, meaning) for n, default, meaning in _fields(Config)}
    sections = {n.rsplit(".", 1)[0] for n in known}
    if error["type"] == "extra_forbidden":
        siblings = [n for n in [*known, *sections] if n.count(".") == name.count(".")]
        near = difflib.get_close_matches(name, siblings, 1, 0.6) or difflib.get_close_matches(
            location[-1], [n.rsplit(".", 1)[-1] for n in known], 1, 0.6
        )
        full = next((n for n in [*known, *sections] if near and (n == near[0] or n.endswith("." + near[0]))), None)
        hint = f"did you mean {full}?" if full else "`--fields` lists all"
        return f"{name}: no such field; {hint}"
    meaning = next((known[n][1] for n in (name, ".".join(location[:-1])) if n in known), "")
    if error["type"] == "missing":
        return f"{name}: is missing. {meaning or 'A section of the config.'}"
    problem = error["msg"][0].lower() + error["msg"][1:]
    return f"{name}: {error['input']!r:.80}: {problem}. {meaning}".strip()


def _impossible(c: Config) -> list[str]:
    """Combinations that no run could satisfy."""
    problems = []
    factor = 2**c.model.levels
    if c.data.resolution % factor:
        most = (c.data.resolution & -c.data.resolution).bit_length() - 1
        right = f"model.levels at most {most}" if most else f"a data.resolution that is a multiple of {factor}"
        problems.append(
            f"model.levels: {c.model.levels} levels need a resolution divisible by 2^{c.model.levels} = {factor}, "
            f"but data.resolution is {c.data.resolution}; use {right}"
        )
    if c.train.micro_batch > c.train.global_batch:
        problems.append(
            f"train.micro_batch: {c.train.micro_batch} is above train.global_batch = {c.train.global_batch}; "
            f"use at most {c.train.global_batch}"
        )
    if c.max_workers < c.workers.min:
        problems.append(
            f"workers.max: {c.workers.max} is below workers.min = {c.workers.min}; raise it or leave it out"
        )
    if c.max_workers > c.train.global_batch:
        problems.append(
            f"workers.max: {c.max_workers} workers cannot share train.global_batch = {c.train.global_batch} images; "
            f"use at most {c.train.global_batch} workers"
        )
    problems += _impossible_model(c.model, c.data.resolution)
    if c.tracking.uri is None and not is_local(c.run.storage):
        problems.append(
            f"tracking.uri: must be set when run.storage is remote ({c.run.storage}); "
            "use your MLflow server, e.g. http://host:5000"
        )
    for name, url in (("run.storage", c.run.storage), ("data.path", c.data.path), ("tracking.uri", c.tracking.uri)):
        if url and re.match(r"[\w+.-]+://[^/]*@", url):
            problems.append(
                f"{name}: a password in a URL would be logged; give it in the environment "
                "(MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; "
                "before a database put an MLflow server)"
            )
    return problems


def _impossible_model(m: Model, resolution: int) -> list[str]:
    problems = []
    if m.anchor_every and m.backprop not in ("invertible", "auto"):
        problems.append(
            f"model.anchor_every: {m.anchor_every} has no meaning with model.backprop = {m.backprop}; use 0"
        )
    if m.memory_budget is not None and m.backprop != "auto":
        problems.append(
            f"model.memory_budget: {m.memory_budget} has no meaning with model.backprop = {m.backprop}; "
            "use null, or model.backprop=auto"
        )
    if m.conditioner.kind == "transformer":
        hidden, heads, patch = m.conditioner.hidden, m.conditioner.heads, m.conditioner.patch
        if hidden % heads:
            problems.append(
                f"model.conditioner.heads: {heads} does not divide model.conditioner.hidden = {hidden}; "
                f"use {max(n for n in range(1, heads) if hidden % n == 0)}"
            )
        least = resolution // 2**m.levels
        if least and least % patch:
            problems.append(
                f"model.conditioner.patch: {patch} does not divide the last level's side, {least}; "
                f"use {max(n for n in range(1, patch) if least % n == 0)} or fewer levels"
            )
    return problems


def _absolute_paths(c: Config) -> Config:
    job = "working_dir_files" in Path.cwd().parts  # where Ray unpacks a job's working directory
    base = Path.home() / "eiwtrain" if job else Path.cwd()

    def absolute(url: str | None) -> str | None:
        return url if url is None or not is_local(url) else str(base / Path(url.removeprefix("file://")).expanduser())

    data = c.data.model_copy(update={"path": absolute(c.data.path), "cache_dir": absolute(c.data.cache_dir)})
    run = c.run.model_copy(update={"storage": absolute(c.run.storage)})
    uri = c.tracking.uri or ""
    if uri.startswith("sqlite:///"):  # four slashes are absolute; workers have working directories of their own
        uri = f"sqlite:///{absolute(uri.removeprefix('sqlite:///'))}"
    tracking = c.tracking.model_copy(update={"uri": uri or None})
    return c.model_copy(update={"data": data, "run": run, "tracking": tracking})


def _fields(model: type[BaseModel], prefix: str = "") -> list[tuple[str, str, str]]:
    """(dotted name, default as YAML, meaning) of every leaf field below `model`."""
    rows: list[tuple[str, str, str]] = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            rows += _fields(kind, f"{prefix}{name}.")
            continue
        default = "(required)" if field.is_required() else yaml.safe_dump(field.default).split("\n")[0]
        if choices := [str(a) for a in get_args(kind) if isinstance(a, str | int)]:
            default += f"  # {' | '.join(choices)}"
        rows.append((prefix + name, default, field.description or ""))
    return rows


def _limit(lines: list[str]) -> str:
    if len(lines) > MAX_ERROR_LINES:
        more = len(lines) - (MAX_ERROR_LINES - 1)
        lines = [*lines[: MAX_ERROR_LINES - 1], f"... and {more} more"]
    return "\n".join(lines)
