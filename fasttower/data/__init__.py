"""From anything that holds interactions to dense, split, counted frames.

This file imports nothing: `fasttower.data.synthetic` has to be importable where there is only numpy.
"""
