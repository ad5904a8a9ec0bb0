"""The steps in plain torch, made of the references of their parts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fasttower_kernels.adam.lazy_reference import catch_up, lazy_adam_step
from fasttower_kernels.adam.reference import adam_step
from fasttower_kernels.negatives import Negatives
from fasttower_kernels.philox import seed_key
from fasttower_kernels.settings import StepSettings
from fasttower_kernels.shuffle import epoch_key
from fasttower_kernels.shuffle.reference import shuffled_rows
from fasttower_kernels.step.gradients.reference import add_gradients, items_in_use
from fasttower_kernels.step.state import TrainState, steps_per_epoch
from fasttower_kernels.tables import Interactions, Tables

# Rows are shuffled this many at a time: one by one, batches of 1,024 would spend their time in launches.
_SHUFFLE_ROWS = 1 << 17


class Steps:
    """See `Step`. Here `auto` is dense: the lazy optimiser takes many small operations."""

    def __init__(
        self, state: TrainState, interactions: Interactions, negatives: Negatives, settings: StepSettings
    ) -> None:
        self._state = state
        self._interactions = interactions
        self._negatives = negatives
        self._settings = settings
        self._lazy = settings.optimiser == "lazy_adam"

    def run(self, first_step: int, num_steps: int) -> Tensor:
        """See `Step.run`."""
        state, settings = self._state, self._settings
        rate, loss = settings.learning_rate, settings.loss
        whole = (state.parameters, state.moments_1, state.moments_2)
        tables = (state.parameters, state.gradients, state.moments_1, state.moments_2)
        last = [torch.full((len(array),), first_step, device=array.device) for array in state.parameters]
        key = seed_key(settings.seed)
        values = []
        for step, batch in enumerate(self._batches(first_step, num_steps), first_step):
            used = []
            if self._lazy:
                items = items_in_use(state.parameters, batch, self._negatives, key=key, step=step)
                used = [batch.user_index.long().unique(), items, items][: len(last)]
                catch_up(*whole, last, used, count=step, learning_rate=rate)
            read = self._as_read()
            values.append(
                add_gradients(read, state.gradients, batch, self._negatives, loss, key=key, step=step)
            )
            if self._lazy:
                lazy_adam_step(*tables, last, used, count=step + 1, learning_rate=rate)
            else:
                adam_step(*tables, count=step + 1, learning_rate=rate)
        if self._lazy:
            everything = [torch.arange(len(seen), device=seen.device) for seen in last]
            catch_up(*whole, last, everything, count=first_step + num_steps, learning_rate=rate)
        return torch.stack(values).cpu().double().sum()

    def _batches(self, first_step: int, num_steps: int) -> Iterator[Interactions]:
        """The batches of the steps, in their epoch's order."""
        interactions, batch_size = self._interactions, self._settings.batch_size
        num_rows = len(interactions)
        epoch, first = divmod(first_step, steps_per_epoch(num_rows, batch_size))
        order, device = epoch_key(self._settings.seed, epoch), interactions.user_index.device
        together = max(1, _SHUFFLE_ROWS // batch_size)
        for batch in range(first, first + num_steps, together):
            end = min(batch + together, first + num_steps)
            positions = torch.arange(batch * batch_size, min(end * batch_size, num_rows), device=device)
            for rows in shuffled_rows(positions, num_rows, order).split(batch_size):
                yield Interactions(interactions.user_index[rows], interactions.item_index[rows])

    def _as_read(self) -> Tables:
        """The tables that the loss sees."""
        parameters = self._state.parameters
        if self._settings.table_dtype == "float32":
            return parameters
        users, items = (table.bfloat16().to(table) for table in (parameters.users, parameters.items))
        return Tables(users, items, parameters.item_bias)
