"""How problems with a value are worded: what kind of thing was found, in short, and what was probably meant."""

import difflib
import unicodedata
from collections.abc import Iterable
from typing import Any

LONGEST_KEY = 80  # characters; nobody misspells a word of that length
UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # categories of characters that are not seen but may act
KINDS = {
    dict: "a mapping",
    list: "a list",
    str: "text",
    bool: "a boolean",
    int: "a whole number",
    float: "a number",
}


def kind(value: Any) -> str:
    """`a mapping`, `text`, `a whole number`, ...; `nothing` for `None`."""
    return "nothing" if value is None else KINDS.get(type(value), type(value).__name__)


def short(value: Any) -> str:
    """The value as Python writes it, at most 60 characters of it."""
    if isinstance(value, str | bytes) and len(value) > 60:
        value = value[:60]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def amount(size: float) -> str:
    """Bytes for people: `1.4 GB` is 1.4e9 bytes."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(size) >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size:,.0f} B"


def near(key: Any, known: Iterable[Any]) -> str | None:
    """The known word that is nearest to this one, or that it begins, if any is near."""
    if not isinstance(key, str) or len(key) > LONGEST_KEY:
        return None
    words = [str(k) for k in known]
    found = difflib.get_close_matches(key, words, n=1, cutoff=0.8)
    if not found and len(key) > 3:
        found = [word for word in words if word.startswith(key)]
    found = found or difflib.get_close_matches(key, words, n=1, cutoff=0.6)
    return found[0] if found else None


def did_you_mean(key: Any, known: Iterable[Any]) -> str:
    """`; did you mean 'beta'?`, or nothing where nothing is near."""
    found = near(key, known)
    return f"; did you mean '{found}'?" if found else ""


def visible(text: str, marks: str = "") -> str:
    """Text of anybody's with all but its letters, blanks and line ends as escapes: a terminal takes none as a command.

    Args:
        marks: further characters to escape.
    """

    def plain(c: str) -> bool:
        return c == "\n" or (unicodedata.category(c) not in UNSEEN and c not in marks)

    return text if text.isascii() and text.isprintable() else "".join(c if plain(c) else ascii(c)[1:-1] for c in text)


def first_line(error: BaseException) -> str:
    """The part of a library's error text worth repeating."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
