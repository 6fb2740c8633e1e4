"""What every generated table shares."""

from __future__ import annotations

from typing import Any

# Where plots lie, below the root of the repository. Tables link to them by this path; a page gets it relative to
# itself.
FIGURES = "docs/results/figures"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose first column is text and whose others are numbers."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def machine(environment: dict[str, Any]) -> str:
    """Processor, libraries and commit of a record, in one line."""
    return (
        f"{environment['cpu']} ({environment['cpu_capability']}), {environment['cores']} cores, torch "
        f"{environment['torch']}, transformers {environment['transformers']}, commit {environment['commit']}"
    )


def seeds(records: list[dict[str, Any]]) -> str:
    """The seeds of records, in one cell."""
    return ", ".join(str(record["seed"]) for record in records)


def trained(stage: str) -> str:
    """What a suite's stage trained with, in one cell."""
    return "no" if stage == "before" else f"preset {stage}"
