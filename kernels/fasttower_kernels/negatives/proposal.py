"""The negatives of a part that is trained on: their settings and what these need of the data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives.popularity import Popularity, popularity
from fasttower_kernels.settings import NegativeSettings
from fasttower_kernels.tables import Interactions


@dataclass(frozen=True)
class Negatives:
    """Where a step gets its negatives from.

    Attributes:
        settings: of the draws.
        num_users: U.
        num_items: I.
        known_positives: what negatives leave out; None draws from the whole catalogue.
        item_counts: (I,), int64: how often each item stands in the n rows of the part that is trained on;
            None where the proposal does not read it.
        num_rows: n.
    """

    settings: NegativeSettings
    num_users: int
    num_items: int
    known_positives: KnownPositives | None = None
    item_counts: Tensor | None = None
    num_rows: int = 0

    @staticmethod
    def of(
        settings: NegativeSettings,
        trained: Interactions,
        num_users: int,
        num_items: int,
        known_positives: KnownPositives | None,
    ) -> Negatives:
        """The negatives for training on some interactions."""
        counts = None
        if settings.proposal in ("popularity", "in-batch", "mixed"):
            counts = torch.bincount(trained.item_index, minlength=num_items)
        return Negatives(settings, num_users, num_items, known_positives, counts, len(trained))

    def check_sizes(self, num_items: int, num_users: int | None = None) -> None:
        """Check that they are of a catalogue, and where ``num_users`` is given of these users.

        Raises:
            FastTowerError: they are not.
        """
        if self.num_items != num_items:
            raise FastTowerError(f"the negatives are of {self.num_items} items; expected {num_items}.")
        if num_users is not None and self.num_users != num_users:
            raise FastTowerError(f"the negatives are of {self.num_users} users; expected {num_users}.")

    @cached_property
    def popularity(self) -> Popularity | None:
        """The proposal's table, where there is one."""
        if self.settings.proposal != "popularity":
            return None
        assert self.item_counts is not None  # `of` counts them
        return popularity(
            self.item_counts, self.settings.popularity_power, self.num_users, self.known_positives
        )

    @cached_property
    def list_rates(self) -> tuple[Tensor, float]:
        """What log q of a shared list is made of.

        An item that is not masked stands ``b * rate[item] + drawn`` times among the negatives of a positive,
        on average, where b are the positives of its block: an item of the block is item i with the share
        ``count_i / n``, and each of the M drawn ones with 1 / I. Masking takes items away and draws none
        anew, so a user's known positives do not change it.

        Returns:
            rate, (I,), float32; and drawn, M / I.
        """
        counts, known = self.item_counts, self.known_positives
        tensor = counts if counts is not None else known.items if known is not None else None
        rate = torch.zeros(self.num_items, device=None if tensor is None else tensor.device)
        if self.settings.proposal in ("in-batch", "mixed"):
            assert counts is not None  # `of` counts them
            # An item that was never seen is not in a block of the part that is trained on, but may be in one
            # of another part: it counts as half a row, like in the popularity proposal.
            rate = (counts.double().clamp(min=0.5) / max(self.num_rows, 1)).float()
        return rate, self.settings.drawn / self.num_items

    @cached_property
    def item_rates(self) -> Tensor:
        """How often an item is expected among the negatives of a user who knows nothing: (I,), float32.

        Of a full block where negatives are shared. Where each positive has its own, a drawn item that the
        user knows is drawn again, so that the others' rates grow to the same sum; see `redraws`.
        """
        if self.popularity is not None:
            return self.settings.drawn * self.popularity.log_p.exp()
        rate, drawn = self.list_rates
        return self.settings.block_size * rate + drawn if self.settings.is_shared else rate * 0 + drawn

    @property
    def redraws(self) -> bool:
        """Whether a drawn item that the user knows is drawn again, rather than masked or kept."""
        return self.known_positives is not None and not self.settings.is_shared
