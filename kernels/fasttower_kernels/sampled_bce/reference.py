"""The loss, and the training step of two tables, in plain torch.

With x the logits of a batch's B positives and their N negatives each:

    loss = 1/B * sum_b w_b * [ softplus(-x_b+) + sum_k softplus(x_bk)
                               + l2 * (|u_b|^2 + 2/(N+1) * sum_{j in {+, k}} |v_j|^2) ]

where w_b is 0 for a user who has touched every item and 1 otherwise, x = <u, v> + bias, and biases carry no
L2. With ``loss_scale="pairs"`` the whole is divided by N + 1 once more, as ``BCEWithLogitsLoss`` does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives.reference import sample_negatives
from fasttower_kernels.philox import Key
from fasttower_kernels.sampled_bce.settings import LossSettings
from fasttower_kernels.tables import Interactions, Tables

# Positives whose vectors, (1 + N, P) each, `bce_sum` gathers at a time.
_PART_ROWS = 1 << 14


def loss_terms(
    user_vectors: Tensor,
    item_vectors: Tensor,
    item_bias: Tensor | None,
    weight: Tensor,
    settings: LossSettings,
) -> tuple[Tensor, Tensor]:
    """The batch's loss from its gathered vectors.

    Args:
        user_vectors: (B, D).
        item_vectors: (B, 1 + N, D): the positive's, then the negatives'.
        item_bias: (B, 1 + N), or None.
        weight: (B,): 0 for a positive that does not count.
        settings: of the loss.

    Returns:
        The loss to minimise, and the sum of its BCE part over the batch's pairs, both scalars.
    """
    logits = torch.bmm(item_vectors, user_vectors[:, :, None])[:, :, 0]  # [B, 1 + N]
    if item_bias is not None:
        logits = logits + item_bias
    labels = torch.zeros_like(logits)
    labels[:, 0] = 1
    bce = F.binary_cross_entropy_with_logits(logits, labels, weight[:, None], reduction="sum")
    loss = bce
    if settings.l2:
        norms = user_vectors.square().sum(-1) + 2 / logits.shape[1] * item_vectors.square().sum((1, 2))  # [B]
        loss = loss + settings.l2 * (weight * norms).sum()
    return loss / settings.divisor(len(logits)), bce.detach()


def batch_loss(
    user_vectors: Tensor,
    item_vectors: Tensor,
    item_bias: Tensor | None,
    batch: Interactions,
    known_positives: KnownPositives | None,
    settings: LossSettings,
    *,
    key: Key,
    step: int,
) -> Tensor:
    """The loss of vectors that come from anywhere, left to autograd: `sampled_bce_loss` in plain torch."""
    items, weight = draw_items(batch, len(item_vectors), known_positives, settings, key=key, step=step)
    bias = None if item_bias is None else item_bias[items]
    return loss_terms(user_vectors, item_vectors[items], bias, weight.to(user_vectors), settings)[0]


def train_step(
    parameters: Tables,
    gradients: Tables,
    batch: Interactions,
    known_positives: KnownPositives | None,
    settings: LossSettings,
    *,
    key: Key,
    step: int,
) -> Tensor:
    """Add the gradients of a batch's loss to gradient tables.

    Args:
        parameters: of the model, float32.
        gradients: of the same shapes, added to.
        batch: the B positives.
        known_positives: what negatives leave out; None draws from the whole catalogue.
        settings: of the loss.
        key: of the stream of negatives.
        step: t, the training step.

    Returns:
        The BCE summed over the batch's pairs, scalar, on the tables' device.
    """
    users = batch.user_index.long()
    items, weight = draw_items(
        batch, parameters.items.shape[0], known_positives, settings, key=key, step=step
    )
    with torch.enable_grad():
        user_vectors = parameters.users[users].requires_grad_()  # [B, P]
        item_vectors = parameters.items[items].requires_grad_()  # [B, 1 + N, P]
        item_bias = None if parameters.item_bias is None else parameters.item_bias[items].requires_grad_()
        loss, bce = loss_terms(user_vectors, item_vectors, item_bias, weight, settings)
        leaves = [user_vectors, item_vectors] + ([] if item_bias is None else [item_bias])
        user_gradient, item_gradient, *bias_gradient = torch.autograd.grad(loss, leaves)
    flat = items.flatten()
    gradients.users.index_add_(0, users, user_gradient)
    gradients.items.index_add_(0, flat, item_gradient.flatten(0, 1))
    if gradients.item_bias is not None:
        gradients.item_bias.index_add_(0, flat, bias_gradient[0].flatten())
    return bce


def bce_sum(
    parameters: Tables,
    batch: Interactions,
    known_positives: KnownPositives | None,
    settings: LossSettings,
    *,
    key: Key,
    step: int,
    first_position: int = 0,
) -> Tensor:
    """The sum of only the BCE part, without gradients; see `fasttower_kernels.sampled_bce.bce_sum`.

    Memory does not grow with B: the vectors of some positives are gathered at a time.
    """
    device = parameters.users.device
    # float64 wherever the device has it: a long sum in float32 loses the digits that epochs differ in.
    total = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    for first, part in batch.parts(_PART_ROWS):
        items, weight = draw_items(
            part,
            parameters.items.shape[0],
            known_positives,
            settings,
            key=key,
            step=step,
            first_position=first_position + first,
        )
        item_bias = None if parameters.item_bias is None else parameters.item_bias[items]
        user_vectors = parameters.users[part.user_index.long()]
        total += loss_terms(user_vectors, parameters.items[items], item_bias, weight, settings)[1]
    return total


def draw_items(
    batch: Interactions,
    num_items: int,
    known_positives: KnownPositives | None,
    settings: LossSettings,
    *,
    key: Key,
    step: int,
    first_position: int = 0,
) -> tuple[Tensor, Tensor]:
    """The items (B, 1 + N) of a batch, the positive first, and the weights (B,) of its positives."""
    negatives = sample_negatives(
        batch.user_index,
        settings.num_negatives,
        num_items,
        key=key,
        step=step,
        known_positives=known_positives,
        first_position=first_position,
    )
    items = torch.cat([batch.item_index.long()[:, None], negatives], dim=1)
    if known_positives is None:
        return items, torch.ones(len(batch), device=items.device)
    return items, (known_positives.degrees[batch.user_index.long()] < num_items).float()
