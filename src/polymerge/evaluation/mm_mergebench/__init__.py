"""MM-MergeBench: its tasks, its files, and its published scorers."""
