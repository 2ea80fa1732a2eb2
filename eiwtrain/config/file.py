"""Reading of a config: a YAML file, then `section.field=value` overrides, then checks whose messages name the remedy.

Not for the fields themselves (`eiwtrain.config`), nor for looking at the world (is there a GPU, does the data exist):
that is `eiwtrain.driver.preflight`. Imports neither Ray nor torch, so that a typo is reported in well
under a second.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError as PydanticError

from eiwtrain.config import MAX_ERROR_LINES, Config, ConfigError, Model, flatten, leaf_fields
from eiwtrain.flow.config import FlowConfig
from eiwtrain.storage import anchored, is_local
from eiwtrain.storage.database import sqlite_path, sqlite_uri
from eiwtrain.terminal.lines import one_line
from eiwtrain.terminal.redact import REFUSAL, holds_secret, redact

_RENAMED = {"data.flip": "data.augment"}  # where names are too unlike to be guessed
_MOST_BYTES = 1 << 16
_MOST_VALUES, _MOST_ALIASES = 10_000, 20  # aliases that name each other, and merges, multiply
_TOO_MANY, _TOO_LONG = "too many aliases", "too long"
_PROBLEMS = {  # parts of PyYAML's messages, which may repeat the text, and what is wrong
    "mapping values are not allowed": "a second colon; quote the value",
    "could not find expected ':'": "a colon is missing",
    "undefined alias": "a value that begins with * must be quoted",
    "cannot start any token": "a value that begins with this character must be quoted",
    "could not determine a constructor": "a value that begins with ! must be quoted",
    "expected <block end>": "the indentation is not that of the lines above, or a quote is missing",
    "expected ',' or": "a comma or a closing bracket is missing",
    "escape character": "in double quotes a backslash must be doubled",
    "unexpected end of stream": "a closing quote or bracket is missing",
    "found duplicate anchor": "an anchor (&name) is defined twice",
    _TOO_LONG: f"over {_MOST_BYTES:,} bytes, and a config has some lines",
    _TOO_MANY: f"over {_MOST_ALIASES} aliases (*name)",
    "expected a single document": "a second document (---)",
}


def load_config(path: str, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply `section.field=value` overrides and validate.

    Values are YAML; `${NAME}` and `${NAME:-default}` stand for environment variables. Relative local paths become
    absolute: under the working directory, or under `~/eiwtrain` inside a Ray job, whose working directory is a
    temporary copy.

    Raises:
        ConfigError: with at most `MAX_ERROR_LINES` lines, each a field, what is wrong and what would be right.
    """
    raw = _read_yaml(path)
    for number, override in enumerate(overrides or [], 1):
        _override(raw, number, override)
    try:
        raw = _expand(raw, "", itertools.count())
    except RecursionError:
        raise ConfigError(f"{path}: it nests too deeply") from None
    try:
        config = Config.model_validate(raw)
    except PydanticError as e:
        by_field = {tuple(_field(dict(err))): dict(err) for err in e.errors()}  # the last of a field's is of a list
        raise ConfigError(_limit([_explain(error) for error in by_field.values()])) from None
    config = _tracked_where_mlflow_says(config)
    if problems := _impossible(config):
        raise ConfigError(_limit(problems))
    return _absolute_paths(config)


def _read_yaml(path: str) -> dict[str, Any]:
    file = Path(path)
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise yaml.MarkedYAMLError(problem=_TOO_LONG)
        raw = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as e:
        near = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.yaml")], 1, 0.4)
        hint = f"; did you mean {file.parent / near[0]}?" if near else "; give the path of a YAML file"
        what = "is a folder" if isinstance(e, IsADirectoryError) else "no such config file"
        raise ConfigError(f"{path}: {what}{hint}") from None
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read ({e.strerror}); it must be a YAML file that you may read") from None
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise ConfigError(f"{path}: not valid YAML{_where(e)}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must hold sections (run:, data:, ...), but holds {type(raw).__name__}")
    return raw


