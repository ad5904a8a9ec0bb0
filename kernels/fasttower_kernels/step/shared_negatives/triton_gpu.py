"""Shared negatives on a GPU: four launches, of which two are matrix products on tensor cores.

`block_list_triton_gpu` has the launches that make the lists and their bits, `gradients_triton_gpu` the
products. A batch of B positives in blocks of b with lists of M items takes ``B (16 + M / 8)`` bytes and
``B / b * M`` item numbers (with cosine similarity and offsets as many floats); logits are never stored.

Products of float32 tables follow ``torch.get_float32_matmul_precision()``. For "highest", torch's default, a
factor is split in two TF32 numbers, and three products of TF32 make one, on tensor cores. Of normal vectors
of 64 elements the split has a relative error of 7.5e-8, with sums that are exact, where a product in float32
has 1.4e-7. (A product of float32 as it is runs beside the tensor cores, and Triton keeps so much of it in
registers that they spill; AMD's matrix cores take it.) The other settings are one product of TF32, with an
error of 2.9e-4. Products of bfloat16 tables are bfloat16; for them the slopes, too, are rounded to bfloat16.
All add up in float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.losses.triton_gpu import NORMALISED
from fasttower_kernels.negatives.proposal import Negatives
from fasttower_kernels.negatives.reference import list_key
from fasttower_kernels.negatives.triton_gpu import exclusion_arguments
from fasttower_kernels.philox import Key
from fasttower_kernels.settings import LossSettings
from fasttower_kernels.shuffle.triton_gpu import row_bits
from fasttower_kernels.step.shared_negatives.block_list_triton_gpu import (
    BlockLists,
    draw_kernel,
    mask_kernel,
)
from fasttower_kernels.step.shared_negatives.gradients_triton_gpu import items_kernel, users_kernel
from fasttower_kernels.tables import Interactions, Tables
from fasttower_kernels.triton_launch import Launch, device_scope, signed_word
from fasttower_kernels.triton_tiles import MAX_WIDTH

_DRAWS = 128  # positions of a program of `draw_kernel`
_MASKED = 32  # positives at a time of `mask_kernel`
_LOSSES = 1 << 16  # positives whose lists are held at a time where no gradients are needed


class ProductTile(NamedTuple):
    """The shape of a program of the products.

    Attributes:
        rows: positives of a program of the users, items of one of the items: 16, 32 or 64.
        columns: items, or positives, at a time: 16, 32 or 64.
        num_warps: warps of a program.
    """

    rows: int
    columns: int
    num_warps: int


# By the width of a row, rounded up to a power of two: what has no spills with MAX_REGISTERS, and 64 rows
# where there is a choice, which is what Hopper's matrix instructions take. Only three products of rows of
# more than 128 elements spill.
TILES = {
    16: ProductTile(64, 32, 4),
    32: ProductTile(64, 32, 4),
    64: ProductTile(64, 32, 4),
    128: ProductTile(64, 32, 8),
    256: ProductTile(32, 32, 8),
    512: ProductTile(16, 16, 8),
}
# Where a product is three.
SPLIT_TILES = {
    16: ProductTile(32, 32, 4),
    32: ProductTile(32, 32, 4),
    64: ProductTile(32, 32, 4),
    128: ProductTile(16, 32, 8),
    256: ProductTile(16, 16, 8),
    512: ProductTile(16, 16, 8),
}
MAX_REGISTERS = 255
"""Of a thread of the products: a program waits for its own matrix instructions, not for other programs."""


class SharedLaunches(NamedTuple):
    """A step's launches, in their order.

    Attributes:
        draw: writes the rows of the batch and the lists; it reads no parameter, so that a lazy optimiser may
            bring the rows in use up to date after it.
        mask: reads item vectors (with cosine similarity) and biases, and writes bits and offsets.
        users: the loss, and with gradients those of users and positives.
        items: the gradients of the lists; None for the loss only, or without a list.
        lists: what they hand each other; ``users``, ``positives`` and ``items`` are the rows in use.
    """

    draw: Launch
    mask: Launch
    users: Launch
    items: Launch | None
    lists: BlockLists

    def __call__(self) -> None:
        """Put the launches on the current stream."""
        for launch in self.in_order():
            launch()

    def in_order(self) -> list[Launch]:
        """The launches that there are."""
        return [self.draw, self.mask, self.users] + ([] if self.items is None else [self.items])


class ProductShape(NamedTuple):
    """How the products of a table's rows are taken.

    Attributes:
        block_d: the power of two that holds a row, at least 16.
        precision: of products of float32, as Triton names it.
        tile: the shape of a program.
    """

    block_d: int
    precision: str
    tile: ProductTile

    @staticmethod
    def of(table: Tensor) -> ProductShape:
        """That for a table as the loss reads it.

        Raises:
            FastTowerError: the rows are too wide.
        """
        width = table.shape[1]
        if width > MAX_WIDTH:
            raise FastTowerError(
                f"vectors have {width} dimensions; the triton backend takes {MAX_WIDTH}: choose backend "
                "torch."
            )
        block_d = max(16, triton.next_power_of_2(width))
        precision = "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
        if torch.version.hip is not None:
            precision = "ieee"
        split = precision == "tf32x3" and table.dtype == torch.float32
        return ProductShape(block_d, precision, (SPLIT_TILES if split else TILES)[block_d])


def num_programs(users: Tensor, batch_size: int, block_size: int) -> int:
    """Programs of the users' launch for a table of users, and slots of its losses."""
    rows = ProductShape.of(users).tile.rows
    return triton.cdiv(batch_size, block_size) * triton.cdiv(block_size, rows)


