"""Recipes: pydantic models with defaults, bounds and units; TOML on disk; `a.b=value` on the command line.

An unknown key is an error that names the nearest known one. A recipe is frozen: what a run was made with is what its
`recipe.toml` says. This module imports no torch.
"""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tomlkit
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError

from imagekiln.errors import RecipeError, did_you_mean

Fraction = Annotated[float, Field(ge=0, le=1)]
Fit = Literal["crop", "smart", "pad"]


class Section(BaseModel):
    """A part of a recipe: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


AUGMENT_LABELS = (
    *("across", "down", "shift_down", "shift_right", "turn_cos", "turn_sin", "scale"),
    *("brightness", "contrast", "saturation", "hue_cos", "hue_sin", "cut", "cut_down", "cut_right"),
)
"""What a network can be told about the change of a picture: names of the columns of `Batch.augment`."""


class DataAugmentConfig(Section):
    """Random changes of the training pictures (`imagekiln.data.augment`); nothing is changed unless told."""

    p: Fraction = Field(0.15, description="share of pictures each of the changes below is made to")
    flip: Literal["none", "horizontal", "vertical", "both"] = Field(
        "none", description="horizontal mirrors left to right, vertical top to bottom"
    )
    shift: float = Field(0.0, ge=0, le=0.5, description="largest shift over height and width, in whole pixels")
    rotate: float = Field(0.0, ge=0, le=180, description="largest turn to either side, in degrees")
    scale: float = Field(0.0, ge=0, le=3, description="0.2 = from 1.2 times smaller to 1.2 times larger")
    color: float = Field(
        0.0, ge=0, le=1, description="0.2 = brightness by up to 0.2, contrast and saturation by up to 1.2 times"
    )
    hue: float = Field(0.0, ge=0, le=180, description="largest turn of the color circle to either side, in degrees")
    cutout: float = Field(0.0, ge=0, lt=1, description="height and width of a grey box over those of the picture")

    @property
    def changes(self) -> bool:
        """Whether any picture is changed at all."""
        strengths = self.shift, self.rotate, self.scale, self.color, self.hue, self.cutout
        return self.p > 0 and (self.flip != "none" or any(strengths))


class DataConfig(Section):
    """What the model learns from."""

    path: str = Field("", description="folder, zip, prepared set, or builtin:NAME")
    size: int = Field(0, ge=0, le=1024, description="height and width in pixels; 0 keeps the set's own size")
    channels: Literal[0, 1, 3, 4] = Field(0, description="1 grey, 3 RGB, 4 RGBA; 0 looks at the pictures")
    fit: Fit = Field(
        "crop", description="how a picture that is not square becomes square; smart crops where most edges are"
    )
    background: str = Field("white", description="colour behind transparent pixels and padding")
    buckets: bool = Field(False, description="learn pictures in their own proportions, about size x size pixels each")
    validation_fraction: Fraction = Field(0.1, description="share held out, by hash of the pixels")
    flip: bool = Field(False, description="mirror half of the training pictures left to right")
    augment: DataAugmentConfig = DataAugmentConfig()
    codec: str = Field(
        "", description="run of an autoencoder, or the recipe of one to train first; empty = learn pixels"
    )
    tag_dropout: Fraction = Field(0.0, description="share of a caption's comma-separated parts left out in training")
    tag_shuffle: bool = Field(False, description="put these parts into another order every time")
    tags_kept: int = Field(1, ge=0, description="the first so many parts stay, and stay first")
    word_dropout: Fraction = Field(0.0, description="share of a caption's words left out in training")
    wordings: tuple[str, ...] = Field((), description="texts with {caption}; training puts captions into one at random")
    fillers: Fraction = Field(0.0, description="share of captions among words without meaning in training")
    phrasebook: bool = Field(
        False, description="keep the captions in the model, and put what is asked for into the words of the nearest one"
    )

    def of_pictures(self) -> dict[str, Any]:
        """The settings of how pictures are read and which are held out, for another model of the same ones."""
        return self.model_dump(
            include={"size", "channels", "fit", "background", "buckets", "validation_fraction", "flip"}
        )


class FamilyConfig(Section):
    """The `family` section: every family subclasses it with at most about 12 fields of its own."""

    name: str = Field(..., description="file name of the family, dotted module, or path of a .py file")


class AugmentConfig(Section):
    """Random changes of what a discriminator sees, of real pictures and fakes alike (`imagekiln.nets.augmentation`)."""

    policy: Literal["none", "diffaugment", "ada", "ramp"] = Field(
        "none", description="ada = as much as is needed; ramp = ADA's changes, more and more of them"
    )
    transforms: str = Field(
        "",
        description="names with commas between them; empty = color,translation,cutout or, of ADA, blit,geometry,color",
    )
    p: Fraction = Field(0.0, description="share of pictures each of them changes, at the start of the run (ada, ramp)")
    target: float = Field(
        0.6, gt=0, lt=1, description="mean sign of the logits of real pictures that p is held at (ada)"
    )
    speed_kimg: float = Field(500.0, gt=0, description="real pictures in which p can go from 0 to 1 (ada)")
    largest: float = Field(0.8, gt=0, lt=1, description="largest p, and the last one of a ramp; near 1 changes leak")


class StabilizeCriticConfig(Section):
    """What keeps a critic from being too sure (`imagekiln.nets.stabilizers.Stabilizers`); nothing is on unless told."""

    instance_noise: float = Field(0.0, ge=0, description="deviation of noise on all pictures, fades to 0 (try 0.1)")
    lecam: float = Field(0.0, ge=0, description="weight of the LeCam penalty (try 0.3); 0 = none")
    consistency: float = Field(
        0.0, ge=0, description="weight of giving mirrored and shifted pictures the same answer (try 10); 0 = none"
    )


class StabilizeConfig(StabilizeCriticConfig):
    """The same of a discriminator, whose answer is a choice between two labels; a Wasserstein critic has none."""

    label_noise: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="share of pairs whose real picture is called fake and the fake real (try 0.05; not Wasserstein)",
    )


class LangevinConfig(Section):
    """Langevin diffusion of some modules' weights: D = temperature / number of training pictures."""

    temperature: float = Field(0.0, ge=0, description="1 = the posterior of a loss that is a negative log-likelihood")
    schedule: Literal["constant", "linear", "cosine", "polynomial", "cyclical", "annealed"] = Field(
        "constant", description="of the temperature, over the run"
    )
    law: Literal["gauss", "matched"] = Field("gauss", description="exact Gaussian noise, or a faster one like it")


