"""Bayesian personalised ranking: the positive above each negative.

    sum_k softplus(x_k - x+)

Source: Rendle et al., "BPR: Bayesian Personalized Ranking from Implicit Feedback" (UAI 2009), section 4.1.
"""
