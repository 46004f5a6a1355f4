"""One page about a merge: what was merged, how the deltas overlap, what the model scores, and what to try next."""
