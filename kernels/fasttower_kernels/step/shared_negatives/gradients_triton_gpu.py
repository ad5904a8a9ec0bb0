"""The products of shared negatives in Triton: a tile of logits at a time, never a block's in memory.

`users_kernel` gives a program some positives of a block and goes through the block's list: logits U V^T,
slopes G, and G V, which stays in registers. A loss that needs the log-sum-exp z first takes the slopes by the
highest logit so far and shrinks what it has when a higher one comes, as flash attention does: one sweep
serves all losses. Then come the positives' own terms, whose slope is the sum of the others'.

`items_kernel` gives a program some items of a block's list and goes through the block's positives: the same
logits once more, slopes by the p and z of each positive, and G^T U, which stays in registers.

So there are four products where a kernel that added G^T U to memory for each tile would have three. That one
would add D floats for each item of a list and each 64 positives, which the L2 cache carries out; here each
item of a list is added once. With 256 positives a block and a list of 512 at D = 64 that is 128 KB for each
block instead of 512 KB, or 34 MB instead of 134 MB of additions a batch of 65,536, for 4.3 of 17.2 GFlop.
This is arithmetic, not a measurement.

Additions to rows that several programs have are atomic, so their order, and the last bits, are not fixed.

Source: Dao et al., "FlashAttention" (NeurIPS 2022), algorithm 1; Wijmans et al., "Cut Your Losses in
Large-Vocabulary Language Models" (ICLR 2025), section 4.
"""

# Constants of a kernel are written in capitals, and arguments get their types when it is launched.
# ruff: noqa: N803
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from fasttower_kernels.losses.triton_gpu import negative, positive
from fasttower_kernels.similarity_triton_gpu import inverse_norm, through_norm
from fasttower_kernels.step.shared_negatives.block_list_triton_gpu import WORD, block_extent

_WORD = tl.constexpr(WORD)
_PIECE = tl.constexpr(16)  # elements of a row at a time outside the products, to spare registers
_MAX_HALVINGS = tl.constexpr(5)  # from the widest row to a piece


@triton.jit
def _load_rows(table_ptr, index, there, d, WIDTH: tl.constexpr):
    """Elements d of some rows of a table [R, len(d)], 0 where there is none."""
    rows = table_ptr + index.to(tl.int64)[:, None] * WIDTH + d[None, :]
    return tl.load(rows, mask=there[:, None] & (d < WIDTH)[None, :], other=0.0)


@triton.jit
def _add_rows(table_ptr, index, there, d, rows, WIDTH: tl.constexpr):
    """Add [R, len(d)] to elements d of some rows of a table."""
    places = table_ptr + index.to(tl.int64)[:, None] * WIDTH + d[None, :]
    tl.atomic_add(places, rows, mask=there[:, None] & (d < WIDTH)[None, :], sem="relaxed")


@triton.jit
def _half(tile, RIGHT: tl.constexpr):
    """The left or the right half of a tile."""
    rows: tl.constexpr = tile.shape[0]
    half: tl.constexpr = tile.shape[1] // 2
    left, right = tl.split(tl.permute(tl.reshape(tile, (rows, 2, half)), (0, 2, 1)))
    if RIGHT:
        return right
    else:  # noqa: RET505 - Triton compiles one of the two branches
        return left