class _Loader(yaml.SafeLoader):
    """YAML's plain data, with few aliases."""

    aliases = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node; count it if it is an alias."""
        self.aliases += self.check_event(yaml.AliasEvent)
        if self.aliases > _MOST_ALIASES:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem=_TOO_MANY, problem_mark=mark)
        return super().compose_node(parent, index)


def _where(error: Exception) -> str:
    """Return what is wrong with a YAML text and where, without a word of it: a line may hold a password."""
    if isinstance(error, UnicodeDecodeError):
        return f": it is not UTF-8, at byte {error.start}"
    if isinstance(error, RecursionError):
        return ": it nests too deeply"
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = next((text for part, text in _PROBLEMS.items() if part in str(getattr(error, "problem", ""))), "")
    line = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
    return line + (f": {problem}" if problem else "")


def _override(raw: dict[str, Any], number: int, text: str) -> None:
    """Apply the override that is argument `number` of its kind."""
    key, equals, value = text.partition("=")
    names = {name for field, *_ in leaf_fields(Config) for name in (field, *field.split("."))}
    if not equals or not re.fullmatch(r"[\w.-]+", key, re.ASCII):
        plain = text in names or re.fullmatch(r"[a-z_]{1,20}", text)  # else it may be a password
        named = repr(text) if plain else f"number {number}"
        raise ConfigError(f"override {named} is not section.field=value; write e.g. train.max_steps=100")
    *sections, field = key.split(".")
    here = raw
    for section in sections:
        if not isinstance(here.get(section), dict):
            here[section] = {}
        here = here[section]
    try:
        here[field] = _value(key, value)
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise ConfigError(f"{key}: the value is not valid YAML{_where(e)}; quote it") from None


def _value(key: str, text: str) -> Any:
    """Return the value of an override: a word or a path as it stands, anything else as YAML reads it.

    To YAML a word ends before ` #`, where a comment begins, and before a space at its end.
    """
    node = yaml.compose(text, _Loader)
    if node is None:
        return text if text.strip() else None
    plain = isinstance(node, yaml.ScalarNode) and node.style is None
    if plain and node.tag == "tag:yaml.org,2002:str" and not text.lstrip().startswith("!"):
        return text
    if text[: node.start_mark.index].strip() or text[node.end_mark.index :].strip():
        raise ConfigError(f"{key}: YAML takes a part of the value for a comment or a mark; leave it out, or quote all")
    if plain and (":" in text or re.fullmatch(r"\s*[-+]?0[\d_]+\s*", text)):
        raise ConfigError(f"{key}: YAML reads a date, or a number to base 8 or 60; write a decimal number, or quote it")
    return yaml.load(text, _Loader)


def _expand(value: Any, where: str, counted: Iterator[int]) -> Any:
    """Replace `${NAME}` and `${NAME:-default}` in every string below `value`.

    Args:
        counted: counts the values; few aliases of YAML can stand for billions.
    """
    if next(counted) > _MOST_VALUES:
        raise ConfigError(f"{where}: over {_MOST_VALUES:,} values, by aliases of YAML (*name); write fewer")
    if isinstance(value, dict):
        return {k: _expand(v, f"{where}.{k}".lstrip("."), counted) for k, v in value.items()}
    if isinstance(value, list):
        return [_expand(v, where, counted) for v in value]
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        found = os.environ.get(name) or default
        if found is None:
            raise ConfigError(f"{where}: environment variable {name} is not set; export {name}=...")
        return found

    return re.sub(r"\$\{(?P<name>\w+)(?::-(?P<default>[^}]*))?\}", variable, value)


def _field(error: dict[str, Any]) -> list[str]:
    """Return the names of the sections and the field of one pydantic error; what it adds for a number in a list, or for
    one of several types, does not belong to them."""
    return [str(p) for p in error["loc"] if isinstance(p, str) and p.isidentifier()]


def _explain(error: dict[str, Any]) -> str:
    """Return one line for one pydantic error: the field, what is wrong, what would be right."""
    location = _field(error)
    name = ".".join(location)
    known = {n: (default, meaning) for n, default, meaning in leaf_fields(Config)}
    sections = {n.rsplit(".", 1)[0] for n in known}
    if error["type"] == "extra_forbidden":
        siblings = [n for n in [*known, *sections] if n.count(".") == name.count(".")]
        near = difflib.get_close_matches(name, siblings, 1, 0.6) or difflib.get_close_matches(
            location[-1], [n.rsplit(".", 1)[-1] for n in known], 1, 0.6
        )
        full = next((n for n in [*known, *sections] if near and (n == near[0] or n.endswith("." + near[0]))), None)
        full = _RENAMED.get(name, full)
        hint = f"did you mean {full}?" if full else "`--fields` lists all"
        return f"{name}: no such field; {hint}"
    meaning = next((known[n][1] for n in (name, ".".join(location[:-1])) if n in known), "")
    if error["type"] == "missing":
        return f"{name}: is missing. {meaning or 'A section of the config.'}"
    problem = error["msg"][0].lower() + error["msg"][1:]
    given = error["input"]
    if isinstance(given, dict | list | tuple | set):  # it may hold anything, a password, too
        return f"{name}: {len(given)} values of its own: {problem}. {meaning}".strip()
    if error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{name}: a single value: {problem}; write its fields below it, or {name}.FIELD=VALUE"
    quoted = "" if error["type"] != "string_type" or given is None else f"; quote it: {_quoted(name, given)}"
    return f"{name}: {one_line(repr(given), 80)}: {problem}{quoted}. {meaning}".strip()


def _quoted(name: str, value: Any) -> str:
    """Return how to write a value that YAML takes for a number or a date, in a file and as an override."""
    return f'{name.rpartition(".")[2]}: "{value}" in the file, {name}=\'"{value}"\' as an override'


def _tracked_where_mlflow_says(c: Config) -> Config:
    """Set `tracking.uri` from MLFLOW_TRACKING_URI, MLflow's own variable, if the config leaves it open. This happens in
    the driver so that workers, whose environment may differ, record in the same place."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if c.tracking.uri is not None or not uri:
        return c
    return c.model_copy(update={"tracking": c.tracking.model_copy(update={"uri": uri})})


