"""Labelled text as tasks."""

from . import demo, glue  # noqa: F401  (they register their tasks)
