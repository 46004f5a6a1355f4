"""The families' tables, one file per lineage; `families.registry` collects every `Family` in them."""