def _most_levels(resolution: int) -> int:
    """Return how often a side can be halved. Not by powers of a number of levels, which may be a trillion."""
    return (resolution & -resolution).bit_length() - 1


def _impossible(c: Config) -> list[str]:
    """Return a line for each combination of fields that no run could satisfy."""
    problems = []
    most = _most_levels(c.data.resolution)
    if c.model.levels > most:
        factor = f" = {1 << c.model.levels}" if c.model.levels < 64 else ""
        right = (
            f"model.levels at most {most}" if most else f"a data.resolution that is a multiple of {1 << c.model.levels}"
        )
        problems.append(
            f"model.levels: {c.model.levels} levels need a resolution divisible by 2^{c.model.levels}{factor}, "
            f"but data.resolution is {c.data.resolution}; use {right}"
        )
    if c.train.micro_batch > c.train.global_batch:
        problems.append(
            f"train.micro_batch: {c.train.micro_batch} is above train.global_batch = {c.train.global_batch}; "
            f"use at most {c.train.global_batch}"
        )
    if c.train.optimizer == "muon" and c.train.zero_stage:
        problems.append(
            f"train.optimizer: muon takes whole matrices, which train.zero_stage = {c.train.zero_stage} cuts up; "
            "set train.zero_stage=0, or use another optimizer"
        )
    if c.train.finetune_steps >= c.train.max_steps:
        problems.append(
            f"train.finetune_steps: {c.train.finetune_steps} leaves none of train.max_steps = {c.train.max_steps} "
            f"before it; use at most {c.train.max_steps - 1}, or 0 for no fine-tuning"
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
    if c.train.max_cost is not None and c.workers.price_per_hour is None:
        problems.append(
            f"train.max_cost: {c.train.max_cost:g} has no meaning without prices; set workers.price_per_hour, or use "
            "null"
        )
    problems += _impossible_model(c.model, c.data.resolution)
    problems += _impossible_name(c)
    query = (c.tracking.uri or "").partition("?")[2]
    if query and sqlite_path(c.tracking.uri or "") and not re.fullmatch(r"\w+=[^=/]*(&\w+=[^=/]*)*", query):
        problems.append("tracking.uri: what follows ? is no setting of a database; write ? in a path as %3F, % as %25")
    if c.tracking.uri is None and not is_local(c.run.storage):
        problems.append(
            f"tracking.uri: must be set when run.storage is remote ({redact(c.run.storage)}); "
            "use your MLflow server, e.g. http://host:5000, here or in MLFLOW_TRACKING_URI"
        )
    for name, value in flatten(c.model_dump()).items():  # all of them are printed and recorded
        if isinstance(value, str) and holds_secret(value):
            problems.append(f"{name}: {REFUSAL}")
        elif name in ("data.cache_dir", "checkpoint.near") and value is not None and not is_local(value):
            problems.append(f"{name}: {one_line(value, 80)} is no folder of this machine; give a local path, or null")
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
        least = resolution >> m.levels
        if least and least % patch:
            problems.append(
                f"model.conditioner.patch: {patch} does not divide the last level's side, {least}; "
                f"use model.conditioner.patch={max(n for n in range(1, patch) if least % n == 0)}"
                + (", or fewer levels" if m.levels > 1 else "")
            )
    if not problems and m.levels <= _most_levels(resolution):
        try:
            FlowConfig.from_dict({**m.to_flow(), "image_shape": [3, resolution, resolution]})
        except ValueError as error:
            problems.append(f"model.{error}")
    return problems


def _impossible_name(c: Config) -> list[str]:
    """Return a line if the run's folder would be where MLflow keeps its database, or images of its runs."""
    if not is_local(c.run.storage):
        return []
    storage = anchored(c.run.storage)
    database = sqlite_path(c.tracking.uri or sqlite_uri(f"{storage}/mlflow.db"))
    taken = {Path(storage, "mlartifacts")} if database else set()
    if database:
        database = Path(anchored(str(database)))
        taken |= {database.with_name(database.name + end) for end in ("", "-journal", "-wal", "-shm")}
    root = Path(storage, c.run.name)
    if found := taken & {root, *root.parents}:
        return [f"run.name: {c.run.name!r} would be a folder at {min(found)}, which is MLflow's; use another run.name"]
    return []


def _absolute_paths(c: Config) -> Config:
    def absolute(url: str | None) -> str | None:
        return url if url is None else anchored(url)

    data = c.data.model_copy(update={"path": absolute(c.data.path), "cache_dir": absolute(c.data.cache_dir)})
    run = c.run.model_copy(update={"storage": absolute(c.run.storage)})
    checkpoint = c.checkpoint.model_copy(update={"near": absolute(c.checkpoint.near)})
    uri = c.tracking.uri or ""
    if (database := sqlite_path(uri)) is not None:  # workers have working directories of their own
        uri = sqlite_uri(anchored(str(database))) + uri[uri.find("?") :] * ("?" in uri)
    tracking = c.tracking.model_copy(update={"uri": uri or None})
    return c.model_copy(update={"data": data, "run": run, "checkpoint": checkpoint, "tracking": tracking})


def _limit(lines: list[str]) -> str:
    if len(lines) > MAX_ERROR_LINES:
        more = len(lines) - (MAX_ERROR_LINES - 1)
        lines = [*lines[: MAX_ERROR_LINES - 1], f"... and {more} more"]
    return "\n".join(lines)
