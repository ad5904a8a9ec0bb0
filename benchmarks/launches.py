"""The launches of the Triton backend by name, on small arrays: only their types and the width count.

Kernels compiled from them ahead of time are those that training launches, with item bias and L2. Where
nothing else is said the loss is binary cross-entropy of the dot product, and tables are float32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fasttower_kernels.adam.triton_gpu import adam_launch
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives.proposal import Negatives
from fasttower_kernels.settings import LazyTables, LossSettings, NegativeSettings
from fasttower_kernels.step.lazy_triton_gpu import LazyLaunches, lazy_launches
from fasttower_kernels.step.own_negatives.pairs_triton_gpu import PairBuffers
from fasttower_kernels.step.own_negatives.triton_gpu import Output, OwnLaunches, own_launches
from fasttower_kernels.step.segments_triton_gpu import segments_launches
from fasttower_kernels.step.shared_negatives.triton_gpu import SharedLaunches, shared_launches
from fasttower_kernels.step.state import TrainState
from fasttower_kernels.tables import Interactions, Tables, padded
from fasttower_kernels.triton_launch import Launch

NUM_NEGATIVES = 10
_USERS, _ITEMS = 8, 40
_INDEX = torch.arange(_USERS, dtype=torch.int32)
_INTERACTIONS = Interactions(_INDEX, _INDEX)
_UNIFORM = NegativeSettings(count=NUM_NEGATIVES)
_POPULARITY = NegativeSettings("popularity", count=NUM_NEGATIVES)
_HARD = NegativeSettings(count=NUM_NEGATIVES, pool=4 * NUM_NEGATIVES)
_DEFAULT = LossSettings(user_l2=0.01, item_l2=0.01)
_COSINE = replace(_DEFAULT, similarity="cosine")
# Beside the default one, of steps whose positives have their own negatives.
_LOSSES = {
    "softmax": replace(_DEFAULT, name="softmax"),
    "bpr": replace(_DEFAULT, name="bpr"),
    "gbce": replace(_DEFAULT, name="gbce"),
    "cosine": _COSINE,
    "softmax, cosine": replace(_COSINE, name="softmax"),
}
# Of shared negatives: torch's precision of float32 products, and the dtype of the tables.
_PRODUCTS = {
    "float32": ("highest", torch.float32),
    "tf32": ("high", torch.float32),
    "bfloat16": ("high", torch.bfloat16),
}
_SHARED_LOSSES = {"softmax": replace(_DEFAULT, name="softmax"), "bce, cosine": _COSINE}


def launches(dim: int, lanes: int = 32) -> dict[str, Launch]:
    """The launches of training at that dimension, for warps of some lanes.

    Those of bfloat16 tables are named so. Those of shared negatives are here for warps of 32 lanes only: the
    shape of their programs follows the GPU vendor that torch was built for.
    """
    rounded = _launches_of(dim, lanes, torch.bfloat16)
    del rounded["loss alone"]  # it reads the float32 tables
    return (
        _launches_of(dim, lanes, torch.float32)
        | {f"{name}, bfloat16": launch for name, launch in rounded.items()}
        | (_shared_launches(dim) if lanes == 32 else {})
    )


def _tables(dim: int) -> Tables:
    width = padded(dim)
    return Tables(torch.zeros(_USERS, width), torch.zeros(_ITEMS, width), torch.zeros(_ITEMS))


def _rounded(tables: Tables, dtype: torch.dtype) -> Tables:
    return Tables(tables.users.to(dtype), tables.items.to(dtype), tables.item_bias)


def _known_positives() -> KnownPositives:
    return KnownPositives.from_pairs(_INDEX, _INDEX, _USERS, _ITEMS)


def _launches_of(dim: int, lanes: int, table_dtype: torch.dtype) -> dict[str, Launch]:
    """The launches of steps whose positives have their own negatives."""
    parameters = _tables(dim)
    rounded = None if table_dtype == torch.float32 else _rounded(parameters, table_dtype)
    read = rounded or parameters
    known = _known_positives()
    counters = torch.zeros(2, dtype=torch.int64)
    pairs = PairBuffers.empty(_USERS, NUM_NEGATIVES, parameters.users.device)

    def launches(
        known_positives: KnownPositives | None = known,
        *,
        negatives: NegativeSettings = _UNIFORM,
        loss: LossSettings = _DEFAULT,
        output: Output = Output.GRADIENTS,
    ) -> OwnLaunches:
        return own_launches(
            read,
            parameters if output is Output.GRADIENTS else None,
            _INTERACTIONS,
            Negatives.of(negatives, _INTERACTIONS, _USERS, _ITEMS, known_positives),
            loss,
            words=torch.zeros(10, dtype=torch.int32),
            counters=counters,
            losses=torch.zeros(_USERS, dtype=torch.float64),
            output=output,
            batch_size=_USERS,
            shuffle=True,
            pair_buffers=pairs if output is Output.PAIRS else None,
            lanes=lanes,
        )

    def step(*arguments: KnownPositives | None, **settings: Any) -> Launch:
        return launches(*arguments, **settings).step

    hard = launches(negatives=_HARD)
    assert hard.choose is not None
    bitmaps = step()
    assert bitmaps.arguments["bit_offsets_ptr"] is None
    filters = {"bit_offsets_ptr": known.indptr}  # any offsets
    rates = torch.zeros(1, 2)
    state = TrainState(parameters, parameters, parameters, parameters)

    def lazy_of(own: Launch, users: bool = True, items: bool = True) -> LazyLaunches:
        return lazy_launches(state, own, rates, LazyTables(users, items), rounded=rounded, lanes=lanes)

    lazy = lazy_of(bitmaps)
    segments, partials = segments_launches(
        pairs.items,
        pairs.items.long(),
        coefficients=pairs.coefficients,
        terms=1,
        others=pairs.users,
        pairs_per_other=1 + NUM_NEGATIVES,
        other_vectors=read.users,
        own_vectors=read.items,
        gradients=parameters.items,
        bias_gradients=parameters.item_bias,
        own_scale=0.0,
    )
    return {
        "step, exclusion by bitmaps": bitmaps,
        "step, exclusion by filters": bitmaps.with_arguments(**filters),
        "step, plain negatives": step(None),
        **{f"step, {name}": step(loss=loss) for name, loss in _LOSSES.items()},
        "step, popularity": step(negatives=_POPULARITY),
        "step, popularity, softmax": step(negatives=_POPULARITY, loss=_LOSSES["softmax"]),
        "step, hard": hard.step,
        "choice of hard negatives": hard.choose,
        "loss alone": step(output=Output.NOTHING),
        "pairs (deterministic)": step(output=Output.PAIRS),
        "segments (deterministic)": segments,
        "partials (deterministic)": partials,
        "adam": adam_launch(
            parameters,
            parameters,
            parameters,
            parameters,
            rates=rates,
            counters=counters,
            rounded=rounded,
            lanes=lanes,
        ),
        "lazy adam, exclusion by bitmaps": lazy.update,
        "lazy adam, exclusion by filters": lazy.update.with_arguments(**filters),
        "lazy adam, plain negatives": lazy_of(step(None)).update,
        "lazy adam, popularity": lazy_of(step(negatives=_POPULARITY)).update,
        "lazy adam, only users": lazy_of(bitmaps, items=False).update,
        "lazy adam, only items": lazy_of(bitmaps, users=False).update,
        "lazy adam, all rows": lazy.at_the_end,
        "lazy adam, all rows of users": lazy_of(bitmaps, items=False).at_the_end,
    }


def _shared_launches(dim: int) -> dict[str, Launch]:
    """The launches of steps with mixed negatives, by the products' precision and the tables' dtype."""
    found: dict[str, Launch] = {}
    before = torch.get_float32_matmul_precision()
    for product, (precision, dtype) in _PRODUCTS.items():
        torch.set_float32_matmul_precision(precision)
        for name, loss in _SHARED_LOSSES.items():
            step = _shared_step(_tables(dim), dtype, loss)
            assert step.items is not None
            found[f"shared users, {name}, {product}"] = step.users
            found[f"shared items, {name}, {product}"] = step.items
            if product == "tf32":
                continue  # neither masks nor lists have products
            found[f"shared masks, {name}, {product}"] = step.mask
            if (name, product) == ("softmax", "float32"):
                offsets = step.mask.arguments["indptr_ptr"]  # any
                found["shared masks by search"] = step.mask.with_arguments(bit_offsets_ptr=offsets)
                found["shared lists"] = step.draw
    torch.set_float32_matmul_precision(before)
    return found


def _shared_step(gradients: Tables, dtype: torch.dtype, loss: LossSettings) -> SharedLaunches:
    settings = NegativeSettings("mixed", count=4, block_size=_USERS)
    return shared_launches(
        _rounded(gradients, dtype),
        gradients,
        _INTERACTIONS,
        Negatives.of(settings, _INTERACTIONS, _USERS, _ITEMS, _known_positives()),
        loss,
        words=torch.zeros(10, dtype=torch.int32),
        counters=torch.zeros(2, dtype=torch.int64),
        losses=torch.zeros(_USERS, dtype=torch.float64),
        batch_size=_USERS,
        shuffle=True,
    )
