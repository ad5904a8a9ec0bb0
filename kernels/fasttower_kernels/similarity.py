"""What a step reads a vector as: itself, or with cosine similarity normalised.

Users carry the temperature: the logit is the inner product of what is read, and so is everything after
training.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

LEAST_NORM = 1e-8
"""A norm below it counts as this; gradients do not pass through such a norm."""


def read_users(vectors: Tensor, temperature: float | None) -> Tensor:
    """User vectors (..., D) as the logit takes them: ``u / |u| / temperature``; with None ``u`` itself."""
    if temperature is None:
        return vectors
    return normalize(vectors, dim=-1, eps=LEAST_NORM) / temperature


def read_items(vectors: Tensor, temperature: float | None) -> Tensor:
    """Item vectors (..., D) as the logit takes them: ``v / |v|``; with None ``v`` itself."""
    return vectors if temperature is None else normalize(vectors, dim=-1, eps=LEAST_NORM)
