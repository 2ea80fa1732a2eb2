"""HTML and SVG elements whose texts are escaped by themselves. Not for what a page says."""

from __future__ import annotations

import html

from eiwtrain.terminal.redact import redact

_VOID = ("img", "meta", "br")


class Html(str):
    """Markup: a plain string that is not this class is text, and gets escaped."""


Child = str | Html | None


def el(tag: str, /, *children: Child, **attributes: object) -> Html:
    """Return an element. Its texts, as children and attributes, are escaped; None is left out.

    Args:
        attributes: `class_` for class, `stroke_width` for stroke-width.
    """
    names = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items() if value is not None}
    head = "".join(f' {name}="{escape(value)}"' for name, value in names.items())
    return Html(f"<{tag}{head}>" if tag in _VOID else f"<{tag}{head}>{joined(*children)}</{tag}>")


def joined(*children: Child) -> Html:
    """Return elements and texts behind each other."""
    return Html("".join(escape(c) for c in children if c is not None))


def escape(value: object) -> Html:
    """Return markup as it is, and a text without effect, secrets of URLs, or characters that turn text around."""
    if isinstance(value, Html):
        return value
    shown = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in redact(str(value)))
    return Html(html.escape(shown))
