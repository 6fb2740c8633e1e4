"""Answers of a saved model to texts: a predictor in memory, and a job over files of any size."""
