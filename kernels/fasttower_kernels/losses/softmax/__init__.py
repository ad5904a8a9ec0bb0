"""Sampled softmax: the positive among all items, estimated from those that are drawn.

    -x+ + log(exp(x+) + sum_k exp(x_k - log q_k))

q_k is the expected number of times that the item stands among the positive's negatives: without it popular
items, which in-batch negatives draw more often, would be pushed down too far.

Source: Bengio and Senecal, "Adaptive Importance Sampling to Accelerate Training of a Neural Probabilistic
Language Model" (2008), section 3; Yi et al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item
Recommendations" (RecSys 2019), section 3.
"""
