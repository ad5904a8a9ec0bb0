"""What a step reads a vector as: itself, or with cosine similarity normalised.

Users carry the temperature: the logit is the inner product of what is read, and so is everything after
training.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from fasttower_kernels.settings import LossSettings

LEAST_NORM = 1e-8
"""A norm below it counts as this; gradients do not pass through such a norm."""


def read_users(vectors: Tensor, loss: LossSettings) -> Tensor:
    """User vectors (..., D) as the logit takes them: ``u``, or ``u / |u| / temperature``."""
    return normalize(vectors, dim=-1, eps=LEAST_NORM) / loss.temperature if loss.is_cosine else vectors


def read_items(vectors: Tensor, loss: LossSettings) -> Tensor:
    """Item vectors (..., D) as the logit takes them: ``v``, or ``v / |v|``."""
    return normalize(vectors, dim=-1, eps=LEAST_NORM) if loss.is_cosine else vectors
