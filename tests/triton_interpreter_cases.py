"""The cases of `test_triton_interpreter`: run there, with TRITON_INTERPRET=1.

The oracles are the known answers of the contract and the plain torch reference in float64. Arrays lie between
canaries, so that a write outside is seen, and a read outside brings in NaN.
"""

import hashlib
import os
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from test_shuffle import order
from triton.runtime import interpreter

from fasttower_kernels import membership, triton_tiles
from fasttower_kernels.adam import lazy_triton_gpu as lazy_adam_triton
from fasttower_kernels.adam import reference as adam_reference
from fasttower_kernels.adam import triton_gpu as adam_triton
from fasttower_kernels.adam.replay_nodes import replay_nodes
from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives import Negatives
from fasttower_kernels.negatives import reference as negatives_reference
from fasttower_kernels.negatives import triton_gpu as negatives_triton
from fasttower_kernels.negatives.membership_triton_gpu import exclusion_rows, touched
from fasttower_kernels.philox import seed_key
from fasttower_kernels.settings import LazyTables, LossSettings, NegativeSettings, StepSettings
from fasttower_kernels.shuffle import triton_gpu as shuffle_triton
from fasttower_kernels.step import (
    TrainState,
    device_memory,
    lazy_triton_gpu,
    steps_per_epoch,
)
from fasttower_kernels.step import reference as steps_reference
from fasttower_kernels.step import triton_gpu as steps_triton
from fasttower_kernels.step.gradients import reference as gradients_reference
from fasttower_kernels.step.gradients import triton_gpu as gradients_triton
from fasttower_kernels.step.own_negatives import triton_gpu as own_triton
from fasttower_kernels.step.own_negatives.triton_gpu import Output
from fasttower_kernels.step.segments_triton_gpu import reduce_pairs
from fasttower_kernels.tables import Interactions, Tables, padded
from fasttower_kernels.triton_launch import Launch, signed_word

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET is not 1: run test_triton_interpreter.py", allow_module_level=True)

KEY = seed_key(0xFEDCBA9876543210 >> 1)
NUM_USERS, NUM_ITEMS = 9, 71
CANARY_FLOATS = 64
EDGES = [*torch.tensor([float("nan"), -0.0]).view(torch.int32).tolist(), torch.iinfo(torch.int32).max]


class Guarded:
    """Makes arrays with canaries before and after, and looks after them.

    The canary of an array that is added to is -0: adding nothing to it, which no NaN would show, makes it +0.
    """

    def __init__(self):
        self.wholes = []

    def like(self, values, *, added_to=False):
        """The values in an array of their own, aligned as torch aligns."""
        canary = torch.iinfo(values.dtype).max if values.dtype == torch.int32 else float("nan")
        if added_to:
            canary = -0.0
        whole = torch.full((values.numel() + 2 * CANARY_FLOATS,), canary, dtype=values.dtype)
        part = whole[CANARY_FLOATS : CANARY_FLOATS + values.numel()].view(values.shape)
        part.copy_(values)
        self.wholes.append(whole)
        return part

    def tables(self, tables, *, added_to=False):
        return Tables(*(self.like(table, added_to=added_to) for table in tables))

    def check(self):
        for whole in self.wholes:
            # As bits: NaN is not equal to itself, and -0 is equal to +0.
            bits = whole.view(torch.int32)
            edge = bits[:CANARY_FLOATS]
            assert edge.unique().numel() == 1
            assert edge[0] in EDGES
            assert bits[-CANARY_FLOATS:].equal(edge)


@pytest.fixture
def guarded():
    guarded = Guarded()
    yield guarded
    guarded.check()


@pytest.fixture
def large_programs(monkeypatch):
    """Programs of 32 positives: the interpreter's time goes by operations, not by elements."""
    for block in triton_tiles.TILES:
        monkeypatch.setitem(triton_tiles.TILES, block, triton_tiles.Tile(32, 1))


def known_positives():
    """User 0 has touched everything, 1 all but one item, 2 nothing, the others some."""
    generator = torch.Generator().manual_seed(2)
    degrees = [NUM_ITEMS, NUM_ITEMS - 1, 0, 60, 35, 20, 7, 1, 1][:NUM_USERS]
    rows = [
        (user, item)
        for user, degree in enumerate(degrees)
        for item in torch.randperm(NUM_ITEMS, generator=generator)[:degree].tolist()
    ]
    index = torch.tensor(rows, dtype=torch.int32)
    return KnownPositives.from_pairs(index[:, 0], index[:, 1], NUM_USERS, NUM_ITEMS)


def use_filters(monkeypatch):
    """Users have filters, however large a part of the catalogue they know, and hits are searched for."""
    monkeypatch.setattr(negatives_triton, "BITMAP_LIMIT_BYTES", 0)
    monkeypatch.setattr(membership, "BITMAP_WORDS_PER_FILTER_WORD", 0)


@pytest.fixture
def filters(monkeypatch):
    """See `use_filters`."""
    use_filters(monkeypatch)


