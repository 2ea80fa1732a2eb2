import math
import sys

import numpy as np
import torch

from eiwtrain.sampling import plots

ENTROPY = torch.tensor([[-1.0, -2.0], [0.5, -0.5], [1.4, math.nan]])


def test_entropies_of_levels_are_drawn_apart_from_pyplot(monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    image = plots.entropy_by_level(ENTROPY, "step 7")
    assert "matplotlib.pyplot" not in sys.modules
    assert image.mode == "RGB"
    assert image.width > 400
    colors = {tuple(c) for c in np.asarray(image).reshape(-1, 3)}
    assert {(0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)} <= colors  # both lines


def test_other_entropies_give_another_plot_and_the_same_ones_the_same():
    first, again = (np.asarray(plots.entropy_by_level(ENTROPY, "step 7")) for _ in range(2))
    assert (first == again).all()
    other = np.asarray(plots.entropy_by_level(ENTROPY + torch.tensor([1.0, 0.0]), "step 7"))
    assert (first != other).any()
