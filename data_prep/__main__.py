"""The command line: `python -m data_prep {folder,photos} --output URL --resolution N`, `python -m data_prep
show PATH`.

Ends with 0 when the data set stands, 2 with one line on stderr for what the caller can mend, 130 or 143 when
stopped: then the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from types import FrameType

from data_prep.items import Source
from data_prep.shard import RESAMPLING
from data_prep.sources import read_source
from data_prep.writer import Plan, find_other, make_plan, run_plan
from eiwtrain import storage
from eiwtrain.data.manifest import DataError, Manifest, load_manifest


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _stop)
    try:
        if args.command == "show":
            _show(args.path)
        else:
            _write(args)
    except (DataError, storage.StorageError, OSError) as e:
        print(f"data_prep: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("data_prep: stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_prep", description="Make the shards that eiwtrain reads.")
    commands = parser.add_subparsers(dest="command", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--output", required=True, help="folder of the data set: a path or any fsspec URL")
    common.add_argument("--resolution", required=True, type=int, help="height and width of the images, in pixels")
    common.add_argument("--shard-size", type=int, default=1000, help="images a shard (default: %(default)s)")
    common.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores, %(default)s)"
    )
    common.add_argument(
        "--max-rejects",
        type=float,
        default=0.01,
        help="share of images that may turn out not to be decodable (default: %(default)s)",
    )
    common.add_argument("--resample", choices=list(RESAMPLING), default="box", help="filter (default: %(default)s)")
    common.add_argument("--name", help="of the data set (default: the last part of --output)")
    common.add_argument("--overwrite", action="store_true", help="replace another data set at --output")
    common.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")

    folder = commands.add_parser("folder", parents=[common], help="images in class folders, or a tar of them")
    folder.add_argument("--source", required=True, help="the folder, or an uncompressed tar")
    folder.add_argument(
        "--eval-fraction",
        type=float,
        default=0.1,
        help="share of the images for evaluation, where the source has no such split (default: %(default)s)",
    )
    commands.add_parser("photos", parents=[common], help="patches of the photographs inside scikit-image and -learn")
    show = commands.add_parser("show", help="print what a data set holds")
    show.add_argument("path", help="the data set: a path or any fsspec URL")
    return parser


def _write(args: argparse.Namespace) -> None:
    start = time.monotonic()
    options = {"path": args.source, "eval_fraction": args.eval_fraction} if args.command == "folder" else {}
    source = read_source(args.command, args.resolution, **options)
    plan = make_plan(source, args.output, args.resolution, args.shard_size, args.resample)
    if args.dry_run:
        _dry_run(plan, source)
        return
    outcome = run_plan(plan, args.workers, args.max_rejects, args.overwrite, args.name, quiet=False)
    if outcome.written == 0:
        print(f"already complete: {outcome.skipped} shards, all checksums hold")
    else:
        print(f"wrote {outcome.written} shards in {time.monotonic() - start:.1f} s, {outcome.skipped} stood already")
    if outcome.rejects:
        first = outcome.rejects[0]
        print(f"left out {len(outcome.rejects)} images; the first: {first['source']} ({first['reason']})")
    print(_describe(outcome.manifest, plan.output))


def _dry_run(plan: Plan, source: Source) -> None:
    other = find_other(plan)
    print(f"would write to {plan.output}, {plan.resolution} pixels, {len(source.classes)} classes")
    for split, shards in plan.shards().items():
        print(f"  {split}: {len(source.splits[split]):,} images in {shards} shards")
    if other is not None:
        print(f"  but it holds {other}: --overwrite would be needed")


def _show(path: str) -> None:
    print(_describe(load_manifest(path), path))


def _describe(manifest: Manifest, where: str) -> str:
    lines = [
        f"{manifest.name}: {manifest.resolution}x{manifest.resolution}x{manifest.channels} at {where}",
        f"  classes: {len(manifest.classes)}",
    ]
    for split in manifest.splits.values():
        size = sum(s.bytes for s in split.shards) / 1e6
        lines.append(f"  {split.name}: {split.samples:,} images in {len(split.shards)} shards, {size:,.1f} MB")
    made = manifest.preprocessing
    lines.append(f"  preprocessing: {made['name']} v{made['version']} {json.dumps(made['params'], sort_keys=True)}")
    lines.append(f"  fingerprint: {manifest.fingerprint}")
    return "\n".join(lines)


def _stop(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends as Ctrl-C does, with the code that the shell expects."""
    signal.signal(number, signal.SIG_IGN)
    print("data_prep: stopped; the same command goes on where it was", file=sys.stderr)
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
