"""Per-token scores as a heat-map over the text."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.colorbar import ColorbarBase
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure as Picture
from matplotlib.patches import Rectangle

from bathyscope import types
from bathyscope.errors import InvalidRequest
from bathyscope.plots._theme import Theme, families, one_line

COLUMNS = 84
"""Characters a line."""

LINES = 60
"""Lines of a picture; what does not fit is said."""

_CELL, _LINE = 0.085, 0.24
"""Inches of a character and of a line."""


@dataclass(frozen=True, slots=True)
class _Cell:
    """A token, or a part of one that goes on in the next line."""

    line: int
    column: int
    width: int
    text: str
    score: float | None


def tokens(
    prediction: types.Prediction, theme: Theme, *, rows: Sequence[int] | None = None, unshown: int = 0
) -> Picture:
    """The texts of a prediction with `per_token`, each token on the colour of its score.

    `rows` are the inputs to show, in order; by default as many as fit. The colour is of the positive class's
    probability, of the top class's for several classes, of the value for a regression (from the lowest shown to the
    highest). `unshown` inputs were left out before.
    """
    if prediction.tokens is None:
        raise InvalidRequest("The prediction has no scores of tokens; ask again with per_token.")
    chosen = range(len(prediction.tokens)) if rows is None else rows
    cells: list[_Cell] = []
    line, left, cut = 0, 0, False
    for shown, row in enumerate(chosen):
        if not 0 <= row < len(prediction.tokens):
            raise InvalidRequest(f"There is no input {row}; the prediction has {len(prediction.tokens)}.")
        own = _laid_out(prediction.tokens[row], line)
        last = max((cell.line for cell in own), default=line)
        if last >= LINES:
            cut = shown == 0
            if cut:
                cells = [cell for cell in own if cell.line < LINES]
            left = len(chosen) - shown - cut
            break
        cells += own
        line = last + 2
    return _drawn(prediction, cells, _left_out(left + unshown, cut), theme)


def _laid_out(scores: Sequence[types.TokenScore], line: int) -> list[_Cell]:
    cells, column = [], 0
    for token in scores:
        text = token.text if token.text else f"<{token.id}>"
        score = token.score if isinstance(token.score, float) else max(token.score, default=None)
        part, width = "", 0
        for character in text:
            size = _width(character)
            if character == "\n" or column + width + size > COLUMNS:
                if part or character == "\n":
                    cells.append(_Cell(line, column, max(width, 1), part or "↵", score))
                line, column, part, width = line + 1, 0, "", 0
                if character == "\n":
                    continue
            part += character if character.isprintable() else "�"
            width += size
        if part:
            cells.append(_Cell(line, column, width, part, score))
            column += width
    return cells


def _width(character: str) -> int:
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _drawn(prediction: types.Prediction, cells: list[_Cell], note: str, theme: Theme) -> Picture:
    lines = max((cell.line for cell in cells), default=0) + 1
    width, height = COLUMNS * _CELL + 0.4, lines * _LINE + 1.1
    picture = Picture(figsize=(width, height))
    axes = picture.add_axes((0.2 / width, 0.15 / height, 1 - 0.4 / width, lines * _LINE / height))
    axes.set(xlim=(0, COLUMNS), ylim=(lines, 0))
    axes.axis("off")
    known = [cell.score for cell in cells if cell.score is not None]
    regression = prediction.task == "regression"
    norm = Normalize(min(known, default=0.0), max(known, default=1.0)) if regression else Normalize(0.0, 1.0)
    colours = LinearSegmentedColormap.from_list("tokens", [theme.low, theme.page, theme.high])
    fonts = families("DejaVu Sans Mono")
    for cell in cells:
        if cell.score is not None:
            colour = colours(norm(cell.score))
            axes.add_patch(Rectangle((cell.column, cell.line + 0.06), cell.width, 0.88, color=colour, linewidth=0))
        column = cell.column
        for character in cell.text:  # one by one, since fonts that stand in are not as wide
            if character != " ":
                axes.text(column, cell.line + 0.55, character, family=fonts, fontsize=8.5, va="center")
            column += _width(character)
    title = f"Tokens as layer {prediction.layer} reads them: {_scale(prediction)}"
    picture.text(0.2 / width, 1 - 0.25 / height, one_line(title, 84), fontweight="bold", fontsize=10, va="top")
    bar = picture.add_axes((0.2 / width, 1 - 0.68 / height, 2.4 / width, 0.1 / height))
    ColorbarBase(bar, cmap=colours, norm=norm, orientation="horizontal").outline.set_linewidth(0.4)
    bar.tick_params(labelsize=7, length=2)
    if note:
        picture.text(1 - 0.2 / width, 1 - 0.62 / height, note, ha="right", va="center", fontsize=7.5, color=theme.faint)
    return picture


def _left_out(inputs: int, cut: bool) -> str:
    said = ["the text goes on"] if cut else []
    if inputs:
        said.append(f"{inputs:,} more input{'s' if inputs > 1 else ''} not shown")
    return "; ".join(said)


def _scale(prediction: types.Prediction) -> str:
    match prediction.task:
        case "regression":
            return "predicted value"
        case "binary":
            return f"probability of {prediction.classes[-1]}"
        case _:
            return "probability of the top class"
