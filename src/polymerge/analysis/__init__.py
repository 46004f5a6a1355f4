"""Analysis of what merging does to the models."""
