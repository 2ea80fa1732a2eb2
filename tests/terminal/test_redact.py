"""Secrets inside URLs: hidden, refused by every command that takes a URL, and never repeated."""

import pytest
from helpers import tiny_config
from hypothesis import given
from hypothesis import strategies as st

import data_prep.__main__ as data_prep_command
from eiwtrain import evaluate, export, sample, storage
from eiwtrain.terminal.redact import holds_secret, redact
from eiwtrain.tracking import TrackingError
from eiwtrain.tracking.store import client

PLANTED = "hunter2"
WITH = [
    f"http://user:{PLANTED}@host:5000/x",
    f"https://{PLANTED}@host",
    f"HTTPS://user:{PLANTED}@host",
    f"s3://key:{PLANTED}/+x@bucket/folder",
    f"postgresql+psycopg://user:{PLANTED}@host/mlflow",
    f"postgresql://user:p@{PLANTED}@host/mlflow",
    f"https://host/x?aws_secret_access_key={PLANTED}",
    f"s3://bucket/x?access_key={PLANTED}&y=1",
    f"https://host/x?sv=1&sig={PLANTED}&z=2",
    f"s3://bucket/x?X-Amz-Signature={PLANTED}",
    f"postgresql://user:12/{PLANTED}@host/mlflow",
    f"mysql+pymysql://user:3306?{PLANTED}@host/mlflow",
    f"s3://key:7/{PLANTED}@bucket/folder",
    f"ftp://user:123456/{PLANTED}@host/folder",
    f"ftp://user:0/{PLANTED}@host/folder",
    f"https://host/x?key={PLANTED}",
    f"https://host/x?y=1&auth={PLANTED}#z",
    f"https://host/x?api-key={PLANTED}",
    f"https://host/x#access_token={PLANTED}&token_type=bearer",
    f"postgresql://host/db?user=a&pass={PLANTED}",
    f"mysql://host/db?db_pass={PLANTED}&a=1",
    f"https://host/x?private_key={PLANTED}",
    f"https://host/x?privateKey={PLANTED}",
    f"mssql+pyodbc:///?odbc_connect=DRIVER%3DX%3BUID%3Da%3BPWD%3D{PLANTED}",
    f"https://host/x?pw={PLANTED}",
    f"https://host/x?passphrase={PLANTED}",
    f"https://account.blob.core.windows.net/c?sas={PLANTED}",
    f"https://host/x?blob_sas={PLANTED}",
    f"https://host/x?jwt={PLANTED}",
    f"jdbc:sqlserver://host;user=a;password={PLANTED};b=1",
    f"https://host/x?a=1;pwd={PLANTED}",
    f"https://host/x?p%61ssword={PLANTED}",
    f"https://host/x?next=https%3A%2F%2Fa%3A{PLANTED}%40host%2F",
    f"https://host/x?next=%2Fy%3Fapi_key%3D{PLANTED}",
    f"https://host/x?Authorization=Bearer+{PLANTED}",
    f"https://host/x?shared-key={PLANTED}",
    f"s3://key:{PLANTED}@bucket/x?a=1",
]
WITHOUT = [
    "runs",
    "/data/a?token=x",
    "http://host:5000/a@b",
    "http://host:5000?x=a@b",
    "redis://host:6379/0?x=a@b",
    "s3://bucket/a:b@c",
    "abfs://container@account.dfs.core.windows.net/x",
    "postgresql://user@host/mlflow",
    "sqlite:////home/a@b/c:d.db",
    "hdfs://namenode:8020/user/a@b",
    "postgresql://host:5432/mlflow?sslmode=require",
    "mysql+pymysql://host:3306/mlflow?charset=utf8mb4",
    "http://host:5000/#/experiments/1/runs/2?searchFilter=tags.author",
    "https://host/x?design=1&author=a&keyword=b&keys=2&monkey=3#key",
    "s3://bucket/key=1/auth=2/sig=3",
    "https://host/x?sort_key=a&keyspace=b&pattern=c&path=d%2Fe&next=https%3A%2F%2Fhost%2Fy%3Fa%3D1",
    "https://host/x;version=1?passage=2&spin=3&assign=4",
]


@pytest.mark.parametrize("url", WITH)
def test_a_secret_in_a_url_is_seen_and_hidden(url):
    assert holds_secret(url)
    assert PLANTED not in redact(f"could not reach {url}: refused")
    assert not holds_secret(redact(url)) or "***" in redact(url)
    assert redact(redact(url)) == redact(url)


