"""The configuration: every setting of a run, its meaning and its default, once.

The command line is made from these dataclasses, so a field's docstring is also its help. Each stage is handed
the part that it needs (`DataConfig`, `TrainingConfig`); `Config` is the whole.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from fasttower.errors import FastTowerError, listed, quoted, reason, shown
from fasttower.training.families import OWN_NEGATIVES, Family, families
from fasttower.typed import in_words, is_of
from fasttower_kernels.settings import (
    MAX_BLOCK_SIZE,
    Backend,
    LossName,
    LossScale,
    LossSettings,
    NegativeSettings,
    Optimiser,
    Proposal,
    Similarity,
    TableDtype,
    check_together,
)

Split = Literal["time", "random", "leave-last"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Preset = Literal["default", "notebook"]
InitialVectors = Literal["spectral", "normal"]
Search = Literal["none", "quick", "thorough"]
Preference = Literal["accuracy", "balanced", "coverage"]

SMALL_CATALOGUE = 10_000
"""Items up to which 32 dimensions do."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the interactions come from, and how they are filtered and split."""

    data: str = "synthetic-1m"
    """A name (ml-100k, ml-1m, ml-10m, ml-20m, ml-25m, ml-32m, ml-latest-small, synthetic-100k, synthetic-1m,
    synthetic-20m) or the path of a zip, folder, csv, tsv, dat, inter or parquet file."""
    data_root: Path | None = None
    """Folder that holds the named data sets; without it $FASTTOWER_DATA, then the cache folder."""
    user_column: str | None = None
    """Column of user ids; found from the known layouts if not given."""
    item_column: str | None = None
    """Column of item ids; found from the known layouts if not given."""
    rating_column: str | None = None
    """Column of ratings; where there is none, every row is a positive."""
    timestamp_column: str | None = None
    """Column of timestamps: seconds, milliseconds, microseconds or datetimes."""
    min_rating: float | None = None
    """Keep interactions rated at least this."""
    min_user_interactions: int = 0
    """Keep users with at least this many interactions."""
    min_item_interactions: int = 0
    """Keep items with at least this many interactions."""
    split: Split = "time"
    """How test and validation rows are chosen: the end of the time line, at random, or each user's last."""
    test_fraction: float = 0.2
    """Share of the interactions that becomes the test part (time and random splits); 0 for none, whatever the
    split: all rows are trained on, and no metrics are reported."""
    test_min_rating: float | None = None
    """Keep test and validation interactions rated at least this."""
    valid_fraction: float = 0.1
    """Share of the interactions before the test cut that becomes the validation part; 0 for none."""
    valid_data: str | None = None
    """A file of validation interactions, instead of splitting."""
    test_data: str | None = None
    """A file of test interactions, instead of splitting."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        _check_types(self)
        for name in ("min_user_interactions", "min_item_interactions"):
            _check(self, name, getattr(self, name) >= 0, "0 or more")
        for name in ("min_rating", "test_min_rating"):
            value = getattr(self, name)
            _check(self, name, value is None or math.isfinite(value), "a finite number")
        _check(self, "test_fraction", 0 <= self.test_fraction < 1, "a number from 0 to below 1")
        _check(self, "valid_fraction", 0 <= self.valid_fraction < 1, "a number from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The model, its loss, its optimiser and the schedule.

    What is None is left open: the search chooses it by the validation part, or a rule fills it in.
    """

    seed: int = 0
    """Seed of every draw, 0 <= seed < 2**63: the same seed gives the same run."""
    seeds: int = 1
    """Train this many times, with seed, seed + 1, ...; report means and deviations, keep the first model."""
    search: Search | Annotated[float, "seconds above 0"] = "quick"
    """How much is tried of what is left open below, by the validation part: quick; thorough, a wider grid; a
    number of seconds, thorough until they are over, compilation included; or none, the standard settings, of
    which only the epochs are chosen, if they are not given."""
    prefer: Preference = "balanced"
    """Which of the settings tried is chosen: the most accurate one (accuracy), or the one with the largest
    coverage among those within one (balanced) or two (coverage) standard errors of it."""
    embedding_dim: int | None = None
    """Dimensions of the user and item vectors, 1 to 512; if not given, 32 for up to 10,000 items, else
    128, and twice as many in a thorough search."""
    item_bias: bool = True
    """Add a learned bias per item to the logit."""
    initial_vectors: InitialVectors = "spectral"
    """Where training begins: normal draws, or draws around the leading singular vectors of the interactions
    (spectral), from where sparse data take half as many epochs."""
    init_scale: float | None = None
    """Standard deviation of the draws for the initial vectors, to which the length of spectral ones is in
    proportion; 0.1 / sqrt(embedding_dim) if not given."""
    loss: LossName | None = None
    """Loss of a positive and its negatives: binary cross-entropy, gbce (its calibrated form), bpr (pairwise)
    or sampled softmax; if not given, the search tries bce and softmax."""
    calibration: float = 0.75
    """t of --loss gbce, from 0 (bce) to 1 (calibrated for the share of items that is drawn)."""
    similarity: Similarity | None = None
    """Of a user's and an item's vector in the logit: their dot product, or their cosine over a
    temperature; searched for if not given."""
    temperature: float | None = None
    """What --similarity cosine is divided by: lower is sharper; searched for if not given."""
    negatives: Proposal | None = None
    """uniform and popularity draw for each positive. The others score a block of positives against one list:
    shared draws it, in-batch takes the items of the block, mixed takes both. Searched for if not given."""
    num_negatives: int = 10
    """Negatives drawn for each positive (uniform, popularity) or for each block (shared, mixed)."""
    negative_pool: int = 0
    """Hard negatives: draw so many for each positive and keep those with the largest logits; 0 for none."""
    popularity_power: float = 0.75
    """--negatives popularity draws an item in proportion to its count to this power."""
    block_size: int = 256
    """Positives that share a list of negatives."""
    exclude_known_positives: bool = True
    """Draw negatives from the items that the user has not touched, exactly."""
    l2: float | None = None
    """L2 on the vectors of a positive and its negatives, added to the loss of each positive. If not given,
    searched for with --similarity dot, and 0 with cosine."""
    item_l2: float | None = None
    """L2 on the vectors of items; as --l2, which then is for users only, if not given."""
    bias_l2: float = 0.0
    """L2 on the item biases."""
    loss_scale: LossScale = "positives"
    """The batch's loss is divided by its positives, or by its positive and negative pairs."""
    learning_rate: float = 0.01
    """Adam's step size."""
    optimiser: Optimiser = "auto"
    """adam passes over whole tables in each step; lazy_adam, equal to it but for rounding, over the rows in
    use; auto takes the faster one by the sizes of the tables and of a batch (adam with backend torch)."""
    table_dtype: TableDtype = "float32"
    """Type of the user and item vectors as the loss reads them. bfloat16 reads half the bytes on a GPU;
    rounding them puts a relative error of 0.002 into gradients. All else stays float32, the tables that Adam
    updates too. It takes 2 bytes a parameter more, and backend triton or torch."""
    batch_size: int | None = None
    """Positives in a batch; if not given, the power of two nearest to a hundredth of the interactions before
    the test cut, or to a three-hundredth with negatives that a block shares, from 256 to 65,536."""
    epochs: int | None = None
    """Passes over the training part: with --search none exactly so many, else at most so many, of which the
    validation part chooses. If not given, at most 32 (64 in a thorough search), or 30 without one."""
    refit: bool = True
    """After the validation part has chosen the epoch, train again with its rows included."""
    k: int = 10
    """Recommendations per user, and the cutoff of the metrics."""
    filter_seen: bool = True
    """Leave the items that a user has already touched out of the recommendations."""
    backend: Backend = "auto"
    """Implementation of the training step: auto takes the fastest that the device allows."""
    threads: int | None = None
    """CPU threads; all cores if not given."""
    deterministic: bool = False
    """Repeat bit for bit on a GPU too, which is slower; on a CPU runs do, for their number of threads."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        _check_types(self)
        _check(self, "seed", 0 <= self.seed < 2**63, "a whole number from 0 to 2**63 - 1")
        _check(
            self, "seeds", 1 <= self.seeds <= 2**63 - self.seed, "1 or more, and the last seed below 2**63"
        )
        _check(
            self, "embedding_dim", self.embedding_dim is None or 1 <= self.embedding_dim <= 512, "1 to 512"
        )
        if not isinstance(self.search, str):
            _check(self, "search", 0 < self.search < math.inf, "none, quick, thorough or seconds above 0")
        _check(self, "num_negatives", 0 <= self.num_negatives <= 100_000, "0 to 100,000")
        _check(self, "epochs", self.epochs is None or self.epochs >= 1, "1 or more")
        for name in ("batch_size", "threads"):
            value = getattr(self, name)
            _check(self, name, value is None or 1 <= value < 2**31, "1 to 2,147,483,647")
        for name in ("l2", "item_l2", "bias_l2", "popularity_power"):
            value = getattr(self, name)
            _check(self, name, value is None or 0 <= value < math.inf, "a finite number, 0 or more")
        temperature = self.temperature
        _check(
            self, "temperature", temperature is None or 0 < temperature < math.inf, "a finite number above 0"
        )
        if not isinstance(self, ResolvedTrainingConfig):
            expected = "none with --similarity dot, which has no temperature"
            _check(self, "temperature", temperature is None or self.similarity != "dot", expected)
        _check(self, "calibration", 0 <= self.calibration <= 1, "a number from 0 to 1")
        _check(self, "block_size", 1 <= self.block_size <= MAX_BLOCK_SIZE, f"1 to {MAX_BLOCK_SIZE:,}")
        pool, shared = self.negative_pool, self.negatives not in (None, "uniform", "popularity")
        _check(self, "negative_pool", not (pool and shared), "0 with negatives that a block shares")
        least = max(self.num_negatives, 1)
        expected = f"0, or at least the {least} that are kept (--num-negatives), at most 100,000"
        _check(self, "negative_pool", pool == 0 or least <= pool <= 100_000, expected)
        # Adam divides it by 1 - beta, which must not overflow float32.
        _check(self, "learning_rate", 0 < self.learning_rate <= 1e30, "a number above 0, at most 1e30")
        scale = self.init_scale
        _check(self, "init_scale", scale is None or 0 <= scale < math.inf, "a finite number, 0 or more")
        _check(self, "k", 1 <= self.k <= 10_000, "1 to 10,000")
        if not isinstance(self, ResolvedTrainingConfig):
            self.resolved(0, 0)  # which checks what goes together

    @property
    def families(self) -> tuple[Family, ...]:
        """The families of settings that a search tries first, of those that what is given leaves open."""
        return families(self.given)

    @property
    def given(self) -> dict[str, Any]:
        """The fields that are not left open."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if value is not None}

    def resolved(self, num_rows: int, num_items: int, **chosen: object) -> ResolvedTrainingConfig:
        """The same configuration with what was left open filled in.

        Args:
            num_rows: interactions before the test cut.
            num_items: items before the test cut.
            **chosen: fields that were left open; a rule fills in the others.
        """
        return _filled_in(ResolvedTrainingConfig, self, num_rows, num_items, chosen)


