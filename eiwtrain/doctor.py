"""Print, a line for each check, whether this machine and its cluster can do a job, with the remedy where they cannot.

    python -m eiwtrain.doctor                                # this machine
    python -m eiwtrain.doctor configs/quickstart.yaml [section.field=value ...]

With a config it also looks at storage, data, MLflow and Ray. Exit codes: 0 all is well; 1 a check failed; 2 the config
cannot be used. Nothing is left behind. Not for training: `eiwtrain.run --dry-run` checks what a config costs.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Collection
from typing import TYPE_CHECKING

from eiwtrain.checks.isolated import Check, Finding, Report, explain, run_check
from eiwtrain.terminal.lines import one_line
from eiwtrain.terminal.output import protect
from eiwtrain.terminal.signals import exit_on_signals

if TYPE_CHECKING:
    from eiwtrain.config import Config

_SECONDS = {"Ray": 180.0, "MLflow": 90.0, "disk": 90.0, "GPU": 90.0, "run.storage": 45.0, "data.path": 45.0}
_SHORT = 20.0
_SUBJECT_WIDTH = 18


def main(argv: list[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m eiwtrain.doctor", description="Check this machine and its cluster; a line for each check."
    )
    parser.add_argument("config", nargs="?", help="YAML file, e.g. configs/quickstart.yaml (default: the machine only)")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="e.g. run.storage=s3://bucket/runs")
    args = parser.parse_intermixed_args(argv)
    exit_on_signals()
    config, unread = None, None
    if args.config is not None:
        try:
            config = _load(args.config, args.overrides)
        except ModuleNotFoundError as e:  # which the check of packages explains
            unread = Finding("FAIL", "config", f"{args.config} cannot be read: {explain(e)}")
        except ValueError as e:
            print(f"error: {e}", file=sys.stderr)
            return 2
    failed: list[str] = []

    def say(finding: Finding) -> None:
        if finding.state == "FAIL":
            failed.append(finding.subject)
        print(f"{finding.state:<4}  {finding.subject:<{_SUBJECT_WIDTH}}  {one_line(finding.text, 1000)}", flush=True)

    try:
        for subject, (check, what) in checks(config, failed).items():
            run_check(subject, check, _SECONDS.get(subject, _SHORT), say, what)
    except KeyboardInterrupt:
        return 130
    if unread is not None:
        say(unread)
    print("all is well" if not failed else f"{len(failed)} of the lines above say FAIL, with what to do")
    return 1 if failed else 0


def checks(config: Config | None, failed: Collection[str]) -> dict[str, tuple[Check, str]]:
    """Return the checks to make, in order, each with what may not answer. Their processes import what they need.

    Args:
        failed: subjects of checks that have failed when a later check begins.
    """

    def of(module: str, function: str, *args: object, what: str = "the check") -> tuple[Check, str]:
        def check(report: Report) -> None:
            getattr(importlib.import_module(f"eiwtrain.checks.{module}"), function)(report, *args)

        return check, what

    def ray(report: Report) -> None:
        of("cluster", "check_ray", config, frozenset(failed))[0](report)

    in_cluster = os.environ.get("RAY_ADDRESS", "local").strip() not in ("", "local")
    gpus = None if config is None else 0 if in_cluster else config.workers.min * config.workers.gpus
    found = {
        "packages": of("machine", "check_packages"),
        "GPU": of("machine", "check_gpus", gpus),
        "folders": of("machine", "check_disks", config),
        "ports": of("machine", "check_loopback"),
    }
    if config is not None:
        from eiwtrain.storage import is_local

        if is_local(config.run.storage):
            found["disk"] = of("machine", "check_run_disk", config)
        found["run.storage"] = of("stores", "check_storage", config, what=config.root)
        found["data.path"] = of("stores", "check_data", config, what=config.data.path)
        found["MLflow"] = of("stores", "check_mlflow", config, what="MLflow or its artifact store")
    found["Ray"] = ray, os.environ["RAY_ADDRESS"] if in_cluster else "a Ray of this machine"
    return found


def _load(path: str, overrides: list[str]) -> Config:
    from eiwtrain.config.file import load_config

    return load_config(path, overrides)


if __name__ == "__main__":
    protect()
    sys.exit(main())
