"""How pictures look: colours that colour-blind eyes tell apart, on white and on a dark page.

The colours are Okabe and Ito's ("Color Universal Design", 2008), on the dark page in their lighter tones. Series differ
in marker and dash as well, so that they stay apart in grey.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from matplotlib import font_manager

from bathyscope.errors import InvalidRequest

ThemeName = Literal["light", "dark"]


@dataclass(frozen=True, slots=True)
class Theme:
    """The colours of one page."""

    page: str
    """Behind everything."""

    ink: str
    """Text and axes."""

    faint: str
    """Notes and lines of reference."""

    series: tuple[str, ...]
    """Lines and their intervals, in order."""

    low: str
    """Middle to the left of a scale, as of a probability near 0; `ink` can be read on it."""

    high: str
    """Its other end."""

    @property
    def rc(self) -> Any:
        """What matplotlib is told. Text is never read as a formula: names and tokens hold dollar signs."""
        return {
            "text.parse_math": False,
            "text.usetex": False,
            "svg.hashsalt": "bathyscope",
            "svg.fonttype": "path",
            "font.family": families("DejaVu Sans"),
            "font.size": 9,
            "figure.facecolor": self.page,
            "savefig.facecolor": self.page,
            "axes.facecolor": self.page,
            "axes.edgecolor": self.faint,
            "axes.labelcolor": self.ink,
            "axes.titlecolor": self.ink,
            "axes.titlelocation": "left",
            "axes.titleweight": "bold",
            "axes.linewidth": 0.8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "text.color": self.ink,
            "xtick.color": self.ink,
            "ytick.color": self.ink,
            "xtick.labelsize": 8,
            "ytick.labelsize": 8,
            "legend.frameon": False,
            "legend.fontsize": 8,
        }


THEMES: dict[str, Theme] = {
    "light": Theme(
        page="#ffffff",
        ink="#1b1f23",
        faint="#666d74",
        series=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9"),
        low="#8fc3e8",
        high="#f6b26b",
    ),
    "dark": Theme(
        page="#14181d",
        ink="#e8eaed",
        faint="#9aa4ad",
        series=("#56b4e9", "#e69f00", "#2fc79a", "#e39cc5", "#f0e442", "#9ecbff"),
        low="#1f5f8b",
        high="#9a5200",
    ),
}

MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1)), (0, (8, 3)))


_FURTHER = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "WenQuanYi Zen Hei",
    "Hiragino Sans",
    "PingFang SC",
    "Microsoft YaHei",
    "Noto Sans Arabic",
    "Noto Sans Devanagari",
    "Arial Unicode MS",
)


@cache
def families(first: str) -> list[str]:
    """Fonts to draw with: that one, which comes with matplotlib, and what this machine has for further scripts."""
    installed = set(font_manager.get_font_names())
    return [first, *(name for name in _FURTHER if name in installed)]


def theme_of(name: str) -> Theme:
    """The theme of that name. Raises `InvalidRequest`."""
    theme = THEMES.get(name)
    if theme is None:
        raise InvalidRequest(f"theme is light or dark, not {name[:40]!r}")
    return theme


def one_line(text: str, length: int = 72) -> str:
    """Text as a title shows it: on one line, without characters that a font cannot draw, cut where it is long."""
    shown = "".join(character if character.isprintable() else " " for character in text)
    shown = " ".join(shown.split())
    return shown if len(shown) <= length else f"{shown[: length - 1]}…"
