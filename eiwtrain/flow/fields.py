"""The values that a field of a config may take, stated once by its type, and the check of a config against that.

Not for tensors at run time.
"""

from __future__ import annotations

from dataclasses import dataclass, is_dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Range:
    """The numbers that a field may be, as in `levels: Annotated[int, Range(1)] = 3`. pydantic understands it too."""

    least: int
    most: int | None = None
    below: int | None = None

    def __str__(self) -> str:
        end = "" if self.most is None else f" to {self.most}"
        return f"from {self.least}{end}" + ("" if self.below is None else f" to below {self.below}")

    def __contains__(self, value: Any) -> bool:
        return (
            self.least <= value
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> dict[str, Any]:
        """Return pydantic's schema of the number with these bounds (its protocol for annotations; needs no import)."""
        bounds = {"ge": self.least, "le": self.most, "lt": self.below}
        return {**handler(source), **{name: bound for name, bound in bounds.items() if bound is not None}}


def check_fields(config: Any) -> None:
    """Check each field of a dataclass against its type: a Literal, a number in a `Range`, another dataclass, or None.

    Raises:
        ValueError: a value is not allowed; the message names the field, the value and what is allowed.
    """
    for name, kind in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        if value is None and type(None) in kinds:
            continue
        if (
            len(kinds) > 1 and get_origin(kinds[-1]) is tuple and isinstance(value, tuple)
        ):  # a number, or a tuple of such numbers
            number, allowed = get_args(kinds[0])
            for one in value:
                check_number(name, one, number, allowed)
            continue
        if get_origin(kinds[0]) is Literal:
            if value not in get_args(kinds[0]):
                raise ValueError(f"{name}: {value!r} is not one of {', '.join(get_args(kinds[0]))}")
        elif get_origin(kinds[0]) is Annotated:
            number, allowed = get_args(kinds[0])
            check_number(name, value, number, allowed)
        elif is_dataclass(kinds[0]) and not isinstance(value, get_args(kind) or kind):
            raise ValueError(f"{name}: {value!r} is not a {kind.__name__}")


def check_number(name: str, value: Any, kind: type, allowed: Range) -> None:
    """Raise ValueError, naming the field, unless `value` is an int (if `kind` is float: or a float) in the range."""
    kinds = (int, float) if kind is float else kind
    if isinstance(value, bool) or not isinstance(value, kinds) or value not in allowed:
        raise ValueError(f"{name}: {value!r} is not {'a number' if kind is float else 'an integer'} {allowed}")


def check_known(what: str, values: Any, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless `values` is a mapping with no keys but `allowed`."""
    if not isinstance(values, dict):
        raise ValueError(f"{what}: {values!r} is not a mapping")
    if unknown := sorted(set(values) - set(allowed)):
        raise ValueError(f"{what}: unknown field {unknown[0]!r}; known are {', '.join(allowed)}")
