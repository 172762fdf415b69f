"""The bundle: a folder with a manifest, graphs, weights and tokenizers; everything a host needs and nothing of torch.

`Manifest` is the type of ``bundle.json``; docs/bundle.md describes it field by field. `Bundle.open` reads and validates
it; `Bundle.verify_files` compares every file with its recorded size and hash.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ddit.profiles import Profile
from ddit.runtime.errors import BundleError, UsageError
from ddit.runtime.files import whole

FORMAT_VERSION = 1
MANIFEST = "bundle.json"


def _inside(name: str) -> str:
    """Refuse names that leave the bundle: a manifest may come from anywhere."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise ValueError(f"file name {name!r} leaves the bundle")
    return name


Dtype = Literal["fp32", "fp16", "bf16"]
FileName = Annotated[str, AfterValidator(_inside)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


DIMENSION = re.compile(r"(\w+)(?:([*/])(\d+))?")  # a symbol, maybe times or over a number


class TensorSpec(_Model):
    """Name, dtype and symbolic shape of a graph's input or output.

    A dimension is a number, a symbol (``"B"``), a symbol over a number (``"H/4"``) or times one (``"H*8"``).
    """

    name: str
    dtype: Literal["float32", "int64"]
    shape: tuple[int | str, ...]

    def resolve(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape in numbers. The one place where symbolic dimensions are worked out."""
        return tuple(dim if isinstance(dim, int) else resolve_dim(dim, sizes) for dim in self.shape)


def resolve_dim(dim: str, sizes: Mapping[str, int]) -> int:
    """The value of a symbolic dimension such as ``"H/4"``. Raises `ValueError` when it does not divide evenly."""
    match = DIMENSION.fullmatch(dim)
    if match is None or match[1] not in sizes:
        raise ValueError(f"dimension {dim!r} is not known")
    value, factor = sizes[match[1]], int(match[3] or 1)
    if match[2] == "*":
        return value * factor
    if value % factor:
        raise ValueError(f"{match[1]} = {value} is not a multiple of {factor}")
    return value // factor


def infer_sizes(specs: Iterable[TensorSpec], shapes: Iterable[tuple[int, ...]]) -> dict[str, int]:
    """The symbols' values from tensors' shapes: the inverse of `TensorSpec.resolve`."""
    sizes = {}
    for spec, shape in zip(specs, shapes, strict=True):
        for dim, value in zip(spec.shape, shape, strict=True):
            if isinstance(dim, str) and (match := DIMENSION.fullmatch(dim)):
                factor = int(match[3] or 1)
                sizes[match[1]] = value // factor if match[2] == "*" else value * factor
    return sizes


class GraphInfo(_Model):
    """One ONNX file: what it takes and gives, and the weight files that it points into."""

    file: FileName
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[FileName, ...] = ()
    dtype: Dtype


class LevelInfo(_Model):
    """One patch size that the bundle can run."""

    patch: int = Field(ge=1, description="side of a patch in latent pixels")
    graph: str
    trained: bool = Field(description="false: no adapter was given, so pictures suffer at this level")
    adapter_sha256: str | None = None


class ModelInfo(_Model):
    """Where the weights come from."""

    id: str
    revision: str | None = None


class LatentInfo(_Model):
    """The latent picture."""

    channels: int = Field(ge=1)
    downscale: int = Field(ge=1, description="pixels of the picture along one latent pixel")


class TokenizerInfo(_Model):
    """A ``tokenizer.json`` and how its output is filled up."""

    file: FileName
    length: int = Field(ge=1, description="tokens of a prompt, padding included")
    pad_id: int = Field(ge=0)


class SamplerInfo(_Model):
    """The fields of diffusers' `FlowMatchEulerDiscreteScheduler` that FLUX uses."""

    use_dynamic_shifting: bool
    shift: float
    base_shift: float
    max_shift: float
    base_image_seq_len: int
    max_image_seq_len: int
    steps: int = Field(ge=1, description="default number of steps")


class RotaryInfo(_Model):
    """Parameters of `ddit.runtime.rotary.rotary_tables`."""

    axes_dims: tuple[int, ...]
    theta: float


class GuidanceInfo(_Model):
    """Distilled guidance: whether the graphs take the scale as an input, and its default."""

    embedded: bool
    default: float


class ReferencePoint(_Model):
    """The statistics of smooth pictures at one noise level (`ddit.runtime.reference`)."""

    sigma: float = Field(ge=0, le=1)
    statistic: dict[int, float] = Field(description="by coarse patch, divided by the cube of the step's length in σ")


class ScheduleInfo(_Model):
    """Defaults of the dynamic schedule (`ddit.runtime.schedule.Dynamic`)."""

    tau: float = Field(gt=0, description="relative to the reference where there is one, else absolute")
    rho: float = Field(gt=0, lt=1)
    warmup: int = Field(ge=3)
    hold: int = Field(default=3, ge=1)
    coarsest: int | None = Field(default=None, description="the largest patch to use; null: all")
    reference: tuple[ReferencePoint, ...] = Field(default=(), description="what τ is relative to, by falling σ")


class Costs(_Model):
    """What a picture of one size costs on one backend, in milliseconds."""

    levels: dict[int, float] = Field(description="median of a step at every level")
    encode: float = Field(description="text encoders")
    decode: float = Field(description="latent to picture")


class CurvePoint(_Model):
    """What one τ does."""

    tau: float = Field(gt=0)
    shares: dict[int, float] = Field(description="mean share of the steps at every level")


class Calibration(ScheduleInfo):
    """Dynamic schedule settings that ``ddit-run calibrate`` found for one number of steps, size and backend."""

    steps: int = Field(ge=1)
    height: int = Field(ge=1, description="pixels")
    width: int = Field(ge=1, description="pixels")
    speedup: float = Field(gt=0, description="over the native schedule, on prompts that τ was not chosen on")
    similarity: float = Field(description="mean SSIM to the native pictures, on the same prompts")
    prompts: int = Field(ge=2, description="how many were used in all")
    backend: str = Field(description="where it was found: the speed-up counts in its milliseconds, τ in its rounding")
    costs: Costs
    curve: tuple[CurvePoint, ...] = Field(description="everything that was tried, by τ")

    @property
    def size(self) -> tuple[int, int, int]:
        """Steps, height and width."""
        return self.steps, self.height, self.width


class ParityResult(_Model):
    """One comparison of a graph's output with the original model's."""

    graph: str
    tensor: str
    case: int
    sizes: dict[str, int]
    error: float = Field(description="relative L2 error against torch")
    tolerance: float
    checked: str = Field(description="'full', or in words what was checked instead")


class FileInfo(_Model):
    """A file's fingerprint."""

    sha256: str
    size: int = Field(ge=0)


class Manifest(_Model):
    """The content of ``bundle.json``."""

    format_version: Literal[1] = 1
    family: Literal["flux"]
    model: ModelInfo
    dtype: Dtype
    opset: int
    native: int = Field(ge=1, description="the patch that the base model was trained at")
    levels: tuple[LevelInfo, ...] = Field(min_length=1)
    graphs: dict[str, GraphInfo]
    profile: Profile
    latent: LatentInfo
    tokenizers: dict[str, TokenizerInfo]
    sampler: SamplerInfo
    rotary: RotaryInfo
    guidance: GuidanceInfo
    carry: float = Field(ge=0, le=1, description="share of the last native step's detail that coarse steps take over")
    schedule: ScheduleInfo
    calibrations: tuple[Calibration, ...] = ()
    parity: tuple[ParityResult, ...]
    files: dict[FileName, FileInfo]
    made_with: dict[str, str]

    @property
    def patches(self) -> tuple[int, ...]:
        """The levels' patch sizes, finest first."""
        return tuple(sorted(level.patch for level in self.levels))

    def level(self, patch: int) -> LevelInfo:
        """The level of a patch size. Raises `UsageError` for one that the bundle has not."""
        for level in self.levels:
            if level.patch == patch:
                return level
        raise UsageError(f"the bundle has no level {patch}; it has {', '.join(map(str, self.patches))}")

    def dynamic(self, *, steps: int, height: int, width: int, backend: str) -> ScheduleInfo:
        """The dynamic schedule's settings for a run: its calibration, or the bundle's defaults where there is none."""
        return self.calibration(steps=steps, height=height, width=width, backend=backend) or self.schedule

    def calibration(self, *, steps: int, height: int, width: int, backend: str) -> Calibration | None:
        """What was found for a number of steps and a size on this backend, or else on the last one that was tried."""
        found = [one for one in self.calibrations if one.size == (steps, height, width)]
        return next((one for one in found if one.backend == backend), found[-1] if found else None)

    def sizes(self, *, height: int, width: int, text: int, batch: int = 1) -> dict[str, int]:
        """Symbols of the tensors' shapes for a picture of ``height``×``width`` pixels.

        ``B`` pictures, latent ``H`` and ``W``, ``L`` text tokens. Raises `UsageError` when a level does not divide the
        size, or when the profile does not hold it.
        """
        unit = self.latent.downscale * max(self.patches)
        for name, value in (("height", height), ("width", width)):
            if value % unit or value < unit:
                below = max(value // unit, 1) * unit
                near = sorted({below, below + unit} if value >= unit else {unit})
                raise UsageError(
                    f"{name} {value} is not a multiple of {unit}, the coarsest level's patch in pixels; "
                    f"nearest: {' or '.join(map(str, near))}"
                )
        if not self.profile.contains(height=height, width=width, text=text, batch=batch):
            raise UsageError(
                f"height {height}, width {width}, text {text}, batch {batch} is outside the bundle's profile "
                f"{self.profile.name!r} ({self.profile}); export again with --profile"
            )
        scale = self.latent.downscale
        return {"B": batch, "H": height // scale, "W": width // scale, "L": text}


class Bundle:
    """A bundle on disk whose manifest has been read."""

    def __init__(self, path: Path, manifest: Manifest):
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path | str) -> "Bundle":
        """Read and validate ``bundle.json``, and see that every file is there with its recorded size.

        Hashes are left to `verify_files`: reading tens of gigabytes at every start would cost minutes.
        """
        path = Path(path)
        bundle = cls(path, read_manifest(path))
        for name, info in bundle.manifest.files.items():
            size = bundle.file(name).stat().st_size if bundle.file(name).is_file() else None
            if size is None:
                raise BundleError(f"{path} is incomplete: {name} is missing; export it again")
            if size != info.size:
                raise BundleError(f"{path} is damaged: {name} has {size} bytes instead of {info.size}; export it again")
        return bundle

    def file(self, name: str) -> Path:
        """The path of one of the bundle's files."""
        return self.path / name

    def graph(self, name: str) -> GraphInfo:
        """A graph by name."""
        return self.manifest.graphs[name]

    def calibrate(self, calibration: Calibration) -> None:
        """Keep a calibration in ``bundle.json``, in the place of an older one for the same steps, size and backend.

        The file is replaced as a whole. Raises `DditError` where it cannot be written.
        """
        key = (calibration.size, calibration.backend)
        others = (one for one in self.manifest.calibrations if (one.size, one.backend) != key)
        manifest = self.manifest.model_copy(update={"calibrations": (*others, calibration)})
        with whole(self.path / MANIFEST) as part:
            part.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        self.manifest = manifest

    def verify_files(self) -> Iterator[str]:
        """Compare every file with its hash; yields its name when it fits, raises `BundleError` when it does not."""
        for name, info in self.manifest.files.items():
            if file_info(self.file(name)).sha256 != info.sha256:
                raise BundleError(f"{self.path} is damaged: {name} has a wrong hash; export it again")
            yield name


def read_manifest(path: Path) -> Manifest:
    """Read ``bundle.json`` of a bundle's folder. Raises `BundleError` with one line that says what is wrong."""
    try:
        content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = "has no bundle.json" if path.is_dir() else "does not exist"
        raise BundleError(f"{path} is not a bundle: it {what}; make one with ddit-export") from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{path / MANIFEST} cannot be read: {error}") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise BundleError(f"{path} has format {version}, this version reads up to {FORMAT_VERSION}; update ddit")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "top"
        raise BundleError(f"{path / MANIFEST} is not valid: {where}: {first['msg']}; export it again") from None


def file_info(path: Path) -> FileInfo:
    """Size and SHA-256 of a file."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
            return FileInfo(sha256=digest.hexdigest(), size=file.tell())
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from None
