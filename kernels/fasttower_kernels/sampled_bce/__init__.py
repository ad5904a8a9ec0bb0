"""Sampled BCE: a positive and its drawn negatives, scored by dot product, against labels 1 and 0."""

from __future__ import annotations

from torch import Tensor

from fasttower_kernels.backends import Backend, implementation
from fasttower_kernels.checks import check_pairs, check_step, check_tables
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.philox import Key
from fasttower_kernels.sampled_bce import reference
from fasttower_kernels.sampled_bce.loss import sampled_bce_loss
from fasttower_kernels.sampled_bce.settings import LossSettings
from fasttower_kernels.tables import Interactions, Tables

__all__ = ["LossSettings", "bce_sum", "sampled_bce_loss", "train_step"]


def train_step(
    parameters: Tables,
    gradients: Tables,
    batch: Interactions,
    known_positives: KnownPositives | None,
    settings: LossSettings,
    *,
    key: Key,
    step: int,
    backend: Backend = "auto",
) -> Tensor:
    """Add the gradients of a batch's loss to ``gradients``.

    Args:
        parameters: users (U, P), items (I, P) and item bias (I,) or None, float32.
        gradients: of the same shapes.
        batch: the B positives.
        known_positives: what negatives leave out; None draws from the whole catalogue.
        settings: of the loss.
        key: of the stream of negatives.
        step: t, the training step.
        backend: the implementation.

    Returns:
        Scalar, float32 or float64: the sum of the BCE part over the batch's pairs.

    Raises:
        FastTowerError: tables, pairs or known positives that do not fit each other, or the backend cannot
            run here.
    """
    run = implementation(__name__, backend, parameters.users.device)
    check_tables(parameters, {"gradients": gradients}, fused=run is not reference)
    check_pairs(parameters, batch, known_positives)
    check_step(step)
    bce: Tensor = run.train_step(parameters, gradients, batch, known_positives, settings, key=key, step=step)
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
    backend: Backend = "auto",
) -> Tensor:
    """The sum of only the BCE part, without gradients: what the validation loss is made of.

    A batch of any size is one call and one check of the indices; what a backend holds of it at a time is the
    backend's own business: Triton takes it in one launch, the others in parts that bound their memory.

    Args:
        parameters: as in `train_step`.
        batch: the B positives.
        known_positives: as in `train_step`.
        settings: of the loss.
        key: of the stream of negatives.
        step: t.
        first_position: the position in the batch of the first positive, where these are a later part of it.
        backend: the implementation.

    Returns:
        Scalar, float64 (float32 on MPS), on the tables' device; reading it waits for the device.

    Raises:
        FastTowerError: as in `train_step`.
    """
    run = implementation(__name__, backend, parameters.users.device)
    check_tables(parameters, {}, fused=run is not reference)
    check_pairs(parameters, batch, known_positives)
    check_step(step)
    bce: Tensor = run.bce_sum(
        parameters, batch, known_positives, settings, key=key, step=step, first_position=first_position
    )
    return bce
