"""Transforms: changes of the network that leave its function alone and make it easier to round."""
