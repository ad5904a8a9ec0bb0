"""What is watched while training: the loss and the ranking metrics of the validation part."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fasttower.evaluation.ranking import means, metrics_per_user
from fasttower.model import TwoTower
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives import Negatives
from fasttower_kernels.philox import Purpose, derive_key
from fasttower_kernels.settings import Backend, LossSettings
from fasttower_kernels.step import loss_sum
from fasttower_kernels.tables import Interactions
from fasttower_kernels.topk import top_k

MOST_USERS = 4_096
"""Users whose ranking is scored; of more, every n-th: the top-K of all would take longer than an epoch."""


@dataclass(frozen=True)
class Validation:
    """The validation part, ready to be scored.

    Attributes:
        interactions: the validation pairs, on the device where the model is.
        users: (R,), int64: users who have any.
        truth: their items; row r belongs to ``users[r]``.
        seen: the training part's known positives.
        train_items: (I,), bool: the items of the training part.
        k: the cutoff of the metrics.
        filter_seen: whether training items are hidden from the ranking.
    """

    interactions: Interactions
    users: torch.Tensor
    truth: KnownPositives
    seen: KnownPositives
    train_items: torch.Tensor
    k: int
    filter_seen: bool = True

    @staticmethod
    def of(
        interactions: Interactions, seen: KnownPositives, k: int, *, filter_seen: bool = True
    ) -> Validation:
        """Group the validation pairs by user."""
        users, row = torch.unique(interactions.user_index, return_inverse=True)
        every = -(-len(users) // MOST_USERS)
        ranked = row % every == 0
        users = users[::every]
        truth = KnownPositives.from_pairs(
            row[ranked] // every, interactions.item_index[ranked], len(users), seen.num_items
        )
        train_items = torch.zeros(seen.num_items, dtype=torch.bool, device=seen.items.device)
        train_items[seen.items.long()] = True
        return Validation(interactions, users.long(), truth, seen, train_items, k, filter_seen)

    @torch.no_grad()
    def metrics(self, model: TwoTower) -> tuple[dict[str, float], torch.Tensor]:
        """The ranking metrics at k of the validation users, training items left out; their NDCG, (R,)."""
        topk = top_k(
            model.infer_users(self.users),
            model.infer_items(),
            k=min(self.k, self.seen.num_items),
            item_bias=model.item_bias,
            seen=self.seen if self.filter_seen else None,
            seen_users=self.users if self.filter_seen else None,
        )
        per_user, coverage = metrics_per_user(topk.items, self.truth, self.train_items, self.k)
        return means(per_user, coverage, self.k), per_user["NDCG"].cpu()

    @torch.no_grad()
    def loss(
        self,
        model: TwoTower,
        loss: LossSettings,
        negatives: Negatives,
        *,
        seed: int,
        backend: Backend,
    ) -> float:
        """The mean loss of the validation pairs, on the scale of the training loss.

        The negatives are the same every epoch, so that only the model moves the curve.
        """
        value = loss_sum(
            model.tables,
            self.interactions,
            negatives,
            loss,
            key=derive_key(seed, Purpose.VALIDATION),
            step=0,
            backend=backend,
        )
        return float(value) / loss.divisor(len(self.interactions), negatives.settings.scored)  # waits
