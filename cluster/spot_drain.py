"""Makes Ray drain this machine's worker nodes once the cloud announces that it ends the spot instance: the job then
leaves them with a checkpoint (docs/resuming.md), where without the notice it would resume from the last one.

    python -m cluster.spot_drain aws --address HOST:6379       # beside a worker node of Ray, until that stops

AWS announces it two minutes before, Google Cloud 30 seconds. Not for Kubernetes, which has its own way, nor for the
head.
"""

from __future__ import annotations

import argparse
import datetime
import http.client
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request

import psutil

from cluster.raylets import drain_command, node_id

_AWS, _GCP = "http://169.254.169.254", "http://metadata.google.internal"
_POLL_SECONDS = 2.0
_ANSWER_SECONDS = 5.0
_GCP_SECONDS = 30.0  # from the notice to the end
_DRAIN_SECONDS, _LEAST_DRAIN_SECONDS = 60.0, 10.0  # for one try of Ray's command: at most, and near the end


def aws_notice(metadata: str = _AWS) -> float | None:
    """Return the seconds until AWS ends this spot instance; None while it has not announced that.

    Raises:
        OSError, HTTPException: the metadata service does not answer.
        ValueError, KeyError, TypeError: it does, but not as it is documented.
    """
    # docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
    token = _get(f"{metadata}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
    try:
        action = _get(f"{metadata}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    except urllib.error.HTTPError as e:
        if e.code == 404:
            return None
        raise
    end = datetime.datetime.fromisoformat(str(json.loads(action)["time"]).replace("Z", "+00:00"))
    return max(0.0, end.timestamp() - time.time())


def gcp_notice(metadata: str = _GCP) -> float | None:
    """Return the seconds until Google Cloud ends this spot instance; None while it has not announced that.

    Raises:
        OSError, HTTPException: the metadata service does not answer.
        ValueError: it does, but not as it is documented.
    """
    # cloud.google.com/compute/docs/instances/create-use-spot#detect-preemption
    said = _get(f"{metadata}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return _GCP_SECONDS if said.strip() == "TRUE" else None


def _get(url: str, headers: dict[str, str], method: str = "GET") -> str:
    request = urllib.request.Request(url, headers=headers, method=method)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=_ANSWER_SECONDS) as answer:
        return str(answer.read().decode())


def own_nodes(address: str) -> list[str]:
    """Return the hex ids of the worker nodes of the cluster at `address` that run on this machine."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        node = node_id(words)
        if node and f"--gcs-address={address}" in words and "--head" not in words:
            found.append(node)
    return found


def drain(address: str, node: str, seconds: float) -> str:
    """Make Ray put nothing new on the node, which stops in `seconds`; return Ray's objection, or an empty text."""
    command = drain_command(address, node, int(seconds), "the cloud ends this spot instance")
    limit = max(_LEAST_DRAIN_SECONDS, min(_DRAIN_SECONDS, seconds))
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"no answer within {limit:.0f} s"
    return (done.stderr.strip() or f"exit code {done.returncode}") if done.returncode else ""


def drain_all(address: str, end: float) -> None:
    """Ask until Ray has agreed to drain each worker node of this machine, or the node has stopped.

    Args:
        end: when the instance ends, by `time.monotonic`.
    """
    agreed: set[str] = set()
    said = ""
    while nodes := [node for node in own_nodes(address) if node not in agreed]:
        for node in nodes:
            objection = drain(address, node, max(0.0, end - time.monotonic()))
            if not objection:
                agreed.add(node)
                _say(f"Ray drains {node}")
            elif objection != said:
                _say(f"error: {objection}; trying again")
                said = objection
        if not agreed.issuperset(nodes):
            time.sleep(_POLL_SECONDS)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return the exit code: 0, Ray drains the nodes, or they have stopped by themselves."""
    parser = argparse.ArgumentParser(prog="python -m cluster.spot_drain", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("cloud", choices=["aws", "gcp"])
    parser.add_argument("--address", required=True, help="HOST:PORT of the cluster, as `ray start` was given it")
    parser.add_argument("--metadata", help="URL of the metadata service (default: the cloud's)")
    args = parser.parse_args(argv)
    notice = {"aws": aws_notice, "gcp": gcp_notice}[args.cloud]
    where = [args.metadata] if args.metadata else []
    silent = False
    while nodes := own_nodes(args.address):
        try:
            seconds, silent = notice(*where), False
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as e:
            if not silent:
                _say(f"no proper answer of the metadata service, asking again: {type(e).__name__}: {e}")
            seconds, silent = None, True
        if seconds is not None:
            _say(f"the instance ends in {seconds:.0f} s: draining {', '.join(nodes)}")
            drain_all(args.address, time.monotonic() + seconds)
            return 0
        time.sleep(_POLL_SECONDS)
    _say(f"no worker node of {args.address} runs here")
    return 0


def _say(text: str) -> None:
    print(f"{datetime.datetime.now().isoformat(timespec='seconds')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
