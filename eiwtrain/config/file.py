"""Reading of a config: a YAML file, then `section.field=value` overrides, then checks whose messages name the remedy.

Not for the fields themselves (`eiwtrain.config`), nor for looking at the world (is there a GPU, does the data exist):
that is `eiwtrain.driver.preflight`. Imports neither Ray nor torch, so that a typo is reported in well
under a second.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError as PydanticError

from eiwtrain.config import MAX_ERROR_LINES, Config, ConfigError, Model, leaf_fields
from eiwtrain.storage import anchored, is_local
from eiwtrain.storage.database import sqlite_path, sqlite_uri
from eiwtrain.terminal.lines import one_line
from eiwtrain.terminal.redact import REFUSAL, holds_secret, redact

_RENAMED = {"data.flip": "data.augment"}  # where names are too unlike to be guessed


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
    config = _tracked_where_mlflow_says(config)
    if problems := _impossible(config):
        raise ConfigError(_limit(problems))
    return _absolute_paths(config)


def _read_yaml(path: str) -> dict[str, Any]:
    file = Path(path)
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as e:
        near = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.yaml")], 1, 0.4)
        hint = f"; did you mean {file.parent / near[0]}?" if near else "; give the path of a YAML file"
        what = "is a folder" if isinstance(e, IsADirectoryError) else "no such config file"
        raise ConfigError(f"{path}: {what}{hint}") from None
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read ({e.strerror}); it must be a YAML file that you may read") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: not valid YAML: {one_line(e)}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must hold sections (run:, data:, ...), but holds {type(raw).__name__}")
    return raw


def _override(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"{redact(text)!r} is not an override; write section.field=value, e.g. train.max_steps=100")
    *sections, field = key.split(".")
    here = raw
    for section in sections:
        if not isinstance(here.get(section), dict):
            here[section] = {}
        here = here[section]
    try:
        here[field] = _value(key, value)
    except yaml.YAMLError:
        raise ConfigError(f"{key}: {redact(value)!r} is not valid YAML; quote it") from None


def _value(key: str, text: str) -> Any:
    """Return the value of an override: a word or a path as it stands, anything else as YAML reads it.

    To YAML a word ends before ` #`, where a comment begins, and before a space at its end.
    """
    node = yaml.compose(text, yaml.SafeLoader)
    if node is None:
        return text if text.strip() else None
    plain = isinstance(node, yaml.ScalarNode) and node.style is None
    if plain and node.tag == "tag:yaml.org,2002:str" and not text.lstrip().startswith("!"):
        return text
    if text[: node.start_mark.index].strip() or text[node.end_mark.index :].strip():
        raise ConfigError(f"{key}: YAML takes a part of the value for a comment or a mark; leave it out, or quote all")
    return yaml.safe_load(text)


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
    """Return one line for one pydantic error: the field, what is wrong, what would be right."""
    location = [str(p) for p in error["loc"]]
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
    return f"{name}: {redact(repr(error['input'])):.80}: {problem}. {meaning}".strip()


def _tracked_where_mlflow_says(c: Config) -> Config:
    """Set `tracking.uri` from MLFLOW_TRACKING_URI, MLflow's own variable, if the config leaves it open. This happens in
    the driver so that workers, whose environment may differ, record in the same place."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if c.tracking.uri is not None or not uri:
        return c
    return c.model_copy(update={"tracking": c.tracking.model_copy(update={"uri": uri})})


def _impossible(c: Config) -> list[str]:
    """Return a line for each combination of fields that no run could satisfy."""
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
    problems += _impossible_model(c.model, c.data.resolution)
    problems += _impossible_name(c)
    if c.tracking.uri is None and not is_local(c.run.storage):
        problems.append(
            f"tracking.uri: must be set when run.storage is remote ({redact(c.run.storage)}); "
            "use your MLflow server, e.g. http://host:5000, here or in MLFLOW_TRACKING_URI"
        )
    for name, url in (("run.storage", c.run.storage), ("data.path", c.data.path), ("tracking.uri", c.tracking.uri)):
        if url and holds_secret(url):
            problems.append(f"{name}: {REFUSAL}")
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
                f"use model.conditioner.patch={max(n for n in range(1, patch) if least % n == 0)}"
                + (", or fewer levels" if m.levels > 1 else "")
            )
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
    uri = c.tracking.uri or ""
    if (database := sqlite_path(uri)) is not None:  # workers have working directories of their own
        uri = sqlite_uri(anchored(str(database))) + uri[uri.find("?") :] * ("?" in uri)
    tracking = c.tracking.model_copy(update={"uri": uri or None})
    return c.model_copy(update={"data": data, "run": run, "tracking": tracking})


def _limit(lines: list[str]) -> str:
    if len(lines) > MAX_ERROR_LINES:
        more = len(lines) - (MAX_ERROR_LINES - 1)
        lines = [*lines[: MAX_ERROR_LINES - 1], f"... and {more} more"]
    return "\n".join(lines)
