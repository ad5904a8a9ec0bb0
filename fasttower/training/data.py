"""The parts of the interactions that training sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.tables import Interactions


class Cut(NamedTuple):
    """What is before and after a validation cut.

    Attributes:
        train: rows of fit before the cut.
        valid: the pairs after it that a model of `train` can be asked for.
    """

    train: Interactions
    valid: Interactions


@dataclass(frozen=True)
class TrainingData:
    """The parts that training sees, as dense indices on one device.

    Attributes:
        fit: everything before the test cut.
        known_positives: of fit.
        cuts: validation cuts, that with the most rows before it first; none where nothing is validated.
    """

    fit: Interactions
    known_positives: KnownPositives
    cuts: tuple[Cut, ...] = ()

    def to(self, device: torch.device) -> TrainingData:
        """The same parts on another device."""
        cuts = tuple(Cut(cut.train.to(device), cut.valid.to(device)) for cut in self.cuts)
        return TrainingData(self.fit.to(device), self.known_positives.to(device), cuts)
