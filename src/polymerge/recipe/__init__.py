"""The recipe: models, weights, a method and its parameters."""
