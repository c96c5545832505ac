"""What a frozen subject's sites hold, as training data: streamed through a mixing buffer, or harvested to disk."""
