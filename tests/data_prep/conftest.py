"""Fixtures of the tests of sources."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from eiwtrain import storage


@pytest.fixture
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder of this test alone, where files are unpacked."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture
def bucket() -> Iterator[str]:
    """URL of an empty folder in memory, which is remote to the code under test."""
    url = f"memory://{uuid.uuid4().hex}"
    yield url
    storage.delete(url)
