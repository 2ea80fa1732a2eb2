"""A real small cluster on one machine: Ray with worker nodes, an S3 server (SeaweedFS) and an MLflow server.

    python -m cluster.local up         # prints the environment to export and commands to try
    python -m cluster.local status
    python -m cluster.local down

For trying things out and for tests. Not for production, and CPU only. All of it listens on loopback; Ray asks for a
token, S3 for keys, MLflow for nothing: anyone else with an account on this machine can read and write its runs.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time

from cluster.local.cluster import LocalCluster
from cluster.local.state import LocalError, down, status, write
from eiwtrain.terminal.signals import exit_on_signals


def main(argv: list[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cluster.local", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("up", "start it"), ("down", "stop all that `up` started"), ("status", "print what runs")):
        command = commands.add_parser(name, help=what)
        command.add_argument("--folder", default="runs/cluster", help="where all is kept (default: %(default)s)")
        if name == "up":
            command.add_argument("--nodes", type=_count, default=2, help="worker nodes (default: %(default)s)")
            command.add_argument("--cpus", type=_count, default=1, help="of each, for Ray (default: %(default)s)")
            command.add_argument("--head-cpus", type=_count, default=0, help="of the head (default: %(default)s)")
            command.add_argument("--no-s3", action="store_true", help="no S3 server")
            command.add_argument("--no-mlflow", action="store_true", help="no MLflow server")
            for port in ("gcs", "job", "s3", "mlflow"):
                command.add_argument(f"--{port}-port", type=int, help="(default, and 0: a free one)")
    args = parser.parse_args(argv)
    exit_on_signals()
    try:
        return {"up": _up, "down": _down, "status": _status}[args.command](args)
    except LocalError as e:
        print(f"cluster.local: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _up(args: argparse.Namespace) -> int:
    cluster = LocalCluster(
        args.folder,
        args.nodes,
        args.cpus,
        s3=not args.no_s3,
        mlflow=not args.no_mlflow,
        head_cpus=args.head_cpus,
        gcs_port=args.gcs_port,
        job_port=args.job_port,
        s3_port=args.s3_port,
        mlflow_port=args.mlflow_port,
    )
    began = time.monotonic()
    cluster.start()
    file = cluster.folder / "env"
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in cluster.env.items())
    write(file, exports)
    print(f"# {args.nodes} worker nodes of {args.cpus} CPU, up in {time.monotonic() - began:.0f} s")
    print(f"# to export; also by: . {shlex.quote(str(file))}")
    print(exports, end="")
    print("# a day with it:")
    submit = "#   ray job submit --working-dir . -- python -m"
    if not args.no_s3:
        print(f"{submit} data_prep photos --output {cluster.env['EIWTRAIN_DATA']}/photos-32 --resolution 32")
    print(f"{submit} eiwtrain.run configs/quickstart.yaml")
    if not args.no_s3:
        run, exported = f"{cluster.env['EIWTRAIN_STORAGE']}/quickstart", f"s3://{cluster.bucket}/models/quickstart"
        print(f"#   python -m eiwtrain.export best --run {run} --output {exported}")
    if not args.no_mlflow:
        print(f"#   open {cluster.mlflow_uri} (MLflow)")
    again = "" if args.folder == "runs/cluster" else f" --folder {shlex.quote(args.folder)}"
    print(f"#   python -m cluster.local status{again}; python -m cluster.local down{again}")
    return 0


def _down(args: argparse.Namespace) -> int:
    ended = down(args.folder)
    print(f"ended: {', '.join(ended)}" if ended else f"{args.folder}: nothing runs")
    return 0


def _status(args: argparse.Namespace) -> int:
    """Print a table; return 0 where all lives, 1 where something does not."""
    rows = status(args.folder)
    if not rows:
        print(f"{args.folder}: nothing runs")
        return 1
    for name, pid, lives, memory in rows:
        print(f"{name:<10} {pid:>8}  {'lives' if lives else 'is dead':<8} {memory / 1e6:>7,.0f} MB")
    print(f"{'':<10} {'':>8}  {'':<8} {sum(row[3] for row in rows) / 1e6:>7,.0f} MB in all")
    return 0 if all(row[2] for row in rows) else 1


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
