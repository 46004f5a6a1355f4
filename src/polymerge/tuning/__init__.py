"""Coefficient search: vary a parameter, generate answers, compare them, choose."""
