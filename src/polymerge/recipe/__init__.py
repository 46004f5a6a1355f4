"""What the user asks for: models, weights, a method and its parameters."""
