"""The origin of a run, for its MLflow page: code, environment, data, and a description. Not for results.

No credential and no value of an environment variable is recorded, except that of EIWTRAIN_COMMIT.
"""

from __future__ import annotations

import getpass
import json
import os
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from eiwtrain import storage
from eiwtrain.config import Config
from eiwtrain.config.construction import construction
from eiwtrain.flow.config import FlowConfig
from eiwtrain.scoring.estimator import estimator_of
from eiwtrain.terminal.markdown import text

if TYPE_CHECKING:
    from eiwtrain.data import Manifest

NOTE_TAG = "mlflow.note.content"  # which the run's page shows as its description
ROOT_TAG = "eiwtrain.root"
_NAME_CHARACTERS, _DIGEST_CHARACTERS = 500, 36  # the most that MLflow takes
_PACKAGE = Path(__file__).parents[1]
_SECONDS = 10.0  # within which a command must answer


def tags(config: Config, command: str) -> dict[str, str]:
    """Return tags that name the code and the command.

    Args:
        command: the command that resumes this run.
    """
    return {
        "mlflow.source.name": "eiwtrain.run",
        "mlflow.source.type": "LOCAL",  # others make the UI look for a project, a notebook or a job of Databricks
        "eiwtrain.command": command,
        ROOT_TAG: config.root,
    } | {f"mlflow.source.git.{name}": value for name, value in revision(_PACKAGE).items()}


def user() -> str:
    """Return the name of the user who runs this process."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"


def revision(package: Path) -> dict[str, str]:
    """Return the revision of the code in the folder `package`; empty if its commit is not known.

    The keys are `commit` (the full hash) and, where known, `dirty` ("true" or "false"), `branch` and `repoURL`. They
    come from the git repository that tracks the folder; else from EIWTRAIN_COMMIT, for code that was copied without
    its repository, as Ray copies a job's working directory; else from pip's record of the installation (PEP 610).
    """
    if _git(
        package, "ls-files", "--error-unmatch", "__init__.py"
    ):  # or the repository may be one around a virtual environment
        found = {
            "commit": _git(package, "rev-parse", "HEAD"),
            "dirty": str(bool(_git(package, "status", "--porcelain", "--untracked-files=no"))).lower(),
            "branch": _git(package, "branch", "--show-current"),
            "repoURL": _without_credentials(_git(package, "config", "--get", "remote.origin.url")),
        }
    elif commit := os.environ.get("EIWTRAIN_COMMIT", "").strip():
        found = {"commit": commit}
    else:
        found = _installed_from()
    return {name: value for name, value in found.items() if value} if found.get("commit") else {}


def _git(folder: Path, *arguments: str) -> str:
    """Return git's answer; empty if there is none, as in most containers."""
    command = ["git", *arguments]
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def _without_credentials(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "")) if parts.scheme else url


def _installed_from() -> dict[str, str]:
    try:
        text = metadata.distribution("eiwtrain").read_text("direct_url.json")
        source = json.loads(text or "{}")
        return {"commit": source["vcs_info"]["commit_id"], "repoURL": _without_credentials(source["url"])}
    except (metadata.PackageNotFoundError, ValueError, KeyError, TypeError):
        return {}


def environment() -> dict[str, Any]:
    """Return the environment of this process: Python, machine, GPUs, CUDA, each distribution with its version."""
    import torch

    installed = {d.metadata["Name"]: d.version for d in metadata.distributions() if d.metadata["Name"]}
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "executable": sys.executable,
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "gpus": _gpus(),
        "cuda": torch.version.cuda,
        "code": revision(_PACKAGE),
        "distributions": dict(sorted(installed.items(), key=lambda item: item[0].lower())),
    }


def _gpus() -> list[str]:
    """Return name, memory and driver of each GPU of this machine."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return result.stdout.strip().splitlines() if result.returncode == 0 else []


def inputs(config: Config, manifest: Manifest) -> list[Any]:
    """Return MLflow's `DatasetInput` of the training split (context "training") and the held-out split ("evaluation").

    MLflow identifies a data set by name and digest; the digest is the beginning of the fingerprint.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    d, p = config.data, manifest.preprocessing
    found = []
    for split, context in ((d.train_split, "training"), (d.eval_split, "evaluation")):
        profile = {
            "images": manifest.splits[split].samples,
            "shards": len(manifest.splits[split].shards),
            "resolution": manifest.resolution,
            "channels": manifest.channels,
            "classes": len(manifest.classes),
            "preprocessing": f"{p['name']} {p['version']}",
            "fingerprint": manifest.fingerprint,
        }
        dataset = Dataset(
            name=f"{manifest.title} {split}"[:_NAME_CHARACTERS],
            digest=manifest.fingerprint[:_DIGEST_CHARACTERS],
            source_type="local" if storage.is_local(d.path) else d.path.partition("://")[0],
            source=json.dumps({"uri": d.path}),
            profile=json.dumps(profile),
        )
        found.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
    return found


def description(config: Config, manifest: Manifest, command: str, parameters: int) -> str:
    """Return the description of a run for its page, in Markdown: data, model, training, storage and commands."""
    d, m, t = config.data, config.model, config.train
    shape = {"image_shape": [manifest.channels, manifest.resolution, manifest.resolution]}
    built = FlowConfig.from_dict(shape | m.to_flow())
    counts = " and ".join(f"{manifest.splits[s].samples:,} {s}" for s in dict.fromkeys((d.train_split, d.eval_split)))
    size = f"{manifest.resolution}x{manifest.resolution}"
    preset = f"preset `{m.preset}`, " if m.preset else ""
    return "\n".join(
        [
            f"A normalizing flow, trained on **{text(manifest.title)}**.",
            "",
            f"- **Data**: {counts} images of {size} pixels at `{d.path}`, fingerprint `{manifest.fingerprint[:12]}`",
            f"- **Model**: {preset}{'; '.join(construction(built))}; {parameters:,} parameters",
            f"- **Bits/dim**: {estimator_of(built)} for each image",
            f"- **Training**: {t.max_steps:,} steps of {t.global_batch} images",
            f"- **Storage**: `{config.root}` (checkpoints, samples, the exported model)",
            f"- **Resume with**: `{command}`",
            f"- **Export**: `python -m eiwtrain.export best --run {config.root} --output FOLDER_OR_URL`",
        ]
    )
