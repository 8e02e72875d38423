"""The report's `protocol`: which rows chose what, and which rows scored it, in words."""

from __future__ import annotations


def protocol_text(
    *,
    folds: int,
    given_test: bool,
    chooses_layer: bool,
    several_penalties: bool,
    calibration: str,
    main: str,
    loss: str,
) -> str:
    """Sentences for a reader of the report. `main` and `loss` name what layers and penalties are chosen by."""
    parts = ["Standardisation and weights see training rows only."]
    if given_test:
        parts.append("`layers`: each layer is fitted on the training rows and scored on the test rows.")
    else:
        parts.append(f"`layers`: each row is scored by a probe fitted without its fold ({folds} folds).")
    if several_penalties:
        parts.append(f"C is chosen in inner folds of the training rows, by {loss}.")
    if calibration != "none":
        parts.append(
            f"Probabilities are calibrated ({calibration}) by what probes of inner folds say of training rows that "
            "they did not see; `calibration.before` and each layer's `uncalibrated` are the figures without it."
        )
    parts.append(_held_out(given_test, chooses_layer, several_penalties, main, calibration))
    if main == "AUROC":
        parts.append("AUROC and average precision compare rows of one fold.")
    parts.append(
        "Intervals: 95 % percentile bootstrap of the held-out predictions, whole clusters (groups, repeated and nearly "
        "equal inputs) at a time" + ("." if folds == 1 else ", widened for what folds share (Nadeau & Bengio 2003).")
    )
    return " ".join(parts)


def _held_out(given_test: bool, chooses_layer: bool, several_penalties: bool, main: str, calibration: str) -> str:
    if not chooses_layer and not several_penalties:
        return "`held_out`: as there is one layer and one C, nothing was chosen, and it equals `layers`."
    what = " and ".join(name for name, chosen in (("the layer", chooses_layer), ("C", several_penalties)) if chosen)
    by = f", the layer by {main}{'' if calibration == 'none' else ' before calibration'}," if chooses_layer else ""
    if given_test:
        return (
            f"`held_out`: {what} chosen in inner folds of the training rows{by} and scored on the test rows. "
            "`best_layer` is that layer, and the probe is the one fitted on the training rows."
        )
    text = (
        f"`held_out`: for each fold {what} chosen in inner folds of its training rows{by} and the fold scored with "
        "that choice; no row takes part in a choice it is scored by."
    )
    if chooses_layer:
        text += (
            " The best figure in `layers` is chosen on the rows it is scored on, and so is too good; quote `held_out`. "
            f"`best_layer` is the layer with the highest {main} in `layers`, and the probe is fitted there on all rows."
        )
    return text
