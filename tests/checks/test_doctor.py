"""The doctor: each check by itself, and the command with what it prints, its exit codes and what it leaves behind."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections import namedtuple

import fsspec
import pytest
import yaml
from fsspec.implementations.memory import MemoryFileSystem
from helpers import free_port, tiny_config, write_shards

from eiwtrain import doctor
from eiwtrain.checks import cluster, isolated, machine, stores
from eiwtrain.checks.isolated import Finding, Probe, Report, run_check
from eiwtrain.config import Config
from eiwtrain.driver import preflight
from eiwtrain.storage import swap


def found(check, *args):
    """Return what a check reports, state and text by subject, run in this process."""
    sent = []
    check(Report(sent.append), *args)
    probes = [each for each in sent if isinstance(each, Probe)]
    assert {p.url for p in probes} == {p.url for p in probes if p.removed}
    return {each.subject: (each.state, each.text) for each in sent if isinstance(each, Finding)}


def states(check, *args):
    return {subject: state for subject, (state, _) in found(check, *args).items()}


def config_at(folder, **sections):
    return Config.model_validate(tiny_config(folder, **sections))


@pytest.fixture(autouse=True)
def _no_time_to_settle(monkeypatch):
    monkeypatch.setattr(swap, "_SETTLE_SECONDS", 0.0)


def findings_of(check, seconds=20.0):
    said = []
    run_check("it", check, seconds, said.append, "the disk")
    return said


class FullDisk(namedtuple("statvfs", "f_bavail f_frsize f_files f_favail")):
    pass


# Isolation


def test_a_check_that_hangs_is_ended_and_its_files_are_removed(tmp_path):
    def hang(report):
        with report.probe(str(tmp_path / "probe"), (tmp_path / "probe").unlink):
            (tmp_path / "probe").touch()
            report.ok("it", "began")
            time.sleep(60)

    began = time.monotonic()
    first, second = findings_of(hang, 0.5)
    assert time.monotonic() - began < 10
    assert (first.state, second.state) == ("ok", "FAIL")
    assert "the disk did not answer" in second.text
    assert list(tmp_path.iterdir()) == []


def test_what_could_not_be_removed_is_named(tmp_path):
    def leave(report):
        with report.probe("s3://bucket/probe", lambda: 1 / 0):
            raise ValueError("broken")

    assert [(f.state, "s3://bucket/probe" in f.text) for f in findings_of(leave)] == [("FAIL", False), ("note", True)]


def test_storage_that_hears_no_signal_does_not_hang_the_doctor(monkeypatch):
    monkeypatch.setattr(isolated, "_CLEANUP_SECONDS", 0.3)

    def deaf(report):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with report.probe("memory://probe", lambda: None):
            time.sleep(60)

    began = time.monotonic()
    assert [f.state for f in findings_of(deaf, 0.3)] == ["FAIL", "note"]
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "end",
    [
        lambda: os.kill(os.getpid(), signal.SIGKILL),
        lambda: os._exit(3),
        lambda: __import__("no_such_package"),
        lambda: 1 / 0,
    ],
)
def test_a_check_that_breaks_is_a_failure_and_no_more(end):
    assert [f.state for f in findings_of(lambda report: end())] == ["FAIL"]


def test_a_password_in_an_error_is_hidden(tmp_path, monkeypatch, capfd):
    check = lambda report: report.fail("it", "http://me:hush@host is away")  # noqa: E731
    monkeypatch.setattr(doctor, "checks", lambda config, failed: {"it": (check, "it")})
    assert doctor.main([]) == 1
    assert "hush" not in capfd.readouterr().out


# The machine


def test_packages_of_other_versions_are_named_with_the_command_that_installs_them(monkeypatch):
    monkeypatch.setattr(machine, "declared", lambda: (">=3.9", ["numpy>=999,<1000", "no-such-pkg>=1", "pyyaml"], "it"))
    result = found(machine.check_packages)
    assert result["Python"][0] == "ok"
    state, text = result["packages"]
    assert state == "FAIL"
    assert all(word in text for word in ("numpy", "no-such-pkg is missing", "pip install", "no-such-pkg>=1"))
    monkeypatch.setattr(machine, "declared", lambda: ("<3.0", ["pyyaml"], "it"))
    assert states(machine.check_packages) == {"Python": "FAIL", "packages": "ok"}


def test_the_packages_of_this_environment_are_those_of_pyproject():
    assert states(machine.check_packages) == {"Python": "ok", "packages": "ok"}
    assert machine.declared()[2].endswith("pyproject.toml")


class Driver:
    """A stand-in for libcuda."""

    def __init__(self, version=13000, error=0, count=1):
        self.version, self.error, self.count = version, error, count

    def cuDriverGetVersion(self, into):
        into._obj.value = self.version
        return 0

    def cuInit(self, flags):
        return self.error

    def cuDeviceGetCount(self, into):
        into._obj.value = self.count
        return 0


@pytest.mark.parametrize(
    ("driver", "present", "visible", "needed", "state", "word"),
    [
        (None, 0, None, None, "ok", "workers.gpus=0"),
        (None, 0, None, 1, "FAIL", "no NVIDIA GPU"),
        (None, 2, None, None, "FAIL", "install NVIDIA's driver"),
        (None, 2, None, 0, "note", "install NVIDIA's driver"),
        (Driver(version=12020), 1, None, None, "FAIL", "update the driver"),
        (Driver(error=803), 1, None, 1, "FAIL", "restart the machine"),
        (Driver(error=100), 1, "", 1, "FAIL", "unset it"),
        (Driver(error=100), 1, "-1", None, "note", "unset it"),
    ],
)
def test_gpus_that_cannot_be_used(monkeypatch, driver, present, visible, needed, state, word):
    monkeypatch.setattr(preflight, "torch_build", lambda: {"cuda": "13.0", "__version__": "2.13.0"})
    monkeypatch.setattr(machine, "gpus_present", lambda: present)

    def load(name):
        if driver is None:
            raise OSError(name)
        return driver

    monkeypatch.setattr(machine.ctypes, "CDLL", load)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    result = found(machine.check_gpus, needed)["GPU"]
    assert result[0] == state
    assert word in result[1]


def test_a_torch_without_cuda_fails_where_gpus_are_needed(monkeypatch):
    monkeypatch.setattr(preflight, "torch_build", lambda: {"cuda": None, "__version__": "2.13.0+cpu"})
    monkeypatch.setattr(machine, "gpus_present", lambda: 1)
    assert [states(machine.check_gpus, n)["GPU"] for n in (None, 0, 2)] == ["FAIL", "note", "FAIL"]
    monkeypatch.setattr(machine, "gpus_present", lambda: 0)
    assert [states(machine.check_gpus, n)["GPU"] for n in (None, 0, 2)] == ["ok", "ok", "FAIL"]


def test_disks_without_room_fail(tmp_path, monkeypatch):
    remote = config_at(tmp_path, data={"path": "s3://bucket/data", "cache_dir": str(tmp_path / "cache")})
    monkeypatch.setattr(machine.os, "statvfs", lambda path: FullDisk(10, 4096, 100, 50))
    assert set(states(machine.check_disks, remote).values()) == {"FAIL", "note"}
    assert states(machine.check_run_disk, remote) == {"disk": "FAIL"}
    loaders = config_at(tmp_path, data={"loader_workers": 2})
    assert [states(machine.check_shared_memory, c)["/dev/shm"] for c in (None, loaders)] == ["note", "FAIL"]
    monkeypatch.setattr(machine.os, "statvfs", lambda path: FullDisk(1 << 30, 4096, 100, 0))
    assert states(machine.check_run_disk, remote) == {"disk": "FAIL"}  # no inodes
    monkeypatch.setattr(machine.os, "statvfs", lambda path: FullDisk(1 << 30, 4096, 100, 50))
    assert states(machine.check_run_disk, remote) == {"disk": "ok"}


def test_a_temporary_folder_that_is_not_there_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    assert states(machine.check_disks, None)["TMPDIR"] == "FAIL"


def test_loopback_works_here():
    assert states(machine.check_loopback) == {"ports": "ok"}


# Storage


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_storage_that_works_and_is_left_as_it_was(tmp_path, kind):
    where = str(tmp_path / "new" / "runs") if kind == "local" else f"memory://{tmp_path.name}"
    result = states(stores.check_storage, config_at(tmp_path, run={"name": "a", "storage": where}))
    assert result.pop("run.storage lease") == ("ok" if kind == "local" else "note")
    assert set(result.values()) == {"ok"}
    assert len(result) == 4
    assert list(tmp_path.iterdir()) == []
    assert fsspec.filesystem("memory").find(f"/{tmp_path.name}") == []


def test_storage_that_cannot_be_written_is_one_failure(tmp_path):
    (tmp_path / "runs").touch()  # root, as whom tests may run, can write to any folder
    assert states(stores.check_storage, config_at(tmp_path)) == {"run.storage": "FAIL"}


class Faulty(MemoryFileSystem):
    """A store that lists nothing, deletes nothing, replaces what it should not, and has another clock."""

    store, pseudo_dirs, protocol = {}, [""], "faulty"
    fault = ""

    def ls(self, path, detail=True, **kwargs):
        if self.fault == "list":
            return []
        return super().ls(path, detail=detail, **kwargs)

    def modified(self, path):
        moment = super().modified(path)
        return moment.replace(year=moment.year - 1) if self.fault == "clock" else moment

    def rm_file(self, path):
        if self.fault != "delete":
            super().rm_file(path)


@pytest.mark.parametrize("fault", ["list", "clock", "delete"])
def test_each_fault_of_a_store_is_named_by_itself(tmp_path, monkeypatch, fault):
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    monkeypatch.setattr(Faulty, "fault", fault)
    sent = []
    stores.check_storage(
        Report(sent.append), config_at(tmp_path, run={"name": "a", "storage": f"faulty://{tmp_path.name}"})
    )
    failed = {f.subject for f in sent if isinstance(f, Finding) and f.state == "FAIL"}
    assert failed == {f"run.storage {fault}"}


def test_a_server_that_ignores_conditions_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "keeps_conditions", lambda url: False)
    assert states(stores.check_storage, config_at(tmp_path))["run.storage lease"] == "FAIL"


class Puts:
    """A stand-in for s3fs that answers puts with a status."""

    def __init__(self, status):
        self.status, self.conditions = status, []

    def split_path(self, path):
        return "bucket", "key", None

    def call_s3(self, method, **kwargs):
        self.conditions.append({"IfNoneMatch", "IfMatch"} & kwargs.keys())
        if self.status != 200:
            error = OSError("refused")
            error.__cause__ = RuntimeError()
            error.__cause__.response = {"ResponseMetadata": {"HTTPStatusCode": self.status}}
            raise error


@pytest.mark.parametrize(("status", "kept"), [(412, True), (200, False), (501, None)])
def test_conditions_of_a_server_are_seen_by_what_it_answers(monkeypatch, status, kept):
    fs = Puts(status)
    monkeypatch.setattr(swap.storage, "filesystem", lambda url: (fs, "bucket/key"))
    monkeypatch.setattr(swap, "_has_conditions", lambda fs: True)
    assert swap.keeps_conditions("s3://bucket/key") is kept
    assert fs.conditions == [{"IfNoneMatch"}, {"IfMatch"}]


# MLflow


def test_a_database_that_is_not_there_yet_is_not_made(tmp_path):
    (tmp_path / "runs").mkdir()
    assert states(stores.check_mlflow, config_at(tmp_path)) == {"MLflow": "ok", "artifacts": "ok"}
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.fixture
def nonsense():
    """The port of a server that answers with what is no HTTP and no gRPC."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(1000)
                    connection.sendall(b"SSH-2.0-OpenSSH\r\n")

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def test_an_mlflow_that_is_away_or_is_none_fails(tmp_path, nonsense):
    for port in (free_port(), nonsense):
        config = config_at(tmp_path, tracking={"uri": f"http://127.0.0.1:{port}"})
        assert states(stores.check_mlflow, config) == {"MLflow": "FAIL"}


