"""What was understood of the data, shown before anything long starts and kept with the results.

A reader returns a ``Reading`` of each source; ``describe.py`` adds what is seen through the tokenizer. Rows in are
rows read plus rows named: ``Reading.rows`` is the sum of the examples and of ``Reading.left_out``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

# Classes and unused columns that are listed; more are counted.
MAX_LISTED = 12


@dataclass(frozen=True)
class Reading:
    """How one source of examples was read.

    Attributes:
        source: the file, or the task and its split.
        rows: rows that the source has.
        layout: how a file was read, such as "CSV with semicolons, UTF-16".
        text_columns, label_column: the columns taken; label_column is None for text without labels.
        unused: columns that were not taken.
        written: how classes are written in the source, where that is not their name.
        left_out: how many rows are not among the examples, by reason.
        notes: what a reader should know.
    """

    source: str
    rows: int
    layout: str = ""
    text_columns: tuple[str, ...] = ()
    label_column: str | None = None
    unused: tuple[str, ...] = ()
    written: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def without(self, count: int, reason: str) -> Reading:
        """The same reading with so many rows left out."""
        return replace(self, left_out={**self.left_out, reason: count}) if count else self

    def divided(self, train: int, held_out: int) -> dict[str, Reading]:
        """The readings by split, where so many examples are trained on and so many are held out."""
        return {
            "train": self.without(held_out, "held out for validation"),
            "validation": self.without(train, "used for training"),
        }


@dataclass(frozen=True)
class SplitSchema:
    """The examples of one split.

    Attributes:
        examples: how many there are.
        kind: classes, scores, "sets of labels", tags, answers or "no labels".
        classes: examples of each class, questions with and without an answer; None for scores and where there are no
            labels.
        score_range: least and greatest score; None unless the labels are scores.
        example: the first example as the model sees it, and its label.
        longest: tokens of the longest example.
        cut: examples that are longer than ``max_length`` tokens and cut to it; those with tags or
            answers are taken in windows.
    """

    name: str
    reading: Reading
    examples: int
    kind: str
    classes: dict[str, int] | None
    score_range: tuple[float, float] | None
    example: str
    longest: int
    cut: int
    max_length: int

    def lines(self) -> list[str]:
        """The schema in a few lines of plain text."""
        reading = self.reading
        source = f"{reading.source} ({reading.layout})" if reading.layout else reading.source
        lines = [f"{source}: {self.examples} of {reading.rows} rows"]
        if reading.left_out:
            reasons = ", ".join(f"{count} {reason}" for reason, count in reading.left_out.items())
            lines[0] += f"; left out: {reasons}"
        if reading.text_columns:
            columns = f"text {' + '.join(map(repr, reading.text_columns))}"
            columns += f", label {reading.label_column!r}" if reading.label_column else ", no label"
            if reading.unused:
                columns += f"; not used: {', '.join(map(repr, reading.unused[:MAX_LISTED]))}"
            lines.append(columns)
        if self.classes is not None and self.kind == "answers":
            parts = (f"{count} {name}" for name, count in self.classes.items())
            lines.append(f"questions: {', '.join(parts)}")
        elif self.classes is not None:
            word = {"sets of labels": "labels", "tags": "tags"}.get(self.kind, "classes")
            lines.append(f"{word}: {self._classes()}")
        if self.score_range is not None:
            lines.append("scores from {:g} to {:g}".format(*self.score_range))
        lines.append(f"first example: {self.example}")
        if self.cut:
            done = "taken in windows of" if self.kind in ("tags", "answers") else "cut to"
            lines.append(
                f"{done} {self.max_length} tokens: {self.cut} of {self.examples} (the longest has {self.longest})"
            )
        return [printable(line) for line in [*lines, *reading.notes, *self._one_label()]]

    def _one_label(self) -> list[str]:
        """A note if every example has the same label, so that most metrics mean nothing."""
        present = [name for name, count in (self.classes or {}).items() if count]
        if len(present) == 1 and self.kind == "classes":
            return [
                f"every example is of the class {present[0]!r}: accuracy is the share of them that is recognised, "
                "and no other metric is given"
            ]
        if self.score_range is not None and self.score_range[0] == self.score_range[1]:
            return ["every example has the same score, with which nothing can correlate"]
        return []

    def _classes(self) -> str:
        as_written = {name: label for label, name in self.reading.written.items()}
        parts = [
            (f"{index} {name}" if name != str(index) else name)
            + (f" (written {as_written[name]})" if name in as_written else "")
            + f": {count}"
            for index, (name, count) in enumerate((self.classes or {}).items())
        ]
        more = len(parts) - MAX_LISTED
        return ", ".join(parts[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class Schema:
    """What was understood of a task's data.

    Attributes:
        task: its name.
        splits: train, validation and further held-out splits.
        notes: what concerns several splits: classes that one lacks, texts that two share.
    """

    task: str
    splits: tuple[SplitSchema, ...]
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The schema in a few lines of plain text, each split's name before its lines."""
        lines = [f"{split.name}: {line}" for split in self.splits for line in split.lines()]
        return [*lines, *map(printable, self.notes)]

    def to_dict(self) -> dict[str, Any]:
        """The schema as plain values for a JSON file."""
        return asdict(self)


def printable(text: str) -> str:
    """Text with what a terminal would obey escaped."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )
