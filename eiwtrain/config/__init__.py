"""The one typed config: its fields (`schema`), read from a file (`file`), and its intervals (`interval`)."""

from eiwtrain.config.schema import (
    MAX_ERROR_LINES,
    Config,
    ConfigError,
    Model,
    Train,
    Workers,
    batching,
    describe_fields,
    flatten,
    leaf_fields,
    micro_batches,
)

__all__ = [
    "MAX_ERROR_LINES",
    "Config",
    "ConfigError",
    "Model",
    "Train",
    "Workers",
    "batching",
    "describe_fields",
    "flatten",
    "leaf_fields",
    "micro_batches",
]
