"""Evaluation of models: tasks, scorers, results and their comparison, and runs of other evaluation tools."""
