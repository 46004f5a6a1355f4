"""A small true story: three models trained on handwritten digits, and what merging two of them gives."""
