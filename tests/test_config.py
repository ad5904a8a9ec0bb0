"""The configuration: ranges, presets, and its json."""

import dataclasses

import pytest

from fasttower.config import PRESETS, Config
from fasttower.errors import FastTowerError
from fasttower_kernels.settings import NegativeSettings


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", -1),
        ("embedding_dim", 0),
        ("embedding_dim", 513),
        ("num_negatives", -1),
        ("batch_size", 0),
        ("optimiser", "sgd"),
        ("epochs", 0),
        ("threads", 0),
        ("l2", -0.1),
        ("l2", float("nan")),
        ("l2", (0.1, 0.03)),
        ("search", "deep"),
        ("search", 0.0),
        ("prefer", "novelty"),
        ("learning_rate", 0.0),
        ("learning_rate", float("inf")),
        ("init_scale", -1.0),
        ("test_fraction", -0.1),
        ("test_fraction", float("nan")),
        ("test_fraction", 1.0),
        ("valid_fraction", 1.0),
        ("valid_fraction", -0.1),
        ("min_rating", float("nan")),
        ("min_user_interactions", -1),
        ("k", 0),
        ("k", 10_001),
        ("seeds", 0),
        ("split", "by-hand"),
        ("device", "tpu"),
        ("backend", "cuda"),
        ("loss_scale", "batch"),
        ("embedding_dim", 16.5),
        ("epochs", True),
        ("seed", 1.5),
        ("item_bias", "no"),
        ("l2", "0.1"),
        ("data", 3),
    ],
)
def test_values_out_of_range_are_named_by_their_flag(field, value):
    with pytest.raises(FastTowerError, match="--" + field.replace("_", "-")):
        Config(**{field: value})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"temperature": 0.0}, "--temperature is 0"),
        ({"temperature": float("inf")}, "--temperature is inf"),
        ({"calibration": -0.1}, "--calibration is -0.1"),
        ({"item_l2": -1.0}, "--item-l2 is -1"),
        ({"bias_l2": float("nan")}, "--bias-l2 is nan"),
        ({"popularity_power": float("inf")}, "--popularity-power is inf"),
        ({"popularity_power": -1.0}, "--popularity-power is -1"),
        ({"block_size": 0}, "--block-size is 0"),
        ({"block_size": 1 << 15}, "--block-size is 32768"),
        ({"negative_pool": 9}, "--negative-pool is 9"),
        ({"negative_pool": -1}, "--negative-pool is -1"),
        (
            {"negative_pool": 50, "negatives": "shared"},
            "--negative-pool is 50; expected 0 with negatives that a block shares",
        ),
        ({"loss": "hinge"}, "--loss is 'hinge'; expected one of bce, gbce, bpr, softmax"),
        ({"negatives": "random"}, "--negatives is 'random'; expected one of uniform"),
        ({"similarity": "angle"}, "--similarity is 'angle'; expected one of dot, cosine"),
        ({"loss": "gbce", "negatives": "in-batch"}, "gbce .* not in-batch .*choose uniform or shared"),
        ({"loss": "gbce", "negatives": "popularity"}, "gbce .* not popularity .*choose uniform or shared"),
        ({"loss_scale": "pairs", "negatives": "mixed"}, "pairs .* mixed .*choose loss scale positives"),
    ],
)
def test_losses_and_negatives(fields, said):
    with pytest.raises(FastTowerError, match=said):
        Config(**fields)


def test_settings_of_the_steps():
    config = Config(
        loss="softmax", similarity="cosine", temperature=0.4, l2=0.1, bias_l2=0.3, negatives="popularity"
    )
    config = config.resolved(1000, 100)
    loss = config.loss_settings
    assert (loss.name, loss.similarity, loss.temperature) == ("softmax", "cosine", 0.4)
    assert (loss.user_l2, loss.item_l2, loss.bias_l2) == (0.1, 0.1, 0.3)
    assert dataclasses.replace(config, item_l2=0.0).loss_settings.item_l2 == 0
    assert config.negative_settings == NegativeSettings("popularity", 10, 0, 0.75, 256)


def test_of_several_l2_in_an_older_file_none_is_given():
    assert Config.from_json({"l2": [0.06, 0.03, 0.1]}).l2 is None
    assert Config.from_json({"l2": [0.06]}).l2 == 0.06


def test_the_last_of_several_seeds_is_in_range():
    with pytest.raises(FastTowerError, match="--seeds"):
        Config(seed=2**63 - 1, seeds=2)


