"""Checks of the cluster, from here and from a process on each of its nodes: Ray, versions, clocks, ports, storage.

Without `RAY_ADDRESS` a Ray is started on this machine, as the job starts one. Not for this machine alone
(`eiwtrain.checks.machine`).
"""

from __future__ import annotations

import platform
import time
import uuid
from collections.abc import Iterable
from typing import Any

from eiwtrain import storage
from eiwtrain.checks import machine
from eiwtrain.checks.isolated import Finding, Probe, Report, explain
from eiwtrain.checks.stores import SKEW_NOTED, SKEW_SECONDS, probe_folder
from eiwtrain.config import Config
from eiwtrain.on_ray import nodes, session

_SAME = ("torch", "ray", "deepspeed", "mlflow")  # packages whose versions must be the same on all nodes
_ANSWER_SECONDS, _CONNECT_SECONDS = 30.0, 5.0


def check_ray(report: Report, config: Config | None, broken: frozenset[str] = frozenset()) -> None:
    """Check that Ray answers here and on each node, and that the nodes can do what a worker does.

    Args:
        broken: of "run.storage" and "MLflow" those that failed here already, and are not tried from nodes.
    """
    session.check()
    if config is None and not session.joins_cluster():
        report.ok("Ray", "can be started here as far as can be seen; with a CONFIG it is tried")
        return
    with nodes.joined(), nodes.asked() as processes:
        own = not session.joins_cluster()
        facts = nodes.answers({n: p.call.remote(look) for n, p in processes.items()}, _ANSWER_SECONDS)
        alive = {name: process for name, process in processes.items() if not isinstance(facts[name], Exception)}
        for name in processes.keys() - alive.keys():
            report.fail("Ray", f"node {name}: {explain(facts[name])}; {_remedy(facts[name])}")
        if not alive:
            report.fail("Ray", "no node answers; see `ray status`, and the logs in Ray's folder on the head")
            return
        where = "started here, and a worker answers" if own else f"{len(alive)} of {len(processes)} nodes answer"
        report.ok("Ray", where)
        if config is not None:
            _check_room(report, config, own)
        if not own:
            _check_versions(report, {name: facts[name] for name in alive})
            _check_clocks(report, alive)
            _check_ports(report, alive)
            _check_disks(report, config, alive)
        if config is not None and "run.storage" not in broken:
            _check_stores(report, config, alive, "MLflow" not in broken)


def look() -> dict[str, str]:
    """Return the versions of Python and of packages in this process."""
    import importlib.metadata

    found = {"Python": ".".join(platform.python_version_tuple()[:2])}
    for name in _SAME:
        try:
            found[name] = importlib.metadata.version(name).partition("+")[0]  # a build for CPUs is no other version
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def reach_stores(config: Config, probe: str, mlflow: bool) -> list[tuple[str, str]]:
    """Return (subject, what is wrong) of storage and MLflow as this process sees them: it reads `probe`, and writes a
    file beside it."""
    from eiwtrain.tracking import record

    wrong = []
    with storage.impatient():
        try:
            storage.read_bytes(probe)
            storage.write_bytes(f"{probe}-{uuid.uuid4().hex}", b"eiwtrain")
        except FileNotFoundError:
            what = "a file that was just written is not there"
            if storage.is_local(probe):
                what += ", as each machine has its own folder of this name; use a shared folder or a bucket"
            wrong.append(("run.storage", what))
        except (storage.StorageError, OSError) as e:
            wrong.append(("run.storage", explain(e)))
    try:
        if mlflow:
            record.check(config)
    except Exception as e:
        wrong.append(("MLflow", f"{explain(e)}; use an address that all nodes reach"))
    return wrong


def _check_room(report: Report, config: Config, own: bool) -> None:
    """Report for how many workers there is room; on one machine the job starts as many as it needs."""
    if own:
        return
    room, needed = session.room(config), config.workers.min
    if room < needed:
        each = f"{config.workers.cpus} CPU and {config.workers.gpus} GPU each"
        report.fail(
            "workers",
            f"room for {room} of {needed} workers of {each} now; the job would wait: add nodes, or lower workers.min",
        )
    else:
        report.ok("workers", f"room for {room}, and the run starts with {needed}")


def _check_versions(report: Report, facts: dict[str, dict[str, str]]) -> None:
    here = look()
    wrong = [
        f"{name} has {package} {found.get(package)} (here {version})"
        for name, found in facts.items()
        for package, version in here.items()
        if found.get(package) != version
    ]
    if wrong:
        report.fail("node versions", f"{_some(wrong)}; install the same on all nodes")
    else:
        report.ok("node versions", f"the same on {len(facts)} nodes: {', '.join(f'{k} {v}' for k, v in here.items())}")


