"""The loss as a function of vectors, for towers that are more than tables.

The fused backends make the gradients along with the loss, in one pass over the pairs; autograd's backward
pass then scales what is there already. So the loss costs a forward pass nothing that backward would not cost,
and what it keeps for backward is of the size of the vectors, not of the pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from fasttower_kernels.backends import implementation
from fasttower_kernels.checks import check_index, check_known_positives, check_step
from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.negatives import Negatives
from fasttower_kernels.philox import Key
from fasttower_kernels.settings import Backend, LossSettings, check_together
from fasttower_kernels.step.gradients import reference
from fasttower_kernels.tables import ROW_ALIGNMENT, Interactions, Tables

_DEFAULTS = LossSettings()


def sampled_loss(
    user_vectors: Tensor,
    item_vectors: Tensor,
    item_index: Tensor,
    *,
    negatives: Negatives,
    user_index: Tensor | None = None,
    item_bias: Tensor | None = None,
    loss: LossSettings = _DEFAULTS,
    key: Key,
    step: int,
    backend: Backend = "auto",
) -> Tensor:
    """The loss of a batch whose vectors come from towers of any kind.

    With uniform negatives and BCE it replaces

        drawn = sample_negatives(user_index, N, I, key=key, step=step, ...)
        items = torch.cat([item_index[:, None], drawn], dim=1)  # [B, 1 + N]
        logits = (user_vectors[:, None] * item_vectors[items]).sum(-1) + item_bias[items]
        loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / B

    and the L2 term, without the (B, 1 + N, D) vectors, and in the fused backends without the (B, 1 + N)
    logits. There the gradients are computed with the loss, also where nobody asks for them; backward scales
    them, and cannot be differentiated again.

    Args:
        user_vectors: (B, D), float32: row b is the vector of positive b's user, so a user who has two
            positives in the batch is there twice.
        item_vectors: (I, D), float32: the whole catalogue. For D that is no multiple of 4 both are copied.
        item_index: (B,), int32 or int64, in [0, I): the positives.
        negatives: where they come from.
        user_index: (B,), int32 or int64, in [0, U): whose known positives each row's negatives leave out;
            needed where the negatives know some, and not read otherwise.
        item_bias: (I,), float32, added to the logits; None for none.
        loss: of a positive. The L2 term is one of the vectors, as for tables, and not of the biases; for the
            weights inside a tower there is the optimiser's weight decay.
        key: of the stream of negatives, such as ``seed_key(seed)``.
        step: t, 0 <= t < 2**32: another one for each batch, so that its negatives are others.
        backend: the implementation; torch takes float64 too.

    Returns:
        Scalar, of the vectors' dtype, with gradients for the vectors (those of the items dense) and the bias.

    Raises:
        FastTowerError: shapes, dtypes or devices that do not fit, an index out of range (on a GPU, whose
            indices are not waited for, a device-side assertion as of ``torch.nn.Embedding``), settings that
            do not go together, or the backend cannot run here.
    """
    run = implementation("fasttower_kernels.step.gradients", backend, user_vectors.device)
    fused = run is not reference
    _check_vectors(user_vectors, item_vectors, item_bias, fused=fused)
    check_step(step)
    check_together(loss, negatives.settings)
    if loss.bias_l2:
        raise FastTowerError(f"bias_l2 is {loss.bias_l2}; the loss of vectors takes 0: use weight decay.")
    _check_index("item_index", item_index, len(user_vectors), item_vectors[:, 0])
    known = negatives.known_positives
    if known is None:
        user_index = torch.zeros_like(item_index)
    else:
        if user_index is None:
            raise FastTowerError(
                "the negatives know positives, but user_index is missing; give each row's user."
            )
        check_known_positives(known, len(item_vectors), item_vectors.device)
        _check_index("user_index", user_index, len(user_vectors), known.degrees)
    negatives.check_sizes(len(item_vectors))
    batch = Interactions(user_index.int(), item_index.int())
    if not fused:
        vectors = user_vectors, item_vectors, item_bias
        return reference.batch_loss(*vectors, batch, negatives, loss, key=key, step=step)[0]

    def with_gradients(vectors: Tables) -> tuple[Tensor, Tables]:
        gradients = vectors.zeros_like()
        value = run.add_gradients(
            vectors, gradients, batch, negatives, loss, key=key, step=step, gathered=True
        )
        total = value / loss.divisor(len(batch), negatives.settings.scored)
        if loss.has_l2:
            total = total + _l2_term(vectors, gradients, batch, negatives, loss)
        return total.to(vectors.users.dtype), gradients

    total: Tensor = _Fused.apply(user_vectors, item_vectors, item_bias, with_gradients)
    return total


class _Fused(torch.autograd.Function):
    """A loss that comes with its gradients."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        user_vectors: Tensor,
        item_vectors: Tensor,
        item_bias: Tensor | None,
        with_gradients: Callable[[Tables], tuple[Tensor, Tables]],
    ) -> Tensor:
        dim = user_vectors.shape[1]
        padding = -dim % ROW_ALIGNMENT
        users, items = (
            F.pad(vectors, (0, padding)) if padding else vectors.contiguous()
            for vectors in (user_vectors, item_vectors)
        )
        bias = None if item_bias is None else item_bias.contiguous()
        loss, gradients = with_gradients(Tables(users, items, bias))
        ctx.save_for_backward(gradients.users[:, :dim], gradients.items[:, :dim], *list(gradients)[2:])
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - as torch has it
        gradients = [gradient * scale for gradient in ctx.saved_tensors]
        return (*gradients, None) if len(gradients) == 3 else (*gradients, None, None)


