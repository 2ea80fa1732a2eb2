"""Settings around the program that break its connections: files of certificates, proxies, a clock that is wrong.

Libraries name the symptom, such as "[Errno 2] No such file"; this names the setting. Not for credentials.
"""

from __future__ import annotations

import email.utils
import os
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

from eiwtrain.terminal.redact import redact

_BUNDLES = (
    "AWS_CA_BUNDLE",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "SSL_CERT_FILE",
    "MLFLOW_TRACKING_SERVER_CERT_PATH",
)
_PROXIES = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
_PROXY_ERRORS = ("ProxyError", "ProxyConnectionError", "ClientProxyConnectionError", "ClientHttpProxyError")
_LOCAL_ERRORS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
_SKEW_SECONDS = 300.0  # Amazon refuses a request whose time is off by 900, other servers earlier


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what caused it, down to the first cause."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def at_fault(error: BaseException) -> str:
    """Return which setting of the environment made a connection fail, in a line; empty if none did."""
    chain = list(causes(error))
    if _is_about_certificates(chain) and (bundle := _wrong_bundle()):
        return bundle
    names = {kind.__name__ for each in chain for kind in type(each).__mro__}
    proxies = [name for name in _PROXIES if os.environ.get(name)]
    if names & set(_PROXY_ERRORS) and proxies:
        which = redact(os.environ[proxies[0]])
        return f"the proxy that {proxies[0]} names, {which}, does not answer; set it right, or NO_PROXY for this host"
    return ""


def is_final(error: BaseException) -> bool:
    """Return whether a connection failed by a file of this machine, such as one of certificates: it fails each time."""
    chain = list(causes(error))
    return _is_of_a_local_file(chain) or (_is_about_certificates(chain) and bool(_wrong_bundle()))


def skew(server_time: str | None) -> str:
    """Return how far this machine's clock is from the server's, in words; empty if it is right.

    Args:
        server_time: the header `Date` of the server's answer.
    """
    try:
        server = email.utils.parsedate_to_datetime(server_time or "").timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return ""
    off = time.time() - server
    side = "ahead of" if off > 0 else "behind"
    return (
        f"this machine's clock is {abs(off) / 60:,.0f} minutes {side} the server's" if abs(off) > _SKEW_SECONDS else ""
    )


def _is_of_a_local_file(chain: list[BaseException]) -> bool:
    """Return whether botocore's client failed at a file before it had a connection."""
    local = any(isinstance(e, _LOCAL_ERRORS) or type(e) is ssl.SSLError for e in chain[1:])
    return type(chain[0]).__name__ == "HTTPClientError" and local


def _is_about_certificates(chain: list[BaseException]) -> bool:
    said = any(isinstance(e, ssl.SSLError) or "certificate bundle" in str(e) for e in chain)
    return said or _is_of_a_local_file(chain)


def _wrong_bundle() -> str:
    """Return which variable names a file of certificates that cannot be read; empty if all can."""
    for name in _BUNDLES:
        if not (given := os.environ.get(name)):
            continue
        path = Path(given)
        if not path.exists():
            why = "is not there"
        elif path.is_dir():
            if name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "MLFLOW_TRACKING_SERVER_CERT_PATH"):
                continue  # requests takes a folder
            why = "is a folder"
        else:
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
                continue
            except OSError:  # SSLError is one
                why = "holds no certificates that can be read"
        return f"{name}: {given} {why}; name a file of certificates (PEM), or unset it"
    return ""