def _check_clocks(report: Report, alive: dict[str, Any]) -> None:
    """Compare this machine's clock with each node's, one by one: the answer lies between two looks at the one here."""
    off: dict[str, float] = {}
    for name, process in alive.items():
        before = time.time()
        there = nodes.answers({name: process.call.remote(time.time)}, _ANSWER_SECONDS)[name]
        after = time.time()
        if isinstance(there, float):
            off[name] = max(before - there, there - after, 0.0)
    worst = max(off.values(), default=0.0)
    late = [f"{name} by {seconds:.0f} s" for name, seconds in off.items() if seconds > SKEW_NOTED]
    if worst > SKEW_SECONDS:
        report.fail("node clocks", f"they differ from this machine's: {_some(late)}; set all clocks by NTP (chrony)")
    elif late:
        report.note("node clocks", f"they differ from this machine's: {_some(late)}; NTP (chrony) keeps them together")
    else:
        report.ok("node clocks", f"{len(off)} nodes agree with this machine")


def short_of_room(config: Config | None) -> list[str]:
    """Return what is wrong with the disks of this process's machine."""
    found: list[Finding | Probe] = []
    machine.check_disks(Report(found.append), config)
    return [f"{each.subject}: {each.text}" for each in found if isinstance(each, Finding) and each.state == "FAIL"]


def _check_disks(report: Report, config: Config | None, alive: dict[str, Any]) -> None:
    """Check the temporary folder, the cache and /dev/shm of each node."""
    found = nodes.answers({n: p.call.remote(short_of_room, config) for n, p in alive.items()}, _ANSWER_SECONDS)
    wrong = [f"{n}: {explain(answer)}" for n, answer in found.items() if isinstance(answer, Exception)]
    wrong += [f"{n}: {text}" for n, answer in found.items() if isinstance(answer, list) for text in answer]
    if wrong:
        report.fail("node disks", _some(wrong))
    else:
        report.ok("node disks", f"{len(alive)} nodes have room in TMPDIR, the cache and /dev/shm")


def _check_ports(report: Report, alive: dict[str, Any]) -> None:
    """Connect each node, and this machine, to a port of each other node, as torch does at ports that systems pick."""
    open_at = nodes.answers({n: p.listen.remote() for n, p in alive.items()}, _ANSWER_SECONDS)
    addresses = {name: where for name, where in open_at.items() if not isinstance(where, Exception)}
    wrong = [f"{name} cannot listen ({explain(e)})" for name, e in open_at.items() if isinstance(e, Exception)]
    calls = {
        name: process.call.remote(nodes.reach, [a for n, a in addresses.items() if n != name], _CONNECT_SECONDS)
        for name, process in alive.items()
    }
    found = nodes.answers(calls, _ANSWER_SECONDS)
    found["this machine"] = nodes.reach(list(addresses.values()), _CONNECT_SECONDS)
    for name, closed in found.items():
        if isinstance(closed, Exception):
            wrong.append(f"{name}: {explain(closed)}")
        elif closed:
            wrong.append(f"{name} cannot connect to {_some(closed)}")
    if wrong:
        report.fail("node ports", f"{_some(wrong)}; open all TCP ports above 1023 between the nodes")
    else:
        report.ok("node ports", f"{len(alive)} nodes and this machine reach each other")


def _check_stores(report: Report, config: Config, alive: dict[str, Any], mlflow: bool) -> None:
    """Check that each node reads what is written here, that what it writes is seen here, and that it reaches MLflow."""
    with storage.impatient():
        with probe_folder(report, config.root) as folder:
            probe = storage.join(folder, "probe")
            storage.write_bytes(probe, b"eiwtrain")
            calls = {name: process.call.remote(reach_stores, config, probe, mlflow) for name, process in alive.items()}
            found = nodes.answers(calls, 2 * _ANSWER_SECONDS)
            written = len(storage.listdir(folder)) - 1
        wrong = [
            (subject, f"{name}: {text}")
            for name, answer in found.items()
            for subject, text in (answer if isinstance(answer, list) else [("run.storage", explain(answer))])
        ]
        for subject in dict.fromkeys(subject for subject, _ in wrong):
            report.fail(f"nodes: {subject}", _some(text for each, text in wrong if each == subject))
        if not wrong and written < len(alive):
            report.fail("nodes: run.storage", "what nodes write is not listed here; use a shared folder or a bucket")
        elif not wrong:
            report.ok("nodes", f"run.storage{' and MLflow' * mlflow} can be reached from {', '.join(alive)}")


def _remedy(error: Exception) -> str:
    if "ModuleNotFoundError" in f"{type(error).__name__}: {error}":
        return "install the same eiwtrain on the nodes, or run this by `ray job submit --working-dir .`"
    return "see `ray status`, and the logs in Ray's folder on that node"


def _some(texts: Iterable[str]) -> str:
    """Return the first three of several texts, and how many there are more."""
    texts = list(texts)
    return "; ".join(texts[:3]) + (f"; and {len(texts) - 3} more" if len(texts) > 3 else "")
