"""Checks of this machine: Python, packages, GPUs, disks, memory that processes share, sockets.

Not for other nodes (`eiwtrain.checks.cluster`).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import os
import platform
import shlex
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eiwtrain.checks.isolated import Report

if TYPE_CHECKING:
    from eiwtrain.config import Config

_GIB, _MIB = 1 << 30, 1 << 20
_TEMP_BYTES = _GIB  # Ray's session, and what libraries unpack
_SHM_BYTES = 128 * _MIB  # Ray's object store, as `eiwtrain.on_ray.session` makes it
_CHECKPOINT_BYTES = 16  # of each parameter: itself, its average and two moments, in float32
_CUDA_ERRORS = {  # of cuInit, with what ends them
    100: "CUDA finds no GPU",
    802: "the GPUs are not ready; on a machine with NVSwitch start nvidia-fabricmanager",
    803: "the driver's library and its kernel module have different versions; restart the machine",
    804: "the driver is older than CUDA's compatibility package allows; update the driver",
    999: "CUDA cannot start; see `nvidia-smi`, and restart the machine if the driver was just updated",
}


def declared() -> tuple[str, list[str], str]:
    """Return the versions of Python and of packages that eiwtrain needs, and which file says so: the pyproject.toml
    beside the package, as an installation's own list may be older than the code."""
    file = Path(__file__).parents[2] / "pyproject.toml"
    with contextlib.suppress(ModuleNotFoundError, OSError, ValueError, KeyError):  # Python 3.10 has no tomllib
        project = importlib.import_module("tomllib").loads(file.read_text(encoding="utf-8"))["project"]
        if project["name"] == "eiwtrain":
            return project["requires-python"], project["dependencies"], str(file)
    about = importlib.metadata.metadata("eiwtrain")
    plain = [each for each in about.get_all("Requires-Dist") or [] if "extra ==" not in each]
    return str(about["Requires-Python"]), plain, "the installed eiwtrain"


