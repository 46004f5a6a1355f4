"""One page that shows a merge: what was merged, how its parts lie to each other, what it scores, what to try next."""
