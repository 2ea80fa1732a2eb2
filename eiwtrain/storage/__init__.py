"""Files at any fsspec URL, tried again when a failure may pass; one writer a run (`lease`, on `swap`)."""

from eiwtrain.storage.files import (
    check_file_writable,
    check_writable,
    exists,
    find,
    get_file,
    listdir,
    put_file,
    read_bytes,
    read_range,
    sha256_bytes,
    sha256_file,
    size,
    without_nan,
    write_bytes,
    write_pieces,
)
from eiwtrain.storage.foreign import foreign
from eiwtrain.storage.removal import abandon_uploads, delete
from eiwtrain.storage.retry import StorageError, count_faults, faults, impatient, read_twice, retrying, waited
from eiwtrain.storage.urls import absolute, anchored, filesystem, is_local, join

__all__ = [
    "StorageError",
    "abandon_uploads",
    "absolute",
    "anchored",
    "check_file_writable",
    "check_writable",
    "count_faults",
    "delete",
    "exists",
    "faults",
    "filesystem",
    "find",
    "foreign",
    "get_file",
    "impatient",
    "is_local",
    "join",
    "listdir",
    "put_file",
    "read_bytes",
    "read_range",
    "read_twice",
    "retrying",
    "sha256_bytes",
    "sha256_file",
    "size",
    "waited",
    "without_nan",
    "write_bytes",
    "write_pieces",
]
