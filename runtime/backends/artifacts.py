"""The engine store: what backends made of a bundle's graphs beforehand, in ``engines/<key>/`` inside the bundle.

An engine runs on the kind of machine and with the libraries that it was built for, for the shapes of its profile, and
nothing in the backend's own file says so before it is loaded. So every engine lies beside an ``engine.json``
(`EngineInfo`), and its folder's name is the hash of everything that it depends on: the backend, the graph and its
weights, the profile, the target and the builder's options. An engine that does not fit is never opened.

The store knows no backend: targets and options are plain data.
"""

import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from ddit.profiles import Profile
from ddit.runtime.bundle import Bundle, file_info
from ddit.runtime.errors import BackendError, BundleError
from ddit.runtime.folders import flush, replace_folder

FOLDER = "engines"
INFO = "engine.json"
DEFAULT_BACKEND = "tensorrt"  # ddit-export engines builds for it unless another is asked for

Options = Mapping[str, str | int | float | None]
FileName = Annotated[str, StringConstraints(pattern=r"^[\w-][\w.-]*$")]  # never another folder's


@dataclass(frozen=True)
class Target:
    """What a backend's engines are built for: they run only where the backend finds the same ``needs``."""

    backend: str  # its name in the registry
    title: str  # its name as people write it
    needs: Mapping[str, str]  # for instance the library's version and the GPU
    words: str  # the needs, for people

    def __str__(self) -> str:
        return self.words


class EngineInfo(BaseModel):
    """The content of ``engine.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: str
    graph: str
    content: str  # `content_hash` of the graph
    profile: Profile
    target: Mapping[str, str]  # `Target.needs`
    built_for: str  # the target, for people
    options: Options  # of the builder, those that change the engine
    file: FileName  # the engine's own, beside this one
    size: int  # of that file, in bytes
    sha256: str
    scratch: int  # bytes of scratch memory that a run needs
    built: str  # ISO 8601, UTC
    seconds: float  # that the build took

    @property
    def key(self) -> str:
        """The name of the engine's folder."""
        return engine_key(self.backend, self.graph, self.content, self.profile, self.target, self.options)


def engine_key(
    backend: str, graph: str, content: str, profile: Profile, target: Mapping[str, str], options: Options
) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of everything that an engine depends on."""
    identity = {
        "backend": backend,
        "graph": graph,
        "content": content,
        "profile": profile.model_dump(mode="json"),
        "target": dict(target),
        "options": dict(options),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def content_hash(bundle: Bundle, graph: str) -> str:
    """A hash of a graph and its weights, from the hashes in the manifest."""
    info = bundle.graph(graph)
    hashes = [bundle.manifest.files[name].sha256 for name in (info.file, *info.weights)]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def build_command(bundle: Path, backend: str) -> str:
    """The command that builds a bundle's engines for a backend."""
    return f"ddit-export engines {bundle}" + ("" if backend == DEFAULT_BACKEND else f" --backend {backend}")


