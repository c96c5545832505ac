"""Language models that can be stepped, and the samplers, drafters and texts around them."""
