"""Carry out a plan: out of core, to disk."""
