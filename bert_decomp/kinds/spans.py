"""Answers that are spans of a text: the best one of several windows, and SQuAD's scores of what was found."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Tokens of the longest answer, as in transformers' example for SQuAD.
MOST_TOKENS = 30
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Spans:
    """The best span of each window, and its first token, which stands for no answer.

    Attributes:
        first, last: tokens of the span (windows,), int.
        score: sum of both logits (windows,); -inf where a window has no token of the context.
        absent: the same sum for no answer (windows,).
        scale: log of the sum over all pairs of tokens of the context, and of the first token (windows,):
            exp(score - scale) is a probability.
    """

    first: np.ndarray
    last: np.ndarray
    score: np.ndarray
    absent: np.ndarray
    scale: np.ndarray


def best_spans(logits: np.ndarray, inside: np.ndarray) -> Spans:
    """The span of at most 30 tokens with the largest sum of logits, in each window.

    Args:
        logits: (windows, 2, tokens) of a span's first and last token.
        inside: (windows, tokens), whether a token is one of the context.

    >>> spans = best_spans(np.array([[[0.0, 2, 1], [0.0, 0, 3]]]), np.array([[False, True, True]]))
    >>> int(spans.first[0]), int(spans.last[0]), float(spans.score[0])
    (1, 2, 5.0)
    """
    windows, _, tokens = logits.shape
    start, end = (np.where(inside, logits[:, place], -np.inf) for place in (0, 1))
    score = np.full(windows, -np.inf)
    first, last = np.zeros(windows, int), np.zeros(windows, int)
    rows = np.arange(windows)
    for more in range(min(MOST_TOKENS, tokens)):
        sums = start[:, : tokens - more] + end[:, more:]
        place = sums.argmax(-1)
        better = sums[rows, place] > score
        score = np.where(better, sums[rows, place], score)
        first, last = np.where(better, place, first), np.where(better, place + more, last)
    counted = np.where(inside[:, None] | (np.arange(tokens) == 0), logits, -np.inf)
    scale = np.logaddexp.reduce(counted, -1).sum(-1)
    return Spans(first, last, score, logits[:, :, 0].sum(-1), scale)


def chosen_windows(
    spans: Spans, question: np.ndarray, may_be_absent: bool
) -> list[tuple[int, int, bool]]:
    """For each question its number, the window that answers it, and whether there is an answer.

    There is none if in every window no answer scores higher than the best span of all, as in transformers' example for
    SQuAD 2.

    Args:
        question: of each window (windows,).
        may_be_absent: whether no answer may be given; else it is where no window has a token of the context.
    """
    found = []
    order = np.argsort(question, kind="stable")
    bounds = np.flatnonzero(np.diff(question[order])) + 1
    for rows in np.split(order, bounds) if len(order) else ():
        best = rows[spans.score[rows].argmax()]
        nothing = rows[spans.absent[rows].argmin()]
        answered = np.isfinite(spans.score[best]) and not (
            may_be_absent and spans.absent[nothing] > spans.score[best]
        )
        found.append((int(question[best]), int(best if answered else nothing), bool(answered)))
    return found


def normalised(text: str) -> str:
    """An answer as SQuAD compares it: small letters, no punctuation, no articles, single spaces.

    >>> normalised("The  Eiffel-Tower!")
    'eiffeltower'
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def squad_scores(given: str, accepted: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 of words, each the best over the accepted answers (Rajpurkar et al., 2016 and 2018).

    >>> squad_scores("in the city of Paris", ["Paris", "the city"])
    (0.0, 0.4)
    >>> squad_scores("", [])  # rightly no answer
    (1.0, 1.0)
    """
    answers = [answer for answer in map(normalised, accepted) if answer] or [""]
    found = normalised(given)
    return (
        max(float(found == answer) for answer in answers),
        max(_f1(found.split(), answer.split()) for answer in answers),
    )


def _f1(found: list[str], answer: list[str]) -> float:
    if not found or not answer:
        return float(found == answer)
    common = sum((Counter(found) & Counter(answer)).values())
    return 2 * common / (len(found) + len(answer))