def _l2_term(
    vectors: Tables, gradients: Tables, batch: Interactions, negatives: Negatives, loss: LossSettings
) -> Tensor:
    """The L2 term of the loss, which the kernels do not add up, from the gradients that they leave.

    Of a pair with the coefficient g, a user's gradient gets ``g v`` and an item's ``g u``; the L2 term adds
    ``2 a u`` for each positive and ``2 c v`` for each pair. So, summed over the batch,
    ``<dV, V> - <dU, U> = 2 c sum |v|^2 - 2 a sum |u|^2``, and the term is ``c sum |v|^2 + a sum |u|^2``. With
    cosine similarity the loss does not change with a vector's norm: ``<dV, V> = 2 c sum |v|^2``.
    """
    squares = vectors.users.square().sum(-1)  # [B]
    known = negatives.known_positives
    if known is not None:
        squares = squares * (known.degrees[batch.user_index] < known.num_items)
    of_users = loss.user_l2 / loss.divisor(len(batch), negatives.settings.scored) * squares.sum()
    items = torch.dot(gradients.items.flatten(), vectors.items.flatten())
    if loss.is_cosine:
        return items / 2 + of_users
    users = torch.dot(gradients.users.flatten(), vectors.users.flatten())
    return (items - users) / 2 + 2 * of_users


def _check_vectors(
    user_vectors: Tensor, item_vectors: Tensor, item_bias: Tensor | None, *, fused: bool
) -> None:
    users, items = tuple(user_vectors.shape), tuple(item_vectors.shape)
    if len(users) != 2 or len(items) != 2 or users[1] != items[1] or 0 in users + items:
        raise FastTowerError(
            f"user_vectors have shape {users} and item_vectors {items}; expected (B, D) and (I, D), none of "
            f"them empty."
        )
    if item_bias is not None and item_bias.shape != items[:1]:
        raise FastTowerError(f"item_bias has shape {tuple(item_bias.shape)}; expected ({items[0]},).")
    allowed = (torch.float32,) if fused else (torch.float32, torch.float64)
    for name, tensor in (
        ("user_vectors", user_vectors),
        ("item_vectors", item_vectors),
        ("item_bias", item_bias),
    ):
        if tensor is None:
            continue
        if tensor.dtype not in allowed or tensor.dtype != user_vectors.dtype:
            raise FastTowerError(
                f"{name} is {tensor.dtype}, user_vectors {user_vectors.dtype}; the loss takes float32, or "
                f"float64 with backend torch: convert them with .float()."
            )
        if tensor.device != user_vectors.device:
            raise FastTowerError(
                f"{name} is on {tensor.device}, user_vectors on {user_vectors.device}; use one device."
            )


def _check_index(name: str, index: Tensor, size: int, column: Tensor) -> None:
    """Check an index of the rows of ``column``."""
    if index.shape != (size,):
        raise FastTowerError(f"{name} has shape {tuple(index.shape)}; expected ({size},).")
    if index.device != column.device:
        raise FastTowerError(f"{name} is on {index.device}, the vectors on {column.device}; use one device.")
    if index.device.type == "cuda":
        column.detach().index_select(0, index)  # asserts the range on the device, and nobody waits
    else:
        check_index(name, index, len(column))
