"""The chart of the performance page: horizontal bars as SVG, readable on light and on dark pages."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

WIDTH, LEFT, RIGHT = 720, 130, 60
BAR, GAP, TITLE, TOP = 18, 6, 26, 34

_STYLE = """\
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600 }
.note { fill: #59636e }
.page { fill: #ffffff }
.bar { fill: #9aa4af }
.ours { fill: #0b62a4 }
.range { stroke: #1f2328; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 }
.note { fill: #9198a1 }
.page { fill: #0d1117 }
.bar { fill: #6e7681 }
.ours { fill: #58a6ff }
.range { stroke: #e6edf3 }
}"""


class Bar(NamedTuple):
    """One bar, with a line from its first to its third quartile."""

    label: str
    q1: float
    median: float
    q3: float
    is_ours: bool


def svg(title: str, groups: Mapping[str, Sequence[Bar]]) -> str:
    """Return the chart: one group of bars for each name in *groups*, all on one linear scale from zero."""
    scale = (WIDTH - LEFT - RIGHT) / max(bar.q3 for bars in groups.values() for bar in bars)
    top, parts = TOP, [_text(12, 22, title, "note")]
    for name, bars in groups.items():
        parts.append(_text(12, top + 18, name, "title"))
        top += TITLE
        for bar in bars:
            parts += _drawn(bar, top, scale)
            top += BAR + GAP
    height = top + GAP
    size = f'width="{WIDTH}" height="{height}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" {size}>',
            f"<title>{escape(title)}</title>",
            f"<style>\n{_STYLE}\n</style>",
            f'<rect class="page" {size} rx="6"/>',
            *parts,
            "</svg>\n",
        ]
    )


def _drawn(bar: Bar, top: int, scale: float) -> Iterator[str]:
    kind, middle = "bar ours" if bar.is_ours else "bar", top + BAR / 2
    yield _text(24, top + 14, bar.label, "label")
    yield f'<rect class="{kind}" x="{LEFT}" y="{top}" width="{bar.median * scale:.1f}" height="{BAR}" rx="2"/>'
    first, last = LEFT + bar.q1 * scale, LEFT + bar.q3 * scale
    yield f'<line class="range" x1="{first:.1f}" x2="{last:.1f}" y1="{middle}" y2="{middle}"/>'
    yield _text(last + 8, top + 14, f"{bar.median:.2f}", "label")


def _text(x: float, y: float, words: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y}">{escape(words)}</text>'
