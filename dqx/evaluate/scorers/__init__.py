"""Scorers of answers: programs in a sandbox, mathematics."""
