import math

import pytest
from helpers import tiny_config
from hypothesis import given
from hypothesis import strategies as st

from eiwtrain.config import Config, flatten, prices
from eiwtrain.config.file import load_config

TYPES = {"g6.xlarge": 0.75, "p5.48xlarge": 12.5}


def on(name, label="instance-type"):
    return {"ray.io/node-id": "x", label: name}


@pytest.mark.parametrize("price", [0.0, 3, 1.25, TYPES])
def test_prices_are_what_the_config_gives(tmp_path, price):
    config = Config.model_validate(tiny_config(tmp_path, workers={"price_per_hour": price}))
    assert config.workers.price_per_hour == price
    assert Config.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("wrong", [-1e-9, True, "3", [], {}, {"a": True}, {"a": None}, {"": 1}, {"a b": 1}, {1: 1}])
def test_anything_else_is_refused(wrong):
    with pytest.raises(ValueError, match="number"):
        prices.parse(wrong)


def test_prices_by_type_can_be_overridden_and_are_recorded_each(tmp_path):
    import yaml

    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_config(tmp_path)))
    config = load_config(str(file), ["workers.price_per_hour={g6.xlarge: 0.75, p5.48xlarge: 12.5}"])
    assert config.workers.price_per_hour == TYPES
    assert flatten(config.model_dump())["workers.price_per_hour.g6.xlarge"] == 0.75


@given(st.lists(st.sampled_from([*TYPES]), max_size=20), st.sampled_from(prices.TYPE_LABELS))
def test_workers_cost_what_each_of_them_costs(types, label):
    assert prices.per_hour(TYPES, [on(name, label) for name in types]) == math.fsum(TYPES[name] for name in types)
    assert prices.per_hour(2.5, [on(name, label) for name in types]) == 2.5 * len(types)
    assert prices.per_hour(None, [on(name, label) for name in types]) == 0.0


def test_a_node_of_another_type_costs_as_much_as_the_dearest():
    assert prices.of_node(TYPES, on("m7i")) is None
    assert prices.of_node(TYPES, {}) is None
    assert prices.per_hour(TYPES, [on("m7i"), {}, on("g6.xlarge")]) == 12.5 + 12.5 + 0.75


def test_the_type_that_an_operator_sets_counts_before_rays_own():
    labels = on("g6.xlarge") | {"ray.io/node-group": "p5.48xlarge"}
    assert prices.of_node(TYPES, labels) == 0.75
    assert prices.of_node(TYPES, labels | {"instance-type": "other"}) == 12.5
