"""Published figures beside a score: those of its own data set, version and estimator, else the reason for none.

One and the same model differs by 0.25 bits/dim between two data sets called ImageNet 64x64, and one model's ELBO from
its IWBO. So a figure is shown only where all of this agrees. The figures and their sources are in `published.json`.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from importlib import resources
from typing import Any

from eiwtrain import data

_SHARE = 0.99  # of the training images must be there: duplicates may have been left out


@dataclass(frozen=True)
class Figure:
    """A published figure.

    Attributes:
        protocol: the data set with its version.
        estimator: "ELBO" or "IWBO(k)".
        parameters: of the model; None where they are not known.
        source: where the figure, the data set and the estimator can be looked up.
    """

    model: str
    protocol: str
    estimator: str
    parameters: int | None
    bits_per_dim: float
    source: str


@dataclass(frozen=True)
class Published:
    """The figures that can be compared with a score, the best last; or, where there are none, the reason."""

    figures: tuple[Figure, ...]
    reason: str = ""

    def lines(self) -> list[str]:
        """Return a short table for people, or the reason in a line; a label stands before the first."""
        if not self.figures:
            return [f"no figure is comparable: {self.reason}"]
        width = max(len(figure.model) for figure in self.figures)
        lines = [f"for {self.figures[0].protocol}, all held-out images"]
        for figure in self.figures:
            size = "" if figure.parameters is None else f", {figure.parameters / 1e6:,.0f} M parameters"
            name = f"{figure.model:{width}}"
            lines.append(f"  {name}  {figure.bits_per_dim:.2f} bits/dim ({figure.estimator}{size}; {figure.source})")
        return lines


@dataclass(frozen=True)
class Scored:
    """What a score is a score of.

    Attributes:
        manifest: of the data set.
        split: its name.
        images: how many were scored.
        trained_on: fingerprint of the data set and name of the split; None where they are not recorded.
        n_bits, classes: of the model.
    """

    manifest: data.Manifest
    split: str
    images: int
    trained_on: tuple[str | None, str | None]
    n_bits: int
    classes: int


def comparable(scored: Scored, estimators: Collection[str]) -> Published:
    """Return the published figures that a score by these estimators, "ELBO" or "IWBO(k)", can be compared with."""
    table = json.loads(resources.files(__package__).joinpath("published.json").read_text(encoding="utf-8"))
    name = next((name for name, facts in table["protocols"].items() if _is_of(scored.manifest, facts)), None)
    if name is None:
        known = ", ".join(table["protocols"])
        return Published((), f"{scored.manifest.title} is not prepared from one of: {known}")
    if reason := _other_protocol(scored, name, table["protocols"][name]):
        return Published((), reason)
    figures = [Figure(**figure) for figure in table["figures"] if figure["protocol"] == name]
    same = sorted((f for f in figures if f.estimator in estimators), key=lambda f: -f.bits_per_dim)
    if not same:
        others = ", ".join(sorted({f.estimator for f in figures}))
        return Published((), f"for {name} they are {others}, and this is {', '.join(estimators)}")
    return Published(tuple(same))


def _is_of(manifest: data.Manifest, facts: dict[str, Any]) -> bool:
    """Whether the data set was prepared from the source of a protocol."""
    source = manifest.preprocessing["params"].get("source")
    return isinstance(source, dict) and all(source.get(key) == value for key, value in facts["source"].items())


def _other_protocol(scored: Scored, name: str, facts: dict[str, Any]) -> str:
    """Return in what a score differs from the protocol of its data set; empty if it does not."""
    manifest, params = scored.manifest, scored.manifest.preprocessing["params"]
    side, images, train = facts["resolution"], facts["images"], manifest.splits.get("train")
    cut = params.get("short_side") is not None or params.get("crop", "center") != "center" or params.get("box")
    if manifest.resolution != side or cut:
        return f"{name} is scored at {side} pixels, uncut, and these images were resized or cut"
    if scored.n_bits != 8:
        return f"this model is of {scored.n_bits}-bit images"
    if scored.classes:
        return "this model scores an image under its class"
    if scored.split != facts["split"] or scored.images != images:
        return f"{name} is scored on {images:,} images of {facts['split']}, not on {scored.images:,} of {scored.split}"
    if train is None or train.samples < _SHARE * facts["training_images"]:
        count = 0 if train is None else train.samples
        return f"{name} has {facts['training_images']:,} training images, and this data set {count:,}"
    if scored.trained_on != (manifest.fingerprint, "train"):
        return f"this model is not known to be trained on split train of {manifest.title}"
    return ""
