"""What all tests share: a real S3 server, one a process, started on first use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cluster.s3 import S3Server


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # two processes on two cores
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """SeaweedFS on the loopback interface, with the bucket `bucket`."""
    with S3Server(tmp_path_factory.mktemp("s3"), bucket="bucket") as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty folder on the server, for which the environment is set."""
    from s3fs import S3FileSystem

    for name in ("AWS_PROFILE", "FSSPEC_S3_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):  # nobody's own settings
        monkeypatch.setenv(name, str(tmp_path / "none"))
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")  # so that a test can put a proxy into AWS_ENDPOINT_URL
    S3FileSystem.clear_instance_cache()  # which keeps clients with what the environment said before
    yield f"s3://{s3_server.bucket}/{tmp_path.name}"
    S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database to copy, as one takes a second to make."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path