def excluded(way, monkeypatch):
    """Known positives that the test's negatives leave out in a way: "bitmaps", "filters", or None for not."""
    if way == "filters":
        use_filters(monkeypatch)
    return known_positives() if way else None


def make_tables(dim, *, num_users=NUM_USERS, num_items=NUM_ITEMS, bias=True):
    generator = torch.Generator().manual_seed(dim)
    users, items = (torch.zeros(n, padded(dim)) for n in (num_users, num_items))
    for table in (users, items):
        table[:, :dim] = torch.randn(len(table), dim, generator=generator) / dim**0.5
    return Tables(users, items, torch.randn(num_items, generator=generator) if bias else None)


def make_batch(size, *, num_users=NUM_USERS, num_items=NUM_ITEMS):
    """Positives at random; one is of the last user and the last item, next to the canaries."""
    generator = torch.Generator().manual_seed(size)
    users, items = (
        torch.randint(n, (size,), generator=generator, dtype=torch.int32) for n in (num_users, num_items)
    )
    users[-1], items[-1] = num_users - 1, num_items - 1
    return Interactions(users, items)


def uniform(count, tables, known=None):
    """Negatives of the tables' catalogue, and of the users of the known positives."""
    num_users = len(tables.users) if known is None else known.num_users
    return Negatives(NegativeSettings(count=count), num_users, len(tables.items), known)


def both_l2(weight, **settings):
    return LossSettings(user_l2=weight, item_l2=weight, **settings)


def doubled(tables):
    return Tables(*(table.double() for table in tables))


def error(result, oracle):
    """|result - oracle| / |oracle|."""
    return float((result.double() - oracle).norm() / oracle.norm().clamp_min(1e-300))


def check_gradients(guarded, tables, batch, negatives, loss, *, bound=5e-7, deterministic=False):
    draw = {"key": KEY, "step": 3}
    oracle = doubled(tables).zeros_like()
    right = gradients_reference.add_gradients(doubled(tables), oracle, batch, negatives, loss, **draw)
    gradients = guarded.tables(tables.zeros_like(), added_to=True)
    batch = Interactions(guarded.like(batch.user_index), guarded.like(batch.item_index))
    arguments = (guarded.tables(tables), gradients, batch, negatives, loss)
    value = own_triton.run_batch(*arguments, **draw, deterministic=deterministic)
    assert float(value) == pytest.approx(float(right), rel=1e-6, abs=1e-6)
    for gradient, expected in zip(gradients, oracle, strict=True):
        assert error(gradient, expected) < bound
        assert bool((gradient == 0)[expected == 0].all())


# ---- the draws


def test_shuffle_known_answers():
    thousand = shuffle_triton.shuffled_rows(torch.arange(1000), 1000, (1, 2)).numpy()
    digest = hashlib.sha256(thousand.astype("<i8").tobytes()).hexdigest()
    assert digest == "8b7aeb427df2f343f2078eec93c0cc839da9608f9caf5c107ab6f80ce6a353db"
    assert shuffle_triton.shuffled_rows(torch.arange(1), 1, (1, 2)).tolist() == [0]
    assert shuffle_triton.shuffled_rows(torch.arange(2), 2, (1, 2)).tolist() == [0, 1]


@pytest.mark.parametrize("num_rows", [3, 257])
def test_shuffle(num_rows):
    rows = shuffle_triton.shuffled_rows(torch.arange(num_rows), num_rows, KEY)
    assert rows.equal(order(num_rows, KEY))


def test_shuffle_of_the_most_rows():
    positions = torch.tensor([0, 1, shuffle_triton.MAX_ROWS - 1])
    rows = shuffle_triton.shuffled_rows(positions, shuffle_triton.MAX_ROWS, KEY)
    assert rows.unique().numel() == 3
    with pytest.raises(FastTowerError, match="choose backend torch"):
        shuffle_triton.shuffled_rows(positions, shuffle_triton.MAX_ROWS + 1, KEY)


def test_negatives_known_answers():
    negatives = negatives_triton.sample_negatives(
        torch.tensor([0, 1, 2]), 6, 3706, key=seed_key(12345678901234567), step=7
    )
    assert negatives.tolist() == [
        [2066, 229, 2559, 660, 751, 2019],
        [2413, 1685, 3675, 1017, 3122, 2161],
        [1518, 1068, 2814, 2317, 3081, 607],
    ]


@pytest.mark.parametrize("exclude", ["bitmaps", "filters"])
def test_negatives(monkeypatch, exclude):
    known, num_negatives = excluded(exclude, monkeypatch), 6
    users = torch.arange(27, dtype=torch.int32) % NUM_USERS
    draw = {"key": KEY, "step": 2**32 - 1, "known_positives": known, "first_position": 11}
    negatives = negatives_triton.sample_negatives(users, num_negatives, NUM_ITEMS, **draw)
    expected = negatives_reference.sample_negatives(users, num_negatives, NUM_ITEMS, **draw)
    counts = known.degrees[users.long()] < NUM_ITEMS
    assert negatives[counts].equal(expected[counts])
    assert not bool(known.contains(users[counts].long()[:, None], negatives[counts]).any())
    offsets = negatives_triton.exclusion_arguments(known)["bit_offsets_ptr"]
    assert (offsets is None) == (exclude == "bitmaps")


