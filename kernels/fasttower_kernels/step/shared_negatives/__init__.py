"""Blocks of positives that share a list of negatives: a matmul for the scores, two for the gradients."""
