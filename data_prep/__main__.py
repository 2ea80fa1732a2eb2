"""The command line: `python -m data_prep SOURCE --source URL --output URL --resolution N`, and `show`, `verify PATH`.

Exit codes: 0 when the data set is complete; 1 when `verify` finds problems; 2, with one line on stderr, for an error
that the caller can fix; 130 or 143 when stopped, after which the same command resumes. Not for calls from Python: that
is `data_prep.prepare`.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NoReturn, TypeVar

from data_prep.inspect import contact_sheet, describe, size_estimate
from data_prep.parallel import NO_MEMORY, run_tasks
from data_prep.pixels import CROPS, RESAMPLING, Preprocess
from data_prep.sources import read_source
from data_prep.sources.webdataset import LABELS
from data_prep.splits import RULES
from data_prep.verify import verify
from data_prep.writer import Plan, find_other, make_plan, run_plan
from eiwtrain import storage
from eiwtrain.data.left_out import left_out_table
from eiwtrain.data.manifest import ENCODINGS, DataError, load_manifest
from eiwtrain.on_ray import session
from eiwtrain.storage import anchored
from eiwtrain.terminal.lines import one_line, printable
from eiwtrain.terminal.output import drain, protect
from eiwtrain.terminal.signals import exit_on_signals

T = TypeVar("T")
R = TypeVar("R")

_STOPPED = "data_prep: stopped; the same command resumes"


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit code."""
    args = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be text
        sys.stdout.reconfigure(errors="backslashreplace")
    exit_on_signals(_STOPPED)
    try:
        if args.command == "verify":
            return _verify(args)
        if args.command == "show":
            _show(args)
        else:
            _write(args)
    except (DataError, storage.StorageError, OSError) as e:
        print(printable(f"data_prep: {e}"), file=sys.stderr)
        return 2
    except MemoryError:
        print(f"data_prep: {NO_MEMORY}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(_STOPPED, file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_prep", description="Make the shards that eiwtrain reads.")
    commands = parser.add_subparsers(dest="command", required=True)
    common = _common_options()
    url = argparse.ArgumentParser(add_help=False)
    url.add_argument("--source", required=True, type=_url, help="where the images are: a path or any fsspec URL")

    imagenet = commands.add_parser("imagenet", parents=[url, common], help="ImageNet, original or downsampled")
    imagenet.add_argument("--val-labels", help="file of the validation images' classes, one a line")
    lsun = commands.add_parser("lsun", parents=[url, common], help="LSUN's category LMDBs")
    lsun.add_argument(
        "--category", action="append", default=[], help="use only this one; can be repeated (default: all)"
    )
    celeba = commands.add_parser("celeba", parents=[url, common], help="CelebA, aligned, with its official splits")
    celeba.add_argument(
        "--face",
        choices=("realnvp", "center"),
        default="realnvp",
        help="where 148 pixels are cut: as RealNVP and NVAE do, or 5 pixels above (default: %(default)s)",
    )
    commands.add_parser("cifar10", parents=[url, common], help="CIFAR-10's python or binary batches")
    commands.add_parser("folder", parents=[url, common], help="images in class folders, or a tar or zip of them")
    tars = commands.add_parser("webdataset", parents=[url, common], help="WebDataset tars: a folder, one, a pattern")
    tars.add_argument(
        "--labels",
        choices=LABELS,
        default="auto",
        help="member that holds the class; auto takes .cls, else .json, and never .txt (default: %(default)s)",
    )
    commands.add_parser("photos", parents=[common], help="patches of the photographs inside scikit-image and -learn")

    show = commands.add_parser("show", help="print what a data set holds, and draw its first images")
    show.add_argument("path", help="the data set: a path or any fsspec URL")
    show.add_argument(
        "--sheet", default="contact-sheet.png", help="file to draw its first images in (default: %(default)s)"
    )
    show.add_argument("--no-sheet", action="store_true", help="print only")
    show.add_argument("--split", help="draw only this split")
    check = commands.add_parser("verify", help="read all of a data set back and check it")
    check.add_argument("path", help="the data set: a path or any fsspec URL")
    _add_workers(check)
    return parser


def _url(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("is empty; a path or a URL is needed")
    return text


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=int,
        help="tasks at a time, on Ray, each on one CPU; a cluster that starts nodes starts as many as these need "
        "(default: two for each CPU of the machine or cluster, which then starts all nodes that it can)",
    )


