"""Checks of config fields, with messages that name the field, the value and what is allowed.

Not for tensors at run time.
"""

from __future__ import annotations

from typing import Any


def check_count(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raise ValueError unless `value` is an integer of at least `least` and at most `most`."""
    allowed = f"an integer from {least}" + ("" if most is None else f" to {most}")
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        raise ValueError(f"{name}: {value!r} is not {allowed}")


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(allowed)}")


def check_known(what: str, fields: Any, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless `fields` is a mapping with no keys but `allowed`."""
    if not isinstance(fields, dict):
        raise ValueError(f"{what}: {fields!r} is not a mapping")
    if unknown := sorted(set(fields) - set(allowed)):
        raise ValueError(f"{what}: unknown field {unknown[0]!r}; known are {', '.join(allowed)}")
