"""Tells which split the name of a folder or of a tar means. Not for where in a source the splits are."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import Literal, NamedTuple

Kind = Literal["train", "eval"]

_TRAIN = ("train", "training", "trn")
_EVAL = (
    *("test", "tests", "testing", "tst", "val", "vals", "valid", "validation", "validate", "eval", "evals"),
    *("evaluation", "evaluate", "dev", "devel", "development", "holdout"),
)
_WORDS: dict[str, Kind] = {**dict.fromkeys(_TRAIN, "train"), **dict.fromkeys(_EVAL, "eval")}
# Words beside that of a split which change nothing: `training_set`, `test images`.
_FILLERS = (
    *("set", "sets", "data", "dataset", "split", "splits", "subset", "partition", "image", "images", "img", "imgs"),
    *("picture", "pictures", "photo", "photos", "sample", "samples", "example", "examples", "folder", "dir", "files"),
    *("jpg", "jpeg", "png"),
)
# Words that make another split of it, of which nobody knows how it is meant: `test2`, `val2017`, `trainB`, `train_old`.
_VERSION = re.compile(
    r"\d+|[a-z]|v\d+|new|old|final|full|all|small|large|big|mini|tiny|clean|raw|part|fold|copy|extra|orig|original|"
    r"public|private|seen|unseen|hard|easy|random|aug|augmented|resized|cropped|labell?ed|unlabell?ed|backup|bak|tmp"
)
_JOINED = re.compile(rf"\b({'|'.join(sorted(_WORDS, key=len, reverse=True))})({'|'.join(_FILLERS)})\b")  # trainset
_BOUNDARY = re.compile(r"(?<=[a-z])(?=[A-Z0-9])|(?<=[A-Z])(?=[0-9])|(?<=[0-9])(?=[A-Za-z])|(?<=[A-Z])(?=[A-Z][a-z])")
_SEVERAL = re.compile(rf"({'|'.join(_TRAIN)})({'|'.join(_EVAL)})|({'|'.join(_EVAL)})({'|'.join(_TRAIN)})")  # trainval


class SplitName(NamedTuple):
    """What the name of a folder says about a split.

    Attributes:
        kind: `train` or `eval`; None if it names no split.
        word: the word that names it, such as `validation`.
        sure: whether nothing else is in the name that counts.
        only: whether the rest, if there is any, only makes a version of a split, as in `test2`, and not a class, as
            in `bullet train`.
        rest: the other words that count; None if the name holds the words of several splits.
    """

    kind: Kind | None
    word: str = ""
    sure: bool = False
    only: bool = False
    rest: tuple[str, ...] | None = None


@lru_cache(maxsize=4096)
def split_name(name: str) -> SplitName:
    """Return what the name of a folder says about a split, in whatever case and with whatever between its words."""
    words = _words(name)
    if any(_SEVERAL.fullmatch(word) for word in words):
        return SplitName("train", "train", sure=False, only=True)
    found = list(dict.fromkeys(word for word in words if word in _WORDS))
    rest = [word for word in words if word not in _WORDS and word not in _FILLERS]
    if not found:
        return SplitName(None)
    sure = len(found) == 1 and not rest
    only = all(map(_VERSION.fullmatch, rest))
    return SplitName(_WORDS[found[0]], found[0], sure, only, tuple(rest) if len(found) == 1 else None)


def split_in(text: str) -> tuple[Kind, str] | None:
    """Return the kind and the word of the first split that a longer name, such as that of a tar, holds."""
    word = next((word for word in _words(text) if word in _WORDS), None)
    return None if word is None else (_WORDS[word], word)


def _words(name: str) -> list[str]:
    text = re.sub(r"h[eo]ld[\W_]*out", "holdout", unicodedata.normalize("NFKC", name), flags=re.IGNORECASE)
    words = re.sub(r"[\W_]+", " ", _BOUNDARY.sub(" ", text).casefold())
    return _JOINED.sub(r"\1 \2", words).split()