class OptimizerConfig(Section):
    """One optimizer; the section's key names the modules it trains."""

    name: Literal["adamw", "adamw_8bit", "adam", "sgd", "rmsprop"] = "adamw"
    lr: float = Field(1e-3, gt=0, le=10, description="peak learning rate per step")
    betas: tuple[float, float] = Field((0.9, 0.99), description="decay of the moments (adam, adamw, adamw_8bit)")
    beta2_start: float = Field(
        0.0, ge=0, lt=1, description="second beta at the start of the run, from where it rises; 0 = constant"
    )
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.0, ge=0, lt=1, description="sgd and rmsprop")
    alpha: float = Field(0.99, gt=0, lt=1, description="decay of the squared gradients (rmsprop)")
    langevin: LangevinConfig = LangevinConfig()


class AverageConfig(Section):
    """One moving average of the weights; several may run at once."""

    kind: Literal["power", "exponential"] = "power"
    sigma_rel: float = Field(0.10, gt=0, lt=0.28, description="width relative to the run so far (power)")
    halflife_kimg: float = Field(20.0, gt=0, description="half-life (exponential)")

    @property
    def name(self) -> str:
        """Short name used in file names: `power-0.100`, `exponential-20`."""
        return f"power-{self.sigma_rel:.3f}" if self.kind == "power" else f"exponential-{self.halflife_kimg:g}"


