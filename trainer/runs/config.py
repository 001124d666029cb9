"""What a run is: one frozen dataclass of settings, checked where they are made.

settings.py resolves it from its sources. It is printed, stored as JSON in the run folder and in every checkpoint, and
compared at a resume.
"""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, NewType

from ...cache_specs.errors import UsageError, at_least, nearest
from ..diffusion.interpolant import Interpolant
from ..objectives.alignment import AlignmentConfig
from ..objectives.choose import objective_class, other_sections, settings_of
from ..objectives.internal import InternalConfig
from ..objectives.jit import JiTMethodConfig
from ..objectives.meanflow import MeanFlowConfig
from ..objectives.reg import REGConfig
from ..objectives.sra import SRAConfig
from ..reading.order import DEFAULT_WINDOW, Shuffle
from ..sampling.samplers import SamplerConfig, SamplerName, check_sampler
from .optimizer import OptimizerConfig

Bytes = NewType("Bytes", int)  # may be written as 512MB or 2GiB
PRECISIONS = ("auto", "fp32", "bf16")
BY_ENCODER = ("alignment.proj_coeff", "alignment.encoder_depth")  # one for all, or one an encoder
Compile = Literal["auto", True, False]


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """Sample grids drawn from the EMA while training; `every` 0 draws none."""

    every: int = 0  # steps between two sheets; 0: none
    num: int = 16  # samples on a sheet
    sampler: SamplerName = "euler"  # as repa-sample --sampler
    steps: int = 50  # of the sampler
    cfg_scale: float = 1.0  # of classifier-free guidance; 1: none
    autoencoder_weights: str | None = None  # local weights of the decoder; null: the hub's

    def __post_init__(self) -> None:
        at_least("grid.every", self.every, 0)
        at_least("grid.num", self.num, 1)
        self.sampler_config()  # checks them

    def sampler_config(self) -> SamplerConfig:
        """Return how its samples are drawn."""
        return SamplerConfig(sampler=self.sampler, steps=self.steps, cfg_scale=self.cfg_scale)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Comparisons of the EMA's samples with the data while training; `every` 0 makes none."""

    every: int = 0  # steps between two comparisons; 0: none
    num: int = 5000  # samples, more than any judge is wide
    num_real: int = 50_000  # images of the cache, or all of them where there are fewer
    cache: str | None = None  # whose images samples are compared with, as of held-out ones; null: the run's own
    encoders: tuple[str, ...] = ()  # judges; empty: the run's own, or the only one in the cache
    pooling: Literal["mean", "cls"] = "mean"  # of patch tokens, or the class token
    neighbours: int = 3  # of precision and recall
    sampler: SamplerName = "euler"  # as repa-sample --sampler
    steps: int = 50  # of the sampler
    cfg_scale: float = 1.0  # of classifier-free guidance; 1: none
    batch_size: int = 64  # samples drawn at a time
    encoder_weights: tuple[str, ...] = ()  # local weights: FILE, of several judges NAME=FILE; empty: the hub's
    autoencoder_weights: str | None = None  # local weights of the decoder; null: the hub's
    inception_weights: str | None = None  # for FID and Inception score by torch-fidelity; null: neither
    inception_data: str | None = None  # the images of FID, as in repa-cache build --data; null: Inception score only

    def __post_init__(self) -> None:
        at_least("evaluation.every", self.every, 0)
        for name in ("num", "num_real", "neighbours", "batch_size"):
            at_least(f"evaluation.{name}", getattr(self, name), 1)
        self.sampler_config()  # checks them

    def sampler_config(self) -> SamplerConfig:
        """Return how its samples are drawn."""
        return SamplerConfig(sampler=self.sampler, steps=self.steps, cfg_scale=self.cfg_scale)


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """Encoders computed at each step from the images, to compare with a run that reads them from the cache."""

    data: str | None = None  # the images, as in repa-cache build --data; null: tokens are read
    weights: tuple[str, ...] = ()  # NAME=FILE of local weights; else the hub's


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Loss on samples that are never trained on, with the same noise, times and labels each time; `every` steps."""

    fraction: float = 0.0  # share of the cache's samples that is held out; 0: none
    cache: str | None = None  # or another cache, of the same networks and classes
    every: int = 1000  # steps between two validations; the run's last step has one, too
    num: int = 4096  # samples of them, or all where there are fewer

    def __post_init__(self) -> None:
        for name in ("every", "num"):
            at_least(f"validation.{name}", getattr(self, name), 1)
        if not 0 <= self.fraction < 1:
            raise UsageError(f"validation.fraction is {self.fraction}; expected a share from 0 to below 1")
        if self.cache == "":  # as of a variable that is not set
            raise UsageError("validation.cache is empty; name a cache, or leave it out")
        if self.fraction and self.cache is not None:
            raise UsageError(
                f"validation.fraction is {self.fraction} and validation.cache {self.cache}; choose one of them"
            )

    @property
    def acts(self) -> bool:
        """Whether anything is validated."""
        return self.fraction > 0 or self.cache is not None


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run. Defaults are SiT's and REPA's published ones."""

    recipe: str  # which row of recipes.yaml the settings begin from
    objective: str = "velocity"  # the method behind the recipe
    cache: str  # folder or URL of the cache
    out: str  # folder of the run
    model: str  # SiT-{Ti,S,B,L,XL}/patch, JiT-{Ti,B,L,H}/patch
    autoencoder: str | None = None  # null: the only one in the cache
    encoders: tuple[str, ...] = ()  # empty: the only one in the cache, or none with alignment.projector=none
    steps: int = 400_000  # optimizer steps in all
    batch_size: int = 256  # samples an optimizer step, over all ranks and micro-batches
    accumulation: int = 1  # micro-batches an optimizer step
    init: str | None = None  # run or checkpoint whose averaged weights training begins with; null: drawn from the seed
    seed: int = 0  # of weights, order and noise
    subset: int | None = None  # train on so many of the samples; null: on all
    split_seed: int = 0  # of the subset, of what is held out and of its noise: not the run's, so that seeds share them
    shuffle: Shuffle = "global"  # or blocks: shards in random order, shuffled within a window of shuffle_window
    shuffle_window: int = DEFAULT_WINDOW  # shards, of shuffle=blocks
    precision: str = "auto"  # fp32 | bf16 of the passes; parameters and EMA stay float32. auto: bf16 on CUDA only
    compile: Compile = "auto"  # torch.compile the model. auto: on CUDA, where a first step works
    activation_checkpointing: bool = False  # compute blocks again in the backward pass: less memory, a third more time
    latent_norm: Literal["fixed", "channel"] = "fixed"  # the published scale, or the cache's statistics by channel
    flip: bool = True  # train on the mirrored view too, where the cache has it
    label_dropout: float = 0.1  # share of samples trained without their label, for guidance
    ema_decay: tuple[float, ...] = (0.9999,)  # one or more averages; samples come from the first
    interpolant: Interpolant = field(default_factory=Interpolant)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    meanflow: MeanFlowConfig = field(default_factory=MeanFlowConfig)
    reg: REGConfig = field(default_factory=REGConfig)
    sra: SRAConfig = field(default_factory=SRAConfig)
    jit: JiTMethodConfig = field(default_factory=JiTMethodConfig)
    internal: InternalConfig = field(default_factory=InternalConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    grid: GridConfig = field(default_factory=GridConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    online: OnlineConfig = field(default_factory=OnlineConfig)
    entries: tuple[str, ...] = ()  # files of networks of one's own (loader: python), for what loads networks
    log_every: int = 50  # steps between two lines of the log
    logger: str | None = None  # wandb, FILE.py:function or package.module:function, beside metrics.jsonl; null: none
    save_every: int = 10_000  # steps between two checkpoints
    save_minutes: float | None = 15.0  # at the latest so long after the last checkpoint; null: by steps alone
    keep_last: int = 2  # checkpoints to resume from
    keep_every: int | None = None  # steps between two copies of the EMA alone that stay, RUN/ema; null: none
    stage: str | None = None  # folder of a local copy of what the run reads, made before the first step
    check_reads: bool = False  # verify the crc32c of every row that is read
    prefetch_bytes: Bytes = Bytes(512_000_000)  # of micro-batches read ahead, a rank; at least one is

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "accumulation", "shuffle_window", "log_every", "save_every", "keep_last")
        for name in (*counts, "prefetch_bytes"):
            at_least(name, getattr(self, name), 1)
        for name in ("seed", "split_seed"):
            at_least(name, getattr(self, name), 0)
        if self.subset is not None:
            at_least("subset", self.subset, 1)
        if self.keep_every is not None:
            at_least("keep_every", self.keep_every, 1)
        if self.save_minutes is not None and not self.save_minutes > 0:
            raise UsageError(f"save_minutes is {self.save_minutes}; expected a number above 0, or null")
        if self.precision == "fp16":
            raise UsageError(
                "precision is fp16: under the published loss most of the alignment's gradient underflows to zero there "
                "(86 % at weight 1/65536), and no loss scale reaches into the fused op. Train with bf16 or fp32"
            )
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision is {self.precision!r}; {nearest(self.precision, PRECISIONS)}")
        reads = objective_class(self.objective).reads(self.alignment)
        if self.encoders and not reads.patch_tokens:
            raise UsageError(
                f"recipe {self.recipe} reads no encoder (objective={self.objective}, "
                f"alignment.projector={self.alignment.projector}), but --encoder names "
                f"{', '.join(self.encoders)}. Leave it out, or choose a recipe such as irepa"
            )
        if self.online.data is not None:
            if not reads.patch_tokens or not self.encoders:
                raise UsageError(
                    "online.data computes encoders from images; name those, --online NAME, or leave it out"
                )
            if self.stage is not None:
                raise UsageError(
                    "--stage copies what is read, and with online.data tokens are not; leave one of them out"
                )
        for name in BY_ENCODER:
            values = getattr(self.alignment, name.rpartition(".")[2])
            if isinstance(values, tuple) and len(values) != len(self.encoders):
                raise UsageError(
                    f"{name} has {len(values)} values, one an encoder, and --encoder names "
                    f"{', '.join(self.encoders) or 'none'}. Give one for all, or name as many encoders"
                )
        for section in sorted(other_sections(self.objective)):
            if getattr(self, section) != type(getattr(self, section))():
                raise UsageError(
                    f"recipe {self.recipe} trains by objective={self.objective}, which does not look at {section}.*; "
                    f"leave it out, or choose a recipe of that method"
                )
        followed = objective_class(self.objective).field(self.interpolant, settings_of(self))
        for name, drawn in (("grid", self.grid), ("evaluation", self.evaluation)):
            if drawn.every > 0:
                check_sampler(drawn.sampler_config(), followed, where=f"{name}: ")
        if self.batch_size % self.accumulation:
            raise UsageError(
                f"batch_size {self.batch_size} is not a multiple of accumulation {self.accumulation}; "
                f"change one of them"
            )
        if self.stage == "":  # as of a variable that is not set
            raise UsageError("stage is empty; name a local folder for the copy, or leave it out")
        if not 0 <= self.label_dropout <= 1:
            raise UsageError(f"label_dropout is {self.label_dropout}; expected 0 to 1")
        if not self.ema_decay or any(not 0 <= decay < 1 for decay in self.ema_decay):
            raise UsageError(f"ema_decay is {_listed(self.ema_decay)}; expected one or more numbers, 0 <= decay < 1")
        if len(set(self.ema_decay)) != len(self.ema_decay):
            raise UsageError(f"ema_decay names one decay twice: {_listed(self.ema_decay)}")

    def plain(self) -> dict[str, Any]:
        """Return the configuration as nested dicts of JSON values."""
        return _as_json(asdict(self))


# A resume may differ in these. A `cache` is where data lies; what it holds is compared by fingerprint.
MAY_CHANGE = frozenset(
    {"steps", "log_every", "save_every", "save_minutes", "keep_last", "keep_every"}
    | {"logger", "stage", "check_reads", "prefetch_bytes", "cache", "out", "entries", "activation_checkpointing"}
    | {"validation.every", "validation.cache"}
    | {f"grid.{item.name}" for item in fields(GridConfig)}
    | {f"evaluation.{item.name}" for item in fields(EvaluationConfig)}
    | {f"online.{item.name}" for item in fields(OnlineConfig)}
)


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(map(str, values)) or "empty"
