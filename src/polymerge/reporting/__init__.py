"""A page about a merge: its inputs and plan, the overlap of the deltas, scores, and suggestions."""