def shared_launches(
    parameters: Tables,
    gradients: Tables | None,
    interactions: Interactions,
    negatives: Negatives,
    loss: LossSettings,
    *,
    words: Tensor,
    counters: Tensor,
    losses: Tensor,
    batch_size: int,
    shuffle: bool,
    gathered: bool = False,
    first_position: int = 0,
) -> SharedLaunches:
    """The launches of a step with their arguments.

    Args:
        parameters: as the loss reads them; users and items float32 or bfloat16, on the device.
        gradients: float32, added to; None for the loss only.
        interactions: the n positives, or those of the batch.
        negatives: where they come from.
        loss: of a positive.
        words: (10,), int32: the key of the lists, `list_key` of that of the negatives, and 8 round keys.
        counters: (2,), int64: t, and Adam's count, which is set to t + 1.
        losses: (`num_programs` of the users,), float64, added to.
        batch_size: B.
        shuffle: the batch is number t mod steps of the shuffled order; otherwise the interactions are it.
        gathered: row b of the user table belongs to position b of the batch.
        first_position: of the batch's first positive, a multiple of the block size.

    Raises:
        FastTowerError: rows too wide.
    """
    settings, device, width = negatives.settings, parameters.users.device, parameters.users.shape[1]
    block_d, precision, tile = ProductShape.of(parameters.users)
    normalised, in_batch = loss.name in NORMALISED, settings.proposal != "shared"
    rate, drawn_rate = negatives.list_rates
    lists = BlockLists.empty(
        batch_size,
        settings.block_size,
        settings.scored,
        device,
        offsets=normalised or parameters.item_bias is not None,
        cosine=loss.is_cosine,
    )
    blocks, list_words = lists.masks.shape[:2]
    l2: dict[str, float | None] = {"user_l2": None, "item_l2": None, "bias_l2": None}
    if loss.has_l2 and gradients is not None:
        share = 4.0 / (1 + settings.scored)
        l2 = {
            "user_l2": 2.0 * loss.user_l2,
            "item_l2": share * loss.item_l2,
            "bias_l2": share * loss.bias_l2,
        }
    exclusion = exclusion_arguments(negatives.known_positives)
    extent = {
        "counters_ptr": counters,
        "num_rows": len(interactions),
        "batch_size": batch_size,
        "steps": triton.cdiv(len(interactions), batch_size),
        "block_size": settings.block_size,
        "drawn": settings.drawn,
        "list_words": list_words,
        "list_ptr": lists.items,
        "SHUFFLE": shuffle,
        "IN_BATCH": in_batch,
    }
    draw = {
        **extent,
        "user_index_ptr": interactions.user_index,
        "item_index_ptr": interactions.item_index,
        "words_ptr": words,
        "users_ptr": lists.users,
        "positives_ptr": lists.positives,
        "bits": row_bits(len(interactions)),
        "first_block": first_position // settings.block_size,
        "num_blocks": blocks,
        "num_items": negatives.num_items,
        "BLOCK": _DRAWS,
    }
    mask = {
        **extent,
        **exclusion,
        "items_ptr": parameters.items,
        "bias_ptr": parameters.item_bias,
        "rate_ptr": rate.to(device) if normalised else None,
        "users_ptr": lists.users,
        "positives_ptr": lists.positives,
        "masks_ptr": lists.masks,
        "offsets_ptr": lists.offsets,
        "inverse_norms_ptr": lists.inverse_norms,
        "num_items": negatives.num_items,
        "drawn_rate": drawn_rate,
        "WIDTH": width,
        "BLOCK_D": block_d,
        "BLOCK_B": _MASKED,
    }
    product = {
        **extent,
        "users_ptr": parameters.users,
        "items_ptr": parameters.items,
        "bias_ptr": parameters.item_bias,
        "item_gradients_ptr": gradients and gradients.items,
        "bias_gradients_ptr": gradients and gradients.item_bias,
        "batch_users_ptr": lists.users,
        "masks_ptr": lists.masks,
        "offsets_ptr": lists.offsets,
        "inverse_norms_ptr": lists.inverse_norms,
        "user_inverse_norms_ptr": lists.user_inverse_norms,
        "logits_ptr": lists.logits,
        "normalisers_ptr": lists.normalisers,
        "item_l2": l2["item_l2"],
        "bias_l2": l2["bias_l2"],
        "LOSS": loss.name,
        "WIDTH": width,
        "BLOCK_D": block_d,
        "GATHERED": gathered,
        "PRECISION": precision,
    }
    of_users = triton.cdiv(settings.block_size, tile.rows)
    of_items = triton.cdiv(settings.scored, tile.rows)
    users: dict[str, Any] = {
        **product,
        "user_gradients_ptr": gradients and gradients.users,
        "indptr_ptr": exclusion["indptr_ptr"],
        "losses_ptr": losses,
        "positives_ptr": lists.positives,
        "num_items": negatives.num_items,
        "programs": of_users,
        "temperature": loss.temperature,
        "beta": loss.shared_positive_weight(drawn_rate),
        "user_l2": l2["user_l2"],
        "NORMALISED": normalised,
        "BLOCK_B": tile.rows,
        "BLOCK_M": tile.columns,
    }
    items = {**product, "programs": of_items, "BLOCK_B": tile.columns, "BLOCK_M": tile.rows}
    quads = blocks * triton.cdiv(settings.drawn, 4)
    return SharedLaunches(
        Launch(draw_kernel, triton.cdiv(max(batch_size, quads), _DRAWS), draw, num_warps=4),
        Launch(mask_kernel, blocks * list_words, mask, num_warps=4),
        Launch(users_kernel, blocks * of_users, users, tile.num_warps, MAX_REGISTERS),
        Launch(items_kernel, blocks * of_items, items, tile.num_warps, MAX_REGISTERS)
        if gradients is not None and of_items
        else None,
        lists,
    )


