"""A bundle on disk: its manifest, read and validated, and its files."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ddit.profiles import why_invalid
from ddit.runtime import strict_json
from ddit.runtime.bundle.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    AdaptiveCalibration,
    DynamicCalibration,
    FileInfo,
    GraphInfo,
    Manifest,
    StepPath,
)
from ddit.runtime.errors import BundleError, DditError
from ddit.runtime.files import PARTIAL, whole
from ddit.runtime.folders import locked, set_aside
from ddit.runtime.reading import read_text

ATTEMPTS = 3  # at reading a bundle that others replace in the meantime
LONGEST_MANIFEST = 64_000_000  # bytes
SMALL = 64_000_000  # bytes of a file that is read in a moment


class Bundle:
    """A bundle on disk whose manifest has been read."""

    def __init__(self, path: Path, manifest: Manifest):
        self.path = path
        self.manifest = manifest
        self._stamp: Stamp | None = None  # of bundle.json when its files were last those of the manifest

    @classmethod
    def open(cls, path: Path | str) -> "Bundle":
        """Read and validate ``bundle.json``, and see that every file is there with its recorded size.

        Hashes are left to `verify_files`: reading tens of gigabytes at every start would cost minutes.
        """
        path = Path(path)
        for attempt in range(ATTEMPTS):
            stamp = _stamp(path)
            bundle = cls(path, read_manifest(path))
            bundle._stamp = stamp
            try:
                bundle._check_sizes()
                break
            except BundleError:
                if _stamp(path) == stamp or attempt == ATTEMPTS - 1:
                    raise  # and not the manifest of one version with the files of another
        return bundle

    def _check_sizes(self) -> None:
        for name, info in self.manifest.files.items():
            size = _size(self.file(name))
            if size is None:
                raise BundleError(f"{self.path} is incomplete: {name} is missing; export it again")
            if size != info.size:
                raise BundleError(
                    f"{self.path} is damaged: {name} has {size} bytes instead of {info.size}; export it again"
                )

    def file(self, name: str) -> Path:
        """The path of one of the bundle's files."""
        return self.path / name

    def graph(self, name: str) -> GraphInfo:
        """A graph by name."""
        return self.manifest.graphs[name]

    def check_current(self) -> None:
        """Raise `BundleError` where the bundle's files are no longer those of the manifest that was read."""
        stamp = _stamp(self.path)
        if stamp == self._stamp:
            return
        # another calibration is no reason to stop, and neither are files that were added
        if not self.manifest.files.items() <= read_manifest(self.path).files.items():
            raise BundleError(f"{self.path} was exported again while it was open; open it anew")
        self._stamp = stamp

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Read files in the block: what it read belongs to the manifest, or `check_current` raises at its end."""
        try:
            yield
        except Exception:
            self.check_current()  # which then is the reason
            raise
        self.check_current()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Change files in the block: no other process changes or replaces the bundle meanwhile.

        Raises `BundleError` where it was exported again, `DditError` where it cannot be written.
        """
        try:
            with locked(self.path):
                self.check_current()
                yield
        except OSError as error:
            raise DditError(f"{self.path} cannot be written: {error.strerror or error}") from None

    def calibrate(self, calibration: DynamicCalibration | AdaptiveCalibration) -> None:
        """Keep a calibration in ``bundle.json``, in the place of an older one of its kind, steps, size and backend.

        Raises as `keep` does.
        """

        def key(one: DynamicCalibration | AdaptiveCalibration) -> tuple[object, ...]:
            return one.kind, one.steps, one.size, one.backend

        def kept(current: Manifest) -> dict[str, Any]:
            others = (one for one in current.calibrations if key(one) != key(calibration))
            return {"calibrations": (*others, calibration)}

        self.keep(kept)

    def keep_path(self, path: StepPath) -> None:
        """Keep a path in the place of an older one for the same steps and size."""

        def key(one: StepPath) -> tuple[object, ...]:
            return one.steps, one.size

        self.keep(lambda current: {"paths": (*(one for one in current.paths if key(one) != key(path)), path)})

    def keep(self, change: Callable[[Manifest], dict[str, Any]]) -> None:
        """Change fields of ``bundle.json``: ``change`` gives their new values.

        Whatever others kept there since the bundle was opened stays. The file is replaced as a whole. Raises
        `BundleError` where the bundle was exported again, `DditError` where it cannot be written.
        """
        with self.lock():
            for left in self.path.glob(f".{Path(MANIFEST).stem}{PARTIAL}*"):  # a killed process's
                left.unlink()
            current = read_manifest(self.path)
            manifest = current.model_copy(update=change(current))
            text = manifest.model_dump_json(indent=2) + "\n"
            Manifest.model_validate_json(text, strict=True)  # before it takes the place of one that can be read
            with whole(self.path / MANIFEST) as part:
                part.write_text(text, encoding="utf-8")
            self.manifest, self._stamp = manifest, _stamp(self.path)

    def verify_small(self, name: str) -> None:
        """Compare a file that is small, a graph or a tokenizer, with its hash. Raises `BundleError`.

        Libraries in other languages read these, and a damaged one can take the process with it.
        """
        info = self.manifest.files[name]
        if info.size <= SMALL and file_info(self.file(name)).sha256 != info.sha256:
            raise BundleError(f"{self.path} is damaged: could not load {name}, it has a wrong hash; export it again")

    def verify_files(self) -> Iterator[str]:
        """Compare every file with its hash; yields its name when it fits, raises `BundleError` when it does not."""
        for name, info in self.manifest.files.items():
            with self.unchanged():
                if file_info(self.file(name)).sha256 != info.sha256:
                    raise BundleError(f"{self.path} is damaged: {name} has a wrong hash; export it again")
            yield name


Stamp = tuple[int, ...]


def _stamp(path: Path) -> Stamp | None:
    """What changes whenever ``bundle.json`` is replaced."""
    try:
        found = (path / MANIFEST).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def read_manifest(path: Path) -> Manifest:
    """Read ``bundle.json`` of a bundle's folder. Raises `BundleError` with one line that says what is wrong."""
    try:
        text = read_text(path / MANIFEST, LONGEST_MANIFEST)
        content = strict_json.parse(text)
    except (FileNotFoundError, NotADirectoryError):
        if kept := set_aside(path):
            raise BundleError(
                f"{path} is being replaced, or an export was killed while it did that: "
                f"then rename {kept} to {path.name}, or export it again"
            ) from None
        what = "has no bundle.json" if path.is_dir() else "is a file" if path.exists() else "does not exist"
        raise BundleError(f"{path} is not a bundle: it {what}; make one with ddit-export") from None
    except OSError as error:
        raise BundleError(f"{path / MANIFEST} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise BundleError(f"{path / MANIFEST} cannot be read: {error}; export it again") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if type(version) is int and version != FORMAT_VERSION:
        mend = "update ddit" if version > FORMAT_VERSION else "export it again"
        raise BundleError(f"{path} has format {version}, this version reads format {FORMAT_VERSION}; {mend}")
    try:
        return Manifest.model_validate_json(text, strict=True)  # strict: a number is no text, and true no number
    except ValidationError as error:
        raise BundleError(f"{path / MANIFEST} is not valid: {why_invalid(error)}; export it again") from None


def _size(path: Path) -> int | None:
    """Bytes of a regular file; None where there is none."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from None


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
