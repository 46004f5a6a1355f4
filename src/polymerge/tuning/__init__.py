"""Vary a coefficient, generate, compare, choose."""
