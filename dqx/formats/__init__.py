"""Number formats: widths, grids and codes."""
