"""Prompts and images in, answers out: what search and evaluation ask of a model."""
