"""What the compiled code of a step is specialised for."""

from __future__ import annotations

from typing import NamedTuple

from fasttower_kernels.negatives.membership_numba_cpu import membership_of
from fasttower_kernels.negatives.proposal import Negatives
from fasttower_kernels.settings import LossSettings
from fasttower_kernels.tables import Tables


class Variant(NamedTuple):
    """What the compiled code is specialised for.

    Attributes:
        width: P, the padded width of a row.
        has_bias: whether items have a bias.
        exclude: whether negatives leave known positives out.
        exact: whether a bit of the membership is the answer already.
        has_l2: whether there is an L2 term.
        similarity: dot or cosine.
        proposal: of the negatives.
        loss: its name.
    """

    width: int
    has_bias: bool
    exclude: bool
    exact: bool
    has_l2: bool
    similarity: str
    proposal: str
    loss: str


def variant_of(parameters: Tables, negatives: Negatives, loss: LossSettings) -> Variant:
    """The variant that a step needs."""
    known = negatives.known_positives
    return Variant(
        parameters.users.shape[1],
        parameters.item_bias is not None,
        known is not None,
        negatives.settings.is_shared or membership_of(known)[1],
        loss.has_l2,
        loss.similarity,
        negatives.settings.proposal,
        loss.name,
    )
