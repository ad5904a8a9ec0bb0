"""Six ranking metrics at 10: fasttower's on the device beside RePlay's."""

import polars as pl
import pytest
import torch

from fasttower.evaluation.ranking import ranking_metrics
from fasttower.evaluation.replay_report import replay_metrics
from fasttower_kernels.known_positives import KnownPositives

NUM_USERS, NUM_ITEMS, RELEVANT, K = 6_040, 3_706, 20, 10


def pairs_of(items):
    return pl.DataFrame(
        {
            "user_id": torch.arange(len(items)).repeat_interleave(items.shape[1]).numpy(),
            "item_id": items.flatten().numpy(),
        }
    )


def fasttower_way(recommended, relevant):
    users = torch.arange(len(relevant)).repeat_interleave(relevant.shape[1])
    truth = KnownPositives.from_pairs(users, relevant.flatten(), len(relevant), NUM_ITEMS)
    train_items = torch.ones(NUM_ITEMS, dtype=torch.bool)
    return lambda: ranking_metrics(recommended, truth, train_items, K)


def replay_way(recommended, relevant):
    rank = torch.arange(1, K + 1).repeat(len(recommended))
    frame = pairs_of(recommended).with_columns(
        score=pl.lit(0.0), rank=pl.Series(rank.numpy()).cast(pl.UInt32)
    )
    test, fit = pairs_of(relevant), pl.DataFrame({"item_id": range(NUM_ITEMS)})
    return lambda: replay_metrics(frame, test, fit, K)


WAYS = {"fasttower": fasttower_way, "replay": replay_way}


@pytest.mark.parametrize("way", WAYS)
def test_metrics(benchmark_in, way):
    generator = torch.Generator().manual_seed(0)
    # Distinct items a user, spread from a random first one, so that recommended and relevant ones meet.
    starts = torch.randint(NUM_ITEMS, (2, NUM_USERS, 1), generator=generator)
    recommended = (starts[0] + 61 * torch.arange(K)) % NUM_ITEMS
    relevant = (starts[1] + 29 * torch.arange(RELEVANT)) % NUM_ITEMS
    ours, theirs = (WAYS[name](recommended, relevant)() for name in ("fasttower", "replay"))
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert 0 < ours["NDCG@10"] < 1
    benchmark_in(f"metrics at {K}, ML-1M's users", users=NUM_USERS, items=NUM_ITEMS, relevant=RELEVANT)(
        WAYS[way](recommended, relevant)
    )
