"""URLs that somebody else wrote."""

import pytest

from eiwtrain import storage


@pytest.mark.parametrize(
    "url",
    [
        "/data/photos",
        "runs/tiny",
        "file:///data/x",
        "s3://b/x",
        "s3a://b/x",
        "gs://b/x",
        "az://c/x",
        "abfs://c@a.dfs.x/y",
    ],
)
def test_paths_and_object_stores_are_opened(url):
    assert storage.foreign(url, "a tag") == url


@pytest.mark.parametrize(
    "url",
    [
        "reference://a::http://evil/x.json",
        "http://evil/x",
        "https://evil/x",
        "s3://b/x::http://evil/x",
        "simplecache::s3://b/x",
        "filecache::http://evil/x",
        "zip://a::s3://b/x.zip",
        "/data/x::reference://",
        "memory://x",
        "ftp://host/x",
        "sftp://host/x",
        "ssh://host/x",
        "hdfs://host/x",
        "github://o:r@main/x",
        "git://x",
        "hf://o/r",
        "smb://host/x",
        "dask://x",
        "jupyter://x",
        "python://x",
        "S3://b/x",
        " http://evil/x",
        "s3://b/\nx",
        "s3://b/\x1b[2J",
        "/data/\x00x",
        "s3://" + "x" * 9000,
        "",
        None,
        3,
        ["s3://b/x"],
    ],
    ids=repr,
)
def test_other_urls_are_refused_in_a_line_fit_to_be_printed(url):
    with pytest.raises(storage.StorageError, match=r"^a tag: ") as e:
        storage.foreign(url, "a tag")
    assert str(e.value).isprintable()
    assert len(str(e.value)) < 300


def test_a_pipe_or_device_is_no_file_and_does_not_block(tmp_path):
    import os

    os.mkfifo(tmp_path / "run.json")
    for path in (tmp_path / "run.json", "/dev/zero"):
        with pytest.raises(storage.StorageError, match="no regular file"):
            storage.read_bytes(str(path))


@pytest.mark.parametrize("remote", [False, True])
def test_a_file_that_is_larger_than_it_may_be_is_not_read(tmp_path, remote):
    url = f"memory://{tmp_path.name}/f" if remote else str(tmp_path / "f")
    storage.write_bytes(url, b"x" * 11)
    assert storage.read_bytes(url, 11) == b"x" * 11
    with pytest.raises(storage.StorageError, match="at most 10"):
        storage.read_bytes(url, 10)
