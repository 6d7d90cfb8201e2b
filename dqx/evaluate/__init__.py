"""Tasks, scored through lm-eval."""