def test_several_seeds_need_a_test_part_to_report_on():
    with pytest.raises(FastTowerError, match=r"--seeds is 2; expected 1 without a test part \(--test-frac"):
        Config(test_fraction=0, seeds=2)
    assert Config(test_fraction=0, test_data="later.csv", seeds=2).seeds == 2


def test_json_brings_back_what_was_asked_for():
    config = Config(device="cuda", backend="auto", embedding_dim=64, data="ml-1m")
    values = config.to_json(device="cpu", backend="numba")
    assert (values["device_requested"], values["device"]) == ("cuda", "cpu")
    assert Config.from_json(values) == config


@pytest.mark.parametrize(
    ("rows", "batch_size"),
    [(1, 256), (25_000, 256), (80_000, 1024), (669_182, 8192), (16_000_000, 65_536), (10**10, 65_536)],
)
def test_what_is_left_open_is_filled_in(rows, batch_size):
    config = Config(embedding_dim=64).resolved(rows, 100)
    assert config.batch_size == batch_size
    assert config.init_scale == pytest.approx(0.0125)
    assert (config.loss, config.negatives, config.similarity, config.l2) == ("bce", "uniform", "dot", 0.06)
    asked = Config(batch_size=3, init_scale=2.0, loss="bpr", l2=0.5, embedding_dim=7, epochs=3)
    given = asked.given
    assert given.items() <= vars(asked.resolved(rows, 100)).items()
    assert config.resolved(1, 1) == config


def test_what_is_chosen_does_not_go_over_what_is_given():
    resolved = Config(embedding_dim=8).resolved(1000, 100, embedding_dim=64, l2=0.5)
    assert (resolved.embedding_dim, resolved.l2) == (8, 0.5)


def test_batches_are_smaller_where_negatives_are_shared():
    sizes = [Config(loss=loss).resolved(669_182, 3_500).batch_size for loss in ("bce", "softmax")]
    assert sizes == [8192, 2048]


def test_json_with_an_unknown_field():
    with pytest.raises(FastTowerError, match="lerning_rate"):
        Config.from_json({"lerning_rate": 1})


def test_json_fields_go_over_the_base():
    assert Config.from_json({"epochs": 3}, PRESETS["notebook"]).batch_size == 1024


def test_a_preset_is_no_label_that_can_be_put_on_other_settings():
    assert Config() == PRESETS["default"]
    with pytest.raises(TypeError, match="preset"):
        dataclasses.replace(Config(), preset="notebook")
    # 32 and 0.06 are defaults; they are given all the same.
    changed = dataclasses.replace(PRESETS["notebook"], embedding_dim=32, l2=0.06)
    assert (changed.embedding_dim, changed.l2, changed.batch_size) == (32, 0.06, 1024)


def test_json_that_names_a_preset():
    expected = dataclasses.replace(PRESETS["notebook"], epochs=3)
    for base in (None, PRESETS["default"], PRESETS["notebook"]):
        assert Config.from_json({"preset": "notebook", "epochs": 3}, base) == expected
    with pytest.raises(FastTowerError, match="the preset is 'fast'; expected one of default, notebook"):
        Config.from_json({"preset": "fast"})
    whole = dataclasses.replace(expected, embedding_dim=32)
    assert Config.from_json(whole.to_json(device="cpu", backend="numba"), PRESETS["default"]) == whole


def test_the_notebook_preset_is_the_notebooks_protocol():
    preset = PRESETS["notebook"]
    expected = {
        "embedding_dim": 16,
        "init_scale": 1.0,
        "item_bias": False,
        "exclude_known_positives": False,
        "l2": 0.0,
        "learning_rate": 1e-3,
        "batch_size": 1024,
        "num_negatives": 10,
        "epochs": 30,
        "min_user_interactions": 20,
        "test_fraction": 0.2,
        "test_min_rating": 4,
        "valid_fraction": 0,
        "loss_scale": "pairs",
    }
    assert {name: getattr(preset, name) for name in expected} == expected


def test_runs_from_before_the_spectral_start_began_at_normal_vectors():
    assert Config.from_json({"format": 3}).initial_vectors == "normal"
    assert Config.from_json({"format": 4, "initial_vectors": "spectral"}).initial_vectors == "spectral"
    assert Config.from_json({}).initial_vectors == "spectral"
