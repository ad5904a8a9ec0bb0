"""Generalised binary cross-entropy: BCE whose positive term weighs beta, against overconfidence.

    beta softplus(-x+) + sum_k softplus(x_k),  beta = a (t (1 - 1/a) + 1/a) = 1 - t (1 - a)

with a the share of a user's untouched items that is drawn and t the calibration: 0 is BCE, 1 calibrates the
probabilities for the sampling.

Source: Petrov and Macdonald, "gSASRec: Reducing Overconfidence in Sequential Recommendation Trained with
Negative Sampling" (RecSys 2023), section 5.
"""
