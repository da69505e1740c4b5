"""Curves and histograms: SVG for pages that may be light or dark, PNG for places that show nothing else."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.records.history import Points

INK = "#767676"  # in PNG, readable on white and on black; in SVG, the colour of the text around it
COLOURS = ("#2f7fd6", "#d9730d", "#2e9e5b", "#9a6dd7", "#d9484f", "#1a9aa0", "#b08a12", "#c65a9e")
STYLES = ("-", "--", ":", "-.")
SIZE, DPI = (4.2, 2.6), 150  # inches; dots an inch
MARKED = 40  # with no more points than this, each one is marked
BUDGET, FEWEST = 2400, 60  # points in a picture, and in a line of it at least


@dataclass(frozen=True)
class Line:
    """One curve: step and value, NaN where there is none."""

    label: str
    points: Points
    colour: int = 0
    style: int = 0


@dataclass(frozen=True)
class Bars:
    """One histogram: `len(edges) == len(counts) + 1`."""

    label: str
    edges: Sequence[float]
    counts: Sequence[float]
    colour: int = 0


@dataclass(frozen=True)
class Picture:
    """What is to be drawn. `name` is its file's, without the ending."""

    name: str
    title: str
    x: str
    y: str
    shapes: Sequence[Line | Bars]

    @property
    def alt(self) -> str:
        """The picture in words."""
        return f"{self.title}, over {self.x}: " + "; ".join(_in_words(shape) for shape in self.shapes)


@dataclass(frozen=True)
class Drawn:
    """A picture as bytes for a file, and as an element for a page."""

    picture: Picture
    svg: str
    png: bytes


def draw(picture: Picture, *, png: bool = True) -> Drawn:
    """Draw a picture. In the SVG, text is text, and colours are `currentColor` and the CSS variables `--c0` to `--c7`.

    Args:
        png: whether a PNG is wanted as well; it has no background.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "toolkit",
        "text.parse_math": False,  # a `$` in a name is a `$`
        "font.size": 8,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=SIZE)
        _fill(figure, picture)
        vector, raster = io.StringIO(), io.BytesIO()
        FigureCanvasSVG(figure).print_svg(vector, metadata={"Date": None})
        if png:
            FigureCanvasAgg(figure)
            figure.savefig(raster, format="png", dpi=DPI, transparent=True)
    return Drawn(picture, _for_pages(vector.getvalue(), picture), raster.getvalue())


def thinned(points: Points, most: int) -> Points:
    """At most about `most` points: of every stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= most:
        return points
    width = math.ceil(2 * len(points) / most)
    kept: Points = []
    for first in range(0, len(points), width):
        part = points[first : first + width]
        finite = [p for p in part if math.isfinite(p[1])]
        ends = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])} if finite else {part[0]}
        kept += sorted(ends)
    return kept


def histogram(label: str, values: Sequence[float], edges: Sequence[float], colour: int = 0) -> Bars:
    """Count values between edges."""
    counts = [0] * (len(edges) - 1)
    width = (edges[-1] - edges[0]) / len(counts)
    for value in values:
        counts[min(max(int((value - edges[0]) / width), 0), len(counts) - 1)] += 1
    return Bars(label, edges, counts, colour)


def _fill(figure: Any, picture: Picture) -> None:
    from matplotlib.ticker import MaxNLocator

    figure.patch.set_visible(False)
    axes = figure.add_axes((0.15, 0.16, 0.82, 0.72))
    axes.patch.set_visible(False)
    axes.set_title(picture.title, loc="left", fontsize=9)
    axes.set_xlabel(picture.x)
    axes.set_ylabel(picture.y)
    axes.grid(axis="y", color=INK, alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    most = max(BUDGET // max(len(picture.shapes), 1), FEWEST)
    drawn = [_shape(axes, shape, most) for shape in picture.shapes]
    if len(drawn) > 1 and any(shape.label for shape in picture.shapes):
        labels = [_label(shape.label) for shape in picture.shapes]
        place: dict[str, Any] = {"loc": "best" if most > BUDGET // 8 else "upper right"}
        if any(isinstance(shape, Bars) for shape in picture.shapes):  # bars leave no room but above them
            place = {"loc": "upper right", "ncols": len(labels)}
            axes.set_ylim(top=1.2 * axes.get_ylim()[1])
        axes.legend(drawn, labels, frameon=False, fontsize=7, **place)
    if picture.y.startswith("share of"):
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.02), min(high, 1.02))


def _shape(axes: Any, shape: Line | Bars, most: int) -> Any:
    colour = COLOURS[shape.colour % len(COLOURS)]
    if isinstance(shape, Bars):
        return axes.stairs(
            shape.counts, shape.edges, fill=True, facecolor=(colour, 0.25), edgecolor=colour, linewidth=1
        )
    points = thinned(shape.points, most)
    marker = "." if len(points) <= MARKED else None
    steps, values = [p[0] for p in points], [p[1] for p in points]
    style = STYLES[shape.style % len(STYLES)]
    return axes.plot(steps, values, color=colour, linestyle=style, linewidth=1.3, marker=marker, markersize=4)[0]


def _label(text: str) -> str:
    text = text if len(text) <= 32 else text[:31] + "…"
    return f" {text}" if text.startswith("_") else text  # matplotlib hides what begins with an underscore


def _for_pages(text: str, picture: Picture) -> str:
    """The `<svg>` element for use inside HTML: no address of a namespace, own ids, the page's colours, its title."""
    from markupsafe import escape

    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style).*?</\1>", "", text, flags=re.DOTALL)
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    own = re.sub(r"\W+", "-", picture.name) + "-"
    body = body.replace("xlink:href", "href")
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{own}", body)
    body = body.replace(INK, "currentColor")
    for i, colour in enumerate(COLOURS):
        body = body.replace(colour, f"var(--c{i})")
    title = f'<title id="{own}title">{escape(picture.alt)}</title>'
    return f'<svg {box.group(0) if box else ""} role="img" aria-labelledby="{own}title">{title}{body.strip()}'


def _in_words(shape: Line | Bars) -> str:
    label = f"{shape.label} " if shape.label else ""
    if isinstance(shape, Bars):
        full = [i for i, count in enumerate(shape.counts) if count]
        if not full:
            return f"{label}nothing"
        return f"{label}{sum(shape.counts):,.0f} from {shape.edges[full[0]]:.4g} to {shape.edges[full[-1] + 1]:.4g}"
    finite = [value for _, value in shape.points if math.isfinite(value)]
    if not finite:
        return f"{label}no number"
    return f"{label}from {finite[0]:.4g} to {finite[-1]:.4g}, lowest {min(finite):.4g}, highest {max(finite):.4g}"
