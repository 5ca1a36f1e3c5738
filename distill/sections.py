"""The sections of a recipe, and what each key may be."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from distill.component import Count, Location, NonNegative, Positive
from distill.remote import is_remote
from distill.schedule import Schedule, learning_rate

# Names of models that other libraries hold, and that only those libraries can check.
OUTSIDE_MODELS = ("timm/", "torchvision/")


def is_published(weights: str | None) -> bool:
    """Whether weights are known by their name, and not by a place on this disk."""
    return weights is not None and (weights == "pretrained" or weights.startswith("hf-hub:"))


class Section(BaseModel):
    """A part of the recipe. Unknown keys are errors, values are never guessed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Component(BaseModel):
    """A named component; the keys beside the declared ones are its own arguments."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    @property
    def arguments(self) -> dict[str, Any]:
        """The component's own arguments."""
        return dict(self.__pydantic_extra__ or {})


class Augmentation(Component):
    """One augmentation by name; a bare word is a name without arguments."""

    name: str

    @model_validator(mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


def _known_set(name: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """Names of the hub beside those that are listed."""
    if isinstance(name, str) and re.fullmatch(r"hf(/[\w.-]+){1,3}", name):
        return name
    return handler(name)


class Data(Section):
    """Images and labels, and how training images are augmented."""

    name: Annotated[
        Literal["digits", "fashion-mnist", "cifar10", "cifar100", "folder", "webdataset", "hf"],
        WrapValidator(_known_set),
    ] = Field(description="of a set of the Hugging Face hub, hf/OWNER/NAME")
    root: str | None = Field(
        None, description="where the files lie, or are downloaded to; shards may be in s3://..."
    )
    download: bool = Field(False, description="fetch the files if they are not at root")
    split_file: str | None = Field(
        None, description="folder only: a CSV of path,split beside images that lie in one folder"
    )
    transfer: str | None = Field(
        None, description="a folder of images without labels, trained on in place of the set's own"
    )
    image_size: Count | None = Field(None, description="pixels; left out: as the set has them")
    eval_crop: Annotated[float, Gt(0), Le(1)] = Field(
        1.0, description="centre part of an evaluation image that is kept; ImageNet's is 0.875"
    )
    augment: list[Augmentation] = Field([], description="in the order they are applied")
    decoder: Literal["exact", "fast", "gpu"] = Field(
        "exact",
        description="of resized_crop on files: exact is Pillow; fast takes 1/1.5 to 1/2.3 of the "
        "time and is 0.02 levels off (2 at most, 50 at the edges), to a teacher KL 1e-4 to 7e-4; "
        "gpu: JPEGs are decoded on the training device, with its own rounding of colours",
    )
    mixup: NonNegative = Field(0.0, description="alpha of the Beta distribution; 0 is off")
    cutmix: NonNegative = Field(0.0, description="alpha of the Beta distribution; 0 is off")
    shuffle_shards: Count | None = Field(
        None,
        description="an epoch mixes so many shards at a time; left out: the whole set at once",
    )
    fraction: Annotated[float, Gt(0), Le(1)] = Field(
        1.0, description="part of the training images that is used; class-balanced and nested"
    )
    omit: list[str] = Field([], description="classes whose images are not trained on")
    val: Annotated[float, Ge(0), Lt(1)] = Field(
        0.0, description="part of the training split held out for choices; class-balanced"
    )
    control: Literal["permuted-pixels", "permuted-labels"] | None = Field(
        None,
        description="takes away the order of all images' pixels, or what the training labels say",
    )
    manifest: str | None = Field(
        None,
        description="of `distill check --data`: each image is held against it as it is read",
    )
    on_bad_image: Literal["error", "skip"] = Field(
        "error", description="of training images; a bad test image is always an error"
    )
    max_bad: Annotated[float, Ge(0), Le(1)] = Field(
        0.05, description="part of the training images that may be skipped, no more"
    )
    max_pixels: Count = Field(64_000_000, description="an image with more counts as bad")
    seed: Annotated[int, Ge(0)] = Field(0, description="decides splits and views")

    def contradictions(self) -> Iterator[tuple[Location, str]]:
        """Keys that the kind of set does not have, or needs."""
        far = is_remote(self.root or "")
        if self.split_file and self.name != "folder":
            yield ("split_file",), "only a folder of images has one"
        if self.shuffle_shards and self.name != "webdataset":
            yield ("shuffle_shards",), "only webdataset has shards"
        if self.manifest and self.name.partition("/")[0] not in ("folder", "webdataset", "hf"):
            yield ("manifest",), "only images in files have one"
        if far and self.name != "webdataset":
            yield ("root",), "only the shards of webdataset are read from an object store"
        elif far and not self.shuffle_shards and not self.transfer:
            yield (
                ("shuffle_shards",),
                "required for shards in an object store, which are fetched whole, a few at a time: "
                "such as 16",
            )
        if self.shuffle_shards and self.transfer:
            yield ("shuffle_shards",), "the images of data.transfer lie in a folder, not in shards"
        if self.shuffle_shards and (self.mixup or self.cutmix):
            yield (
                ("shuffle_shards",),
                "mixup and cutmix take an image's partner from the whole set: leave it out, or "
                "them",
            )


class Model(Component):
    """A network by name: our own, `timm/NAME`, `torchvision/NAME` or `module:function`."""

    model: str
    weights: str | None = Field(
        None, description="a run directory, a .safetensors file, pretrained or hf-hub:NAME"
    )


class Cache(Section):
    """What the teachers are asked once and for all: some views of every image, and where."""

    path: str | None = Field(
        None, description="a folder or s3://..., gs://...; left out: teachers run live"
    )
    views: Count | None = Field(
        None, description="epoch e reads view e mod views; left out: an epoch each, at most 50"
    )
    codec: str = Field("auto", description="auto | int8 | fp16 | topk:K")
    features: list[str] = Field(
        [], description="kept beside the logits: pooled, or a module's name in the teacher"
    )
    precision: Literal["fp32", "bf16", "fp16"] | None = Field(
        None, description="of the teachers; left out: the training's"
    )
    fill: bool = Field(False, description="run teachers live and keep what they say")

    @field_validator("codec")
    @classmethod
    def _known(cls, value: str) -> str:
        if not re.fullmatch(r"auto|int8|fp16|topk:[1-9][0-9]{0,5}", value):
            raise ValueError(
                f"must be auto, int8, fp16 or topk:K (such as topk:100), got {value!r}"
            )
        return value


class TermSpec(Component):
    """One term of the objective: `weight` times the named loss."""

    term: str
    name: str | None = Field(None, description="needed where one loss stands twice")
    teacher: Annotated[int, Ge(0)] | str | None = Field(
        None, description="the one of several that is heard, by number or name; left out: all"
    )
    weight: Schedule = 1.0

    @property
    def key(self) -> str:
        """The name under which the term is logged."""
        return self.name or self.term


class Optimizer(Section):
    """How the weights move."""

    name: Literal["sgd", "adamw", "lamb", "muon"] = "adamw"
    lr: Annotated[float, Gt(0), Lt(3.4e38)] = Field(
        description="peak learning rate, for the global batch"
    )
    momentum: Annotated[float, Ge(0), Lt(1)] = Field(0.9, description="of sgd and muon")
    nesterov: bool = Field(
        True, description="of sgd and muon: the momentum looks ahead; false: it is the plain one"
    )
    weight_decay: NonNegative = 0.0
    decay: Literal["all", "matrices"] | None = Field(
        None, description="what decays; left out: all for sgd, matrices for the others"
    )
    warmup_epochs: NonNegative = 0.0
    schedule: Literal["cosine", "linear", "constant", "step"] = "cosine"
    milestones: list[Positive] = Field(
        [], description="step: finished epochs after each of which the rate is gamma times as high"
    )
    gamma: Annotated[float, Gt(0), Lt(1)] = Field(0.1, description="of schedule: step")
    clip_norm: Positive | None = Field(None, description="limit on the norm of all gradients")

    def rate(self, progress: float, epochs: int) -> float:
        """The learning rate at `progress`, the finished fraction in [0, 1] of so many epochs."""
        return self.lr * learning_rate(
            progress,
            warmup=self.warmup_epochs / epochs,
            shape=self.schedule,
            milestones=[milestone / epochs for milestone in self.milestones],
            gamma=self.gamma,
        )

    def contradictions(self, epochs: int) -> Iterator[tuple[Location, str]]:
        """Keys that are right one by one and wrong together, in a run of so many epochs."""
        if not self.nesterov and self.name not in ("sgd", "muon"):
            yield ("nesterov",), f"only sgd and muon have it, and {self.name} has none to leave out"
        if self.warmup_epochs > epochs:
            yield ("warmup_epochs",), f"longer than the run's {epochs} epochs"
        if self.schedule != "step":
            if self.milestones:
                yield ("milestones",), f"only schedule: step has them, and this is {self.schedule}"
            if self.gamma != type(self).model_fields["gamma"].default:
                yield ("gamma",), f"only schedule: step has it, and this is {self.schedule}"
        elif not self.milestones:
            yield ("milestones",), "required for schedule: step, such as [150, 180, 210]"
        for i, (before, milestone) in enumerate(pairwise([0.0, *self.milestones])):
            if milestone <= before:
                what = f"must be greater than the one before it, {before:g}, got {milestone:g}"
                yield ("milestones", i), what
            if milestone >= epochs:
                what = f"must be less than the run's {epochs} epochs, got {milestone:g}"
                yield ("milestones", i), what


class Train(Section):
    """How long, in what batches and in what numbers."""

    epochs: Count
    batch_size: Count = Field(description="images an optimizer step, over all devices")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema: Annotated[float, Ge(0), Lt(1)] = Field(
        0.0, description="decay of the averaged weights that are evaluated and saved; 0 is off"
    )
    sync_batchnorm: bool = Field(
        False, description="BatchNorm sees the whole batch where several devices share it"
    )
    eval_epochs: Count = Field(1, description="epochs between two looks at the validation split")
    deterministic: bool = Field(
        False,
        description="the same bits each time, with slower kernels; a run goes on only on the same "
        "device, with the same threads, processes and versions",
    )
    seed: Annotated[int, Ge(0)] = Field(0, description="decides initial weights, order, dropout")
