"""The tables of the families, a file for each lineage; `families.registry` finds every `Family` in them."""