def check_packages(report: Report) -> None:
    """Check the versions of Python and of the packages."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        python, packages, source = declared()
    except importlib.metadata.PackageNotFoundError:
        report.note("packages", "eiwtrain is not installed and has no pyproject.toml: there is nothing to compare with")
        return
    here = platform.python_version()
    if SpecifierSet(python).contains(here, prereleases=True):
        report.ok("Python", here)
    else:
        report.fail("Python", f"{here}, and {source} needs {python}; make a venv with such a Python")
    wrong, install, count = [], [], 0
    for needed in map(Requirement, packages):
        if needed.marker is not None and not needed.marker.evaluate():
            continue
        count += 1
        try:
            found = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{needed.name} is missing")
        else:
            if needed.specifier.contains(found, prereleases=True):
                continue
            wrong.append(f"{needed.name} is {found} and must be {needed.specifier}")
        install.append(shlex.quote(str(needed).partition(";")[0].replace(" ", "")))
    if wrong:
        report.fail("packages", f"{', '.join(wrong)}; run `pip install {' '.join(install)}`")
    else:
        report.ok("packages", f"all {count} have versions that {source} allows")


def check_gpus(report: Report, needed: int | None = None) -> None:
    """Check that torch can use the GPUs of this machine.

    Args:
        needed: how many the job takes here; None: not known, then a GPU that is there must work.
    """
    from eiwtrain.driver import preflight

    build, present = preflight.torch_build(), gpus_present()
    if not build:
        report.fail("torch", "it is missing; run `pip install -e .`")
        return
    torch, cuda = f"torch {build.get('__version__')}", build.get("cuda")
    bad = report.fail if needed or (needed is None and present) else report.note
    if cuda is None:
        if needed or present:
            there = f"the machine's NVIDIA GPUs ({present}) are not used" if present else "there is no NVIDIA GPU here"
            bad(
                "GPU",
                f"{torch} is built without CUDA, and {there}; install a build with CUDA (pip uninstall "
                "torch, then install eiwtrain again), or use workers.gpus=0",
            )
        else:
            report.ok("GPU", f"{torch}, for CPUs; there is no NVIDIA GPU here: workers.gpus=0")
        return
    built = f"{torch} for CUDA {cuda}"
    try:
        driver: Any = ctypes.CDLL("libcuda.so.1")
    except OSError:
        if present:
            bad(
                "GPU",
                f"there {_are(present)} here, but no driver (libcuda.so.1); install NVIDIA's driver, or start the "
                "container with GPUs (docker run --gpus all)",
            )
        elif needed:
            report.fail("GPU", f"{built}, but this machine has no NVIDIA GPU; use workers.gpus=0 or another machine")
        else:
            report.ok("GPU", f"{built}; there is no NVIDIA GPU here: workers.gpus=0")
        return
    why, hidden = _driver_trouble(driver, str(cuda), present)
    if why:
        (report.fail if needed else report.note)("GPU", why) if hidden else bad("GPU", f"{built}: {why}")
    else:
        _try_gpus(report, built, needed or 0, bad)


def gpus_present() -> int:
    """Return how many NVIDIA GPUs the kernel knows, whether or not CUDA can use them."""
    with contextlib.suppress(OSError):
        if found := len(list(Path("/proc/driver/nvidia/gpus").iterdir())):
            return found
    found = 0
    for device in Path("/sys/bus/pci/devices").glob("*"):
        with contextlib.suppress(OSError):
            nvidia = (device / "vendor").read_text().strip() == "0x10de"
            found += nvidia and (device / "class").read_text().startswith("0x03")  # displays and 3D controllers
    return found


def _are(count: int) -> str:
    return "is 1" if count == 1 else f"are {count}"


def _driver_trouble(driver: Any, cuda: str, present: int) -> tuple[str, bool]:
    """Return why CUDA has no GPU for this process, empty if it has one, and whether they are only hidden."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value:
        major, minor = version.value // 1000, version.value % 1000 // 10
        if major < int(cuda.partition(".")[0]):
            return (
                f"the driver is too old: it knows CUDA {major}.{minor}; update the driver, or install a torch built "
                f"for CUDA {major}"
            ), False
    error = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if visible is not None and not count.value and error in (0, 100):
        return (
            f"CUDA_VISIBLE_DEVICES={visible!r} hides the GPUs of this machine; unset it to use them" if present else ""
        ) or "there is no NVIDIA GPU here: workers.gpus=0", True
    if error:
        return f"{_CUDA_ERRORS.get(error, 'CUDA cannot start; see `nvidia-smi`')} (error {error})", False
    return ("" if count.value else "the driver is there, but no GPU"), False


def _try_gpus(report: Report, built: str, needed: int, bad: Any) -> None:
    """Compute on each GPU: only that shows that torch has kernels for it and that it has memory left."""
    import torch

    count, names, wrong = torch.cuda.device_count(), [], []
    for number in range(count):
        name = torch.cuda.get_device_name(number)
        try:
            torch.ones(8, device=f"cuda:{number}").sum().item()
            free, total = torch.cuda.mem_get_info(number)
            names.append(f"{name} ({free / _GIB:.0f} of {total / _GIB:.0f} GiB free)")
        except RuntimeError as e:
            wrong.append(f"GPU {number}, {name}: {e}")
    if wrong or not count:
        bad("GPU", f"{built} cannot compute on {'; '.join(wrong) or 'any GPU'}; see `nvidia-smi` for who uses it")
    elif count < needed:
        report.fail("GPU", f"{count} can be used here, and the job takes {needed}; use fewer workers (workers.min)")
    else:
        report.ok("GPU", f"{built}: {', '.join(names)}")


