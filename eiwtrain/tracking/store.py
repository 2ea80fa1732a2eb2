"""An MLflow tracking store: its address, a client, and its errors. Not for what is logged."""

from __future__ import annotations

import logging
import os
import re
import shlex
import sqlite3
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eiwtrain.config import Config
from eiwtrain.storage import surroundings
from eiwtrain.storage.database import check_sqlite, sqlite_path, sqlite_uri
from eiwtrain.terminal.lines import one_line
from eiwtrain.terminal.redact import REFUSAL, holds_secret, redact

_AWAY = {"ConnectionError", "Timeout", "TimeoutError", "ProxyError", "gaierror", "EndpointConnectionError"}
"""Classes of errors, by name, after which a server may answer later."""


class TrackingError(RuntimeError):
    """The tracking server or database cannot be used; the message is one line with the URI and the cause."""

    passing = False
    """Whether it may work later without a change, as when a connection is refused."""

    @classmethod
    def because(cls, text: str, cause: Exception) -> TrackingError:
        """Return an error about what MLflow raised."""
        error = cls(f"{text}: {cause_line(cause)}")
        error.passing = may_pass(cause)
        return error


@dataclass(frozen=True)
class TrackedRun:
    """The address of a run in MLflow."""

    uri: str
    experiment_id: str
    run_id: str

    @property
    def view_command(self) -> str:
        """The command that opens the MLflow UI on this run's store; empty when the store is a server."""
        if self.uri.startswith("http"):
            return ""
        mlflow = Path(sys.executable).with_name("mlflow")
        return f"{shlex.quote(str(mlflow))} ui --backend-store-uri {shlex.quote(self.uri)} --port 5000"

    @property
    def url(self) -> str:
        """URL of the run's page in the MLflow UI; for a local store `view_command` must run."""
        server = self.uri.rstrip("/") if self.uri.startswith("http") else "http://127.0.0.1:5000"
        # the UI opens on GenAI unless the address says otherwise
        return f"{server}/#/experiments/{self.experiment_id}/runs/{self.run_id}?workflowType=machine_learning"


def tracking_uri(config: Config) -> str:
    """Return the MLflow tracking URI of a config: the given one, or an SQLite file in the local storage folder.

    The environment is not read here, as it differs between processes: `load_config` has read it for all of them.
    """
    return config.tracking.uri or sqlite_uri(f"{config.run.storage}/mlflow.db")


def is_local(uri: str) -> bool:
    """Return whether the store is a database file, after a look at the file, which takes milliseconds.

    Raises:
        TrackingError: it cannot be used.
    """
    if (database := sqlite_path(uri)) is None:
        return False
    try:
        check_sqlite(database)
    except (OSError, ValueError, sqlite3.Error) as e:
        raise TrackingError(f"tracking.uri: {uri} cannot be used: {cause_line(e)}") from None
    return True


def client(uri: str) -> Any:
    """Return a client of the store at `uri`.

    Raises:
        TrackingError: the store cannot be used, or the URI holds a password.
    """
    if holds_secret(uri):
        raise TrackingError(f"tracking.uri: {redact(uri)}: {REFUSAL}")
    is_local(uri)
    # a request that is sent again could create a run twice; callers here look first, and retry by themselves
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "1")
    try:
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):  # after the import, which sets its own levels
            logging.getLogger(name).setLevel(logging.ERROR)
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # or it logs a traceback at each try
        if not uri.startswith("http"):
            from mlflow.store.db import utils

            utils.MAX_RETRY_COUNT = 3  # of opening a database; by itself MLflow tries for 110 s
        return MlflowClient(tracking_uri=uri)
    except Exception as e:
        raise TrackingError(f"tracking.uri: {uri} cannot be used: {cause_line(e)}") from None


def refused(e: Exception) -> bool:
    """Return whether the server understood a request and refused it: retries would block all later ones forever."""
    from mlflow.exceptions import MlflowException

    return isinstance(e, MlflowException) and e.error_code in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")


def may_pass(e: Exception) -> bool:
    """Return whether the store may answer later: it, or what is between, does not answer now."""
    if surroundings.is_final(e) and surroundings.at_fault(e):
        return False
    names = {kind.__name__ for each in surroundings.causes(e) for kind in type(each).__mro__}
    return bool(names & _AWAY) or bool(re.search(r"error code (429|50[0234])\b|database is locked", str(e)))


def cause_line(e: BaseException) -> str:
    """Return the innermost cause that the message repeats: a refused connection, without the layers above it; or the
    setting of the environment that is at fault."""
    if why := surroundings.at_fault(e):
        return why
    whole, cause = str(e), e.__cause__ or e.__context__
    while cause is not None:
        if str(cause) and str(cause) in whole:
            e = cause
        cause = cause.__cause__ or cause.__context__
    text = one_line(e, limit=None).partition(" [SQL: ")[0]  # SQLAlchemy adds the statement and its values
    return f"{type(e).__name__}: {text[:200]}"
