"""What merges do to the models that went into them."""
