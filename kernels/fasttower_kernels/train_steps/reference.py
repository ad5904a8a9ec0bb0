"""The steps in plain torch, made of the references of their parts."""

import torch
from torch import Tensor

from fasttower_kernels.adam.lazy_reference import catch_up, lazy_adam_step
from fasttower_kernels.adam.reference import adam_step
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.philox import seed_key
from fasttower_kernels.sampled_bce.reference import draw_items, train_step
from fasttower_kernels.shuffle import epoch_key
from fasttower_kernels.shuffle.reference import shuffled_rows
from fasttower_kernels.tables import Interactions, Tables
from fasttower_kernels.train_steps.state import StepSettings, TrainState, steps_per_epoch

# Rows are shuffled this many at a time: one by one, batches of 1,024 would spend their time in launches.
_SHUFFLE_ROWS = 1 << 17


def run_steps(
    state: TrainState,
    interactions: Interactions,
    known_positives: KnownPositives | None,
    settings: StepSettings,
    *,
    first_step: int,
    num_steps: int,
) -> Tensor:
    """See the operator's `run_steps`. Here `auto` is dense: the lazy one takes many small operations."""
    lazy = settings.optimiser == "lazy_adam"
    whole = (state.parameters, state.moments_1, state.moments_2)
    tables = (state.parameters, state.gradients, state.moments_1, state.moments_2)
    last = [torch.full((len(array),), first_step, device=array.device) for array in state.parameters]
    num_rows, batch_size = len(interactions), settings.batch_size
    epoch, first_batch = divmod(first_step, steps_per_epoch(num_rows, batch_size))
    order = epoch_key(settings.seed, epoch)
    key = seed_key(settings.seed)
    device = interactions.user_index.device
    batches_a_shuffle = max(1, _SHUFFLE_ROWS // batch_size)
    losses = []
    for batch in range(first_batch, first_batch + num_steps, batches_a_shuffle):
        last_batch = min(batch + batches_a_shuffle, first_batch + num_steps)
        positions = torch.arange(batch * batch_size, min(last_batch * batch_size, num_rows), device=device)
        rows = shuffled_rows(positions, num_rows, order)
        for i, batch_rows in enumerate(rows.split(batch_size)):
            step = first_step + batch - first_batch + i
            taken = Interactions(interactions.user_index[batch_rows], interactions.item_index[batch_rows])
            if lazy:
                num_items = len(state.parameters.items)
                items = draw_items(taken, num_items, known_positives, settings.loss, key=key, step=step)[0]
                used = [taken.user_index.long().unique(), items.unique(), items.unique()][: len(last)]
                catch_up(*whole, last, used, count=step, learning_rate=settings.learning_rate)
            losses.append(
                train_step(
                    _as_read(state.parameters, settings),
                    state.gradients,
                    taken,
                    known_positives,
                    settings.loss,
                    key=key,
                    step=step,
                )
            )
            if lazy:
                lazy_adam_step(*tables, last, used, count=step + 1, learning_rate=settings.learning_rate)
            else:
                adam_step(*tables, count=step + 1, learning_rate=settings.learning_rate)
    if lazy:
        everything = [torch.arange(len(seen), device=seen.device) for seen in last]
        count = first_step + num_steps
        catch_up(*whole, last, everything, count=count, learning_rate=settings.learning_rate)
    return torch.stack(losses).cpu().double().sum()


def _as_read(parameters: Tables, settings: StepSettings) -> Tables:
    """The tables that the loss sees."""
    if settings.table_dtype == "float32":
        return parameters
    users, items = (table.bfloat16().to(table) for table in (parameters.users, parameters.items))
    return Tables(users, items, parameters.item_bias)
