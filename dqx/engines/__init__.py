"""Other programs that compute a model's logits, in place of the simulation."""
