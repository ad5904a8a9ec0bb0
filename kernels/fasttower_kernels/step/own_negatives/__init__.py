"""Positives that draw negatives of their own: gather, dot product, scatter."""
