"""Training: a plan of phases, and the trainer that goes through them.

Needs only torch and numpy, and numba or Triton where they are there.
"""
