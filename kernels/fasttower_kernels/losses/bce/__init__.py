"""Binary cross-entropy: the positive against label 1, each negative against label 0.

    softplus(-x+) + sum_k softplus(x_k)

Source: Mikolov et al., "Distributed Representations of Words and Phrases and their Compositionality"
(NIPS 2013), section 2.2; He et al., "Neural Collaborative Filtering" (WWW 2017), section 3.1.
"""