def run_batch(
    parameters: Tables,
    gradients: Tables | None,
    batch: Interactions,
    negatives: Negatives,
    loss: LossSettings,
    *,
    key: Key,
    step: int,
    gathered: bool = False,
    first_position: int = 0,
) -> Tensor:
    """Add the gradients of a batch's loss, or none; see `own_negatives.triton_gpu.run_batch`.

    Without gradients the lists of many positives are held in parts.

    Raises:
        FastTowerError: as `shared_launches`.
    """
    device = parameters.users.device
    if not len(batch):
        return torch.zeros((), dtype=torch.float64, device=device)
    size = max(1, _LOSSES // negatives.settings.block_size) * negatives.settings.block_size
    if gradients is None and len(batch) > size:
        parts = [
            run_batch(parameters, None, part, negatives, loss, key=key, step=step, first_position=first)
            for first, part in batch.parts(size)
        ]
        return torch.stack(parts).sum()
    programs = num_programs(parameters.users, len(batch), negatives.settings.block_size)
    losses = torch.zeros(programs, dtype=torch.float64, device=device)
    launches = shared_launches(
        parameters,
        gradients,
        batch,
        negatives,
        loss,
        words=torch.tensor([*map(signed_word, list_key(key))] + [0] * 8, dtype=torch.int32, device=device),
        counters=torch.tensor([step, 0], dtype=torch.int64, device=device),
        losses=losses,
        batch_size=len(batch),
        shuffle=False,
        gathered=gathered,
        first_position=first_position,
    )
    with device_scope(device):
        launches()
    return losses.sum()
