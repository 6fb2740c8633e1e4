"""Tags of words put together to entities."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..data.tokens import OUTSIDE

# What may stand before the name in a tag of a span: it begins, goes on, ends, or is one word (seqeval's default mode).
BEGINS, ENDS, PREFIXES = ("B-", "S-"), ("E-", "S-"), ("B-", "I-", "E-", "S-")


def of_spans(names: Iterable[str]) -> bool:
    """Whether tags say where spans begin and go on.

    >>> of_spans(["O", "B-PER", "I-PER"]), of_spans(["O", "PER"]), of_spans(["NOUN", "VERB"])
    (True, False, False)
    """
    return any(name.startswith(("B-", "I-")) for name in names)


def entities(tags: Sequence[str], names: Sequence[str]) -> list[tuple[str, int, int]]:
    """Label, first and last word of each entity in the tags of consecutive words.

    Of spans (``B-``, ``I-``) as seqeval counts them; it is what transformers' pipeline groups. Other tags beside ``O``
    go on while they are the same, as in the pipeline. Where no tag is called ``O`` (parts of speech) every word is one.

    Args:
        names: all tags that there are.

    >>> entities(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"], ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"])
    [('PER', 0, 1), ('LOC', 3, 3), ('LOC', 4, 4)]
    >>> entities(["NAME", "NAME", "O"], ["O", "NAME"]), entities(["NOUN", "NOUN"], ["NOUN", "VERB"])
    ([('NAME', 0, 1)], [('NOUN', 0, 0), ('NOUN', 1, 1)])
    """
    spans = of_spans(names)
    alone = not spans and OUTSIDE not in names
    found: list[tuple[str, int, int]] = []
    previous = OUTSIDE
    for place, tag in enumerate(tags):
        label = tag[2:] if spans and tag.startswith(PREFIXES) else tag
        begins = (
            alone
            or previous == OUTSIDE
            or found[-1][0] != label
            or (spans and (tag.startswith(BEGINS) or previous.startswith(ENDS)))
        )
        if tag != OUTSIDE and begins:
            found.append((label, place, place))
        elif tag != OUTSIDE:
            found[-1] = (label, found[-1][1], place)
        previous = tag
    return found