class TrainConfig(Section):
    """How long, how fast, how safe."""

    seed: int = Field(0, ge=0, lt=2**31)
    start: str = Field("", description="run whose weights this one begins with (train --from); empty = fresh ones")
    total_kimg: float = Field(200.0, gt=0, description="length of the run in thousands of images seen")
    batch: int = Field(64, ge=1, description="pictures a step")
    accumulate: int = Field(1, ge=1, description="equal parts a batch is computed in at least, to save memory")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="bf16 where the device computes it")
    device: str = Field("auto", description="cpu, cuda, cuda:1, mps, or auto")
    compile: Literal["auto", "on", "off"] = Field("auto", description="torch.compile; auto = on CUDA only")
    clip_norm: float = Field(1.0, ge=0, description="largest gradient norm; 0 = no clipping")
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="decay of lr after warm-up")
    warmup_fraction: Fraction = Field(0.02, description="share of the run in which lr rises to its peak")
    end_lr_ratio: Fraction = Field(0.0, description="lr at the end of the run over its peak (linear, cosine)")
    averages: tuple[AverageConfig, ...] = Field(
        (AverageConfig(),), min_length=1, description="moving averages of the weights; the first one draws previews"
    )
    checkpoint_kimg: float = Field(0.0, ge=0, description="0 = an eighth of the run")
    preview_kimg: float = Field(0.0, ge=0, description="0 = a sixteenth of the run")
    validate_kimg: float = Field(0.0, ge=0, description="0 = a sixteenth of the run")
    prompts: tuple[str, ...] = Field(
        (), max_length=40, description="words that previews show, a row each; empty = captions of held-out pictures"
    )
    keep: int = Field(2, ge=2, description="checkpoints kept besides the best")
    keep_kimg: tuple[float, ...] = Field((), description="moments whose weights are kept beside the best and the last")
    choose: Literal["best", "last"] = Field(
        "best", description="moment to draw with: best on held-out pictures, or last"
    )
    patience: int = Field(0, ge=0, description="stop after this many validations without gain; 0 = never")
    doctor: Literal["off", "watch", "act"] = Field("watch", description="notice illnesses; act = also repair")
    tensorboard: bool = Field(False, description="also write TensorBoard events")

    @property
    def total_nimg(self) -> int:
        """Length of the run in images."""
        return max(1, round(self.total_kimg * 1000))

    def interval_nimg(self, which: Literal["checkpoint", "preview", "validate"]) -> int:
        """Images between two events of a kind."""
        share = {"checkpoint": 8, "preview": 16, "validate": 16}[which]
        kimg = getattr(self, f"{which}_kimg") or self.total_kimg / share
        return max(1, round(kimg * 1000))


class EvalConfig(Section):
    """What is measured when the run is done."""

    n: int = Field(1000, ge=2, description="generated and reference pictures, where the set has as many")
    seed: int = Field(0, ge=0, lt=2**31)
    features: str = Field(
        "auto", description="where pictures are compared: auto = classifier with labels, else randconv"
    )
    metrics: str = Field("default", description="default, all, or names with commas between them")


class Recipe(Section):
    """Everything a run is made with."""

    schema_version: Literal[1] = 1
    data: DataConfig = DataConfig()
    family: SerializeAsAny[FamilyConfig]
    optim: dict[str, OptimizerConfig] = {}
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()


def parse(model: type[Section], values: Mapping[str, Any], where: str) -> Any:
    """Validate plain values into a section; `RecipeError` says key, value, expectation and the nearest known key."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise RecipeError(_sentence(error, model, where)) from None


def _sentence(error: ValidationError, model: type[BaseModel], where: str) -> str:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join([where, *path] if where else path)
    more = f" ({error.error_count() - 1} more after this one.)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{key}: no such setting. {_known(model, where, path)}{more}"
    if first["type"] == "missing":
        return f"{key}: this setting is missing.{more}"
    return f"{key} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}.{more}"


def _known(model: Any, where: str, path: list[str]) -> str:
    """Which settings there are instead: one of this name in a section of the section, or what is spelt like it."""
    *parents, last = path
    fields = _fields(model, parents)
    for section in fields:
        if last in _fields(model, [*parents, section]):
            return f"Did you mean '{'.'.join([*filter(None, [where]), *parents, section, last])}'?"
    return did_you_mean(last, fields)


def _fields(model: Any, path: list[str]) -> list[str]:
    """Names of the fields of the section that `path` leads to."""
    for part in path:
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return []
        info = model.model_fields.get(part)
        model = info.annotation if info else None
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as plain values; `RecipeError` names file and line when it cannot be read."""
    try:
        if path.stat().st_size > 1_000_000:
            raise RecipeError(f"{path}: a recipe of more than 1 MB is not a recipe.")
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is not valid TOML: {error}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe {path} cannot be read: {error}.") from None


def write_toml(recipe: BaseModel) -> str:
    """The recipe as TOML with every default written out."""
    return tomlkit.dumps(recipe.model_dump(mode="json", exclude_none=True))


def override(values: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """A copy of `values` with `a.b=value` assignments applied; a value is read as TOML, else taken as text.

    >>> override({"train": {"batch": 64}}, ["train.batch=8", "data.path=my photos"])
    {'train': {'batch': 8}, 'data': {'path': 'my photos'}}
    """
    result = copy.deepcopy(values)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"--set {assignment!r}: expected key=value, for example --set train.batch=32.")
        section = result
        *parents, last = key.strip().split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise RecipeError(f"--set {assignment!r}: {parent} is a value, not a section.")
        try:
            section[last] = tomllib.loads(f"value = {text}")["value"]
        except ValueError:  # not TOML, or a number of thousands of digits
            section[last] = text.strip()
    return result


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings laid over one another, the later ones on top.

    >>> merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}})
    {'a': {'b': 3, 'c': 2}}
    """
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            result[key] = merge(result[key], value) if both else value
    return result
