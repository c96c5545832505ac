"""Read, replace and steer at a site of a frozen subject model, by plain forward hooks."""
