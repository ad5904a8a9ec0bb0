"""Negatives: items drawn for each positive or for a block, by default those that the user has not touched."""

from __future__ import annotations

from torch import Tensor

from fasttower_kernels.backends import implementation
from fasttower_kernels.checks import check_index, check_known_positives, check_step
from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives.popularity import Popularity
from fasttower_kernels.negatives.proposal import Negatives
from fasttower_kernels.negatives.reference import ATTEMPTS
from fasttower_kernels.philox import Key
from fasttower_kernels.settings import Backend

__all__ = ["ATTEMPTS", "Negatives", "Popularity", "sample_negatives"]


def sample_negatives(
    user_index: Tensor,
    num_negatives: int,
    num_items: int,
    *,
    key: Key,
    step: int,
    known_positives: KnownPositives | None = None,
    popularity: Popularity | None = None,
    first_position: int = 0,
    backend: Backend = "auto",
) -> Tensor:
    """Draw the negatives of a batch, the same ones in every backend.

    Without known positives it replaces ``torch.randint(num_items, (B, N))``; with them, a draw that the user
    has touched is drawn again, exactly, by the rule in `reference`. The training step draws as it scores, and
    never calls this.

    Args:
        user_index: (B,), int32 or int64, in [0, U): the users of the batch.
        num_negatives: N, 0 or more.
        num_items: I, 1 <= I < 2**31.
        key: of the stream of negatives.
        step: t, 0 <= t < 2**32: the training step.
        known_positives: what to leave out; None draws from the whole catalogue.
        popularity: what to draw by; None draws uniformly.
        first_position: the batch position of ``user_index[0]``, where a batch is handled in parts.
        backend: the implementation.

    Returns:
        (B, N), int64, in [0, I). Negatives may repeat. Those of a user who has touched every item mean
        nothing: such a positive has weight 0 in the loss.

    Raises:
        FastTowerError: a number out of range, known positives that do not fit, or the backend cannot run
            here.
    """
    if num_negatives < 0 or not 1 <= num_items < 2**31:
        raise FastTowerError(
            f"{num_negatives} negatives of {num_items} items; expected 0 or more of 1 to 2**31 - 1."
        )
    check_step(step)
    if first_position < 0 or first_position + len(user_index) > 2**32:
        raise FastTowerError(
            f"first_position is {first_position} for {len(user_index)} users; expected 0 to 2**32."
        )
    if known_positives is not None:
        check_known_positives(known_positives, num_items, user_index.device)
        check_index("user_index", user_index, known_positives.num_users)
    draw = implementation(__name__, backend, user_index.device).sample_negatives
    negatives: Tensor = draw(
        user_index.contiguous(),
        num_negatives,
        num_items,
        key=key,
        step=step,
        known_positives=known_positives,
        popularity=popularity,
        first_position=first_position,
    )
    return negatives
