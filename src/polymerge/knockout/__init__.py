"""What each layer does: replace a part of a model, or merge a part of it only, and score what is left."""
