"""Reads a JSON object of strangers field by field: each has the type that is asked for, or an error names it.

Not for what the fields mean: that is in `eiwtrain.data.manifest`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_MOST = (1 << 63) - 1  # a whole number: arrays hold no larger ones
_DEEPEST = 32  # levels of values of any form


class DataError(ValueError):
    """A data set is absent, damaged or not the one that was asked for; the message is one line."""


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object; `where` names it in errors.

    Raises:
        DataError: it is not one.
    """
    try:
        content = json.loads(text)
    except RecursionError:  # a file of brackets
        raise DataError(f"{where}: not JSON that can be read (it nests far too deep)") from None
    except ValueError as e:
        raise DataError(f"{where}: not JSON ({e})") from None
    if not isinstance(content, dict):
        raise DataError(f"{where}: not a JSON object")
    return content


def _inside(value: Any) -> Iterable[Any]:
    """Return the values directly inside a JSON value."""
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _shown(value: Any) -> str:
    """Return a value for an error: not what is inside of it, which may be large or deep."""
    return "an object" if isinstance(value, dict) else "a list" if isinstance(value, list) else f"{value!r:.60}"


@dataclass(frozen=True)
class Fields:
    """A JSON object whose fields are read by name and type; an error names the field and the file."""

    values: dict[str, Any]
    where: str
    prefix: str = ""

    def _take(self, name: str, kind: type, what: str) -> Any:
        if name not in self.values:
            raise DataError(f"{self.where}: field '{self.prefix}{name}' is missing")
        value = self.values[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise DataError(f"{self.where}: field '{self.prefix}{name}' is {_shown(value)}, not {what}")
        return value

    def text(self, name: str) -> str:
        return str(self._take(name, str, "a string"))

    def integer(self, name: str) -> int:
        value = int(self._take(name, int, "a whole number"))
        if not 0 <= value <= _MOST:
            raise DataError(f"{self.where}: field '{self.prefix}{name}' is negative, or far too large")
        return value

    def mapping(self, name: str) -> Fields:
        return Fields(self._take(name, dict, "an object"), self.where, f"{self.prefix}{name}.")

    def mappings(self, name: str) -> list[Fields]:
        entries = self.listed(name, dict)
        return [Fields(e, self.where, f"{self.prefix}{name}[{i}].") for i, e in enumerate(entries)]

    def listed(self, name: str, kind: type) -> list[Any]:
        values = self._take(name, list, "a list")
        for i, value in enumerate(values):
            if type(value) is not kind or (isinstance(value, int) and not -_MOST <= value <= _MOST):
                field = f"{self.prefix}{name}[{i}]"
                raise DataError(f"{self.where}: field '{field}' is {_shown(value)}, not {kind.__name__}")
        return list(values)

    def check_depth(self) -> None:
        """Check that the fields hold no values too deep inside others to be written or printed again."""
        level: list[Any] = [self.values]
        for _ in range(_DEEPEST):
            level = [inner for value in level for inner in _inside(value)]
            if not level:
                return
        raise DataError(f"{self.where}: field '{self.prefix.rstrip('.')}' nests more than {_DEEPEST} deep")
