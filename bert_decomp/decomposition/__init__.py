"""From a plan to a model of factors."""
