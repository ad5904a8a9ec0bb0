"""Training: epochs of steps, the choice of the epoch on a validation part, and the refit.

Needs torch and numpy alone, and numba or Triton where they are there.
"""
