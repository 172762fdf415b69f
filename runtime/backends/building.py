"""Building engines beforehand: what all backends that need it share.

What is built already is not built again; a second process that builds the same engine waits and then finds it.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timezone
from time import perf_counter

from ddit.profiles import BOUNDS, Profile
from ddit.runtime import shapes
from ddit.runtime.backends.artifacts import (
    EngineInfo,
    EngineStore,
    FileName,
    Options,
    StoredEngine,
    Target,
    content_hash,
    engine_key,
)
from ddit.runtime.bundle import Bundle, Manifest
from ddit.runtime.errors import UsageError

Report = Callable[[str], None]
# told a phase's name, steps done and their number, while the block lasts
Progress = Callable[[str], AbstractContextManager[Callable[[str, int, int], None]]]


@dataclass(frozen=True)
class Built:
    """An engine, and whether it was built now."""

    engine: StoredEngine
    new: bool


class EngineBuilder(ABC):
    """Builds one backend's engines on this machine and keeps them in the bundle's store."""

    file: FileName  # of an engine, in its folder of the store

    def __init__(self, target: Target, options: Options, report: Report, progress: Progress):
        self.target = target
        self.options = options  # that change the engine
        self.report = report
        self.progress = progress

    @abstractmethod
    def _build(self, bundle: Bundle, profile: Profile, graph: str, temporary: str) -> tuple[bytes | memoryview, int]:
        """The content of an engine's file, and the bytes of scratch memory that a run needs.

        ``temporary`` is a file's name, relative to the bundle, for weights that only the building needs. Raises
        `BackendError`.
        """

    def build(self, bundle: Bundle, profile: Profile, graphs: Sequence[str]) -> list[Built]:
        """Build the engines of graphs that are not there yet, in order.

        Raises `UsageError` for a profile that the bundle cannot serve, `BackendError` where building fails; engines
        that were finished before stay.
        """
        check_profile(bundle.manifest, profile)
        return [self._ensure(bundle, profile, graph) for graph in graphs]

    def _ensure(self, bundle: Bundle, profile: Profile, graph: str) -> Built:
        store, target = EngineStore(bundle), self.target
        content = content_hash(bundle, graph)
        key = engine_key(target.backend, graph, content, profile, target.needs, self.options)
        with store.lock(key):
            engine = store.get(key)
            if engine and engine.whole:
                self.report(f"{graph}: built already ({key})")
                return Built(engine, False)
            self.report(f"{graph}: building")
            start = perf_counter()
            with bundle.unchanged(), store.temporary_weights(key) as temporary:
                serialized, scratch = self._build(bundle, profile, graph, temporary)
            info = EngineInfo(
                backend=target.backend,
                graph=graph,
                content=content,
                profile=profile,
                target=target.needs,
                built_for=str(target),
                options=self.options,
                file=self.file,
                size=len(serialized),
                sha256=hashlib.sha256(serialized).hexdigest(),
                scratch=scratch,
                built=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                seconds=round(perf_counter() - start, 1),
            )
            return Built(store.put(info, serialized), True)


def check_profile(manifest: Manifest, profile: Profile) -> None:
    """Raise `UsageError` unless every size of a profile lies in what the bundle was exported and checked for."""
    for entry in profile.entry:
        for bound in BOUNDS:
            sizes = entry.at(bound)
            if not manifest.profile.contains(**sizes):
                raise UsageError(
                    f"profile {profile.name!r} ({entry}) leaves the bundle's own ({manifest.profile}); "
                    "export the bundle with the larger profile, or choose a smaller one"
                )
            try:
                shapes.check(manifest.latent, manifest.patches, sizes)
            except UsageError as error:
                raise UsageError(f"profile {profile.name!r}: {error}") from None
