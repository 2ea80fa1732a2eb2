"""Notices of spot instances that end, read from stand-ins for the clouds' metadata services and passed on to Ray."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest

from cluster import spot_drain


class Metadata(http.server.BaseHTTPRequestHandler):
    """The metadata services of both clouds: no notice until `said`, and at first what is `garbled`."""

    said = False
    garbled: ClassVar[list[str]] = []

    def do_PUT(self):
        assert self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self._answer(200, "a token" if self.path == "/latest/api/token" else "")

    def do_GET(self):
        if self.path == "/latest/meta-data/spot/instance-action":
            if self.headers["X-aws-ec2-metadata-token"] != "a token":
                return self._answer(401, "")
            end = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 120))
            said = json.dumps({"action": "terminate", "time": end})
            if self.garbled:
                return self._answer(200, self.garbled.pop(0))
            return self._answer(200, said) if self.said else self._answer(404, "")
        if self.path == "/computeMetadata/v1/instance/preempted" and self.headers["Metadata-Flavor"] == "Google":
            return self._answer(200, "TRUE\n" if self.said else "FALSE\n")
        return self._answer(403, "")

    def _answer(self, code, text):
        if text == "not HTTP":
            self.wfile.write(b"what?\r\n")
            return
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def metadata(monkeypatch):
    monkeypatch.setattr(Metadata, "said", False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("notice", "seconds"), [(spot_drain.aws_notice, 120), (spot_drain.gcp_notice, 30)])
def test_a_notice_is_heard_once_the_cloud_gives_it(notice, seconds, metadata, monkeypatch):
    assert notice(metadata) is None
    monkeypatch.setattr(Metadata, "said", True)
    assert notice(metadata) == pytest.approx(seconds, abs=60)


@pytest.mark.parametrize("notice", [spot_drain.aws_notice, spot_drain.gcp_notice])
def test_a_metadata_service_that_refuses_is_an_oserror(notice, metadata):
    with pytest.raises(OSError, match="40"):
        notice(f"{metadata}/elsewhere")


@pytest.fixture
def drains(monkeypatch):
    """Return Ray's answers to the next drains (in the end it agrees), and the seconds that it was given."""
    answers, asked = [], []

    def drain(address, node, seconds):
        asked.append(seconds)
        return answers.pop(0) if answers else ""

    monkeypatch.setattr(spot_drain, "drain", drain)
    monkeypatch.setattr(spot_drain, "own_nodes", lambda address: ["a node"])
    monkeypatch.setattr(spot_drain, "_POLL_SECONDS", 0.01)
    return answers, asked


def test_a_refused_drain_is_asked_for_again(drains, metadata, monkeypatch, capsys):
    answers, asked = drains
    answers += ["refused", "refused"]
    monkeypatch.setattr(Metadata, "said", True)
    assert spot_drain.main(["aws", "--address=10.7.0.1:6379", f"--metadata={metadata}"]) == 0
    assert len(asked) == 3
    assert 120 >= asked[0] > asked[1] > asked[2]
    said = capsys.readouterr().err
    assert said.count("refused") == 1
    assert "Ray drains a node" in said


def test_a_node_that_ends_is_not_asked_for_any_more(drains, metadata, monkeypatch):
    answers, asked = drains
    answers += ["refused"] * 1000
    monkeypatch.setattr(Metadata, "said", True)
    monkeypatch.setattr(spot_drain, "own_nodes", lambda address: ["a node"] * (len(asked) < 3))
    assert spot_drain.main(["aws", "--address=10.7.0.1:6379", f"--metadata={metadata}"]) == 0
    assert len(asked) == 3


@pytest.mark.parametrize("garbled", ["{}", "[]", "<html>", '{"time": 5}', "not HTTP"])
def test_a_malformed_notice_is_reported_once_and_asked_again(garbled, drains, metadata, monkeypatch, capsys):
    monkeypatch.setattr(Metadata, "said", True)
    monkeypatch.setattr(Metadata, "garbled", [garbled, garbled])
    assert spot_drain.main(["aws", "--address=10.7.0.1:6379", f"--metadata={metadata}"]) == 0
    assert len(drains[1]) == 1
    assert capsys.readouterr().err.count("no proper answer of the metadata service") == 1


@pytest.mark.parametrize(("seconds", "limit"), [(118, 60), (30, 30), (0, 10)])
def test_rays_command_gets_no_more_time_than_is_left(seconds, limit, monkeypatch):
    def run(command, timeout, **options):
        assert f"--deadline-remaining-seconds={seconds}" in command
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    assert spot_drain.drain("10.7.0.1:6379", "a node", seconds) == f"no answer within {limit} s"


@pytest.mark.cluster
def test_a_spot_notice_drains_this_machines_worker_nodes(metadata, monkeypatch, tmp_path):
    from cluster.local import LocalCluster

    with LocalCluster(tmp_path, nodes=1, cpus=1, s3=False, mlflow=False) as cluster:
        for name, value in cluster.env.items():
            monkeypatch.setenv(name, value)
        (node,), address = cluster.nodes, cluster.env["RAY_ADDRESS"]
        assert spot_drain.own_nodes(address) == [node.node_id]
        arguments = ["aws", f"--address={address}", f"--metadata={metadata}"]
        watching = subprocess.Popen(
            [sys.executable, "-m", "cluster.spot_drain", *arguments], cwd=Path(__file__).parents[2]
        )
        try:
            with pytest.raises(subprocess.TimeoutExpired):  # no notice yet
                watching.wait(8)
            assert node.alive
            monkeypatch.setattr(Metadata, "said", True)
            assert watching.wait(120) == 0
        finally:
            watching.kill()
            watching.wait()
        end = time.monotonic() + 60
        while node.alive:  # it has nothing to do, so Ray ends it at once
            assert time.monotonic() < end, "the node was not drained"
            time.sleep(0.2)
        assert cluster.head.alive
        assert spot_drain.main(arguments) == 0  # there is nothing more to wait for
