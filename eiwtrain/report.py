"""Write one HTML page about a run, or one that compares several, for anybody to open or send: it loads nothing.

    python -m eiwtrain.report runs/quickstart --output report.html
    python -m eiwtrain.report runs/quickstart runs/other --output both.html

What the page says is gathered by `eiwtrain.reporting.facts`; a run that still trains has a page, too.
"""

from __future__ import annotations

import argparse
import os
import sys

from eiwtrain import storage
from eiwtrain.exporting.command import check_new, root_of, run_command
from eiwtrain.storage.database import sqlite_path
from eiwtrain.terminal.lines import one_line
from eiwtrain.terminal.output import protect
from eiwtrain.terminal.redact import REFUSAL, holds_secret
from eiwtrain.terminal.signals import exit_on_signals


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m eiwtrain.report", description="Write a page about a run, or one that compares several."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder or URL of a run, or its name under --storage")
    parser.add_argument("--storage", default="runs", help="where runs are that are given by name (runs)")
    parser.add_argument(
        "--output", default="report.html", help="file or URL to write, which ends in .html (report.html)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a page that is there already")
    parser.add_argument("--tracking-uri", help="URI of MLflow (MLFLOW_TRACKING_URI, or where the run was recorded)")
    exit_on_signals()
    return run_command(_report, parser.parse_args(argv))


def _report(args: argparse.Namespace) -> int:
    if not args.output.endswith((".html", ".htm")):
        raise ValueError(f"--output: {args.output} does not end in .html")
    check_new(args.output, args.overwrite)
    storage.check_file_writable(args.output)
    roots = [storage.absolute(root_of(run, args.storage)) for run in args.runs]
    if twice := [root for root in roots if roots.count(root) > 1]:
        raise ValueError(f"{twice[0]} is given twice")
    uri = _tracking_uri(args.tracking_uri)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

    from eiwtrain.reporting import comparison, facts, page  # not earlier: torch and MLflow take seconds

    runs = [facts.gather(root, uri) for root in roots]
    text = page.render(runs[0]) if len(runs) == 1 else comparison.render(runs)
    storage.write_bytes(args.output, text.encode())
    for run in runs:
        for note in run.notes:
            print(f"{run.root}: {one_line(note, 500)}", file=sys.stderr)
    print(f"{', '.join(run.root for run in runs)} -> {args.output} ({len(text) / 1e6:.1f} MB)")
    return 0


def _tracking_uri(given: str | None) -> str | None:
    """Return the URI of MLflow that the user names; raise ValueError if it cannot be one."""
    name, uri = ("--tracking-uri", given) if given else ("MLFLOW_TRACKING_URI", os.environ.get("MLFLOW_TRACKING_URI"))
    if not uri:
        return None
    if holds_secret(uri):
        raise ValueError(f"{name}: {REFUSAL}")
    if (database := sqlite_path(uri)) is not None and not database.is_file():  # which MLflow would make
        raise ValueError(f"{name}: {database} is not there")
    return uri


if __name__ == "__main__":
    protect()
    sys.exit(main())
