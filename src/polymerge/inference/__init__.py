"""Inference: prompts and images in, answers out, for search and evaluation."""
