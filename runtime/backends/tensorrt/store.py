"""The engine store: TensorRT plans of a bundle's graphs, in ``engines/<key>/`` inside the bundle.

A plan runs on the GPU model and with the TensorRT version that built it, for the shapes of its profile, and nothing in
the plan's file says so before it is loaded. So every plan lies beside a ``plan.json`` (`PlanInfo`), and its folder's
name is the hash of everything that it depends on: the graph, its weights, the profile, TensorRT, the GPU and the
builder's options. A plan that does not fit is never opened.
"""

import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ddit.profiles import Profile
from ddit.runtime.bundle import Bundle, file_info
from ddit.runtime.errors import BackendError, BundleError, UsageError

FOLDER = "engines"
PLAN, INFO = "engine.plan", "plan.json"


class Target(BaseModel):
    """What a plan is built with and for; the same on the machine that runs it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensorrt: str
    gpu: str
    compute_capability: str

    def __str__(self) -> str:
        return f"{self.gpu} (compute capability {self.compute_capability}), TensorRT {self.tensorrt}"


class BuilderOptions(BaseModel):
    """Options of the builder that change the plan."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    optimization_level: int
    workspace: int | None = None  # bytes; None: what the GPU has


class PlanInfo(BaseModel):
    """The content of ``plan.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    graph: str
    content: str  # `content_hash` of the graph
    profile: Profile
    target: Target
    options: BuilderOptions
    size: int  # bytes of the plan's file
    sha256: str
    scratch: int  # bytes of scratch memory that a context needs
    built: str  # ISO 8601, UTC
    seconds: float  # that the build took

    @property
    def key(self) -> str:
        """The name of the plan's folder."""
        return plan_key(self.graph, self.content, self.profile, self.target, self.options)


