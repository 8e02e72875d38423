"""Whether an answer in words is the right one.

`exact` drops white space at both ends and compares what is left. `normalised` is that of SQuAD (Rajpurkar et al. 2016):
lower case, no punctuation, no articles, single spaces. Two things differ, since they would call wrong answers right: a
sign before a number and a point within one stay ("-4" is not "4", "3.5" not "35"), and articles and punctuation stay in
when nothing else is left of the right answer ("A", "The", "?").
"""

from __future__ import annotations

import re
import string
import unicodedata

from bathyscope_workers.extraction.spec import Match

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_SIGN = re.compile(r"(?<![\w.])[-\u2212](?=\.?\d)")
_POINT = re.compile(r"(?<=\d)\.(?=\d)")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_KEPT = {"\ue000": "-", "\ue001": "."}
"""Private characters that stand for a sign and a point while punctuation is dropped."""


def matches(given: str, right: str, how: Match) -> bool:
    """Whether `given` counts as the answer `right`."""
    if how == "exact":
        return given.strip() == right.strip()
    wanted = normalised(right)
    if wanted:
        return normalised(given) == wanted
    return _plain(given) == _plain(right)


def normalised(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces."""
    text = _plain(text).replace("\ue000", "").replace("\ue001", "")
    text = _POINT.sub("\ue001", _SIGN.sub("\ue000", _THOUSANDS.sub("", text)))
    text = _ARTICLES.sub(" ", text.translate(_PUNCTUATION))
    for stand_in, kept in _KEPT.items():
        text = text.replace(stand_in, kept)
    return " ".join(text.split())


def _plain(text: str) -> str:
    """Lower case, single spaces, one way of writing each character."""
    return " ".join(unicodedata.normalize("NFC", text).lower().split())
