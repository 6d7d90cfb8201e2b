"""Model families, written natively: `checkpoint.inspect` -> `checkpoint.load_weights` -> logits."""