@triton.jit
def _touched_kernel(
    indptr_ptr,
    known_items_ptr,
    bit_offsets_ptr,
    bits_ptr,
    found_ptr,
    num_items,
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Of each user (a program each) and item, whether the user has touched it."""
    i = tl.arange(0, BLOCK)
    user = (i * 0 + tl.program_id(0)).to(tl.int64)
    known = exclusion_rows(
        user, i < num_items, num_items, indptr_ptr, known_items_ptr, bit_offsets_ptr, bits_ptr
    )
    items = ()
    wanted = ()
    for lane in tl.static_range(4):
        items += (4 * i + lane,)
        wanted += (4 * i + lane < num_items,)
    found = touched(items, wanted, known)
    for lane in tl.static_range(4):
        tl.store(found_ptr + user * num_items + 4 * i + lane, found[lane], mask=wanted[lane])


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_touched(monkeypatch, limit):
    """Every user and item, by rows of either kind: nothing, few, many, all but one item, all."""
    monkeypatch.setattr(negatives_triton, "BITMAP_LIMIT_BYTES", limit)
    num_items, degrees = 4099, [0, 1, 2, 17, 63, 64, 400, 4098, 4099]
    generator = torch.Generator().manual_seed(3)
    items = torch.cat([torch.randperm(num_items, generator=generator)[:degree] for degree in degrees])
    users = torch.repeat_interleave(torch.arange(len(degrees)), torch.tensor(degrees))
    known = KnownPositives.from_pairs(users, items, len(degrees), num_items)
    arguments = negatives_triton.exclusion_arguments(known)
    offsets = arguments["bit_offsets_ptr"]
    if limit == 0:
        bitmap = (offsets.diff() == -(-num_items // 32)).tolist()
        assert bitmap == [False, False, False, False, False, False, True, True, True]
    found = torch.zeros(len(degrees), num_items, dtype=torch.bool)
    _touched_kernel[(len(degrees),)](**arguments, found_ptr=found, num_items=num_items, BLOCK=2048)
    expected = known.contains(torch.arange(len(degrees))[:, None], torch.arange(num_items))
    assert found.equal(expected)


def test_bits_are_set_in_parts(monkeypatch):
    known = known_positives()
    layout = membership.layout_of(known, 0)
    whole = negatives_triton.build_bits(known, layout)
    assert bool(whole.any())
    monkeypatch.setattr(negatives_triton, "_PAIRS_AT_ONCE", 7)
    assert negatives_triton.build_bits(known, layout).equal(whole)


def test_negatives_of_the_largest_catalogue():
    # The product of a word and I has 63 bits, and items are int32.
    users, num_items = torch.arange(40), 2**31 - 1
    draw = {"key": KEY, "step": 1}
    negatives = negatives_triton.sample_negatives(users, 4, num_items, **draw)
    assert negatives.equal(negatives_reference.sample_negatives(users, 4, num_items, **draw))


# ---- the loss and its gradients


@pytest.mark.usefixtures("large_programs")
@pytest.mark.parametrize(
    ("dim", "num_negatives", "size", "exclude", "loss", "bias"),
    [
        (16, 5, 40, "bitmaps", both_l2(0.3), True),
        (3, 2, 33, None, LossSettings(scale="pairs"), False),
        (37, 4, 5, "filters", both_l2(0.2), True),
        (1, 0, 7, "bitmaps", both_l2(0.1), True),
    ],
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients(guarded, monkeypatch, dim, num_negatives, size, exclude, loss, bias, deterministic):
    tables = make_tables(dim, bias=bias)
    negatives = uniform(num_negatives, tables, excluded(exclude, monkeypatch))
    check_gradients(guarded, tables, make_batch(size), negatives, loss, deterministic=deterministic)


@pytest.mark.parametrize("deterministic", [False, True])
def test_collisions(guarded, deterministic):
    # Three users and two items in programs of their real size: nearly every add meets another one.
    tables, batch = (make(n, num_users=3, num_items=2) for make, n in ((make_tables, 16), (make_batch, 30)))
    call = (guarded, tables, batch, uniform(5, tables), both_l2(0.1))
    check_gradients(*call, bound=2e-6, deterministic=deterministic)


@pytest.mark.parametrize("bias", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "rows",
    [
        [0] * 700,  # three rounds of the partial sums of one row
        [*range(33)],
        [2] * 15 + [3] * 2 + [5] * 31 + [6],  # to the end of a chunk, across it, over whole ones
        [7] * 16 + [8] * 16 + [9] * 256 + [10],
        [4],
        [11, 11, 11],
    ],
    ids=["one", "each once", "across", "whole chunks", "single", "none"],
)
def test_sums_in_a_fixed_order(guarded, monkeypatch, rows, bias):
    # Row 11 is none where there are 11.
    num_own, width, terms = 11 if rows[-1] == 11 else 33, 12, 3
    generator = torch.Generator().manual_seed(len(rows))
    keys = torch.tensor(rows, dtype=torch.int32)[torch.randperm(len(rows), generator=generator)]
    others = torch.randint(7, (len(rows) * terms,), generator=generator, dtype=torch.int32)
    own, other, before = (torch.randn(n, width, generator=generator) for n in (num_own, 7, num_own))
    coefficients = torch.randn(len(rows) * terms, generator=generator)
    slopes = torch.randn(num_own, generator=generator)
    expected, expected_slopes = before.double(), slopes.double()
    for o, key in enumerate(keys.tolist()):
        if key < num_own:
            mine = slice(o * terms, (o + 1) * terms)
            expected[key] += coefficients[mine].double() @ other[others[mine].long()].double()
            expected[key] += 0.3 * own[key].double()
            expected_slopes[key] += coefficients[mine].double().sum()
    arrays = {
        "keys": keys,
        "coefficients": coefficients,
        "others": others,
        "other_vectors": other,
        "own_vectors": own,
    }
    arrays = {name: guarded.like(array) for name, array in arrays.items()}

    def sums():
        gradients = guarded.like(before, added_to=True)
        bias_gradients = guarded.like(slopes, added_to=True) if bias else None
        reduce_pairs(
            **arrays,
            terms=terms,
            pairs_per_other=1,
            gradients=gradients,
            bias_gradients=bias_gradients,
            own_scale=0.3,
        )
        return gradients, bias_gradients

    gradients, bias_gradients = sums()
    torch.testing.assert_close(gradients.double(), expected, rtol=2e-6, atol=2e-5)
    if bias:
        torch.testing.assert_close(bias_gradients.double(), expected_slopes, rtol=2e-6, atol=2e-5)
    untouched = torch.tensor([row not in rows for row in range(num_own)])
    assert gradients[untouched].equal(before[untouched])
    # The interpreter runs one program after another; now from the last to the first.
    builder = interpreter.interpreter_builder
    forwards = builder.set_grid_idx
    monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: forwards(builder.grid_dim[0] - 1 - x, y, z))
    for again, result in zip(sums(), (gradients, bias_gradients), strict=True):
        assert result is None or again.equal(result)


@pytest.mark.usefixtures("large_programs")
@pytest.mark.parametrize("deterministic", [False, True])
def test_gathered_users(guarded, deterministic):
    # Row b of the user table belongs to position b; the user says only what is left out.
    batch, loss, tables = make_batch(33), both_l2(0.2), make_tables(6, num_users=33)
    negatives = uniform(5, tables, known_positives())
    leaves = [table.double().requires_grad_() for table in tables]
    gradients_reference.batch_loss(*leaves, batch, negatives, loss, key=KEY, step=3)[0].backward()
    gradients = guarded.tables(tables.zeros_like(), added_to=True)
    own_triton.run_batch(
        guarded.tables(tables),
        gradients,
        batch,
        negatives,
        loss,
        key=KEY,
        step=3,
        gathered=True,
        deterministic=deterministic,
    )
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert error(gradient, leaf.grad) < 1e-6


def test_only_users_without_free_items():
    # Weight 0 for the whole batch: no loss, no gradient, in either mode.
    tables = make_tables(4)
    negatives = uniform(2, tables, known_positives())
    batch = Interactions(torch.zeros(3, dtype=torch.int32), torch.arange(3, dtype=torch.int32))
    for deterministic in (False, True):
        gradients = tables.zeros_like()
        step = (tables, gradients, batch, negatives, both_l2(0.1))
        assert float(own_triton.run_batch(*step, key=KEY, step=0, deterministic=deterministic)) == 0
        assert all(not gradient.any() for gradient in gradients)


@pytest.mark.usefixtures("large_programs")
def test_gradients_are_added():
    tables, batch = make_tables(4), make_batch(9)
    call = (batch, uniform(2, tables), both_l2(0.1))
    for deterministic in (False, True):
        once, twice = tables.zeros_like(), tables.zeros_like()
        for gradients, times in ((once, 1), (twice, 2)):
            for _ in range(times):
                own_triton.run_batch(tables, gradients, *call, key=KEY, step=0, deterministic=deterministic)
        for single, double in zip(once, twice, strict=True):
            torch.testing.assert_close(double, 2 * single)


def test_large_logits():
    # Logits of 10^4: the positive's is wrong (loss 10^4, slope -1), then right (loss 0, slope 0).
    tables = Tables(
        torch.tensor([[100.0, 0, 0, 0]]), torch.tensor([[-100.0, 0, 0, 0], [100.0, 0, 0, 0]]), torch.zeros(2)
    )
    for item, loss in ((0, 1e4), (1, 0.0)):
        gradients = tables.zeros_like()
        batch = Interactions(torch.zeros(1, dtype=torch.int32), torch.tensor([item], dtype=torch.int32))
        call = (tables, gradients, batch, uniform(0, tables), LossSettings())
        assert float(gradients_triton.add_gradients(*call, key=KEY, step=0)) == pytest.approx(loss)
        assert float(gradients.item_bias[item]) == (-1 if loss else 0)


@pytest.mark.usefixtures("large_programs")
def test_loss_of_a_later_part(guarded):
    tables, batch, loss = make_tables(5), make_batch(20), both_l2(0.5)
    negatives = uniform(3, tables, known_positives())
    rows, losses = tables.users[batch.user_index.long()], torch.zeros(1, dtype=torch.float64)
    oracle = gradients_reference.batch_loss(
        *doubled(Tables(rows, *[*tables][1:])), batch, negatives, loss, key=KEY, step=5, first_position=1000
    )[1]
    own_triton.own_launches(
        guarded.tables(tables),
        None,
        batch,
        negatives,
        loss,
        words=torch.tensor([*map(signed_word, KEY)], dtype=torch.int32),
        counters=torch.tensor([5, 0]),
        losses=losses,
        output=Output.NOTHING,
        batch_size=len(batch),
        shuffle=False,
    ).step.with_arguments(first_position=1000)()
    assert float(losses) == pytest.approx(float(oracle), rel=1e-6)


def test_rows_past_2_31_elements():
    # The pages of the large table are never touched, but for its last ones.
    num_users, width = 2**29 + 8, 4
    users, user_gradients = (torch.empty(num_users, width) for _ in range(2))
    users[-8:] = torch.randn(8, width, generator=torch.Generator().manual_seed(0))
    user_gradients[-8:] = 0
    items, gradients = torch.ones(3, width), torch.zeros(3, width)
    batch = Interactions(
        torch.tensor([num_users - 1], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    )
    tables = Tables(users, items)
    call = (tables, Tables(user_gradients, gradients), batch, uniform(0, tables), LossSettings())
    gradients_triton.add_gradients(*call, key=KEY, step=0)
    slope = torch.sigmoid(users[-1].double().sum()) - 1
    torch.testing.assert_close(user_gradients[-1].double(), slope.expand(4), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients[1].double(), slope * users[-1].double(), rtol=1e-6, atol=0)
    assert not bool(user_gradients[-8:-1].any())


def test_too_wide():
    tables = make_tables(513, num_users=1, num_items=1)
    with pytest.raises(FastTowerError, match="516 dimensions; the triton backend takes 512"):
        gradients_triton.loss_sum(
            tables,
            make_batch(1, num_users=1, num_items=1),
            uniform(0, tables),
            LossSettings(),
            key=KEY,
            step=0,
        )


# ---- Adam


@pytest.mark.parametrize(("num_users", "num_items", "dim", "bias"), [(90, 70, 12, True), (1, 3, 4, False)])
def test_adam(guarded, num_users, num_items, dim, bias):
    generator = torch.Generator().manual_seed(0)
    start = make_tables(dim, num_users=num_users, num_items=num_items, bias=bias)
    parameters, moments_1, moments_2 = (
        guarded.tables(tables) for tables in (start, start.zeros_like(), start.zeros_like())
    )
    oracle = [doubled(start), doubled(start.zeros_like()), doubled(start.zeros_like())]
    for count in range(1, 4):
        gradients = Tables(*(torch.randn(t.shape, generator=generator) for t in start))
        exact = doubled(gradients)
        gradients = guarded.tables(gradients, added_to=True)
        rates = {"count": count, "learning_rate": 0.1}
        adam_triton.adam_step(parameters, gradients, moments_1, moments_2, **rates)
        adam_reference.adam_step(oracle[0], exact, oracle[1], oracle[2], **rates)
        assert not any(bool(gradient.any()) for gradient in gradients)
        for result, right in zip((parameters, moments_1, moments_2), oracle, strict=True):
            for table, table_right in zip(result, right, strict=True):
                assert error(table, table_right) < 3e-7


def test_adam_rates():
    # Where 1 - beta^count is near 0 and near 1; the learning rate is a float32 at the end, no sooner.
    for count in (1, 2, 1000, 10**6):
        rate = adam_triton.step_rates(count, 1, 1e-3).double()[0]
        exact = torch.tensor([1e-3 / (1 - 0.9**count), (1 - 0.999**count) ** -0.5], dtype=torch.float64)
        torch.testing.assert_close(rate, exact, rtol=6e-8, atol=0)


# ---- many steps

SETTINGS = StepSettings(0.05, 10, 2**33 + 9, both_l2(0.01), NegativeSettings(count=3))


def start_guarded(guarded, tables):
    """The state before step 0, in arrays with canaries."""
    return TrainState(*(guarded.tables(t) for t in (tables, *(tables.zeros_like() for _ in range(3)))))


def steps_of(backend, state, interactions, known, settings):
    sizes = len(state.parameters.users), len(state.parameters.items)
    negatives = Negatives.of(settings.negatives, interactions, *sizes, known)
    return backend.Steps(state, interactions, negatives, settings)


@pytest.mark.usefixtures("large_programs")
@pytest.mark.parametrize("deterministic", [False, True])
def test_steps(guarded, deterministic):
    # The second epoch of 3 steps in two calls, the last batch short; then a step of the third.
    settings = replace(SETTINGS, deterministic=deterministic)
    tables, call = make_tables(6), (make_batch(26), known_positives(), settings)
    oracle, state = TrainState.start(doubled(tables)), start_guarded(guarded, tables)
    steps, right = steps_of(steps_triton, state, *call), steps_of(steps_reference, oracle, *call)
    assert steps_per_epoch(26, settings.batch_size) == 3
    for first, count in ((3, 2), (5, 1), (6, 1)):
        value, expected = steps.run(first, count), right.run(first, count)
        assert value.dtype == torch.float64
        assert float(value) == pytest.approx(float(expected), rel=1e-6)
        for result, exact in zip(
            (*state.parameters, *state.moments_1), (*oracle.parameters, *oracle.moments_1), strict=True
        ):
            assert error(result, exact) < 2e-6
        assert not any(bool(gradient.any()) for gradient in state.gradients)


@pytest.mark.usefixtures("large_programs")
def test_steps_with_other_settings_of_the_same_state():
    # Each object has buffers of its own, though all are made before the first step.
    interactions, tables = make_batch(7), make_tables(4)
    state, oracle = (TrainState.start(Tables(*(t.clone() for t in tables))) for _ in range(2))
    kinds = [
        SETTINGS,
        replace(SETTINGS, learning_rate=0.5),
        replace(SETTINGS, seed=1, batch_size=4),
        replace(SETTINGS, seed=1, batch_size=4, deterministic=True),
        replace(SETTINGS, seed=1, optimiser="lazy_adam", deterministic=True),
    ]
    runs = [steps_of(steps_triton, state, interactions, None, settings) for settings in kinds]
    for settings, steps in zip(kinds, runs, strict=True):
        assert (steps.pairs is not None) == settings.deterministic
        assert (steps.lazy is not None) == (settings.optimiser == "lazy_adam")
        steps.run(0, 1)
        steps_of(steps_reference, oracle, interactions, None, settings).run(0, 1)
        torch.testing.assert_close(state.parameters.items, oracle.parameters.items)


def test_no_room(monkeypatch):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(negatives_triton, "build_bits", out_of_memory)
    state = TrainState.start(make_tables(4))
    with pytest.raises(FastTowerError, match=r"cpu ran out of memory; training needs .* GiB for tables"):
        steps_of(steps_triton, state, make_batch(5), known_positives(), SETTINGS)


def test_room_is_checked_before_anything_is_copied(monkeypatch):
    sizes = device_memory.resident_bytes(
        num_users=138_493, num_items=26_744, width=64, num_rows=20_000_263, num_known=20_000_263
    )
    assert sizes["tables, gradients and moments"] == 16 * (165_237 * 64 + 26_744)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (300 << 20, 8 << 30))
    with pytest.raises(
        FastTowerError, match=r"0\.16 GiB for tables.*0\.15 GiB for positives.*0\.29 GiB of 8\.00"
    ):
        device_memory.check_device_memory(sizes, torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (4 << 30, 8 << 30))
    device_memory.check_device_memory(sizes, torch.device("cuda", 0))


# ---- lazy Adam


@triton.jit
def claims_kernel(stamps_ptr, rows_ptr, owners_ptr, behind_ptr, count, now):
    index = tl.program_id(0) * 8 + tl.arange(0, 4)[:, None] * 2 + tl.arange(0, 2)[None, :]
    there = index < count
    rows = tl.load(rows_ptr + index, mask=there, other=0)
    behind = now - lazy_triton_gpu._claim(stamps_ptr, rows, there, now)
    tl.atomic_add(owners_ptr + rows, 1, mask=behind > 0)
    tl.store(behind_ptr + index, behind)


def test_a_row_has_one_owner(guarded):
    # Rows that are wanted often, within programs and among them; the last one has its stamp already.
    stamps, now = torch.tensor([0, 3, 7, 5, 9], dtype=torch.int32), 9
    rows = torch.tensor([1, 0, 1, 3, 1, 4, 0, 3, 3, 1, 4], dtype=torch.int32)
    owners, behind = torch.zeros(5, dtype=torch.int32), torch.zeros(16, dtype=torch.int32)
    result = guarded.like(stamps)
    claims_kernel[(2,)](result, guarded.like(rows), owners, behind, len(rows), now)
    assert owners.tolist() == [1, 1, 0, 1, 0]
    assert result.tolist() == [9, 9, 7, 9, 9]
    assert sorted(behind.tolist()) == [0] * 13 + [4, 6, 9]


@pytest.mark.parametrize("epoch", [0, 2])
def test_catch_up_of_rows_that_wait_for_long(guarded, epoch):
    """Rows with gradients that wait for 1 to 1,000 updates, far more than are replayed, and rows without.

    In the first epoch some had their gradient in an update whose rates are still being corrected.
    """
    updates, stamps = 1000, [0, 1, 198, 199, 700, 900, 996, 998, 999]
    start = make_tables(10, num_users=20, num_items=22)
    generator = torch.Generator().manual_seed(0)
    gradients, moments_1 = (
        Tables(*(torch.randn(t.shape, generator=generator) for t in start)) for _ in range(2)
    )
    moments_2 = Tables(*(moment.square() * 0.1 for moment in moments_1))
    for tables in (gradients, moments_1, moments_2):
        for table in tables:
            table[-1] = 0
    row_stamps = [
        torch.tensor(stamps, dtype=torch.int32).repeat(3)[: len(t)] for t in (start.users, start.items)
    ]
    oracle = [doubled(t) for t in (start, gradients, moments_1, moments_2)]
    for stamp in stamps:
        some = [doubled(t) for t in (start, gradients, moments_1, moments_2)]
        for update in range(stamp, updates):
            adam_reference.adam_step(*some, count=epoch * updates + update + 1, learning_rate=0.01)
        for right, own in zip(oracle, some, strict=True):
            for array, values, chosen in zip(right, own, (*row_stamps, row_stamps[1]), strict=True):
                array[chosen == stamp] = values[chosen == stamp]
    state = [guarded.tables(t) for t in (start, gradients, moments_1, moments_2)]
    lazy_adam_triton.catch_up_launch(
        *state,
        # After the last row's stamp lie others that are behind too: their rows are no part of the tables.
        user_stamps=torch.cat([row_stamps[0], torch.zeros(64, dtype=torch.int32)])[:20],
        item_stamps=torch.cat([row_stamps[1], torch.zeros(64, dtype=torch.int32)])[:22],
        rates=guarded.like(adam_triton.step_rates(epoch * updates + 1, updates, 0.01)),
        counters=torch.tensor([0, (epoch + 1) * updates]),
    ).with_arguments(
        nodes_ptr=guarded.like(replay_nodes()), decays_ptr=guarded.like(lazy_adam_triton.decays(updates))
    )()
    *vectors, bias = zip(state[0], oracle[0], start, strict=True)
    assert max(error_of_rows(*table) for table in vectors) < 1e-6
    result, right, before = bias  # a number may hardly move, and be mostly rounding
    assert error(result.double() - before, right - before) < 1e-6
    for result, right in zip((*state[2], *state[3]), (*oracle[2], *oracle[3]), strict=True):
        torch.testing.assert_close(result.double(), right, rtol=3e-6, atol=1e-30)
    for result, before in zip(state[0], start, strict=True):
        assert result[-1].equal(before[-1])
    assert not any(bool(gradient.any()) for gradient in state[1])


def error_of_rows(result, right, start):
    """The largest error of a row's displacement, relative to that."""
    moved = (right - start.double()).view(len(start), -1).norm(dim=1)
    return float(((result.double() - right).view(len(start), -1).norm(dim=1) / moved.clamp_min(1e-300)).max())


def lazy_example(num_steps, batch_size):
    """Three users and five items have nearly all positives; the rare ones wait; some are never used."""
    generator = torch.Generator().manual_seed(5)
    num_rows = num_steps * batch_size - 1
    users, items = (torch.randint(n, (num_rows,), generator=generator, dtype=torch.int32) for n in (3, 5))
    rare = torch.randperm(num_rows, generator=generator)[:10]
    users[rare] = 3 + torch.arange(10, dtype=torch.int32) // 2
    items[rare] = 40 + torch.arange(10, dtype=torch.int32) // 2
    # Nobody draws the items from 40 on, and user 7 has touched everything.
    pairs = torch.tensor([(u, i) for u in range(10) for i in (range(47) if u == 7 else range(40, 47))]).int()
    return Interactions(users, items), KnownPositives.from_pairs(pairs[:, 0], pairs[:, 1], 10, 47)


@pytest.fixture
def one_lazy_table(monkeypatch, request):
    """The users or the items are lazy, and the other table is dense."""
    lazy = LazyTables(request.param == "users", request.param == "items")
    monkeypatch.setattr(StepSettings, "lazy_tables", lambda *_: lazy)
    return lazy


def check_lazy_steps(
    guarded,
    num_steps,
    calls,
    *,
    num_negatives=2,
    bias=True,
    deterministic=False,
    first_epoch=1,
    proposal="uniform",
    pool=0,
):
    """Against dense Adam in float64, through an epoch; its last batch is short."""
    interactions, known = lazy_example(num_steps, 4)
    settings = StepSettings(
        0.01,
        4,
        seed=7,
        loss=both_l2(0.01),
        negatives=NegativeSettings(proposal, num_negatives, pool),
        optimiser="lazy_adam",
        deterministic=deterministic,
    )
    tables = make_tables(5, num_users=10, num_items=47, bias=bias)
    oracle, state = TrainState.start(doubled(tables)), start_guarded(guarded, tables)
    steps = steps_of(steps_triton, state, interactions, known, settings)
    dense = steps_of(steps_reference, oracle, interactions, known, replace(settings, optimiser="adam"))
    first = first_epoch * num_steps
    for count in calls:
        assert float(steps.run(first, count)) == pytest.approx(float(dense.run(first, count)), rel=1e-6)
        assert not any(bool(gradient.any()) for gradient in state.gradients)
        first += count
    for result, right, before in zip(state.parameters, oracle.parameters, tables, strict=True):
        assert error(result.double() - before, right - before) < 5e-6
    for result, right in zip(
        (*state.moments_1, *state.moments_2), (*oracle.moments_1, *oracle.moments_2), strict=True
    ):
        assert error(result, right) < 1e-5
    for table, before, unused in zip(state.parameters, tables, (8, 45, 45), strict=bias):
        assert table[unused:].equal(before[unused:])
        assert not table[:3].equal(before[:3])


def test_lazy_steps(guarded, monkeypatch):
    # Two positives a program, so that rows are wanted by several programs.
    monkeypatch.setitem(triton_tiles.TILES, 8, triton_tiles.Tile(2, 1))
    check_lazy_steps(guarded, 6, (4, 2))


@pytest.mark.usefixtures("large_programs")
@pytest.mark.parametrize(
    ("num_negatives", "bias", "deterministic"),
    [(0, True, False), pytest.param(5, False, False, marks=pytest.mark.slow), (2, True, True)],
)
def test_lazy_steps_of_other_kinds(guarded, num_negatives, bias, deterministic):
    check_lazy_steps(guarded, 5, (5,), num_negatives=num_negatives, bias=bias, deterministic=deterministic)


@pytest.mark.usefixtures("large_programs")
def test_lazy_steps_of_hard_negatives(guarded):
    # Rows of the pool are read whether they are kept or not.
    check_lazy_steps(guarded, 6, (6,), num_negatives=1, proposal="popularity", pool=5)


@pytest.mark.usefixtures("large_programs")
@pytest.mark.parametrize("one_lazy_table", ["users", "items"], indirect=True)
@pytest.mark.parametrize(
    ("calls", "num_negatives", "bias", "deterministic"),
    [
        ((4, 1), 2, True, False),
        pytest.param((5,), 5, False, False, marks=pytest.mark.slow),
        ((1, 4), 0, True, True),
    ],
)
def test_steps_of_one_lazy_table(
    guarded, monkeypatch, one_lazy_table, calls, num_negatives, bias, deterministic
):
    if num_negatives == 2:
        # Two positives per program, so that rows are wanted by several programs.
        monkeypatch.setitem(triton_tiles.TILES, 8, triton_tiles.Tile(2, 1))
    launched = []
    original = Launch.__call__
    monkeypatch.setattr(
        Launch, "__call__", lambda self: launched.append(self.kernel.fn.__name__) or original(self)
    )
    check_lazy_steps(guarded, 5, calls, num_negatives=num_negatives, bias=bias, deterministic=deterministic)
    assert launched.count("lazy_update_kernel") == launched.count("own_negatives_kernel") == 5
    assert launched.count("catch_up_kernel") == len(calls)
    assert "adam_kernel" not in launched


@pytest.mark.slow
@pytest.mark.usefixtures("large_programs")
def test_many_lazy_steps(guarded):
    check_lazy_steps(guarded, 300, (300,), first_epoch=0)


@pytest.mark.slow
@pytest.mark.usefixtures("large_programs")
@pytest.mark.parametrize("one_lazy_table", ["users"], indirect=True)
def test_many_steps_of_one_lazy_table(guarded, one_lazy_table):
    check_lazy_steps(guarded, 300, (299, 1))


# ---- more shapes


@pytest.mark.slow
@pytest.mark.usefixtures("large_programs")
@pytest.mark.parametrize("dim", [2, 64, 100, 128, 256, 512])
@pytest.mark.parametrize("exclude", [None, "bitmaps", "filters"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_of_more_dims(guarded, monkeypatch, dim, exclude, deterministic):
    tables = make_tables(dim)
    negatives = uniform(10, tables, excluded(exclude, monkeypatch))
    check_gradients(guarded, tables, make_batch(37), negatives, both_l2(0.2), deterministic=deterministic)


@pytest.mark.slow
@pytest.mark.usefixtures("large_programs")
def test_gradients_of_many_negatives(guarded):
    tables = make_tables(8)
    negatives = uniform(101, tables, known_positives())
    check_gradients(guarded, tables, make_batch(17), negatives, both_l2(0.1), bound=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [4, 64, 512])
def test_programs_of_their_real_size(guarded, dim):
    tables = make_tables(dim)
    check_gradients(guarded, tables, make_batch(11), uniform(5, tables, known_positives()), both_l2(0.1))
