"""The target of a cluster that grows, computed by Ray's own coordinator and scheduler without a running Ray."""

import functools
import time
from types import SimpleNamespace

import pytest
import ray
from helpers import tiny_config
from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as coordinator

from eiwtrain.config import Config
from eiwtrain.on_ray import autoscaling, session
from eiwtrain.on_ray.autoscaling import NodeRequest

WORKER = {"CPU": 4, "GPU": 1}


class Cluster:
    """Ray's coordinator in this process, with a clock of the test's."""

    def __init__(self):
        self.now = 1000.0
        self.target = None
        self.sent = 0
        self.too_much = False
        self.actor = coordinator._AutoscalingCoordinatorActor(lambda: self.now, self._send, list)

    def _send(self, bundles, label_selectors=None):
        self.target = list(bundles)
        self.sent += 1

    def handle(self):
        def remote(**arguments):
            self.asked = arguments
            self.actor.request_resources(**arguments)
            return "done"

        def cancel(**arguments):
            self.actor.cancel_request(**arguments)

        return SimpleNamespace(
            request_resources=SimpleNamespace(remote=remote), cancel_request=SimpleNamespace(remote=cancel)
        )

    def pass_seconds(self, seconds, *living):
        """Let time pass in which these jobs poll, and the coordinator does what it does every 20 s."""
        for second in range(int(seconds)):
            self.now += 1
            for job in living:
                job.renew()
            if second % 20 == 19:
                self.actor._tick()


@pytest.fixture
def cluster(monkeypatch):
    from ray.train.v2._internal.execution.scaling_policy import autoscaling_coordinator_client

    cluster = Cluster()
    monkeypatch.setattr(time, "monotonic", lambda: cluster.now)
    monkeypatch.setattr(coordinator, "get_or_create_autoscaling_coordinator", cluster.handle)
    monkeypatch.setattr(autoscaling_coordinator_client, "get_or_create_autoscaling_coordinator", cluster.handle)
    monkeypatch.setattr(session, "joins_cluster", lambda: True)
    monkeypatch.setattr(session, "is_running", lambda: True)
    monkeypatch.setattr(autoscaling, "_is_too_much", lambda: cluster.too_much)
    monkeypatch.setattr(ray, "get", lambda answer, timeout: answer)
    return cluster


@pytest.fixture
def job(tmp_path):
    def build(name="one", **workers):
        workers = {"min": 1, "max": 8, "cpus": 4, "gpus": 1} | workers
        return NodeRequest(Config.model_validate(tiny_config(tmp_path / name, workers=workers)))

    return build


@pytest.fixture
def attempt():
    """Build Ray Train's own policy for an attempt, as `eiwtrain.on_ray.trainer` has it."""
    from ray.train import ScalingConfig
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

    def build(workers, quiet=True):
        scaling = ScalingConfig(num_workers=workers, use_gpu=True, resources_per_worker=WORKER)
        policy = FixedScalingPolicy(scaling)
        if quiet:
            policy = autoscaling.without_request(policy)
        policy.after_controller_start(SimpleNamespace(run_id="run"))
        assert policy.make_decision_for_non_running_worker_group().num_workers == workers
        return policy

    return build


def test_the_target_is_workers_max_whatever_attempt_runs(cluster, job, attempt):
    one = job()
    one.renew()
    assert cluster.target == [WORKER] * 8
    for workers in (1, 8, 7):
        policy = attempt(workers)
        assert cluster.target == [WORKER] * 8
        cluster.pass_seconds(100, one, SimpleNamespace(renew=policy._maybe_send_resource_request))
        assert cluster.target == [WORKER] * 8
        policy._cancel_resource_request()
        assert cluster.target == [WORKER] * 8
    one.end()
    assert cluster.target == []


def test_ray_train_by_itself_would_ask_for_more_nodes(cluster, job, attempt):
    job().renew()
    attempt(3, quiet=False)
    assert cluster.target == [WORKER] * 11


def test_requests_of_two_jobs_add_up_and_end_apart(cluster, job):
    one, two = job("one"), job("two", max=4)
    cluster.pass_seconds(100, one, two)
    assert cluster.target == [WORKER] * 12
    one.end()
    cluster.pass_seconds(100, two)
    assert cluster.target == [WORKER] * 4


def test_a_killed_jobs_request_expires_or_is_taken_over(cluster, job):
    job("one").renew()
    again = job("one", max=6)
    again.renew()
    assert cluster.target == [WORKER] * 6
    cluster.pass_seconds(100)
    assert cluster.target == [WORKER] * 6
    cluster.pass_seconds(60)
    assert cluster.target == []


