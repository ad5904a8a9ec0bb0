"""The loss of a batch as the contract writes it, one positive at a time, in float64 autograd."""

import math

import torch

from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives.proposal import Negatives
from fasttower_kernels.negatives.reference import draw, draw_list
from fasttower_kernels.tables import Interactions, Tables, padded

KEY, STEP = (5, 6), 3
NUM_USERS, NUM_ITEMS = 7, 11


def make_tables(dim, *, scale=1.0, bias=True):
    generator = torch.Generator().manual_seed(dim)
    users, items = (torch.zeros(n, padded(dim)) for n in (NUM_USERS, NUM_ITEMS))
    for table in (users, items):
        table[:, :dim] = torch.randn(len(table), dim, generator=generator) * scale
    return Tables(users, items, torch.randn(NUM_ITEMS, generator=generator) if bias else None)


def make_batch(size):
    generator = torch.Generator().manual_seed(size)
    return Interactions(
        torch.randint(NUM_USERS, (size,), generator=generator, dtype=torch.int32),
        torch.randint(NUM_ITEMS, (size,), generator=generator, dtype=torch.int32),
    )


def make_known():
    """User 0 has touched every item, user 1 all but one, user 4 all but two that are rare, user 6 none.

    Of those two the gap search and the popularity have different q.
    """
    rows = [(0, i) for i in range(NUM_ITEMS)] + [(1, i) for i in range(NUM_ITEMS - 1)]
    rows += [(2, 4), (3, 5), (5, 0)] + [(4, i) for i in range(NUM_ITEMS) if i not in (8, 10)]
    index = torch.tensor(rows, dtype=torch.int32)
    return KnownPositives.from_pairs(index[:, 0], index[:, 1], NUM_USERS, NUM_ITEMS)


def make_negatives(settings, *, exclude=True):
    generator = torch.Generator().manual_seed(0)
    users = torch.randint(NUM_USERS, (300,), generator=generator, dtype=torch.int32)
    items = (
        torch.rand(300, generator=generator).square() * (NUM_ITEMS - 1)
    ).int()  # the last one is not there
    return Negatives.of(
        settings, Interactions(users, items), NUM_USERS, NUM_ITEMS, make_known() if exclude else None
    )


def _softplus(x):
    return torch.logaddexp(torch.zeros((), dtype=torch.float64), x)


def _value(positive, negatives, log_q, beta, name):
    """Of one positive: logits as a scalar and a list of scalars."""
    if name in ("bce", "gbce"):
        return beta * _softplus(-positive) + sum(_softplus(x) for x in negatives)
    if name == "bpr":
        return sum((_softplus(x - positive) for x in negatives), torch.zeros((), dtype=torch.float64))
    corrected = [positive, *(x - q for x, q in zip(negatives, log_q, strict=True))]
    return torch.stack(corrected).logsumexp(0) - positive


def _touched(known, user):
    return set() if known is None else set(known.items[known.indptr[user] : known.indptr[user + 1]].tolist())


def _own(batch, negatives, logit):
    """For each positive its negatives and their log q; None for one without."""
    settings, known = negatives.settings, negatives.known_positives
    p = torch.ones(NUM_ITEMS, dtype=torch.float64)
    if settings.proposal == "popularity":
        p = negatives.item_counts.double()
        p[p == 0] = p[p > 0].min() / 2
        p = p**settings.popularity_power
    p = (p / p.sum()).tolist()
    kept = {"known_positives": known, "popularity": negatives.popularity}
    drawn = draw(batch.user_index, settings.drawn, NUM_ITEMS, key=KEY, step=STEP, **kept)
    for b, user in enumerate(batch.user_index.tolist()):
        touched = _touched(known, user)
        if len(touched) == NUM_ITEMS:
            yield None
            continue
        pairs = []
        for item, by_rank in zip(drawn.items[b].tolist(), drawn.by_rank[b].tolist(), strict=True):
            uniform = settings.drawn / (NUM_ITEMS - len(touched))
            q = uniform if by_rank else settings.drawn * p[item] / (1 - sum(p[i] for i in touched))
            pairs.append((item, math.log(q)))
        if settings.pool:
            pairs.sort(key=lambda pair: -logit(user, pair[0]).item())  # stable
            pairs = pairs[: settings.count]
        yield pairs


def _shared(batch, negatives):
    """For each positive its negatives and their log q; None for one without."""
    settings, known = negatives.settings, negatives.known_positives
    size = settings.block_size
    for b, (user, own) in enumerate(zip(batch.user_index.tolist(), batch.item_index.tolist(), strict=True)):
        touched = _touched(known, user)
        if len(touched) == NUM_ITEMS:
            yield None
            continue
        block = b // size
        drawn, positives = [], []
        if settings.proposal != "in-batch":
            cpu = torch.device("cpu")
            drawn = draw_list(block, settings.count, NUM_ITEMS, key=KEY, step=STEP, device=cpu).tolist()
        if settings.proposal != "shared":
            positives = batch.item_index[block * size : (block + 1) * size].tolist()
        pairs = []
        for item in drawn + positives:
            q = len(drawn) / NUM_ITEMS
            if positives:
                q += len(positives) * max(float(negatives.item_counts[item]), 0.5) / negatives.num_rows
            if item != own and item not in touched:
                pairs.append((item, math.log(q)))
        yield pairs


def oracle(tables, batch, negatives, loss):
    """The sum of the values, the loss, and the gradients of users, items and bias, in float64."""
    settings = negatives.settings
    users, items, *bias = (table.double().requires_grad_() for table in tables)

    def logit(user, item):
        u, v = users[user], items[item]
        if loss.similarity == "cosine":
            u = u / max(u.norm(), torch.tensor(1e-8)) / loss.temperature
            v = v / max(v.norm(), torch.tensor(1e-8))
        return u @ v + (bias[0][item] if bias else 0)

    total = values = torch.zeros((), dtype=torch.float64)
    lists = _shared(batch, negatives) if settings.is_shared else _own(batch, negatives, logit)
    for b, pairs in enumerate(lists):
        if pairs is None:
            continue
        user, positive = int(batch.user_index[b]), int(batch.item_index[b])
        beta = 1.0
        if loss.name == "gbce":
            free = NUM_ITEMS
            if not settings.is_shared and negatives.known_positives is not None:
                free -= int(negatives.known_positives.degrees[user])
            a = min(settings.count / free, 1)
            beta = a * (loss.calibration * (1 - 1 / a) + 1 / a) if a else 1 - loss.calibration
        value = _value(
            logit(user, positive),
            [logit(user, item) for item, _ in pairs],
            [q for _, q in pairs],
            beta,
            loss.name,
        )
        count = settings.scored
        norms = loss.user_l2 * users[user] @ users[user]
        for item in [positive, *(item for item, _ in pairs)]:
            term = loss.item_l2 * items[item] @ items[item]
            if bias:
                term = term + loss.bias_l2 * bias[0][item] ** 2
            norms = norms + 2 / (count + 1) * term
        total, values = total + value + norms, values + value
    total = total / (len(batch) * (1 if loss.scale == "positives" else 1 + settings.scored))
    leaves = (users, items, *bias)
    gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return values.detach(), total.detach(), Tables(*gradients)
