"""Draw images from a trained flow: samples, or ways between samples or held-out images.

python -m eiwtrain.sample runs/quickstart/model --n 64 --temperature 0.7 --seed 0 --output grid.png

The images to draw come from `eiwtrain.sampling.series`, pictures of them from `eiwtrain.sampling.drawing`, and files of
many images from `eiwtrain.sampling.image_sets`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

from tqdm import tqdm

from eiwtrain import data, storage
from eiwtrain.exporting import models
from eiwtrain.exporting.command import add_model_options, check_numbers, run_command
from eiwtrain.sampling import image_sets, pictures
from eiwtrain.terminal.output import protect

if TYPE_CHECKING:
    from torch import Tensor

_N, _ROWS = 64, 8  # of images; of interpolations, and of images of each class


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit code."""
    return run_command(_sample, _arguments(argv))


def _sample(args: argparse.Namespace) -> int:
    kind = _check(args)
    import torch  # not earlier: it takes a second, which `--help` need not

    from eiwtrain.sampling import drawing
    from eiwtrain.sampling.series import between_images, between_samples, pairs_of, render, samples
    from eiwtrain.train import device

    found = models.open_model(args.model)
    classes = _classes(args, found)
    n, columns, rows = _layout(args, len(classes))
    _check_output(args, kind, found, columns, rows)
    reader = models.open_split(found, args.data, args.split) if args.data is not None else None
    model = found.flow.to(device.of_command(args.device))
    if reader is not None:
        pairs = pairs_of(reader, n, model.config.classes, args.seed)
        series = between_images(model, pairs, args.interpolate, args.batch)
    elif args.interpolate:
        series = between_samples(model, n, args.interpolate, args.seed, classes)
    else:
        series = samples(model, n, args.seed, classes)
    what = _what(args, reader)
    with tqdm(total=series.n * len(args.temperature), unit=" images", disable=None) as bar:  # None: on a terminal
        drawn = [_counted(render(model, series, t, args.batch), bar) for t in args.temperature]
        if kind == "npz":
            image_sets.write_npz(args.output, drawn[0], series.n, series.labels)
        elif kind == "folder":
            image_sets.write_folder(args.output, drawn[0])
        else:
            titles = [what] if len(drawn) == 1 else [f"temperature {t:g}" for t in args.temperature]
            panels = [(title, torch.cat(list(batches))) for title, batches in zip(titles, drawn, strict=True)]
            if args.interpolate:
                picture = drawing.rows_between(panels, series, columns, _names(found))
            else:
                picture = drawing.rows_of_classes(panels, columns, [_names(found)[number] for number in classes])
            storage.write_bytes(args.output, pictures.png(picture))
    images = f"{series.n:,} image{'s' * (series.n > 1)}"
    print(f"{args.output}: {images} ({what}), seed {args.seed}, of {found.source}")
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eiwtrain.sample", description="Draw samples of a trained flow.")
    add_model_options(parser)
    parser.add_argument(
        "--n",
        type=int,
        help=f"images in all, 64 unless given; with --interpolate rows, {_ROWS}; with --classes {_ROWS} of each",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        nargs="+",
        metavar="T",
        help="scale of the latents, 1 unless given; several: the same latents, side by side",
    )
    parser.add_argument(
        "--classes", nargs="+", metavar="CLASS", help="all, or numbers or names: a row for each, images in turn"
    )
    parser.add_argument("--interpolate", type=int, metavar="K", help="rows of K images from one sample to another")
    parser.add_argument("--data", help="with --interpolate: between held-out images of this data set (folder or URL)")
    parser.add_argument("--split", default="test", help="of --data")
    parser.add_argument(
        "--output",
        default="grid.png",
        help="x.png: a grid; x.npz: one array, for FID tools; x/: PNG files 000000.png and so on. Path or URL",
    )
    return parser.parse_args(argv)


def _check(args: argparse.Namespace) -> str:
    """Check what can be checked before anything is opened, fill in defaults, and return the kind of the output."""
    check_numbers(args, n=1, batch=1, interpolate=2)
    if args.data is not None:
        if args.interpolate is None:
            raise ValueError("--data: it goes with --interpolate K, whose rows lead from one of its images to another")
        if args.temperature or args.classes:
            raise ValueError("--data: images have their own latents and classes; leave out --temperature, --classes")
    args.temperature = args.temperature or [1.0]
    with models.about_option("output"):
        kind = image_sets.kind(args.output)
    if kind != "grid" and len(args.temperature) > 1:
        raise ValueError(f"--temperature: several are for a grid (x.png) to compare them; {args.output} takes one")
    return kind


def _names(found: models.LoadedModel) -> list[str]:
    """Return what to call each class: its name if the model knows names, else its number."""
    named = list(map(str, found.metadata.get("class_names") or []))
    return named if len(named) == found.flow.config.classes else list(map(str, range(found.flow.config.classes)))


def _classes(args: argparse.Namespace, found: models.LoadedModel) -> list[int]:
    """Return the numbers of the classes that --classes names, by number or name."""
    if args.classes is None:
        return []
    count, names = found.flow.config.classes, _names(found)
    if not count:
        raise ValueError(f"--classes: {args.model} was trained without classes; leave it out")
    if args.classes == ["all"]:
        return list(range(count))
    known = {name: number for number, name in enumerate(names)} | {str(number): number for number in range(count)}
    if unknown := [name for name in args.classes if name not in known]:
        called = "" if names[0] == "0" else f" ({', '.join(names[:10])}{', ...' if count > 10 else ''})"
        raise ValueError(f"--classes: no class {unknown[0]!r}; the model has 0 to {count - 1}{called}, or all")
    return [known[name] for name in args.classes]


def _layout(args: argparse.Namespace, classes: int) -> tuple[int, int, int]:
    """Return the number of images, or of rows of interpolations, and the columns and rows of a panel of them."""
    if args.interpolate:
        rows = args.n or _ROWS
        return rows, args.interpolate, rows
    if classes:
        n = args.n or _ROWS * classes
        columns, rows = pictures.rows_by_class(n, classes)
        return n, columns, rows * classes
    n = args.n or _N
    columns = pictures.columns_for(n, side_by_side=len(args.temperature) > 1)
    return n, columns, -(-n // columns)


def _check_output(args: argparse.Namespace, kind: str, found: models.LoadedModel, columns: int, rows: int) -> None:
    channels = found.flow.config.image_shape[0]
    if channels != 3:
        raise ValueError(f"{args.model}: its images have {channels} channels, and what is written here has 3")
    if kind == "grid":
        try:
            pictures.check_size(columns * len(args.temperature), rows)
        except ValueError as e:
            raise ValueError(f"--output: {e}; draw fewer, or give x.npz, or x/ for PNG files") from None
    with models.about_option("output"):
        image_sets.check(args.output, args.overwrite)


def _what(args: argparse.Namespace, reader: data.ShardReader | None) -> str:
    if reader is not None:
        return f"between images of {reader.manifest.title}, split {args.split}"
    temperatures = ", ".join(f"{t:g}" for t in args.temperature)
    return f"{'between samples' if args.interpolate else 'samples'}, temperature {temperatures}"


def _counted(batches: Iterator[Tensor], bar: tqdm[NoReturn]) -> Iterator[Tensor]:
    for batch in batches:
        yield batch
        bar.update(len(batch))


if __name__ == "__main__":
    protect()
    sys.exit(main())
