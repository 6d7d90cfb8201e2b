"""Roundings: a weight and the statistics of its input in, codes on a grid out (`dqx.quant.protocols.Rounding`)."""
