"""The rules of what to try next, by what they look at."""