def check_disks(report: Report, config: Config | None) -> None:
    """Check that the folders in which this machine keeps files have room."""
    from eiwtrain import storage
    from eiwtrain.storage.private import private_folder

    given = os.environ.get("TMPDIR")
    if given and not os.access(given, os.W_OK | os.X_OK):
        report.fail("TMPDIR", f"{given} is no folder that you may write to; make it, or set TMPDIR to another")
    temp = Path(tempfile.gettempdir())
    if given is None or temp == Path(given).absolute():
        _room(report, "TMPDIR", temp, _TEMP_BYTES, "free some, or set TMPDIR to a folder of another disk")
    with _kept_as_it_was(temp, "eiwtrain-ray", "eiwtrain-cache"):
        for name, field in (("eiwtrain-ray", "TMPDIR"), ("eiwtrain-cache", "data.cache_dir")):
            if name == "eiwtrain-ray" or config is None or config.data.cache_dir is None:
                try:
                    private_folder(name, field)
                except storage.StorageError as e:
                    report.fail("TMPDIR", str(e))
    if config is not None and not storage.is_local(config.data.path):
        cache = Path(config.data.cache_dir or temp)
        remedy = "give data.cache_dir a folder of another disk"
        if _room(report, "data.cache_dir", cache, _GIB, remedy) < config.data.cache_bytes:
            report.note(
                "data.cache_dir",
                f"the cache may take {_size(config.data.cache_bytes)}, more than {cache} has; lower data.cache_bytes, "
                f"or {remedy}, unless the data set is smaller",
            )
    check_shared_memory(report, config)


def check_shared_memory(report: Report, config: Config | None) -> None:
    """Check that /dev/shm has room for what processes share; too little matters to loaders and GPUs alone, as Ray then
    keeps its objects in a file."""
    try:
        free = _free("/dev/shm")
    except OSError:
        report.note("/dev/shm", "it is not there; in a container mount it (docker run --shm-size=1g)")
        return
    if free >= _SHM_BYTES:
        report.ok("/dev/shm", f"{_size(free)} free")
        return
    must = config is not None and (config.data.loader_workers > 0 or config.workers.gpus > 0)
    (report.fail if must else report.note)(
        "/dev/shm",
        f"{_size(free)} free, and Ray, NCCL and loader processes need {_size(_SHM_BYTES)}; start the container with "
        "--shm-size=1g, or delete old files there",
    )


def check_run_disk(report: Report, config: Config) -> None:
    """Check that a local `run.storage` has room for the checkpoints that the run keeps."""
    from eiwtrain.train.state import outline

    kept = config.checkpoint.keep_last + 2  # the best, and the one that is being written
    parameters = sum(p.numel() for p in outline(config, 3).parameters())
    remedy = f"it is for {kept} checkpoints; free some, or set run.storage to another disk or a bucket"
    _room(report, "disk", Path(config.run.storage), kept * _CHECKPOINT_BYTES * parameters, remedy)


def check_loopback(report: Report) -> None:
    """Check that processes of this machine can reach each other, at a port that the system picks."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 5.0):
            report.ok("ports", "processes of this machine reach each other on 127.0.0.1")
    except OSError as e:
        report.fail("ports", f"no connection to a port on 127.0.0.1 ({e}); open the loopback interface (lo)")


@contextlib.contextmanager
def _kept_as_it_was(folder: Path, *names: str) -> Any:
    """Remove this user's folders of these names that the block has made."""
    paths = [folder / f"{name}-{os.getuid()}" for name in names]
    there = [path.exists() for path in paths]
    try:
        yield
    finally:
        for path, before in zip(paths, there, strict=True):
            if not before:
                with contextlib.suppress(OSError):
                    path.rmdir()


def _room(report: Report, subject: str, folder: Path, needed: int, remedy: str) -> int:
    """Report how much room the disk of `folder` has; return it in bytes."""
    above = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    about = os.statvfs(above)
    free = about.f_bavail * about.f_frsize
    if free < needed:
        report.fail(subject, f"{folder}: {_size(free)} free, and it needs {_size(needed)}; {remedy}")
    elif about.f_files and not about.f_favail:
        report.fail(subject, f"{folder}: the disk can take no more files (it has no inodes left); {remedy}")
    else:
        report.ok(subject, f"{folder}: {_size(free)} free")
    return free


def _free(folder: str) -> int:
    about = os.statvfs(folder)
    return about.f_bavail * about.f_frsize


def _size(count: float) -> str:
    """Return bytes as people write them."""
    return f"{count / _GIB:,.1f} GiB" if count >= _GIB else f"{count / _MIB:,.1f} MiB"
