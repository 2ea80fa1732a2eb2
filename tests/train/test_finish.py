import json
import math
from typing import get_type_hints

import pytest

from eiwtrain.checkpoints import Checkpoint
from eiwtrain.on_ray.messages import Summary
from eiwtrain.train import finish, state


def test_a_summary_is_json_though_numbers_are_not_finite():
    kinds = get_type_hints(Summary)
    values = {name: {float: math.nan, int: 3}.get(kind, "x") for name, kind in kinds.items()}
    text = finish.content_of(Summary(**values | {"goodput_shares": {"productive": math.inf}}))
    read = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert (read["test_standard_error"], read["goodput_shares"], read["steps"]) == (None, {"productive": None}, 3)


def test_a_score_comes_back_with_what_was_not_finite():
    saved = {"score": {"bits_per_dim": 3.5, "standard_error": None, "images": 1}}
    score = state._score_of(Checkpoint("x", 1, 8, (), saved))
    assert score is not None
    assert (score.bits_per_dim, score.images) == (3.5, 1)
    assert math.isnan(score.standard_error)
