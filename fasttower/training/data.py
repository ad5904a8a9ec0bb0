"""The parts of the interactions that training sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.tables import Interactions


@dataclass(frozen=True)
class TrainingData:
    """The parts that training sees, as dense indices on one device.

    Attributes:
        fit: everything before the test cut.
        train: fit's rows before the validation cut; not read without a validation part.
        valid: the validation pairs, or None.
        known_positives: of fit.
    """

    fit: Interactions
    train: Interactions
    valid: Interactions | None
    known_positives: KnownPositives

    def to(self, device: torch.device) -> TrainingData:
        """The same parts on another device."""
        valid = None if self.valid is None else self.valid.to(device)
        return TrainingData(
            self.fit.to(device), self.train.to(device), valid, self.known_positives.to(device)
        )
