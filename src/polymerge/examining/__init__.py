"""Evaluate a model: ask it, or let another tool ask it, and write down what it is worth."""
