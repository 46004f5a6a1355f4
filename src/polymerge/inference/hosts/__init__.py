"""Programs that run in a process and an environment of their own, and import nothing of polymerge."""
