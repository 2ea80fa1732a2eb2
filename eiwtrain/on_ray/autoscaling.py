"""Asks a cluster that starts nodes on demand for room for all workers of a job, for as long as the job lives.

Not for what the workers then run on (`eiwtrain.on_ray.session.room`). On this machine alone, or on a cluster of a fixed
size, asking changes nothing.

Ray keeps one target for the size of a cluster, which every call of its public `request_resources` replaces. Ray Train
and Ray Data therefore ask an actor of theirs, which sets the target to the sum of its requests every 20 s, whatever it
was. The public function does not do for a job: the next such sum would erase its request, two jobs would replace each
other's, and that of a killed job would stay. A job therefore asks the same actor, and keeps Ray Train, which would ask
for the workers of one attempt, from asking (`without_request`): the two would add up.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

from eiwtrain.config import Config
from eiwtrain.on_ray import session

_RENEW_SECONDS = 20.0
_EXPIRY_SECONDS = 120.0  # after which a job that was killed asks for nothing; a driver is silent for 60 s at most
_RAISE_SECONDS = 300.0  # after which a job that lowered its request asks for one worker more
_ANSWER_SECONDS = 5.0


class NodeRequest:
    """One job's request: `workers.max`, or the most that the cluster can become.

    Ray's autoscaler starts nothing at all towards a target that its node types do not allow: one job's `workers.max`
    may be too much for them, or what two jobs ask for together. While that is so each job lowers its request step by
    step, down to `workers.min`, and later raises it again.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._requester = f"eiwtrain {config.root}"  # a run has one job: the next one takes the request over
        self._workers = config.max_workers
        self._renewed_at = self._changed_at = float("-inf")

    def renew(self) -> None:
        """Ask, if it is time to; call it often. It never fails and waits for no node: Ray's head may be away."""
        now = time.monotonic()
        if not session.joins_cluster() or now - self._renewed_at < _RENEW_SECONDS:
            return
        first, self._renewed_at = self._renewed_at == float("-inf"), now
        with contextlib.suppress(Exception):
            if not first:
                self._adapt(_is_too_much(), now)
            _ask(self._requester, [session.resources(self._config.workers)] * self._workers)

    def end(self) -> None:
        """Withdraw the request."""
        if not session.joins_cluster() or not session.is_running():
            return
        with contextlib.suppress(Exception):  # a head that has just gone
            import ray

            ray.get(_ask(self._requester, []), timeout=_ANSWER_SECONDS)

    def _adapt(self, too_much: bool, now: float) -> None:
        before, least, most = self._workers, self._config.workers.min, self._config.max_workers
        if too_much:
            self._workers = max(before - max(before // 4, 1), least)
        elif now - self._changed_at >= _RAISE_SECONDS:
            self._workers = min(before + 1, most)
        if self._workers != before:
            self._changed_at = now


def without_request(policy: Any) -> Any:
    """Return Ray Train's scaling policy, changed so that it never asks for nodes.

    Nor does it then start the actor that it would ask, for which an attempt would wait over a second.

    Args:
        policy: `ray.train.v2._internal.execution.scaling_policy.FixedScalingPolicy` of Ray 2.60.
    """
    policy.after_controller_start = policy._maybe_send_resource_request = _ask_nothing
    return policy


def _ask_nothing(*_: Any) -> None:
    """Do nothing; a function of a module, as the policy is pickled."""


def _ask(requester: str, bundles: list[dict[str, float]]) -> Any:
    """Replace this requester's request; return a reference to the answer of the actor, which is that of Ray 2.60."""
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    return get_or_create_autoscaling_coordinator().request_resources.remote(
        requester_id=requester, resources=bundles, expire_after_s=_EXPIRY_SECONDS
    )


def _is_too_much() -> bool:
    """Whether the autoscaler (version 2, of Ray 2.60) has found that the cluster cannot become as large as asked."""
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
    from ray.experimental.internal_kv import internal_kv_get_gcs_client

    reply = GetClusterStatusReply.FromString(internal_kv_get_gcs_client().get_cluster_status(timeout_s=_ANSWER_SECONDS))
    return bool(reply.autoscaling_state.infeasible_cluster_resource_constraints)
