from types import SimpleNamespace

from helpers import tiny_config

from eiwtrain import launch, ray_session
from eiwtrain.config import Config
from eiwtrain.console import Console
from eiwtrain.signals import Stop


def test_a_job_whose_own_node_is_drained_while_it_waits_for_workers_stops_and_goes_on_later(tmp_path, monkeypatch):
    config = Config.model_validate(tiny_config(tmp_path))
    monkeypatch.setattr(ray_session, "room", lambda config: 0)
    drains = iter([False, True])
    monkeypatch.setattr(ray_session, "own_node_drains", lambda: next(drains))
    stop, lease = Stop(Console()), SimpleNamespace(lost=None)
    assert launch._wait_for_room(config, lease, Console(), stop) == 0
    assert launch._stopped(config, stop) == {
        "stopped": "the drain of this job's own node",
        "step": 0,
        "checkpoint": "none yet",
    }
