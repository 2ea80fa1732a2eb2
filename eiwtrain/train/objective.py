"""What a step of training minimises, how far it goes, and what it draws at random. Not for the optimizer, which is
`eiwtrain.train.engine`."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from eiwtrain import flow
from eiwtrain.config import Config, Train


class MicroBatch:
    """One forward pass of one rank: its share of the loss, and what it measured on the way."""

    def __init__(
        self,
        weight: Tensor,
        config: Config,
        images: Tensor,
        noise: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> None:
        """
        Args:
            weight: (n,), 1 for an image that counts, 0 for padding.
            images, noise, labels: what the flow takes; images (n, C, H, W).
        """
        self.weight, self.config = weight.to(images.device, non_blocking=True), config
        self.images, self.noise, self.labels = images, noise, labels
        self.sums, self.entropy = torch.empty(2), torch.empty(0, 2)
        """After `loss`: bits/dim and penalty summed over the images, float64; the entropy proxy of each level."""

    def loss(self, module: nn.Module) -> Tensor:
        """Return this micro-batch's share of the mean bits/dim, and of the shuffle's regulariser, over the global
        batch."""
        t = self.config.train
        out: flow.FlowOutput = module(self.images, self.noise, self.labels)
        bits = flow.bits_per_dim(out.log_prob, self.images[0].numel(), self.config.model.n_bits)
        # a padded row counts zero times; its image is a real one, so its loss is finite
        bits, penalty = (self.weight * bits).sum(), (self.weight * out.penalty).sum()
        # left on the device: to read them here would have the backward pass wait for the forward pass
        self.sums, self.entropy = torch.stack([bits.detach().double(), penalty.detach().double()]), out.entropy
        return (bits + t.shuffle_penalty * penalty) / t.global_batch


def learning_rate(step: int, train: Train, images: int) -> float:
    """Return the rate of optimizer step `step` (the first is 0): linear warm-up, the schedule, fine-tuning.

    Args:
        images: number of training images: the length of an epoch.
    """
    last = train.max_steps - train.finetune_steps
    if train.finetune_steps and step >= last:
        return train.finetune_lr
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.lr
    if train.schedule == "exponential":  # by whole epochs, counted from step 0, as DenseFlow does
        return train.lr * train.lr_decay ** (step * train.global_batch // images)
    done = (step - train.warmup_steps) / max(1, last - train.warmup_steps)
    return train.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the 64-bit seed of what one rank draws in one step, apart from its samples' noise."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:8], "big")