@triton.jit
def _piece(tile, NUMBER: tl.constexpr):
    """Columns NUMBER * _PIECE and the following of a tile: [R, D] to [R, _PIECE].

    A thread that adds all of its part of a tile at once holds an address for each element, and spills.
    """
    for _ in tl.static_range(_MAX_HALVINGS):
        if tile.shape[1] > _PIECE:
            tile = _half(tile, NUMBER // (tile.shape[1] // (2 * _PIECE)) % 2)
    return tile


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "batch_size",
        "steps",
        "block_size",
        "num_items",
        "drawn",
        "list_words",
        "programs",
    ]
)
def users_kernel(
    users_ptr,
    items_ptr,
    bias_ptr,
    user_gradients_ptr,
    item_gradients_ptr,
    bias_gradients_ptr,
    indptr_ptr,
    counters_ptr,
    losses_ptr,
    batch_users_ptr,
    positives_ptr,
    list_ptr,
    masks_ptr,
    offsets_ptr,
    inverse_norms_ptr,
    user_inverse_norms_ptr,
    logits_ptr,
    normalisers_ptr,
    num_rows,
    batch_size,
    steps,
    block_size,
    num_items,
    drawn,
    list_words,
    programs,
    temperature,
    beta,
    user_l2,
    item_l2,
    bias_l2,
    LOSS: tl.constexpr,
    NORMALISED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SHUFFLE: tl.constexpr,
    IN_BATCH: tl.constexpr,
    GATHERED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The loss, the gradients of the users, and those of the positives' items for being positives.

    Args:
        users_ptr: (U, WIDTH), float32 or bfloat16, 16-byte aligned.
        items_ptr: (I, WIDTH), likewise.
        bias_ptr: (I,), float32, or None.
        user_gradients_ptr: (U, WIDTH), float32, added to; None, like the next two, for the loss only.
        item_gradients_ptr: (I, WIDTH), added to.
        bias_gradients_ptr: (I,), added to; None without a bias.
        indptr_ptr: as in `Exclusion`; None to leave nothing out.
        counters_ptr: (2,), int64: t.
        losses_ptr: (C * programs,), float64: a program adds its loss to its own slot.
        batch_users_ptr: ``users`` of `BlockLists`; what follows is as there.
        positives_ptr: read.
        list_ptr: read.
        masks_ptr: read.
        offsets_ptr: read, or None.
        inverse_norms_ptr: read; None for the dot product.
        user_inverse_norms_ptr: written; likewise.
        logits_ptr: written.
        normalisers_ptr: written.
        num_rows: as in `draw_kernel`, like the next six.
        batch_size: the same.
        steps: the same.
        block_size: the same.
        num_items: the same.
        drawn: the same.
        list_words: the same.
        programs: for each block.
        temperature: of cosine similarity.
        beta: of gbce.
        user_l2: 2 times the weight; None without L2, like the next two.
        item_l2: 4 times the weight over 1 + the scored negatives.
        bias_l2: likewise.
        LOSS: its name.
        NORMALISED: whether it reads z; then negatives have the value 0 and the slope exp(x - z).
        WIDTH: the padded width of a row.
        BLOCK_D: the power of two from it, at least 16.
        BLOCK_B: positives of a program.
        BLOCK_M: items at a time.
        SHUFFLE: as in `draw_kernel`.
        IN_BATCH: the same.
        GATHERED: row b of the user table belongs to position b of the batch, whoever the user is.
        PRECISION: of products of float32.
    """
    block = tl.program_id(0) // programs
    i = tl.program_id(0) % programs * BLOCK_B + tl.arange(0, BLOCK_B)
    length, here, count = block_extent(
        block, tl.load(counters_ptr), num_rows, batch_size, steps, block_size, drawn, SHUFFLE, IN_BATCH
    )
    there = i < here
    b = block * block_size + i
    user = tl.load(batch_users_ptr + b, mask=there, other=0)
    own = tl.load(positives_ptr + b, mask=there, other=0)
    live = there
    if indptr_ptr is not None:
        known = tl.load(indptr_ptr + user + 1, mask=there, other=0)
        known -= tl.load(indptr_ptr + user, mask=there, other=0)
        live = there & (known < num_items)
    row = user
    if GATHERED:
        row = b
    p = tl.zeros([BLOCK_B], tl.float32)
    square = tl.zeros([BLOCK_B], tl.float32)
    own_square = tl.zeros([BLOCK_B], tl.float32)
    for first in range(0, BLOCK_D, _PIECE):
        piece = first + tl.arange(0, _PIECE)
        u = _load_rows(users_ptr, row, live, piece, WIDTH).to(tl.float32)
        v = _load_rows(items_ptr, own, live, piece, WIDTH).to(tl.float32)
        p += tl.sum(u * v, axis=1)
        if inverse_norms_ptr is not None:
            square += tl.sum(u * u, axis=1)
            own_square += tl.sum(v * v, axis=1)
    inverse = p
    own_inverse = p
    if inverse_norms_ptr is not None:
        inverse = inverse_norm(square)
        own_inverse = inverse_norm(own_square)
        p *= inverse * own_inverse / temperature
        tl.store(user_inverse_norms_ptr + b, inverse / temperature, mask=there)
    similarity = p
    if bias_ptr is not None:
        p += tl.load(bias_ptr + own, mask=live, other=0.0)

    z = p * 0.0
    if NORMALISED:
        z = p
    value = p * 0.0
    total = p * 0.0
    d = tl.arange(0, BLOCK_D)
    users = _load_rows(users_ptr, row, live, d, WIDTH)
    gradients = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    list_ptr += block.to(tl.int64) * (list_words * _WORD)
    masks_ptr += block.to(tl.int64) * list_words * block_size
    for first in range(0, count, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        item = tl.load(list_ptr + m)
        items = _load_rows(items_ptr, item, m < count, d, WIDTH)
        x = tl.dot(users, tl.trans(items), input_precision=PRECISION)  # [BLOCK_B, BLOCK_M]
        place = block.to(tl.int64) * (list_words * _WORD) + m
        item_inverse = m
        if inverse_norms_ptr is not None:
            item_inverse = tl.load(inverse_norms_ptr + place)
            x *= (inverse / temperature)[:, None] * item_inverse[None, :]
        if offsets_ptr is not None:
            x += tl.load(offsets_ptr + place)[None, :]
        word = tl.load(masks_ptr + first // _WORD * block_size + i, mask=there, other=0)
        counted = ((word[:, None] >> (m % _WORD).to(tl.int64)[None, :]) & 1) != 0
        x = tl.where(counted, x, -float("inf"))  # whose value and slope are 0
        if NORMALISED:
            highest = tl.maximum(z, tl.max(x, axis=1))
            shrink = tl.exp(z - highest)
            total *= shrink
            gradients *= shrink[:, None]
            z = highest
        linear, factor, slopes = negative(x, p[:, None], z[:, None], LOSS)
        if not NORMALISED:  # their values are 0
            value += tl.sum(linear + tl.log(factor), axis=1)
        total += tl.sum(slopes, axis=1)
        if user_gradients_ptr is not None:
            if inverse_norms_ptr is not None:
                slopes *= item_inverse[None, :]
            gradients = tl.dot(slopes.to(items.dtype), items, gradients, input_precision=PRECISION)
    if NORMALISED:
        whole = total + tl.exp(p - z)
        z += tl.log(whole)
        total /= whole
        gradients /= whole[:, None]
    linear, factor, slope = positive(p, z, total, beta, LOSS)
    of_positive = linear + tl.log(factor)
    tl.store(logits_ptr + b, p, mask=there)
    tl.store(normalisers_ptr + b, z, mask=there)
    slot = losses_ptr + tl.program_id(0)
    tl.store(slot, tl.load(slot) + tl.sum(tl.where(live, value + of_positive, 0.0), axis=0).to(tl.float64))

    if user_gradients_ptr is not None:
        scale = 1.0 / length.to(tl.float32)
        along = p
        if inverse_norms_ptr is not None:
            along = slope * similarity * temperature
            for n in tl.static_range(BLOCK_D // _PIECE):
                piece = n * _PIECE + tl.arange(0, _PIECE)
                u = _load_rows(users_ptr, row, live, piece, WIDTH).to(tl.float32)
                along += inverse * tl.sum(_piece(gradients, n) * u, axis=1)
        for n in tl.static_range(BLOCK_D // _PIECE):
            piece = n * _PIECE + tl.arange(0, _PIECE)
            u = _load_rows(users_ptr, row, live, piece, WIDTH).to(tl.float32)
            v = _load_rows(items_ptr, own, live, piece, WIDTH).to(tl.float32)
            of_users = _piece(gradients, n)
            of_items = slope[:, None] * u
            if inverse_norms_ptr is not None:
                of_users += (slope * own_inverse)[:, None] * v
                of_users = through_norm(of_users, along, u, inverse, temperature)
                of_items *= (inverse / temperature)[:, None]
                of_items = through_norm(of_items, slope * similarity, v, own_inverse, 1.0)
            else:
                of_users += slope[:, None] * v
            if user_l2 is not None:
                of_users += user_l2 * u
                of_items += item_l2 * v
            _add_rows(user_gradients_ptr, row, live, piece, of_users * scale, WIDTH)
            _add_rows(item_gradients_ptr, own, live, piece, of_items * scale, WIDTH)
        if bias_gradients_ptr is not None:
            of_bias = slope
            if bias_l2 is not None:
                of_bias += bias_l2 * tl.load(bias_ptr + own, mask=live, other=0.0)
            tl.atomic_add(bias_gradients_ptr + own, of_bias * scale, mask=live, sem="relaxed")


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "batch_size",
        "steps",
        "block_size",
        "drawn",
        "list_words",
        "programs",
    ]
)
def items_kernel(
    users_ptr,
    items_ptr,
    bias_ptr,
    item_gradients_ptr,
    bias_gradients_ptr,
    counters_ptr,
    batch_users_ptr,
    list_ptr,
    masks_ptr,
    offsets_ptr,
    inverse_norms_ptr,
    user_inverse_norms_ptr,
    logits_ptr,
    normalisers_ptr,
    num_rows,
    batch_size,
    steps,
    block_size,
    drawn,
    list_words,
    programs,
    item_l2,
    bias_l2,
    LOSS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SHUFFLE: tl.constexpr,
    IN_BATCH: tl.constexpr,
    GATHERED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of the lists' items for being negatives.

    Args are those of `users_kernel`; ``logits_ptr``, ``normalisers_ptr`` and ``user_inverse_norms_ptr`` are
    read, BLOCK_M are items of a program and BLOCK_B positives at a time.
    """
    block = tl.program_id(0) // programs
    m = tl.program_id(0) % programs * BLOCK_M + tl.arange(0, BLOCK_M)
    length, here, count = block_extent(
        block, tl.load(counters_ptr), num_rows, batch_size, steps, block_size, drawn, SHUFFLE, IN_BATCH
    )
    inside = m < count
    place = block.to(tl.int64) * (list_words * _WORD) + m
    item = tl.load(list_ptr + place, mask=inside, other=0)
    d = tl.arange(0, BLOCK_D)
    items = _load_rows(items_ptr, item, inside, d, WIDTH)
    item_inverse = m
    if inverse_norms_ptr is not None:
        item_inverse = tl.load(inverse_norms_ptr + place, mask=inside, other=0.0)
    offset = m
    if offsets_ptr is not None:
        offset = tl.load(offsets_ptr + place, mask=inside, other=0.0)
    masks_ptr += (
        block.to(tl.int64) * list_words + tl.program_id(0) % programs * BLOCK_M // _WORD
    ) * block_size

    gradients = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    of_bias = tl.zeros([BLOCK_M], tl.float32)
    pairs = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, here, BLOCK_B):
        i = first + tl.arange(0, BLOCK_B)
        there = i < here
        b = block * block_size + i
        row = b
        if not GATHERED:
            row = tl.load(batch_users_ptr + b, mask=there, other=0)
        users = _load_rows(users_ptr, row, there, d, WIDTH)
        x = tl.dot(items, tl.trans(users), input_precision=PRECISION)  # [BLOCK_M, BLOCK_B]
        inverse = i
        if inverse_norms_ptr is not None:
            inverse = tl.load(user_inverse_norms_ptr + b, mask=there, other=0.0)
            x *= item_inverse[:, None] * inverse[None, :]
        if offsets_ptr is not None:
            x += offset[:, None]
        p = tl.load(logits_ptr + b, mask=there, other=0.0)
        z = tl.load(normalisers_ptr + b, mask=there, other=0.0)
        word = tl.load(masks_ptr + i, mask=there, other=0)
        counted = ((word[None, :] >> (m % _WORD).to(tl.int64)[:, None]) & 1) != 0
        _, _, slopes = negative(tl.where(counted, x, -float("inf")), p[None, :], z[None, :], LOSS)
        if bias_gradients_ptr is not None:
            of_bias += tl.sum(slopes, axis=1)
        if item_l2 is not None:
            pairs += tl.sum(counted.to(tl.float32), axis=1)
        if inverse_norms_ptr is not None:
            slopes *= inverse[None, :]
        gradients = tl.dot(slopes.to(users.dtype), users, gradients, input_precision=PRECISION)

    scale = 1.0 / length.to(tl.float32)
    along = tl.zeros([BLOCK_M], tl.float32)
    if inverse_norms_ptr is not None:
        for n in tl.static_range(BLOCK_D // _PIECE):
            piece = n * _PIECE + tl.arange(0, _PIECE)
            v = _load_rows(items_ptr, item, inside, piece, WIDTH).to(tl.float32)
            along += item_inverse * tl.sum(_piece(gradients, n) * v, axis=1)
    for n in tl.static_range(BLOCK_D // _PIECE):
        piece = n * _PIECE + tl.arange(0, _PIECE)
        of_items = _piece(gradients, n)
        v = of_items
        if (inverse_norms_ptr is not None) or (item_l2 is not None):
            v = _load_rows(items_ptr, item, inside, piece, WIDTH).to(tl.float32)
        if inverse_norms_ptr is not None:
            of_items = through_norm(of_items, along, v, item_inverse, 1.0)
        if item_l2 is not None:
            of_items += (item_l2 * pairs)[:, None] * v
        _add_rows(item_gradients_ptr, item, inside, piece, of_items * scale, WIDTH)
    if bias_gradients_ptr is not None:
        if bias_l2 is not None:
            of_bias += bias_l2 * pairs * tl.load(bias_ptr + item, mask=inside, other=0.0)
        tl.atomic_add(bias_gradients_ptr + item, of_bias * scale, mask=inside, sem="relaxed")