# Ray


def test_a_ray_address_where_none_answers_fails(nonsense, monkeypatch):
    for port in (free_port(), nonsense):
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        assert [f.state for f in findings_of(lambda report: cluster.check_ray(report, None))] == ["FAIL"]


def test_without_a_config_no_ray_is_started(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster.nodes, "joined", None)
    assert states(cluster.check_ray, None) == {"Ray": "ok"}


def test_nodes_that_see_other_storage_name_it(tmp_path):
    config = config_at(tmp_path)
    assert [subject for subject, _ in cluster.reach_stores(config, str(tmp_path / "absent"), False)] == ["run.storage"]
    (tmp_path / "probe").touch()
    assert cluster.reach_stores(config, str(tmp_path / "probe"), False) == []


def test_a_node_without_room_says_which_disk(tmp_path, monkeypatch):
    assert cluster.short_of_room(config_at(tmp_path)) == []
    monkeypatch.setattr(machine.os, "statvfs", lambda path: FullDisk(10, 4096, 100, 50))
    assert [text.partition(":")[0] for text in cluster.short_of_room(config_at(tmp_path))] == ["TMPDIR"]


def test_versions_that_differ_between_nodes_fail():
    here = cluster.look()
    assert states(cluster._check_versions, {"a": here}) == {"node versions": "ok"}
    assert states(cluster._check_versions, {"a": here, "b": here | {"torch": "1.0"}}) == {"node versions": "FAIL"}


# The command


def test_the_command_checks_a_config_and_leaves_nothing(tmp_path, monkeypatch, capfd):
    write_shards(tmp_path / "data")
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(machine, "check_run_disk", lambda report, config: None)  # torch takes a second
    monkeypatch.setattr(cluster, "check_ray", lambda report, config, broken: report.ok("Ray", str(sorted(broken))))
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(tiny_config(tmp_path)))
    assert doctor.main([str(config), "tracking.uri=http://127.0.0.1:1"]) == 1
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("FAIL")] == ["MLflow"]
    assert any("Ray" in line and "MLflow" in line for line in lines)
    config.unlink()
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("words", [["nowhere.yaml"], ["configs/quickstart.yaml", "run.nam=a"]])
def test_bad_input_is_code_2_before_anything_is_checked(words, capfd, monkeypatch):
    monkeypatch.setattr(doctor, "run_check", None)
    assert doctor.main(words) == 2
    assert capfd.readouterr().err.startswith("error: ")
