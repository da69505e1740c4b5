"""What pages share: templates, names without their place on this machine, numbers for people, marked differences."""

import difflib
import re
from pathlib import Path
from typing import Any

from markupsafe import Markup

from toolkit.pages.pictures import Drawn

MAX_BYTES = 2_000_000
LONGEST = 4_000  # characters of one answer on a page
WORDS = 1_500  # compared word by word up to this length
_PATH = re.compile(r"(?<![\w/.:~-])/(?:[^\s'\"/]+/)+([^\s'\"/]*)")


def render(template: str, **context: Any) -> str:
    """A page from one of the templates. Everything is escaped that was not made here."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("toolkit.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(f"{template}.html.jinja").render(**context)
    return text.encode("utf-8", "replace").decode("utf-8")  # a model may have said half of a character


def element(drawn: Drawn) -> Markup:
    """The picture as an element; its texts were escaped when it was drawn."""
    return Markup(drawn.svg)


def short(value: Any) -> Any:
    """The value with absolute paths by their last part, inside of mappings, lists and sentences as well."""
    if isinstance(value, dict):
        return {key: short(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [short(inner) for inner in value]
    if not isinstance(value, str):
        return value
    return Path(value).name if value.startswith("/") and "\n" not in value else _PATH.sub(r"\1", value)


def figure(value: float) -> str:
    """A number for people: 4 digits, thousands separated."""
    if value == int(value) and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """`2:05:09`, `5:09`, or `3.2 s` below a minute."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def marked(before: str | None, after: str) -> list[tuple[bool, str]]:
    """The text in pieces, each with whether it is new: words that stand differently, or not at all, in `before`."""
    cut = after if len(after) <= LONGEST else after[:LONGEST] + f" … ({len(after) - LONGEST:,} characters more)"
    if before is None:
        return [(False, cut)] if cut else []
    ours, theirs = _words(cut), _words(before[: LONGEST * 2])
    if max(len(ours), len(theirs)) > WORDS:
        return [(False, cut)]
    pieces: list[tuple[bool, str]] = []
    matcher = difflib.SequenceMatcher(None, theirs, ours, autojunk=False)
    for kind, _, _, first, last in matcher.get_opcodes():
        if last > first:
            pieces.append((kind != "equal", "".join(ours[first:last])))
    return pieces


def _words(text: str) -> list[str]:
    """Words with the white space after them, so that they join to the text."""
    return re.findall(r"\s*\S+|\s+$", text)
