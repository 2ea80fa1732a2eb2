"""Detection of images of another distribution by their bits/dim: AUROC, and the histogram that shows it.

A flow may need *fewer* bits for simpler images of another kind than for those that it was trained on;
AUROC is then below 1/2 (Nalisnick et al. 2019, arXiv 1810.09136). `corrected` is a remedy, not a proof.

Not for scoring images: `eiwtrain.scoring.score_table`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score

from eiwtrain.scoring import yardsticks
from eiwtrain.scoring.score_table import ScoreTable

Numbers = npt.NDArray[np.float64]

_BINS = 40
_SHOWN = (0.2, 99.8)  # percentiles of either set between which bins lie, so that one extreme image does not widen them


@dataclass(frozen=True)
class Auroc:
    """How well a score separates images of another set.

    Attributes:
        value: probability that an image from outside scores higher than one from inside, ties counting half.
        standard_error: of the value, over the images of both sets; NaN if one has a single image.
    """

    value: float
    standard_error: float


def auroc(inside: Numbers, outside: Numbers) -> Auroc:
    """Return the area under the ROC curve for separating `outside`, (m,), from `inside`, (n,), by higher scores.

    The standard error is that of DeLong et al. 1988 (Biometrics 44, 837-845): it assumes no shape of either
    distribution.

    Raises:
        ValueError: a score is not finite.
    """
    both = np.concatenate([inside, outside])
    if wild := int((~np.isfinite(both)).sum()):
        raise ValueError(f"AUROC: {wild} of {len(both)} images have scores that are not finite")
    value = roc_auc_score(np.repeat([0, 1], [len(inside), len(outside)]), both)
    if min(len(inside), len(outside)) < 2:
        return Auroc(float(value), math.nan)
    variance = _share_below(outside, inside).var(ddof=1) / len(outside)
    variance += _share_below(inside, outside).var(ddof=1) / len(inside)
    return Auroc(float(value), math.sqrt(variance))


def corrected(table: ScoreTable, coder: str) -> Numbers:
    """Return bits/dim of the model minus those of the coder, (n,): the score S(x) = -l(x) - L(x) of Serrà et al. 2020
    (arXiv 1909.11480), where l is the log2-likelihood a dimension and L the length of the compressed image, in
    bits a dimension. Higher is further out.

    Args:
        coder: one of `yardsticks.CODERS`.
    """
    return table.bound - table.coders[coder]


def histogram(panels: Mapping[str, Sequence[Numbers]], areas: Mapping[str, Auroc], inside: str, outside: str) -> bytes:
    """Return a PNG with one histogram of both sets for each score.

    Args:
        panels: scores of the images inside, (n,), and outside, (m,), by the name of the score.
        areas: AUROC of each.
        inside: name of the first set.
        outside: name of the other.
    """
    figure = Figure(figsize=(7, 3.4 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axis, (title, sets) in zip(axes, panels.items(), strict=True):
        ends = np.array([np.percentile(scores, _SHOWN) for scores in sets])
        edges = np.histogram_bin_edges([], _BINS, (ends.min(), ends.max()))
        for scores, name in zip(sets, (f"in: {inside}", f"out: {outside}"), strict=True):
            weights = np.full(len(scores), 1 / len(scores))
            shown = np.clip(scores, edges[0], edges[-1])
            axis.hist(shown, edges, weights=weights, alpha=0.55, label=f"{name} ({len(scores):,} images)")
        area = areas[title]
        axis.set(xlabel=f"{title} (values beyond count in the outermost bars)", ylabel="share of images")
        axis.set_title(f"AUROC {area.value:.3f} ± {area.standard_error:.3f}")
        axis.legend()
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def score_title(estimator: str, coder: str | None = None) -> str:
    """Return the name of the model's own score, or of the score minus a coder's.

    Args:
        estimator: the name of the score's, as `eiwtrain.scoring.estimator` gives it.
        coder: one of `yardsticks.CODERS`.
    """
    return f"bits/dim ({estimator})" + ("" if coder is None else f" minus {yardsticks.TITLES[coder]}'s")


def _share_below(scores: Numbers, others: Numbers) -> Numbers:
    """Return, for each score, the share of the others that are below it; equal ones count half."""
    ordered = np.sort(others)
    return (np.searchsorted(ordered, scores, "left") + np.searchsorted(ordered, scores, "right")) / (2 * len(others))