@dataclass(frozen=True, kw_only=True)
class ResolvedTrainingConfig(TrainingConfig):
    """A training configuration in which nothing is left open: what the trainer reads."""

    embedding_dim: int
    init_scale: float
    loss: LossName
    similarity: Similarity
    temperature: float
    negatives: Proposal
    l2: float
    batch_size: int
    epochs: int

    def __post_init__(self) -> None:
        """Check the ranges, and that the loss and the negatives go together."""
        super().__post_init__()
        check_together(self.loss_settings, self.negative_settings)

    @property
    def loss_settings(self) -> LossSettings:
        """The loss as the training step takes it."""
        return LossSettings(
            self.loss,
            self.calibration,
            self.similarity,
            self.temperature,
            user_l2=self.l2,
            item_l2=self.l2 if self.item_l2 is None else self.item_l2,
            bias_l2=self.bias_l2,
            scale=self.loss_scale,
        )

    @property
    def negative_settings(self) -> NegativeSettings:
        """The negatives as the training step takes them."""
        return NegativeSettings(
            self.negatives, self.num_negatives, self.negative_pool, self.popularity_power, self.block_size
        )


Resolved = TypeVar("Resolved", bound=ResolvedTrainingConfig)


def _filled_in(
    kind: type[Resolved],
    config: TrainingConfig,
    num_rows: int,
    num_items: int,
    chosen: Mapping[str, object],
) -> Resolved:
    """The configuration with the fields that depend on others or on the sizes filled in."""
    fields = {**chosen, **config.given}
    for name, value in config.families[0]._asdict().items():
        fields.setdefault(name, value)
    shared = fields["negatives"] not in OWN_NEGATIVES
    fields.setdefault("l2", 0.0 if fields["similarity"] == "cosine" else 0.06)
    fields.setdefault("temperature", 0.2)
    fields.setdefault("embedding_dim", 32 if num_items <= SMALL_CATALOGUE else 128)
    fields.setdefault("init_scale", 0.1 / math.sqrt(fields["embedding_dim"]))
    batch = 2 ** round(math.log2(max(num_rows, 1) / (300 if shared else 100)))
    fields.setdefault("batch_size", min(max(batch, 256), 65_536))
    fields.setdefault("epochs", 30)
    names = [field.name for field in dataclasses.fields(kind)]
    return kind(**{name: fields[name] for name in names if name in fields})


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig, DataConfig):
    """A whole run: data, model, training, recommendations.

    Each field is a flag of ``python -m fasttower.train --help``, which says what it does:
    ``Config(embedding_dim=16)`` is ``--embedding-dim 16``.
    """

    device: Device = "auto"
    """Where to train: auto takes CUDA, then MPS, then the CPU."""
    strict_device: bool = False
    """Fail where --device cuda cannot be met, instead of going on on the CPU."""

    def __post_init__(self) -> None:
        """Check the ranges of every part."""
        TrainingConfig.__post_init__(self)
        DataConfig.__post_init__(self)
        if self.test_fraction == 0 and not self.test_data:
            _check(self, "seeds", self.seeds == 1, "1 without a test part (--test-fraction 0) to report on")

    def resolved(self, num_rows: int, num_items: int, **chosen: object) -> ResolvedConfig:
        """See `TrainingConfig.resolved`."""
        return _filled_in(ResolvedConfig, self, num_rows, num_items, chosen)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], base: Config | None = None) -> Config:
        """A configuration from the fields of a ``config.json``.

        Those that it lacks are taken from the preset that it names, or else from ``base``.

        Raises:
            FastTowerError: a field that no configuration has, or a value out of its range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        merged = dict(values)
        # The format is of the run that the file belongs to. What it does not read has a value there too.
        if merged.pop("format", None) is not None:
            merged.setdefault("initial_vectors", "normal")  # before there were others
            if merged.get("similarity") == "dot":
                merged.pop("temperature", None)
        # A run's file says what was used beside what was asked for; what was asked for is the configuration.
        for name in ("device", "backend"):
            if (requested := merged.pop(f"{name}_requested", None)) is not None:
                merged[name] = requested
        if (preset := merged.pop("preset", None)) is not None:
            if not is_of(preset, Preset):
                raise FastTowerError(f"the preset is {quoted(preset)}; expected {in_words(Preset)}.")
            base = PRESETS[preset]
        if unknown := sorted(merged.keys() - known):
            nearest = [
                near for name in unknown[:1] for near in get_close_matches(shown(name), known, 1, 0.75)
            ]
            hint = f"did you mean {nearest[0]}?" if nearest else "python -m fasttower.train --help has all."
            raise FastTowerError(f"the configuration has no field {listed(unknown, 3)}; {hint}")
        try:
            if isinstance(merged.get("data_root"), str):
                merged["data_root"] = Path(merged["data_root"])
            if isinstance(merged.get("l2"), list):  # once there were several, of which one was chosen
                merged["l2"] = merged["l2"][0] if len(merged["l2"]) == 1 else None
            return cls(**merged) if base is None else dataclasses.replace(base, **merged)
        except TypeError as error:
            raise FastTowerError(
                f"the configuration has a value of the wrong type: {reason(error)}."
            ) from error

    def to_json(self, *, device: str, backend: str) -> dict[str, Any]:
        """The fields of a ``config.json``: what was asked for, and the device and backend that were used."""
        return {
            **asdict(self),
            "data_root": None if self.data_root is None else str(self.data_root),
            "device_requested": self.device,
            "device": device,
            "backend_requested": self.backend,
            "backend": backend,
        }


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(ResolvedTrainingConfig, Config):
    """The configuration of a run that was trained, in which nothing is left open."""


def _check_types(config: DataConfig | TrainingConfig) -> None:
    """Check every field against its annotation, so that nothing of a wrong type is met hours later."""
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        _check(config, name, is_of(value, hint), in_words(hint))
        if isinstance(value, str | Path):
            text = str(value)
            readable = "\0" not in text and text.encode(errors="replace").decode() == text
            _check(config, name, readable and text != "", "some text, of whole characters and without NUL")


def _check(config: object, name: str, holds: bool, expected: str) -> None:
    if not holds:
        flag = "--" + name.replace("_", "-")
        raise FastTowerError(f"{flag} is {quoted(getattr(config, name))}; expected {expected}.")


PRESETS: dict[Preset, Config] = {
    "default": Config(),
    # The published notebook's protocol, without its mistake of training on the test part.
    "notebook": Config(
        min_user_interactions=20,
        test_fraction=0.2,
        test_min_rating=4,
        valid_fraction=0,
        embedding_dim=16,
        item_bias=False,
        initial_vectors="normal",
        init_scale=1.0,
        num_negatives=10,
        exclude_known_positives=False,
        loss="bce",
        similarity="dot",
        negatives="uniform",
        l2=0.0,
        loss_scale="pairs",
        learning_rate=1e-3,
        batch_size=1024,
        epochs=30,
    ),
}
"""Configurations to begin with; ``dataclasses.replace(PRESETS["notebook"], epochs=10)`` changes one."""