def _common_options() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--output", required=True, type=_url, help="folder of the data set: a path or any fsspec URL")
    common.add_argument("--resolution", required=True, type=int, help="height and width of the images, in pixels")
    pixels = common.add_argument_group("pixels")
    pixels.add_argument("--resample", choices=list(RESAMPLING), default="box", help="filter (default: %(default)s)")
    pixels.add_argument(
        "--crop", choices=CROPS, default="center", help="where the square is cut (default: %(default)s)"
    )
    pixels.add_argument("--crop-seed", type=int, default=0, help="seed of random crops (default: %(default)s)")
    pixels.add_argument(
        "--short-side",
        type=int,
        help="resize the shorter side to this, then cut --resolution (default: cut, then resize)",
    )
    pixels.add_argument(
        "--background",
        default="white",
        help="colour that is seen through transparent pixels, by name or as #rrggbb (default: %(default)s)",
    )
    pixels.add_argument(
        "--accept-damaged",
        action="store_true",
        help="use JPEGs of which the decoder says that they are damaged (default: they are left out)",
    )
    pixels.add_argument(
        "--encoding",
        choices=ENCODINGS,
        default="png",
        help="npy files are half as large again, and read many times faster (default: %(default)s)",
    )
    which = common.add_argument_group("which images")
    which.add_argument("--split", default="auto", help=f"what is held out: {RULES} (default: %(default)s)")
    which.add_argument("--only", action="append", default=[], help="write only this split; can be repeated")
    which.add_argument(
        "--drop-duplicates",
        action="store_true",
        help="leave images out of training that equal another one or a held-out one",
    )
    which.add_argument(
        "--max-rejects",
        type=float,
        default=0.01,
        help="largest share of images that cannot be decoded (default: %(default)s)",
    )
    common.add_argument("--shard-size", type=int, default=1000, help="images a shard (default: %(default)s)")
    _add_workers(common)
    common.add_argument("--name", help="name of the data set (default: the last part of --output)")
    common.add_argument("--overwrite", action="store_true", help="replace another data set at --output")
    common.add_argument("--dry-run", action="store_true", help="print what would be written, and write nothing")
    return common


def _write(args: argparse.Namespace) -> None:
    start = time.monotonic()
    preprocess = Preprocess(args.resolution, args.resample, args.encoding, args.crop, args.short_side, args.crop_seed)
    preprocess = replace(preprocess, background=args.background, accept_damaged=args.accept_damaged)
    of_source = {
        "imagenet": lambda: {"val_labels": args.val_labels},
        "lsun": lambda: {"categories": tuple(args.category)},
        "celeba": lambda: {"crop": args.face},
        "webdataset": lambda: {"labels": args.labels},
    }.get(args.command, dict)()
    if args.only and args.drop_duplicates:
        raise DataError("--drop-duplicates looks at all splits; leave --only out")
    path = anchored(args.source) if "source" in args else None
    source = read_source(args.command, args.resolution, path, split=args.split, only=args.only, **of_source)
    plan = make_plan(source, anchored(args.output), preprocess, args.shard_size, args.drop_duplicates)
    for note in plan.notes:
        print(f"data_prep: {one_line(note, None)}", file=sys.stderr)
    if args.dry_run:
        _dry_run(plan)
        return
    outcome = run_plan(
        plan,
        workers=args.workers,
        max_rejects=args.max_rejects,
        overwrite=args.overwrite,
        name=args.name,
        quiet=False,
    )
    if outcome.written == 0:
        print(f"already complete: {outcome.skipped} shards, all checksums hold")
    else:
        print(
            f"wrote {outcome.written} shards in {time.monotonic() - start:.1f} s, {outcome.skipped} were there already"
        )
    if outcome.rejects:
        first = outcome.rejects[0]
        print(printable(f"left out {len(outcome.rejects)} images; the first: {first['source']} ({first['reason']})"))
    if outcome.duplicates:
        d = outcome.duplicates[0]
        print(
            f"{len(outcome.duplicates)} images have the same pixels as another, the first: {d.split}/{d.key} as "
            f"{d.first}; {outcome.dropped or 'none'} dropped"
        )
    print(describe(outcome.manifest, plan.output))


def _dry_run(plan: Plan) -> None:
    other = find_other(plan)
    print(f"would write to {plan.output}, {plan.preprocess.resolution} pixels, {len(plan.source.classes)} classes")
    for split, shards in plan.shards().items():
        print(f"  {split}: {len(plan.orders[split]):,} images in {shards} shards")
    if plan.source.protocol:
        print(f"  {plan.source.protocol}")
    for line in left_out_table(plan.source.left_out):
        print(f"  {line}")
    if plan.flawed[0]:
        print(printable(f"  {plan.flawed[0]:,} of the images cannot be decoded; the first: {plan.flawed[1]}"))
    size = size_estimate(plan)
    print(f"  about {size.bytes / 1e6:,.1f} MB, from encoding {size.images} of them")
    if other is not None:
        print(f"  but it holds {other}: --overwrite would be needed")


def _show(args: argparse.Namespace) -> None:
    path = anchored(args.path)
    manifest = load_manifest(path)
    print(describe(manifest, path))
    if not args.no_sheet:
        contact_sheet(path, manifest, args.split).save(args.sheet, format="PNG")
        print(f"  contact sheet: {args.sheet}")


def _verify(args: argparse.Namespace) -> int:
    def run(call: Callable[[T], R], checks: Iterable[T]) -> Iterator[R]:
        return (found for _, found in run_tasks(call, iter(checks), args.workers))

    problems = verify(anchored(args.path), run=run, quiet=False)
    for problem in problems:
        print(problem)
    print(f"{len(problems)} problems" if problems else "sound: every byte and every image is as the manifest says")
    return 1 if problems else 0


def _leave(code: int) -> NoReturn:
    """Exit at once, without waiting for threads that can wait for storage for minutes."""
    session.stop()
    sys.stdout.flush()
    sys.stderr.flush()
    drain()
    os._exit(code)


if __name__ == "__main__":
    protect()
    try:
        _leave(main())
    except SystemExit as e:  # argparse's, and SIGTERM's
        _leave(e.code if isinstance(e.code, int) else 1)
