"""Families of settings that a search tries: a loss, its negatives and a similarity, and what to vary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from fasttower_kernels.settings import LossName, Proposal, Similarity

OWN_NEGATIVES: tuple[Proposal, ...] = ("uniform", "popularity")
"""Proposals that draw for each positive; the others share a list."""


class Family(NamedTuple):
    """Settings that differ in one number."""

    loss: LossName
    negatives: Proposal
    similarity: Similarity

    @property
    def axis(self) -> Literal["l2", "temperature"]:
        """The number: vectors of any length need L2, normalised ones a temperature."""
        return "temperature" if self.similarity == "cosine" else "l2"


STANDARD = Family("bce", "uniform", "dot")
IN_BATCH = Family("softmax", "in-batch", "cosine")
THOROUGH = (Family("softmax", "in-batch", "dot"), Family("softmax", "mixed", "cosine"))
"""What is tried besides by a thorough search."""


def families(given: Mapping[str, Any], *, thorough: bool = False) -> tuple[Family, ...]:
    """The families that a configuration leaves open, at least one; the first one counts without a search.

    Args:
        given: the fields of the configuration that have a value.
        thorough: whether to try what rarely wins.
    """
    return among((STANDARD, IN_BATCH, *(THOROUGH if thorough else ())), given)


def among(tried: Sequence[Family], given: Mapping[str, Any]) -> tuple[Family, ...]:
    """Those of some families that a configuration leaves open, or the one that what is given makes."""
    return tuple(family for family in tried if _fits(family, given)) or (_completed(given),)


def _fits(family: Family, given: Mapping[str, Any]) -> bool:
    if any(given.get(name, value) != value for name, value in family._asdict().items()):
        return False
    axis = "temperature" if "temperature" in given else "l2" if "l2" in given else family.axis
    if axis != family.axis and "similarity" not in given:
        return False
    needs_own = (
        given["negative_pool"]
        or given["loss_scale"] == "pairs"
        or given["deterministic"]
        or given["optimiser"] == "lazy_adam"
    )
    return family.negatives in OWN_NEGATIVES or not needs_own


def _completed(given: Mapping[str, Any]) -> Family:
    """Of settings that are none of those tried."""
    negatives = given.get("negatives", "uniform")
    shared = negatives not in OWN_NEGATIVES
    cosine = "temperature" in given or (shared and "l2" not in given)
    similarity = given.get("similarity", "cosine" if cosine else "dot")
    return Family(given.get("loss", "softmax" if shared else "bce"), negatives, similarity)
