"""A run as training leaves it, written in milliseconds: checkpoints of an untrained flow, and where MLflow has it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from helpers import tiny_config
from mlflow import MlflowClient
from safetensors.torch import save

from eiwtrain import checkpoints, flow, storage
from eiwtrain.config import Config
from eiwtrain.exporting import assemble
from eiwtrain.scoring.estimator import estimator_of
from eiwtrain.train.state import flow_config

FINGERPRINT = "f" * 64


def small_flow(seed: int = 0, **model) -> flow.EIWFlow:
    """Make an untrained flow for images of 8x8 whose parameters are not those of the start."""
    torch.manual_seed(seed)
    built = flow.EIWFlow(flow_config(Config.model_validate(tiny_config(Path("/x"), model=model)), 3))
    shape = built.config.noise_shape
    noise = torch.rand(32, *shape) if len(shape) == 1 else None
    built.initialize(torch.rand(32, 3, 8, 8) - 0.5, noise)
    with torch.no_grad():
        for p in built.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return built.eval()


def commit(root: Path | str, step: int, bits: float | None, model: flow.EIWFlow | None = None, **state) -> None:
    """Add a checkpoint with this held-out score to the run at `root`."""
    model = model or small_flow(seed=step)
    root = str(root)
    config = tiny_config(Path("/nowhere"), train={"precision": "fp32"})
    config["run"] = {"name": root.rpartition("/")[2], "storage": root.rpartition("/")[0]}
    url = storage.join(checkpoints.folder(root), f"step-{step:08d}-{step:08x}")
    data = save({f"ema/{name}": t for name, t in model.state_dict().items()})
    part = checkpoints.Part("part-0.safetensors", len(data), storage.sha256_bytes(data))
    about = {
        "config": Config.model_validate(config).model_dump(mode="json"),
        "flow": model.config.to_dict(),
        "data": "photos (patches)",
        "data_fingerprint": FINGERPRINT,
        "score": None if bits is None else {"bits_per_dim": bits, "standard_error": 0.01, "images": 8},
        "eval_bits_per_dim": bits,
        "estimator": asdict(estimator_of(model.config)),
        "world_size": 2,
        "saved_at": float(step),
        "clock": {"wall": 7200.0, "seconds": {}},
    }
    saved = checkpoints.Checkpoint(url, step, 8 * step, (part,), about | state)
    storage.write_bytes(storage.join(url, part.name), data)
    storage.write_bytes(storage.join(url, checkpoints.MANIFEST), checkpoints.render(saved))


def export_model(model: flow.EIWFlow, folder: Path, **metadata) -> str:
    """Export the model and return its folder."""
    with assemble.assembled(model, metadata) as assembled:
        assemble.publish(assembled, str(folder))
    return str(folder)


def tracked(uri: str, artifacts: Path | None = None) -> str:
    """Create an MLflow run and return its id."""
    client = MlflowClient(uri)
    experiment = client.create_experiment("small", artifact_location=artifacts and artifacts.as_uri())
    return str(client.create_run(experiment).info.run_id)