@pytest.mark.parametrize("url", WITHOUT)
def test_a_url_without_one_is_left_alone(url):
    assert not holds_secret(url)


CHARACTERS = "abcXYZ019-._~%!$'()*+,;"
WORD = st.text(CHARACTERS, min_size=1, max_size=12)
SECRET = st.text(CHARACTERS + "/?#:", min_size=1, max_size=12)


@given(st.sampled_from(["http", "https", "s3", "gs", "mysql+pymysql"]), WORD, WORD, WORD, st.text(max_size=20))
def test_no_password_outlives_redaction_wherever_the_url_stands(scheme, user, password, host, around):
    planted = f"0{password}QQ"  # not found by chance in what is around it
    said = redact(f"{around} {scheme}://{user}:{planted}@{host}/x {around}")
    assert planted not in said
    assert said.count(f"{scheme}://***@{host}/x") == 1


@given(st.sampled_from(["postgresql", "mysql+pymysql", "mssql+pyodbc", "s3"]), WORD, SECRET, WORD)
def test_a_password_that_looks_like_a_port_is_seen(scheme, user, password, host):
    assert redact(f"{scheme}://{user}:{password}@{host}/x") == f"{scheme}://***@{host}/x"


NAME = st.text("abcz019-._~", min_size=1, max_size=12)


@given(
    st.sampled_from(["http", "https", "s3", "gs", "hdfs", "redis", "postgresql", "mysql+pymysql"]),
    st.integers(1, 65535),
    st.lists(NAME, max_size=3),
    st.dictionaries(st.sampled_from(["versionId", "region", "page", "q", "sort", "driver", "keyspace", "a"]), NAME),
)
def test_host_port_path_and_everyday_parameters_are_no_secret(scheme, port, path, parameters):
    query = "&".join(f"{name}={value}" for name, value in parameters.items())
    assert not holds_secret(f"{scheme}://host:{port}/{'/'.join(path)}?{query}")


@given(st.text(max_size=60))
def test_redaction_twice_is_redaction_once(text):
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize("url", WITH)
def test_storage_and_mlflow_refuse_it_without_repeating_it(url):
    for refuse, error in ((storage.exists, storage.StorageError), (client, TrackingError)):
        with pytest.raises(error, match="a password in a URL would be logged; give it in the environment") as e:
            refuse(url)
        assert PLANTED not in str(e.value)


URL = f"s3://key:{PLANTED}@bucket/x"


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (evaluate.main, [URL, "--data", "nowhere"]),
        (sample.main, [URL, "--output", "x.png"]),
        (export.main, ["best", "--run", URL]),
        (export.main, ["best", "--run", "x", "--tracking-uri", f"http://user:{PLANTED}@host"]),
        (data_prep_command.main, ["photos", "--output", URL, "--resolution", "32"]),
        (data_prep_command.main, ["folder", "--source", URL, "--output", "x", "--resolution", "32"]),
        (data_prep_command.main, ["show", URL]),
    ],
)
def test_every_command_refuses_it_in_one_line(command, arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command(arguments) == 2
    said = capsys.readouterr()
    assert "would be logged" in said.err
    assert PLANTED not in said.out + said.err
    assert list(tmp_path.iterdir()) == []


def test_a_registered_model_with_a_password_in_its_url_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:{PLANTED}@127.0.0.1:1")
    assert evaluate.main(["models:/x@best", "--data", "nowhere"]) == 2
    assert PLANTED not in capsys.readouterr().err


def test_a_password_from_the_environment_is_refused(monkeypatch, capsys, tmp_path):
    import yaml

    from eiwtrain import run

    config = tiny_config(
        tmp_path, tracking={"uri": "http://user:${SECRET}@host"}, run={"storage": "s3://k:${SECRET}@b"}
    )
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("SECRET", PLANTED)
    for dry in ([], ["--dry-run"]):
        assert run.main([str(tmp_path / "c.yaml"), *dry]) == 2
        said = capsys.readouterr()
        assert said.err.count("would be logged") == 2
        assert PLANTED not in said.out + said.err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:{PLANTED}@host")
    config["tracking"], config["run"] = {}, {"name": "tiny", "storage": str(tmp_path / "runs")}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    assert run.main([str(tmp_path / "c.yaml")]) == 2
    assert PLANTED not in capsys.readouterr().err
