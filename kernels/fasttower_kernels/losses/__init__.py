"""Losses of a positive and its negatives, each given by what it does with a logit.

A loss is a folder with one small file per language: `reference` (plain torch, the specification), `numba_cpu`
and `triton_gpu`. The steps call it for a tile of positives and know nothing of its formula.
"""