def plan_key(graph: str, content: str, profile: Profile, target: Target, options: BuilderOptions) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of everything that a plan depends on."""
    identity = {
        "graph": graph,
        "content": content,
        "profile": profile.model_dump(mode="json"),
        "target": target.model_dump(),
        "options": options.model_dump(),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def content_hash(bundle: Bundle, graph: str) -> str:
    """A hash of a graph and its weights, from the hashes in the manifest."""
    info = bundle.graph(graph)
    hashes = [bundle.manifest.files[name].sha256 for name in (info.file, *info.weights)]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """A plan on disk."""

    folder: Path
    info: PlanInfo

    @property
    def file(self) -> Path:
        """The serialized engine."""
        return self.folder / PLAN

    @property
    def whole(self) -> bool:
        """Whether the file has its recorded size."""
        return self.file.stat().st_size == self.info.size

    def map(self) -> mmap.mmap:
        """The serialized engine, memory-mapped. Raises `BackendError` where the file has not its recorded size."""
        try:
            if not self.whole:
                size = self.file.stat().st_size
                raise BackendError(
                    f"{self.file} is damaged: it has {size} bytes instead of {self.info.size}; "
                    "run ddit-export engines again"
                )
            with self.file.open("rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise BackendError(f"{self.file} cannot be read: {error.strerror}") from None

    def verify(self) -> None:
        """Compare the file with its recorded hash. Raises `BundleError`."""
        if file_info(self.file).sha256 != self.info.sha256:
            raise BundleError(f"{self.file} has a wrong hash; delete its folder and run ddit-export engines again")


class PlanStore:
    """The plans of one bundle."""

    def __init__(self, bundle: Bundle):
        self.bundle = bundle
        self.folder = bundle.path / FOLDER

    def plans(self) -> list[Plan]:
        """Every whole plan, newest first. What a killed builder left, or another version wrote, is not one."""
        found = [plan for path in self.folder.glob(f"*/{INFO}") if (plan := _read(path.parent))]
        return sorted(found, key=lambda plan: plan.info.built, reverse=True)

    def find(self, graph: str, target: Target) -> list[Plan]:
        """The plans of a graph that fit this machine, newest first. Raises `BackendError` that says why there are none.

        Several are there when a graph was built for several profiles.
        """
        content = content_hash(self.bundle, graph)
        known = [plan for plan in self.plans() if plan.info.graph == graph]
        fitting = [plan for plan in known if plan.info.content == content and plan.info.target == target]
        if fitting:
            return fitting
        rebuild = f"run: ddit-export engines {self.bundle.path}"
        if not known:
            raise BackendError(f"{self.bundle.path} has no TensorRT engine of {graph} yet; {rebuild}")
        if not any(plan.info.content == content for plan in known):
            raise BackendError(f"the TensorRT engine of {graph} was built from another version of the graph; {rebuild}")
        others = ", ".join(sorted({str(plan.info.target) for plan in known if plan.info.content == content}))
        raise BackendError(f"the TensorRT engine of {graph} was built for {others}; this is {target}; {rebuild}")

    def get(self, key: str) -> Plan | None:
        """The plan of a key, if it is there and whole."""
        return _read(self.folder / key)

    def prune(self) -> None:
        """Delete plans of graphs that the bundle no longer has: nothing can ever run them again."""
        contents = {content_hash(self.bundle, graph) for graph in self.bundle.manifest.graphs}
        for plan in self.plans():
            if plan.info.content not in contents:
                shutil.rmtree(plan.folder, ignore_errors=True)

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold a key's lock: a second process that builds the same plan waits here. A killed process lets it go."""
        from filelock import FileLock

        try:
            self.folder.mkdir(exist_ok=True)
            with FileLock(self.folder / f".{key}.lock"):
                yield
        except OSError as error:
            raise BackendError(f"{self.folder} cannot be written: {error.strerror or error}") from None

    @contextmanager
    def merged_weights(self, key: str) -> Iterator[str]:
        """A file's name, relative to the bundle, for weights that only the building needs; gone with the block.

        Call it with the key's lock held.
        """
        file = self.folder / f".{key}.weights"
        try:
            yield f"{FOLDER}/{file.name}"
        finally:
            file.unlink(missing_ok=True)

    def put(self, info: PlanInfo, content: bytes | memoryview) -> Plan:
        """Write a plan, which appears all at once. Call it with the key's lock held."""
        partial, final = self.folder / f".{info.key}.partial", self.folder / info.key
        shutil.rmtree(partial, ignore_errors=True)  # a killed builder's
        try:
            partial.mkdir()
            (partial / PLAN).write_bytes(content)
            (partial / INFO).write_text(info.model_dump_json(indent=2) + "\n", encoding="utf-8")
            shutil.rmtree(final, ignore_errors=True)  # a damaged one
            os.replace(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return Plan(final, info)


def _read(folder: Path) -> Plan | None:
    """The plan of a folder; None unless its name is the key of what it says, and its file is there."""
    if folder.name.startswith("."):
        return None
    try:
        info = PlanInfo.model_validate_json((folder / INFO).read_text(encoding="utf-8"))
    except (OSError, ValidationError, ValueError):
        return None
    return Plan(folder, info) if info.key == folder.name and (folder / PLAN).is_file() else None


def choose(plans: Sequence[Plan], sizes: Mapping[str, int]) -> tuple[Plan, int]:
    """The first plan whose profile holds the sizes (height, width, text, batch or some of them), and the entry's index.

    Raises `UsageError`.
    """
    for plan in plans:
        for index, entry in enumerate(plan.info.profile.entry):
            if entry.contains(**sizes):
                return plan, index
    asked = ", ".join(f"{name} {value}" for name, value in sizes.items())
    built = "; or ".join(str(plan.info.profile) for plan in plans)
    raise UsageError(
        f"{asked} is outside what the TensorRT engine of {plans[0].info.graph} was built for ({built}); "
        "build another: ddit-export engines BUNDLE --profile PROFILE"
    )
