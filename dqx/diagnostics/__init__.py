"""What a model's activations and predictions look like, before and after quantization."""
