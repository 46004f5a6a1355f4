"""Files that the Python of a tool's environment runs; they import nothing of polymerge's."""
