import sys
from types import SimpleNamespace

import pytest
from helpers import tiny_config
from small_run import commit

from eiwtrain import checkpoints, storage
from eiwtrain.config import Config, ConfigError, Workers
from eiwtrain.driver import launch
from eiwtrain.on_ray import node_prices, session
from eiwtrain.on_ray.messages import Crashed, Stopped
from eiwtrain.terminal.console import Console
from eiwtrain.terminal.signals import Stop


def test_a_waiting_job_whose_own_node_drains_stops(tmp_path, monkeypatch):
    config = Config.model_validate(tiny_config(tmp_path))
    monkeypatch.setattr(session, "room", lambda config: 0)
    monkeypatch.setattr(session, "free_places", lambda: None)
    drains = iter([False, True])
    monkeypatch.setattr(session, "own_node_drains", lambda: next(drains))
    renewed = []
    stop, lease = Stop(Console()), SimpleNamespace(lost=None)
    node_request = SimpleNamespace(renew=lambda: renewed.append(True))
    assert launch._wait_for_room(config, node_request, lease, Console(), stop) == 0
    assert renewed
    assert launch._stopped(config, stop) == Stopped("the drain of this job's own node", 0, None)


def test_an_attempt_is_told_how_often_memory_was_short(tmp_path, monkeypatch):
    config = Config.model_validate(tiny_config(tmp_path))
    outcomes = [
        Crashed("x", short_of_memory=True),
        Crashed("y"),
        Crashed("z", short_of_memory=True),
        Stopped("", 0, None),
    ]
    told = []

    def attempt(*arguments):
        told.append(arguments[-2])
        return SimpleNamespace(follow=lambda *_: outcomes[len(told) - 1], holds_on=False)

    monkeypatch.setattr("eiwtrain.driver.attempt.Attempt", attempt)
    monkeypatch.setattr(launch, "start_ray", lambda _: None)
    monkeypatch.setattr(launch, "_clean", lambda *_: ([], []))
    monkeypatch.setattr(launch, "_wait_for_room", lambda *_: 1)
    monkeypatch.setattr(launch, "NodeRequest", lambda _config: SimpleNamespace(end=lambda: None))
    lease = SimpleNamespace(next_attempt=lambda: None, failed=lambda why: None)
    launch.run_attempts(config, "", [], None, lease, 0.0, Console(), Stop(Console()))
    assert told == [0, 1, 1, 2]


NODES = [
    {"NodeID": "head", "Labels": {}, "Resources": {"memory": 1e9}},
    {"NodeID": "a", "Labels": {"ray.io/node-group": "spot"}, "Resources": {"CPU": 4.0}},
    {"NodeID": "b", "Labels": {"instance-type": "g6", "ray.io/node-group": "x"}, "Resources": {"CPU": 4.0}},
]


@pytest.fixture
def cluster(monkeypatch):
    """Ray's word for the nodes of a cluster."""
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(nodes=lambda: NODES, is_initialized=lambda: True))


def test_workers_cost_what_the_types_of_their_nodes_cost(tmp_path, cluster):
    workers = Workers(cpus=2, price_per_hour={"spot": 1.0, "g6": 3.0})
    assert node_prices.price_of(workers, ["a", "b", "b", "gone"]) == 1.0 + 3.0 + 3.0 + 3.0
    assert node_prices.price_of(Workers(price_per_hour=0.5), ["a", "gone"]) == 1.0
    assert node_prices.price_of(Workers(), ["a"]) == 0.0


@pytest.mark.parametrize("price", [{"spot": 1.0}, {"other": 1.0}, {"g6": 1.0}])
def test_a_node_without_a_price_is_named_before_workers_start(tmp_path, monkeypatch, cluster, price):
    monkeypatch.setattr(launch, "start_ray", lambda _config: None)
    monkeypatch.setattr(launch, "NodeRequest", lambda _config: pytest.fail("workers would start"))
    config = Config.model_validate(tiny_config(tmp_path, workers={"price_per_hour": price}))
    with pytest.raises(ConfigError, match=r"^workers.price_per_hour: no price for a node that is ") as e:
        launch.run_attempts(config, "", [], None, None, 0.0, Console(), Stop(Console()))
    assert "\n" not in str(e.value)


def test_nodes_that_can_have_no_worker_need_no_price(cluster):
    node_prices.check_prices(Workers(cpus=4, price_per_hour={"spot": 1.0, "g6": 1.0}))
    node_prices.check_prices(Workers(cpus=5, price_per_hour={"none": 1.0}))


class Guard:
    """The guard of a lease that is ours; `meanwhile` is what workers of an earlier attempt still write."""

    def __init__(self, meanwhile):
        self.meanwhile, self.waits = meanwhile, 0

    def check(self, give_up):
        assert not give_up()

    def outwait(self, give_up):
        assert not give_up()
        self.waits += 1
        self.meanwhile()


def test_a_late_commit_of_a_cut_off_worker_stays_whole(tmp_path):
    config = Config.model_validate(tiny_config(tmp_path))
    commit(config.root, 3, None)
    commit(config.root, 6, None)
    last, first = checkpoints.committed(config.root)
    manifest = storage.join(last.url, checkpoints.MANIFEST)
    content = storage.read_bytes(manifest)
    storage.delete(manifest)
    dead = storage.join(checkpoints.folder(config.root), "step-00000005-deadbeef")
    storage.write_bytes(storage.join(dead, "part"), b"half")

    guard = Guard(meanwhile=lambda: storage.write_bytes(manifest, content))
    for _ in range(2):  # then there is nothing to wait for
        there = launch._clean(config, SimpleNamespace(guard=lambda: guard), Stop(Console()), [first])
        assert guard.waits == 1
        assert there == checkpoints.survey(config.root) == ([last, first], [])
        assert checkpoints.load(last)
        assert not storage.exists(dead)
