"""Images from a flow: samples at a temperature, reconstructions, and the grid that shows them.

python -m eiwtrain.sample runs/quickstart/model --n 64 --temperature 0.7 --seed 0 --output grid.png
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from eiwtrain import data, flow, storage
from eiwtrain.pictures import grid


def sample(model: flow.EIWFlow, n: int, temperature: float, seed: int) -> Tensor:
    """n images, uint8 (n, C, H, W); the same for the same seed on the same device."""
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    with torch.no_grad():
        return model.to_images(model.sample(n, temperature=temperature, generator=generator)).cpu()


def reconstruct(model: flow.EIWFlow, batch: data.Batch) -> Tensor:
    """The images of a batch through the flow and back, uint8 (n, C, H, W)."""
    device = next(model.parameters()).device
    images, noise, labels = data.flow_inputs(batch, model.config.classes, device)
    with torch.no_grad():
        x, _ = model.dequantize(images, noise)
        latents, _ = model.encode(x, labels)
        return model.to_images(model.decode(latents, labels)).cpu()


def overview(model: flow.EIWFlow, batch: data.Batch, n: int, temperatures: Sequence[float], seed: int) -> Image.Image:
    """One picture: n samples at each temperature, then held-out images and their reconstructions."""
    panels = [(f"samples, temperature {t:g}", sample(model, n, t, seed)) for t in temperatures]
    shift = 8 - model.config.n_bits
    panels.append(("held-out images", (batch.images >> shift) << shift))
    panels.append(("their reconstructions", reconstruct(model, batch)))
    return grid(panels)


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m eiwtrain.sample", description="Draw a grid of samples.")
    parser.add_argument("model", help="folder or URL of an exported model")
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="grid.png", help="PNG file to write")
    args = parser.parse_args(argv)
    if args.n < 1 or not 0 < args.temperature < math.inf:
        print(f"error: --n {args.n} --temperature {args.temperature}: both must be numbers above 0", file=sys.stderr)
        return 2
    try:
        with storage.local_folder(args.model) as folder:
            model = flow.load(folder)
        images = sample(model, args.n, args.temperature, args.seed)
        grid([(f"samples, temperature {args.temperature:g}", images)]).save(args.output)
    except (ValueError, OSError, storage.StorageError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
