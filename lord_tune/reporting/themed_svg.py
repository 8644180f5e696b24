"""SVG by matplotlib that takes its colours and its font from the page it stands in.

A figure is drawn in colours that stand for roles; in the text of the SVG they become CSS variables, so that light, dark
and print need one drawing. Letters stay text. Identifiers get the figure's name in front, because all figures of a page
share one space of names.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, GRID, FILL = "#00000a", "#00000b", "#00000c", "#00000d"
SERIES = tuple(f"#0000{index:02x}" for index in range(0x10, 0x18))  # a colour per run
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", FILL: "fill"} | {
    colour: f"series-{index}" for index, colour in enumerate(SERIES)
}
_TEXT = 10.5  # size of letters, in units of the drawing
_RULES: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name with $ is a name
    "font.size": _TEXT,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "axes.titlesize": _TEXT + 0.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.unicode_minus": True,
}


def themed(
    key: str,  # the figure's name, of letters, digits and -
    size: tuple[float, float],  # width and height in the units of the page's letters, about pixels
    title: str,
    description: str,
    draw: Callable[[Axes], None],
) -> str:
    """An <svg> element; everything in it is escaped."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_RULES, "svg.hashsalt": key}), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # letters that matplotlib's own font lacks: the page's is used
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _adapted(file.getvalue(), key, size, title, description)


def _adapted(text: str, key: str, size: tuple[float, float], title: str, description: str) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    text = re.sub(r"font-family: [^;\"]*;?", "", text)
    text = re.sub(r"(font: [^;\"]*?px) [^;\"]*", lambda found: found[1] + " sans-serif", text)
    text = re.sub(r"font: ([\d.]+px) sans-serif", r"font-size: \1", text)
    text = re.sub(r'\bid="', f'id="{key}-', text)
    text = text.replace("url(#", f"url(#{key}-").replace('xlink:href="#', f'href="#{key}-')
    text = re.sub(r"\s*\n\s*", "\n", text)
    inside = text[text.index(">", text.index("<svg")) + 1 :]
    width, height = size
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" '
        f'aria-labelledby="{key}-title {key}-desc">'
        f'<title id="{key}-title">{html.escape(title)}</title><desc id="{key}-desc">{html.escape(description)}</desc>'
        f"{inside}"
    )