def test_a_request_is_renewed_every_twenty_seconds(cluster, job, monkeypatch):
    asked = []
    monkeypatch.setattr(autoscaling, "_ask", lambda requester, bundles: asked.append(len(bundles)))
    one = job()
    for _ in range(1000):
        cluster.now += 0.1
        one.renew()
    assert asked == [8] * 5


def test_nothing_is_asked_for_without_a_cluster(cluster, job, monkeypatch):
    monkeypatch.setattr(session, "joins_cluster", lambda: False)
    job().renew()
    job().end()
    assert cluster.target is None


def test_a_head_that_is_away_is_asked_again_later(cluster, job, monkeypatch):
    def away():
        raise ConnectionError("no head")

    one, handle = job(), coordinator.get_or_create_autoscaling_coordinator
    monkeypatch.setattr(coordinator, "get_or_create_autoscaling_coordinator", away)
    one.renew()
    one.end()
    assert cluster.target is None
    monkeypatch.setattr(coordinator, "get_or_create_autoscaling_coordinator", handle)
    cluster.pass_seconds(20, one)
    assert cluster.target == [WORKER] * 8


class Scheduler:
    """Ray's autoscaler (version 2), which may start `nodes` nodes of one GPU."""

    def __init__(self, cluster, nodes):
        from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
        from ray.autoscaler.v2.scheduler import ResourceDemandScheduler

        self.cluster, self.nodes = cluster, nodes
        self.types = {"worker": NodeTypeConfig("worker", 0, nodes, resources={"CPU": 4, "GPU": 1})}
        self.scheduler = ResourceDemandScheduler()
        self.schedule = functools.cache(self._schedule)

    def renew(self):
        """Compute, as it does every few seconds, what it starts from nothing for the cluster's target."""
        assert all(bundle == WORKER for bundle in self.cluster.target)
        self.started, self.cluster.too_much = self.schedule(len(self.cluster.target))

    def _schedule(self, workers):
        from ray.autoscaler.v2.scheduler import SchedulingRequest
        from ray.autoscaler.v2.utils import ResourceRequestUtil
        from ray.core.generated.autoscaler_pb2 import ClusterResourceConstraint

        requests = ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(WORKER)] * workers)
        constraint = ClusterResourceConstraint(resource_requests=requests)
        reply = self.scheduler.schedule(
            SchedulingRequest(
                disable_launch_config_check=True,
                node_type_configs=self.types,
                max_num_nodes=self.nodes,
                cluster_resource_constraints=[constraint],
            )
        )
        started = sum(launch.count for launch in reply.to_launch)
        return started, bool(reply.infeasible_cluster_resource_constraints)


def test_rays_autoscaler_starts_nothing_for_too_large_a_target(cluster, job):
    scheduler = Scheduler(cluster, 8)
    job(max=9).renew()
    scheduler.renew()
    assert (scheduler.started, cluster.too_much) == (0, True)


def test_a_job_that_asks_for_too_much_gets_about_all_there_is(cluster, job):
    scheduler, one = Scheduler(cluster, 8), job(max=64)
    cluster.pass_seconds(200, one, scheduler)
    assert scheduler.started in (7, 8)
    started = []
    for _ in range(3600):
        cluster.pass_seconds(1, one, scheduler)
        started.append(scheduler.started)
    assert max(started) == 8
    assert started.count(0) < 0.1 * len(started)  # it tries for more now and then


def test_two_jobs_that_ask_for_too_much_share_the_cluster(cluster, job):
    scheduler, one, two = Scheduler(cluster, 8), job("one"), job("two")
    cluster.pass_seconds(100, one, two, scheduler)
    assert 6 <= scheduler.started <= 8
    one.end()
    cluster.pass_seconds(3000, two, scheduler)
    assert scheduler.started == 8


@pytest.mark.parametrize("too_much", [False, True])
def test_rays_head_says_whether_a_target_is_too_large(too_much, monkeypatch):
    from ray.core.generated.autoscaler_pb2 import ClusterResourceConstraint, GetClusterStatusReply
    from ray.experimental import internal_kv

    reply = GetClusterStatusReply()
    reply.autoscaling_state.infeasible_cluster_resource_constraints.extend([ClusterResourceConstraint()] * too_much)
    head = SimpleNamespace(get_cluster_status=lambda timeout_s: reply.SerializeToString())
    monkeypatch.setattr(internal_kv, "internal_kv_get_gcs_client", lambda: head)
    assert autoscaling._is_too_much() is too_much


def test_no_job_asks_for_fewer_than_it_needs(cluster, job):
    cluster.too_much = True
    cluster.pass_seconds(1000, job(min=3))
    assert cluster.target == [WORKER] * 3