@dataclass(frozen=True)
class StoredEngine:
    """An engine on disk."""

    folder: Path
    info: EngineInfo

    @property
    def file(self) -> Path:
        """The backend's own file."""
        return self.folder / self.info.file

    @property
    def whole(self) -> bool:
        """Whether the file has its recorded size."""
        return self.file.stat().st_size == self.info.size

    @property
    def build_command(self) -> str:
        """The command that builds it again."""
        return build_command(self.folder.parent.parent, self.info.backend)

    def check(self) -> None:
        """Raise `BackendError` where the file differs from its recorded size."""
        try:
            size = self.file.stat().st_size
        except OSError as error:
            raise BackendError(f"{self.file} cannot be read: {error.strerror}; run: {self.build_command}") from None
        if size != self.info.size:
            raise BackendError(
                f"{self.file} is damaged: it has {size} bytes instead of {self.info.size}; run: {self.build_command}"
            )

    def map(self) -> mmap.mmap:
        """The file, memory-mapped. Raises `BackendError` as `check` does."""
        self.check()
        try:
            with self.file.open("rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise BackendError(f"{self.file} cannot be read: {error.strerror}") from None

    def verify(self) -> None:
        """Compare the file with its recorded hash. Raises `BundleError`."""
        if file_info(self.file).sha256 != self.info.sha256:
            raise BundleError(f"{self.file} has a wrong hash; delete its folder and run: {self.build_command}")


class EngineStore:
    """The engines of one bundle, of all backends."""

    def __init__(self, bundle: Bundle):
        self.bundle = bundle
        self.folder = bundle.path / FOLDER

    def engines(self) -> list[StoredEngine]:
        """Every whole engine, newest first. What a killed builder left, or another version wrote, is not one."""
        found = [engine for path in self.folder.glob(f"*/{INFO}") if (engine := _read(path.parent))]
        return sorted(found, key=lambda engine: engine.info.built, reverse=True)

    def find(self, graph: str, target: Target) -> list[StoredEngine]:
        """The engines of a graph that fit a target, newest first. Raises `BackendError` that says why there are none.

        Several are there when a graph was built for several profiles.
        """
        content = content_hash(self.bundle, graph)
        known = [
            engine for engine in self.engines() if (engine.info.backend, engine.info.graph) == (target.backend, graph)
        ]
        current = [engine for engine in known if engine.info.content == content]
        fitting = [engine for engine in current if engine.info.target == target.needs]
        if fitting:
            return fitting
        what, rebuild = f"{target.title} engine of {graph}", f"run: {build_command(self.bundle.path, target.backend)}"
        if not known:
            raise BackendError(f"{self.bundle.path} has no {what} yet; {rebuild}")
        if not current:
            raise BackendError(f"the {what} was built from another version of the graph; {rebuild}")
        others = ", ".join(sorted({engine.info.built_for for engine in current}))
        raise BackendError(f"the {what} was built for {others}; this is {target}; {rebuild}")

    def get(self, key: str) -> StoredEngine | None:
        """The engine of a key, if it is there."""
        return _read(self.folder / key)

    def adopt(self, other: "EngineStore") -> None:
        """Take over the engines of an older version of the bundle whose graphs this one still has.

        They become hard links, or copies where the filesystem has no links: the older bundle stays whole.
        """
        contents = {content_hash(self.bundle, graph) for graph in self.bundle.manifest.graphs}
        for engine in other.engines():
            if engine.info.content not in contents:
                continue
            folder = self.folder / engine.folder.name
            folder.mkdir(parents=True)
            for name in (engine.info.file, INFO):
                try:
                    os.link(engine.folder / name, folder / name)
                except OSError:
                    shutil.copy2(engine.folder / name, folder / name)

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold a key's lock: a second process that builds the same engine waits here. A killed process lets it go."""
        from filelock import FileLock

        try:
            self.folder.mkdir(exist_ok=True)
            with FileLock(self.folder / f".{key}.lock"):
                yield
        except OSError as error:
            raise BackendError(f"{self.folder} cannot be written: {error.strerror or error}") from None

    @contextmanager
    def temporary_weights(self, key: str) -> Iterator[str]:
        """A file's name, relative to the bundle, for weights that only the building needs; gone with the block.

        Call it with the key's lock held.
        """
        file = self.folder / f".{key}.weights"
        try:
            yield f"{FOLDER}/{file.name}"
        finally:
            file.unlink(missing_ok=True)

    def put(self, info: EngineInfo, content: bytes | memoryview) -> StoredEngine:
        """Write an engine, which appears all at once. Call it with the key's lock held.

        Raises `BundleError` where the bundle was exported again meanwhile: the engine may be of either's graphs.
        """
        partial, final = self.folder / f".{info.key}.partial", self.folder / info.key
        shutil.rmtree(partial, ignore_errors=True)  # a killed builder's
        try:
            with self.bundle.unchanged():
                partial.mkdir()
                (partial / info.file).write_bytes(content)
                (partial / INFO).write_text(info.model_dump_json(indent=2) + "\n", encoding="utf-8")
                flush(partial)
            with self.bundle.lock():
                replace_folder(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # or the damaged one that was there
        return StoredEngine(final, info)


def _read(folder: Path) -> StoredEngine | None:
    """The engine of a folder; None unless its name is the key of what it says, and its file is there."""
    if folder.name.startswith("."):
        return None
    try:
        info = EngineInfo.model_validate_json((folder / INFO).read_text(encoding="utf-8"))
    except (OSError, ValidationError, ValueError):
        return None
    return StoredEngine(folder, info) if info.key == folder.name and (folder / info.file).is_file() else None
