"""Share the options of the two data benchmarks, their defaults, and the report. Not for what is measured."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.data_peers import PEERS
from benchmarks.environments import DEFAULT_VENVS


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of both benchmarks."""
    parser.add_argument("--source", type=Path, help="folder or uncompressed tar of images (default: made here)")
    parser.add_argument("--encoding", nargs="+", choices=("png", "npy"), help="default both, quick png")
    parser.add_argument("--codec", nargs="+", choices=("own", "ours"), help="of the peers: default both, quick own")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--venvs", type=Path, default=DEFAULT_VENVS, help="where peers are installed")
    parser.add_argument("--folder", type=Path, help="for images and data sets (default: a temporary one)")
    parser.add_argument("--quick", action="store_true", help="few images, under a minute once the peers are installed")
    parser.add_argument("--json", type=Path, help="file to write the rows to")


def report(
    args: argparse.Namespace,
    run: Callable[[argparse.Namespace, Path], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
) -> None:
    """Run the benchmark in a temporary folder, print the table, and write the rows with `--json`."""
    args.encoding = args.encoding or (["png"] if args.quick else ["png", "npy"])
    args.codec = args.codec or (["own"] if args.quick else ["own", "ours"])
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rows = run(args, Path(folder))
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
