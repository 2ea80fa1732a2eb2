"""The one typed config: its sections and fields, what each means and which values it takes.

Not for reading it from a file, nor for what fields must satisfy together: that is `eiwtrain.config.file`.
"""

from __future__ import annotations

import ast
import inspect
import math
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

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

from eiwtrain.config import interval, prices
from eiwtrain.flow.config import ConditionerConfig, DequantizerConfig, FlowSettings
from eiwtrain.flow.presets import PRESETS, preset
from eiwtrain.terminal.lines import one_line

MAX_ERROR_LINES = 4

if TYPE_CHECKING:  # a type checker takes no Literal that is computed
    PresetName = str
else:
    PresetName = Literal[tuple(PRESETS)]


class ConfigError(ValueError):
    """The config cannot be used; the message is at most `MAX_ERROR_LINES` lines, each naming a field and the remedy."""

    passing = False
    """Whether the same command may work later: a server does not answer now."""

    @classmethod
    def because(cls, text: str, cause: Exception) -> ConfigError:
        """Return an error whose cause may pass, if that says so."""
        error = cls(text)
        error.passing = bool(getattr(cause, "passing", False))
        return error


Text = Annotated[str, Field(min_length=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of every section: unknown fields are refused, the docstring under a field is its meaning."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _a_bool_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError(
                "it must be a number or a word, not true or false; a word that YAML takes so, such as yes: quote it"
            )
        return value


class Run(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)
    """Name of the run: its folder under `storage`, its MLflow run; the same name resumes where it stopped."""
    storage: Text = "runs"
    """Folder or fsspec URL (s3://...) under which checkpoints, samples and the exported model of each run live."""
    max_failures: NonNegativeInt = 3
    """How often in a row crashed workers are started again, without a new checkpoint in between, before the run counts
    as failed."""


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
    augment: Literal["none", "flip", "eta"] = "flip"
    """How training images vary from epoch to epoch: none; flip, mirrored left-right with probability 1/2; eta,
    DenseFlow's, also shifted by up to 4 %."""
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


class Conditioner(Section, ConditionerConfig):  # type: ignore[misc]  # frozen it is, by pydantic's config
    """The network inside each coupling: the fields of the flow's own `ConditionerConfig`."""


class Dequantizer(Section, DequantizerConfig):  # type: ignore[misc]  # as above
    """The size of the flow of variational dequantization: the fields of the flow's own `DequantizerConfig`."""


class Model(Section, FlowSettings):  # type: ignore[misc]  # as above
    """The flow: a preset, and the fields of the flow's own `FlowSettings`."""

    preset: PresetName | None = None
    """A published size (`eiwtrain/flow/presets.py`) in place of the defaults here; fields set beside it win."""
    conditioner: Conditioner = Conditioner()
    dequantizer: Dequantizer = Dequantizer()

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if values.get("kl") is True:  # YAML's reading of the word
            values = {**values, "kl": "true"}
        parts = (values.get(part, {}) for part in ("conditioner", "dequantizer"))
        name = values.get("preset")
        if not isinstance(name, str) or name not in PRESETS or not all(isinstance(part, dict) for part in parts):
            return values
        return preset(name, values)

    def to_flow(self) -> dict[str, Any]:
        """Return these fields as `eiwtrain.flow.FlowConfig.from_dict` takes them."""
        return self.model_dump(exclude={"preset"})


class Train(Section):
    global_batch: PositiveInt = 64
    """Images per optimizer step over all workers; the samples of a step do not depend on the number of workers."""
    micro_batch: PositiveInt = 32
    """Images per forward pass of one worker; gradients accumulate until `global_batch` is reached."""
    max_steps: PositiveInt = 1000
    """Optimizer steps after which the run is finished."""
    max_hours: PositiveFloat | None = None
    """Wall time of the job, hours, after which it checkpoints and stops, to resume later; null: no limit."""
    max_cost: PositiveFloat | None = None
    """What the run may cost over all jobs, by `workers.price_per_hour`; beyond it it checkpoints and stops, to resume
    with a higher limit; null: no limit."""
    optimizer: Literal["adamw", "adamax", "muon"] = "adamw"
    """Optimizer: AdamW; Adamax, whose steps are scaled by the greatest recent gradient in place of the mean square; or
    Muon, which orthogonalises the steps of the networks' weights and leaves all else to AdamW (ZeRO 0 only)."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """The optimizer's decay per step of its mean gradient and of its gradient scale."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate of the optimizer."""
    warmup_steps: NonNegativeInt = 100
    """Steps over which the learning rate rises linearly from zero."""
    schedule: Literal["constant", "cosine", "exponential"] = "cosine"
    """Learning rate between warm-up and fine-tuning: constant, half a cosine down to zero, or less by a factor after
    each epoch."""
    lr_decay: PositiveFloat = Field(default=0.995, le=1)
    """exponential: the factor on the learning rate after each epoch, that is as many samples as there are training
    images."""
    finetune_steps: NonNegativeInt = 0
    """Last of the `max_steps` that fine-tune at a small constant learning rate; 0: none."""
    finetune_lr: PositiveFloat = 2e-5
    """Learning rate of these steps. DenseFlow has 2e-5."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of the optimizer: decoupled in AdamW, a part of the gradient in Adamax."""
    clip: NonNegativeFloat = 50.0
    """Gradient norm (loss in bits/dim) above which gradients are scaled down; 0: never."""
    shuffle_penalty: NonNegativeFloat = 1e-3
    """Weight of the shuffle's regulariser (hard, soft: mean squared log-weight) in the loss, bits/dim per unit."""
    ema: float = Field(default=0.999, ge=0, lt=1)
    """Decay per step of the averaged weights that are evaluated and exported; 0: the weights themselves."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of the conditioners; the trunk has its own (`model.trunk_dtype`), parameters stay float32."""
    max_skipped: NonNegativeInt = 3
    """Steps in a row whose loss or gradient is not finite that are skipped and counted; one more fails the run."""
    rollbacks: NonNegativeInt = 0
    """Times that the run, instead of failing so, returns to the weights of the last good checkpoint and continues with
    the samples after the bad steps."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO: 0 replicates the optimizer state, the fastest where it fits; 1 shards it over workers, 2 also
    gradients, 3 also weights."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of initial weights, sample order, dequantisation noise and augmentation."""
    deterministic: bool = False
    """Use only kernels that compute the same each time: slower on GPUs, where a replayed step is then equal to the
    bit, as it always is on CPUs."""
    log_every_seconds: PositiveFloat = 5.0
    """Time between two training lines, seconds."""


class Workers(Section):
    min: PositiveInt = 1
    """Workers needed to start, and to continue when a node is lost."""
    max: PositiveInt | None = None
    """Workers to use when the cluster has room; null: as `min`."""
    grow_seconds: PositiveFloat = 60.0
    """How long there must be room for more workers, up to `max`, before all are started again to use it, seconds."""
    hang_seconds: PositiveFloat = 1200.0
    """Time without progress (up to the first step at least 300) after which a worker prints its stacks and all are
    started again, seconds; longer than a compilation and than three times EIWTRAIN_RETRY_SECONDS."""
    gpus: Literal[0, 1] = 0
    """GPUs per worker; 0: CPU and gloo."""
    cpus: PositiveInt = 1
    """CPU cores per worker."""
    price_per_hour: float | dict[str, float] | None = None
    """What one worker costs in an hour, in any currency: a number, or {TYPE: number} by the instance type of its node
    (docs/training.md); null: the run's cost is not counted."""

    @field_validator("price_per_hour", mode="before")
    @classmethod
    def _prices(cls, value: Any) -> Any:
        return prices.parse(value)


class Checkpoint(Section):
    every: int | str = 500
    """Between two checkpoints: steps, a time (90s, 10m, 1.5h), or auto, from what one costs and how often the run
    fails; one is also written after each evaluation, on a stop and at the end."""
    mtbf_hours: PositiveFloat = 6.0
    """Mean time between failures, hours, that `every: auto` assumes until the run has seen its own."""
    keep_last: PositiveInt = 2
    """Newest checkpoints to keep; the best by held-out bits/dim is kept in addition."""
    keep_every: NonNegativeInt = 0
    """Length of a span of steps whose first checkpoint is kept forever, in addition; 0: none."""

    near: Text | None = None
    """Local folder of each node, such as /dev/shm or one on its disk, for copies of the newest checkpoint, which a
    restart reads instead of `run.storage`; null: no copies."""

    @field_validator("every", mode="before")
    @classmethod
    def _an_interval(cls, value: Any) -> Any:
        interval.parse(value)
        return value


class Tracking(Section):
    uri: Text | None = None
    """MLflow tracking URI; null: what the environment variable MLFLOW_TRACKING_URI says where the job starts, or sqlite
    in a local `run.storage`."""
    experiment: Text = "eiwtrain"
    """MLflow experiment of the run."""
    log_every: PositiveInt = 10
    """Steps between two points of the training curves."""
    registered_model: Annotated[str, Field(pattern=r"^[\w.-][\w. -]*$")] | None = None
    """Name in MLflow's Model Registry under which the finished run's model becomes a version; null: register it with
    `eiwtrain.export`."""


class Eval(Section):
    every: PositiveInt = 1000
    """Steps between two evaluations on the held-out split; one is also made at the end."""
    images: PositiveInt = 2048
    """Held-out images scored (the first of the split; all when it has fewer)."""
    samples: PositiveInt = 16
    """Images drawn at each temperature, and reconstructions, in the sample grid."""
    temperatures: tuple[PositiveFloat, PositiveFloat] = (0.7, 1.0)
    """The two scales of the latents that the sample grid shows."""
    drift_warning: PositiveFloat = 3e-3
    """Drift (relative error of held-out images through the flow and back) above which a warning names the remedy."""


class Config(Section):
    """Everything a run needs to know. Fields that shape samples or weights are fixed for a run (docs/training.md)."""

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


def micro_batches(global_batch: int, micro_batch: int, world_size: int) -> int:
    """Return the number of micro-batches into which a rank cuts its share of a global batch."""
    return math.ceil(global_batch / (micro_batch * world_size))


def batching(train: Train, world_size: int) -> tuple[int, int]:
    """Return (rows of a micro-batch, micro-batches of a step) of each rank.

    As few micro-batches as `train.micro_batch` allows, and no more rows than they need: a remainder is padded.
    """
    accumulation = micro_batches(train.global_batch, train.micro_batch, world_size)
    return math.ceil(train.global_batch / (world_size * accumulation)), accumulation


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def describe_fields() -> str:
    """Return two lines for each field: name and default, meaning."""
    lines = []
    for name, default, meaning in leaf_fields(Config):
        lines.append(f"{name} = {default}\n    {meaning}")
    return "\n".join(lines)


def leaf_fields(model: type[BaseModel], prefix: str = "") -> list[tuple[str, str, str]]:
    """Return (dotted name, default as YAML, meaning) of every leaf field below `model`."""
    rows: list[tuple[str, str, str]] = []
    inherited = _meanings(model)
    # A preset first: it stands for defaults of the fields after it.
    for name, field in sorted(model.model_fields.items(), key=lambda item: item[0] != "preset"):
        kind = field.annotation
        # Python 3.10 says that tuple[...] is a type, but issubclass refuses it
        if isinstance(kind, type) and get_origin(kind) is None and issubclass(kind, BaseModel):
            rows += leaf_fields(kind, f"{prefix}{name}.")
            continue
        as_yaml = "" if field.is_required() else yaml.safe_dump(field.default, default_flow_style=True)
        default = as_yaml.split("\n")[0] or "(required)"
        choices = [arg for part in (kind, *get_args(kind)) for arg in get_args(part)]  # of a Literal, or one or None
        if words := [str(c) for c in choices if isinstance(c, str | int)]:
            default += f"  # {' | '.join(words)}"
        meaning = field.description or inherited.get(name, "")
        rows.append((prefix + name, default, one_line(meaning, limit=None)))
    return rows


def _meanings(section: type) -> dict[str, str]:
    """Return the docstrings under the fields of the dataclass that a section inherits from, if it does: pydantic reads
    those of its own classes alone."""
    sources = [inspect.getsource(base) for base in section.__bases__ if is_dataclass(base)]
    classes = [statement for source in sources for statement in ast.parse(source).body]
    pairs = [pair for c in classes if isinstance(c, ast.ClassDef) for pair in zip(c.body, c.body[1:], strict=False)]
    return {
        field.target.id: ast.literal_eval(text.value)
        for field, text in pairs
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr)
    }
