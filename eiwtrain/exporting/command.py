"""What the commands on a trained model share: their options, checks of numbers, and errors in one line.

Not for the work of any of them.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

from eiwtrain import storage
from eiwtrain.checkpoints import DamagedCheckpoint
from eiwtrain.sampling import BATCH
from eiwtrain.terminal.lines import is_out_of_memory, one_line


def run_command(work: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Do the work of a command and return its exit code; an error that the user can fix is one line, and code 2."""
    try:
        return work(args)
    except (ValueError, OSError, storage.StorageError, DamagedCheckpoint) as e:
        why = one_line(e, limit=None)
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        draws = getattr(args, "batch_draws", 1)
        which, what = ("--batch", "images") if draws == 1 else ("--batch, --batch-draws", f"images and {draws} draws")
        why = f"{which}: {args.batch} {what} at a time do not fit in the GPU's memory; give fewer"
    print(f"error: {why}", file=sys.stderr)
    return 2


def root_of(run: str, under: str) -> str:
    """Return the URL of a run's folder: a bare name that is no folder here is a run under `under`."""
    bare = "/" not in run and not Path(run).is_dir()
    return storage.join(under, run) if bare else run.rstrip("/")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the model to a command, and where and in which batches it computes."""
    parser.add_argument("model", help="an exported model, a checkpoint or a run (folder or URL), or models:/NAME@best")
    parser.add_argument("--seed", type=int, default=0, help="of noise and samples")
    parser.add_argument("--batch", type=int, default=BATCH, help="images at a time; changes nothing but rounding")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there already")


def check_new(url: str, overwrite: bool) -> None:
    """Raise ValueError if a file is at `url` that may not be replaced."""
    if not overwrite and storage.exists(url):
        raise ValueError(f"{url} is there already; give another name, or --overwrite to replace it")


def check_numbers(args: argparse.Namespace, **least: int) -> None:
    """Raise ValueError for a number below its least, where it is given, or a temperature that is not above 0."""
    for name, low in least.items():
        if (value := getattr(args, name)) is not None and value < low:
            raise ValueError(f"--{name.replace('_', '-')}: {value} is too few; give at least {low}")
    given = args.temperature if isinstance(args.temperature, list) else [args.temperature]
    for t in given:
        if t is not None and not 0 < t < math.inf:
            raise ValueError(f"--temperature: {t} is not a number above 0")
