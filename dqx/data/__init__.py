"""Data that the project makes itself, and where texts come from."""
