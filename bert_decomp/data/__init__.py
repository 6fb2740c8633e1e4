"""Labelled text as tasks."""
