"""``bundle.json``, as a type. docs/spec/bundle.md describes it field by field."""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from ddit.profiles import Profile, Text
from ddit.runtime import shapes
from ddit.runtime.bundle.fit import check_manifest
from ddit.runtime.errors import UsageError

FORMAT_VERSION = 2
MANIFEST = "bundle.json"


def _inside(name: str) -> str:
    """Refuse names that leave the bundle: a manifest may come from anywhere."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise ValueError(f"file name {name!r} leaves the bundle")
    return name


def _readable(dim: int | str) -> int | str:
    """Refuse a dimension that is no size, and an expression that `ddit.runtime.shapes` cannot read."""
    number = dim if isinstance(dim, int) else shapes.split(dim)[2]
    if not 1 <= number <= LARGEST:
        raise ValueError(f"dimension {dim!r} is not between 1 and {LARGEST}")
    return dim


# Limits far beyond what anybody runs: a count that was damaged is refused before memory is asked for.
MAX_STEPS = 10_000
LARGEST = 1_000_000  # of a tensor's fixed dimensions
MAX_PATCH = 256  # latent pixels
MAX_GUIDANCE = 1_000.0
LARGEST_COEFFICIENT = 1e9  # of a gate's polynomial

Dtype = Literal["fp32", "fp16", "bf16"]
Name = Annotated[Text, Field(min_length=1, max_length=200)]
FileName = Annotated[Name, AfterValidator(_inside)]
Dimension = Annotated[int | str, AfterValidator(_readable)]
Patch = Annotated[int, Field(ge=1, le=MAX_PATCH)]
StepCount = Annotated[int, Field(ge=1, le=MAX_STEPS)]
Pixels = Annotated[int, Field(ge=1, le=LARGEST)]
AxisName = Literal["frames", "height", "width"]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TensorSpec(_Model):
    """Name, dtype and symbolic shape (`ddit.runtime.shapes`) of a graph's input or output."""

    name: Name
    dtype: Literal["float32", "int64"]
    shape: tuple[Dimension, ...] = Field(min_length=1, max_length=8)

    def resolve(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape in numbers."""
        return shapes.resolve(self.shape, sizes)


class GraphInfo(_Model):
    """One ONNX file: what it takes and gives, and the weight files that it points into."""

    file: FileName
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[FileName, ...] = ()
    dtype: Dtype
    twins: dict[Name, FileName] = Field(
        default={}, description="by backend: an ONNX file that computes the same from the same weights, faster there"
    )
    twin_weights: dict[Name, tuple[FileName, ...]] = Field(
        default={}, description="by backend: weight files that only its twin points into, beside the graph's"
    )

    def on(self, backend: str) -> "GraphInfo":
        """The graph as a backend opens it: with the files of its twin, where it has one for this backend."""
        weights = (*self.weights, *self.twin_weights.get(backend, ()))
        return self.model_copy(update={"file": self.twins.get(backend, self.file), "weights": weights})

    @property
    def all_files(self) -> tuple[str, ...]:
        """Its files and those of its twins."""
        more = (file for files in self.twin_weights.values() for file in files)
        return (self.file, *self.weights, *self.twins.values(), *more)


class LevelInfo(_Model):
    """One patch size that the bundle can run."""

    patch: Patch = Field(description="side of a patch in latent pixels")
    graph: Name
    trained: bool = Field(description="false: no adapter was given, so pictures suffer at this level")
    adapter_sha256: Text | None = None


class ModelInfo(_Model):
    """Where the weights come from."""

    id: Text
    revision: Text | None = None


class AxisInfo(_Model):
    """One axis of the latent beside batch and channels."""

    name: AxisName
    downscale: int = Field(
        ge=1,
        le=256,
        description="pixels of the picture along one latent pixel; frames of the clip for every latent frame but the "
        "first, which is one frame",
    )

    def to_latent(self, size: int) -> int:
        """Latent pixels of so many pixels, latent frames of so many frames; rounded down."""
        return (size - 1) // self.downscale + 1 if self.name == "frames" else size // self.downscale

    def from_latent(self, size: int) -> int:
        """Pixels, or frames, of so many latent ones."""
        return (size - 1) * self.downscale + 1 if self.name == "frames" else size * self.downscale


class LatentInfo(_Model):
    """The latent: (B, channels, then its axes in order). A clip's has frames before height and width."""

    channels: int = Field(ge=1, le=4096)
    axes: tuple[AxisInfo, ...] = Field(min_length=1)

    @property
    def shape(self) -> tuple[int | str, ...]:
        """Its symbolic shape, as in ``("B", 16, "H", "W")``."""
        return ("B", self.channels, *self.patch_grid(1))

    @property
    def sides(self) -> tuple[AxisInfo, ...]:
        """The axes that levels cut into patches; frames stay whole."""
        return tuple(axis for axis in self.axes if axis.name != "frames")

    @property
    def has_frames(self) -> bool:
        """Whether it is a clip's."""
        return self.sides != self.axes

    def patch_grid(self, patch: int) -> tuple[str, ...]:
        """A level's patches along each axis, in symbols: ``("F", "H/4", "W/4")``."""
        return tuple(
            shapes.SYMBOLS[axis.name] + (f"/{patch}" if axis in self.sides and patch > 1 else "") for axis in self.axes
        )


class TokenizerInfo(_Model):
    """A ``tokenizer.json`` and how its output is filled up."""

    file: FileName
    length: int = Field(ge=1, le=100_000, description="tokens of a prompt, padding included")
    pad_id: int = Field(ge=0, le=10_000_000)


class TextEncoderInfo(_Model):
    """A text encoder: its graph takes ``input_ids`` (B, tokens)."""

    graph: Name
    tokenizer: TokenizerInfo
    free_length: bool = Field(description="whether a run may choose the number of tokens, the symbol L")
    feeds: dict[Name, Name] = Field(description="the levels' input that each of the graph's outputs becomes")


class FlowMatchEulerInfo(_Model):
    """Euler steps along a flow: the fields of diffusers' `FlowMatchEulerDiscreteScheduler` that FLUX uses."""

    kind: Literal["flow_match_euler"] = "flow_match_euler"
    use_dynamic_shifting: bool
    shift: float = Field(gt=0, le=1e6)
    base_shift: float = Field(ge=-1e6, le=1e6)
    max_shift: float = Field(ge=-1e6, le=1e6)
    base_image_seq_len: int = Field(ge=1)
    max_image_seq_len: int = Field(ge=1)
    smallest: float | None = Field(
        default=None, gt=0, le=1, description="the last noise level before the shift; null: 1 / steps"
    )
    steps: StepCount = Field(description="default number of steps")

    @model_validator(mode="after")
    def _lengths_differ(self) -> "FlowMatchEulerInfo":
        if self.base_image_seq_len == self.max_image_seq_len:
            raise ValueError("base_image_seq_len and max_image_seq_len are the same: the shift has no slope")
        return self


class UniPCInfo(_Model):
    """UniPC of a low order along a flow: the fields of diffusers' `UniPCMultistepScheduler` that Wan 2.1 sets."""

    kind: Literal["flow_unipc"] = "flow_unipc"
    shift: float = Field(gt=0, le=1e6)
    order: int = Field(ge=1, le=2)
    train_steps: int = Field(ge=1, le=1_000_000, description="the model knows noise levels in whole parts of so many")
    steps: StepCount = Field(description="default number of steps")


SamplerInfo = Annotated[FlowMatchEulerInfo | UniPCInfo, Field(discriminator="kind")]


class RotaryAxis(_Model):
    """One rotated axis of the rotary embedding."""

    axis: AxisName | None = Field(description="null: a coordinate that is always 0")
    dimensions: int = Field(ge=2, le=4096, multiple_of=2, description="of a head, that this axis rotates")


class RotaryInfo(_Model):
    """Rotary positions: tables that the levels take as inputs (`ddit.runtime.conditioning.positions`)."""

    kind: Literal["rotary"] = "rotary"
    axes: tuple[RotaryAxis, ...] = Field(min_length=1)
    theta: float = Field(ge=1, le=1e12)


class GuidanceInfo(_Model):
    """How guidance comes in.

    ``embedded`` as an input of the levels (distilled models); as ``two_passes`` of a level, with the prompt and with
    another one, which the guide graph puts together (classifier-free guidance); or not at all.
    """

    kind: Literal["embedded", "two_passes", "none"]
    default: float = Field(ge=-MAX_GUIDANCE, le=MAX_GUIDANCE)

    @property
    def embedded(self) -> bool:
        """Whether the levels take the scale as an input."""
        return self.kind == "embedded"

    @property
    def two_passes(self) -> bool:
        """Whether a step may run its level twice."""
        return self.kind == "two_passes"


class DecoderInfo(_Model):
    """The graph that turns a latent into a picture."""

    kind: Literal["image"] = "image"
    graph: Name

    @property
    def graphs(self) -> tuple[str, ...]:
        """All of them."""
        return (self.graph,)


class VideoDecoderInfo(_Model):
    """The graphs that turn a clip's latent into frames, one latent frame a call.

    The first call gives the clip's first frame, every further one as many as the latent's frames are apart. What they
    must know of the frames before, they hand on as state: tensors that have a ``next_`` twin.
    """

    kind: Literal["video"] = "video"
    first: Name
    following: Name
    frames_per_second: float = Field(gt=0, le=1000, description="at which the model was trained, for players")

    @property
    def graphs(self) -> tuple[str, ...]:
        """All of them."""
        return (self.first, self.following)


Decoder = Annotated[DecoderInfo | VideoDecoderInfo, Field(discriminator="kind")]


class GateInfo(_Model):
    """A small graph that shows, before a step, how much it will differ from the one before (TeaCache)."""

    graph: Name
    coefficients: tuple[Annotated[float, Field(ge=-LARGEST_COEFFICIENT, le=LARGEST_COEFFICIENT)], ...] = Field(
        min_length=1,
        max_length=8,
        description="of the polynomial from the change of the modulated input to that of the velocity, highest first",
    )
    source: Text = Field(description="where the coefficients are from, for people to read")


class SmoothPoint(_Model):
    """The statistics of smooth pictures at one noise level (`ddit.runtime.policies.smooth`)."""

    sigma: float = Field(ge=0, le=1)
    statistic: dict[Patch, Annotated[float, Field(ge=0)]] = Field(
        description="by coarse patch, divided by the cube of the step's length in σ"
    )


class ScheduleInfo(_Model):
    """Defaults of the dynamic schedule (`ddit.runtime.policies.dynamic.Dynamic`)."""

    tau: float = Field(gt=0, description="a multiple of smooth pictures' statistic where that is known, else absolute")
    rho: float = Field(gt=0, lt=1)
    warmup: int = Field(ge=3, le=MAX_STEPS)
    hold: int = Field(default=3, ge=1, le=MAX_STEPS)
    coarsest: Patch | None = Field(default=None, description="the largest patch to use; null: all")
    smooth: tuple[SmoothPoint, ...] = Field(default=(), description="what τ is a multiple of, by falling σ")

    @model_validator(mode="after")
    def _same_patches(self) -> "ScheduleInfo":
        if any(point.statistic.keys() != self.smooth[0].statistic.keys() for point in self.smooth):
            raise ValueError("smooth has other patches at one noise level than at another")
        return self


class SpectrumInfo(_Model):
    """The mean power of a model's latents over the frequency, A·ω^−β (`ddit.runtime.policies.progressive`)."""

    amplitude: float = Field(gt=0, le=1e12, description="A, of a coefficient of the orthonormal DCT; noise has 1")
    exponent: float = Field(ge=0, le=20, description="β; ω counts periods along the picture's shorter side")


class Costs(_Model):
    """What a picture of one size costs on one backend, in milliseconds."""

    levels: dict[Patch, Annotated[float, Field(gt=0)]] = Field(description="median of a step at every level")
    predicted: float = Field(ge=0, description="of a step that runs no level")
    encode: float = Field(ge=0, description="text encoders")
    decode: float = Field(ge=0, description="latent to picture")


class AdaptiveInfo(_Model):
    """Defaults of prediction with error control (`ddit.runtime.policies.adaptive.Adaptive`)."""

    tolerance: float = Field(default=0.04, ge=0, description="of the picture's latent, root mean square")
    order: int = Field(default=1, ge=0, le=2, description="of the polynomial")


class _Found(_Model):
    """What was found for one number of steps and one size."""

    steps: StepCount
    height: Pixels
    width: Pixels
    frames: Pixels | None = None

    @property
    def size(self) -> shapes.Size:
        """The picture's or clip's."""
        return shapes.Size(self.height, self.width, self.frames)


class CurvePoint(_Model):
    """What one value of the number that trades quality for speed does."""

    value: float = Field(gt=0)
    shares: dict[Patch, Annotated[float, Field(ge=0, le=1)]] = Field(
        description="mean share of the steps at every level; the rest was predicted"
    )


class Calibrated(_Found):
    """How and for what `ddit-run calibrate` found settings: one number of steps, size and backend."""

    speedup: float = Field(gt=0, description="over the native schedule, on prompts that nothing was chosen on")
    similarity: float = Field(description="mean SSIM to the native pictures, on the same prompts")
    prompts: int = Field(ge=2, description="how many were used in all")
    backend: Text = Field(description="where it was found: the speed-up counts in its milliseconds")
    costs: Costs
    curve: tuple[CurvePoint, ...] = Field(description="everything that was tried, by value")


class DynamicCalibration(Calibrated, ScheduleInfo):
    """Settings of the dynamic schedule."""

    kind: Literal["dynamic"] = "dynamic"


class AdaptiveCalibration(Calibrated, AdaptiveInfo):
    """Settings of prediction with error control, before native steps."""

    kind: Literal["adaptive"] = "adaptive"


Calibration = Annotated[DynamicCalibration | AdaptiveCalibration, Field(discriminator="kind")]


class StepPath(_Found):
    """The steps that are computed of a number of them at a size (`ddit.runtime.policies.dpcache`)."""

    computed: tuple[Annotated[int, Field(ge=0, lt=MAX_STEPS)], ...] = Field(
        min_length=1, description="their numbers, from 0"
    )
    error: float = Field(ge=0, description="by which the others are expected to move the latent wrongly")
    prompts: int = Field(ge=1, description="how many it was found on")

    @model_validator(mode="after")
    def _rises(self) -> "StepPath":
        if list(self.computed) != sorted(set(self.computed)) or self.computed[0] or self.computed[-1] >= self.steps:
            raise ValueError("the computed steps have to rise from 0 and to stay below their number")
        return self


class ParityResult(_Model):
    """One comparison of a graph's output with the original model's."""

    graph: Name
    tensor: Name
    case: int
    sizes: dict[Name, int]
    error: float = Field(ge=0, description="relative L2 error against torch")
    tolerance: float = Field(gt=0)
    checked: Text = Field(description="'full', or in words what was checked instead")
    twin: Name | None = Field(default=None, description="the backend whose twin was compared; null: the graph itself")
    note: Text = Field(default="", description="what else is to be said, as why a level has no twin")


class FileInfo(_Model):
    """A file's fingerprint."""

    sha256: Text
    size: int = Field(ge=0)


class Manifest(_Model):
    """The content of ``bundle.json``."""

    format_version: Literal[2] = 2
    family: Text = Field(description="for people to read; whatever a host must know of it has a field of its own")
    model: ModelInfo
    dtype: Dtype
    opset: int = Field(ge=1, le=1000)
    native: Patch = Field(description="the patch that the base model was trained at")
    levels: tuple[LevelInfo, ...] = Field(min_length=1)
    graphs: dict[Name, GraphInfo]
    profile: Profile
    latent: LatentInfo
    encoders: tuple[TextEncoderInfo, ...]
    sampler: SamplerInfo
    positions: RotaryInfo
    guidance: GuidanceInfo
    decoder: Decoder
    gate: GateInfo | None = None
    carry: float = Field(ge=0, le=1, description="share of the last native step's detail that coarse steps take over")
    schedule: ScheduleInfo
    adaptive: AdaptiveInfo
    spectrum: SpectrumInfo | None = Field(default=None, description="null: nobody has measured the model's latents")
    calibrations: tuple[Calibration, ...] = ()
    paths: tuple[StepPath, ...] = ()
    parity: tuple[ParityResult, ...]
    files: dict[FileName, FileInfo]
    made_with: dict[Name, Text]

    @model_validator(mode="after")
    def _fits_together(self) -> "Manifest":
        check_manifest(self)
        return self

    @property
    def patches(self) -> tuple[int, ...]:
        """The levels' patch sizes, finest first."""
        return tuple(sorted(level.patch for level in self.levels))

    def level(self, patch: int) -> LevelInfo:
        """The level of a patch size. Raises `UsageError` where the bundle has no such level."""
        for level in self.levels:
            if level.patch == patch:
                return level
        raise UsageError(f"the bundle has no level {patch}; it has {', '.join(map(str, self.patches))}")

    def dynamic(self, *, steps: int, size: shapes.Size, backend: str) -> ScheduleInfo:
        """The dynamic schedule's settings for a run: its calibration, or the bundle's defaults where there is none."""
        found = self.calibration("dynamic", steps=steps, size=size, backend=backend)
        return found if isinstance(found, ScheduleInfo) else self.schedule

    def prediction(self, *, steps: int, size: shapes.Size, backend: str) -> AdaptiveInfo:
        """The adaptive policy's settings for a run: its calibration, or the bundle's defaults where there is none."""
        found = self.calibration("adaptive", steps=steps, size=size, backend=backend)
        return found if isinstance(found, AdaptiveInfo) else self.adaptive

    def calibration(
        self, kind: str, *, steps: int, size: shapes.Size, backend: str
    ) -> DynamicCalibration | AdaptiveCalibration | None:
        """What was found for a policy, steps and size on this backend, or else on the last one that was tried."""
        found = [one for one in self.calibrations if (one.kind, one.steps, one.size) == (kind, steps, size)]
        return next((one for one in found if one.backend == backend), found[-1] if found else None)

    def path(self, *, steps: int, size: shapes.Size) -> StepPath | None:
        """The path that was found for a number of steps and a size."""
        return next((one for one in self.paths if (one.steps, one.size) == (steps, size)), None)

    @property
    def coarse(self) -> tuple[int, ...]:
        """The patch sizes of the levels that are not native, finest first."""
        return tuple(patch for patch in self.patches if patch != self.native)

    @property
    def text_length(self) -> int:
        """Tokens of a prompt unless a run chooses otherwise."""
        return max((one.tokenizer.length for one in self.encoders if one.free_length), default=1)

    def size(self, *, height: int | None = None, width: int | None = None, frames: int | None = None) -> shapes.Size:
        """The size of a picture or clip; the profile's optimum where something is not given.

        Raises `UsageError` for frames where the model makes pictures.
        """
        usual = self.profile.entry[0]
        if frames is not None and not self.latent.has_frames:
            raise UsageError("this model makes pictures, which have no frames; leave them out")
        if frames is None and usual.frames:
            frames = usual.frames.optimum
        return shapes.Size(
            height=usual.height.optimum if height is None else height,
            width=usual.width.optimum if width is None else width,
            frames=frames,
        )

    def sizes(self, size: shapes.Size, *, text: int, batch: int = 1) -> dict[str, int]:
        """Symbols of the tensors' shapes for so many pictures or clips of a size.

        ``B`` samples, latent ``H`` and ``W``, of a clip ``F``, and ``L`` text tokens. Raises `UsageError` when a level
        does not divide the size, or when the profile does not hold it.
        """
        asked = {**size.by_name(), "text": text, "batch": batch}
        shapes.check(self.latent, self.patches, asked)
        if not self.profile.contains(**asked):
            what = ", ".join(f"{name} {number}" for name, number in asked.items())
            raise UsageError(
                f"{what} is outside the bundle's profile {self.profile.name!r} ({self.profile}); "
                "export again with --profile"
            )
        return shapes.to_symbols(self.latent, asked)
