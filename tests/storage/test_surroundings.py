"""Settings of the environment that break connections are named, and what cannot pass is not tried again."""

import email.utils
import ssl
import time

import botocore.exceptions
import certifi
import pytest
import requests
from mlflow.exceptions import MlflowException
from storage_helpers import refusal, retried

from eiwtrain.storage import retry, surroundings
from eiwtrain.tracking import store

BUNDLES = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "MLFLOW_TRACKING_SERVER_CERT_PATH")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in (*BUNDLES, *surroundings._PROXIES):
        monkeypatch.delenv(name, raising=False)


def raised(error, cause=None):
    try:
        raise error from cause
    except Exception as e:
        return e


def of_s3(cause):
    return raised(botocore.exceptions.HTTPClientError(error=cause), cause)


def final_message(error):
    """The message of a call to S3 that fails so at its first try; fails if it is tried again."""
    calls, final = retried(error)
    assert calls == 1
    assert not final.passing
    return str(final)


@pytest.mark.parametrize("name", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"])
@pytest.mark.parametrize(
    ("content", "cause", "words"),
    [
        (None, FileNotFoundError(2, "No such file or directory"), "is not there"),
        ("folder", IsADirectoryError(21, "Is a directory"), "is a folder"),
        ("no certificate", ssl.SSLError(136, "[X509: NO_CERTIFICATE_OR_CRL_FOUND]"), "holds no certificates"),
    ],
)
def test_a_wrong_bundle_of_certificates_is_final_and_named(tmp_path, monkeypatch, name, content, cause, words):
    path = tmp_path / "ca.pem"
    if content == "folder":
        path.mkdir()
    elif content:
        path.write_text(content)
    monkeypatch.setenv(name, str(path))
    said = final_message(of_s3(cause))
    if content != "folder" or name != "REQUESTS_CA_BUNDLE":  # requests takes a folder
        assert f"{name}: {path} {words}" in said


def test_a_file_that_is_missing_for_a_connection_is_final_whatever_names_it():
    assert "[Errno 2]" in final_message(of_s3(FileNotFoundError(2, "No such file or directory")))


def test_a_wrong_bundle_is_named_of_mlflow_too(tmp_path, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    cause = OSError(f"Could not find a suitable TLS CA certificate bundle, invalid path: {tmp_path}/ca.pem")
    error = raised(MlflowException(f"API request failed with exception {cause}"), cause)
    assert store.cause_line(error).startswith(f"REQUESTS_CA_BUNDLE: {tmp_path}/ca.pem is not there")
    assert not store.may_pass(error)


def test_a_bundle_that_is_right_is_not_blamed(monkeypatch):
    monkeypatch.setenv("AWS_CA_BUNDLE", certifi.where())
    assert surroundings.at_fault(of_s3(ssl.SSLCertVerificationError(1, "self-signed certificate"))) == ""
    assert retry._may_pass(raised(botocore.exceptions.EndpointConnectionError(endpoint_url="https://x")))


def test_a_dead_proxy_is_named_without_its_password(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://user:hunter2@127.0.0.1:1")
    cause = requests.exceptions.ProxyError("Max retries exceeded, Connection refused")
    for said in (
        store.cause_line(raised(MlflowException("API request failed with exception"), cause)),
        retry._describe(raised(botocore.exceptions.ProxyConnectionError(proxy_url="http://x"))),
    ):
        assert "the proxy that HTTPS_PROXY names, http://***@127.0.0.1:1, does not answer" in said
        assert "hunter2" not in said


@pytest.mark.parametrize(
    ("status", "code", "minutes", "words"),
    [
        (403, "RequestTimeTooSkewed", None, "the clock of this machine is wrong"),
        (403, "SignatureDoesNotMatch", 20, "20 minutes ahead of the server's"),
        (403, "AccessDenied", -20, "20 minutes behind the server's"),
        (400, "ExpiredToken", 90, "90 minutes ahead"),
        (403, "SignatureDoesNotMatch", 0, "wrong credentials"),
    ],
)
def test_a_wrong_clock_is_not_said_to_be_wrong_credentials(status, code, minutes, words):
    error = refusal(status, code)
    if minutes is not None:
        date = email.utils.formatdate(time.time() - 60 * minutes, usegmt=True)
        error.__cause__.response["ResponseMetadata"]["HTTPHeaders"] = {"Date": date}
    said = final_message(error)
    assert words in said
    assert ("credentials" in said) == (minutes == 0)


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (raised(MlflowException("x"), requests.exceptions.ConnectionError("refused")), True),
        (raised(MlflowException("x"), requests.exceptions.ReadTimeout("slow")), True),
        (MlflowException("API request to endpoint failed with error code 503 != 200"), True),
        (MlflowException("API request to endpoint failed with error code 401 != 200"), False),
        (MlflowException("no such table"), False),
    ],
)
def test_what_may_pass_of_mlflow(error, passes):
    assert store.may_pass(error) == passes


def test_an_error_of_a_local_file_is_not_blamed_on_certificates(monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "absent"))
    assert surroundings.at_fault(raised(PermissionError(13, "Permission denied"), FileNotFoundError(2, "x"))) == ""
    assert not surroundings.is_final(raised(ConnectionResetError("reset"), FileNotFoundError(2, "x")))
