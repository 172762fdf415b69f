"""Fixtures: a tiny random pipeline, an adapter for it, and the bundle that the command line makes of them."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from conformance_bundle import CLIP, CLIP_SCHEDULES, PICTURES, SIZE, STEPS, enrich


def run(command, *arguments: object) -> Result:
    """Run a command of ours in this process; an exception that it does not handle fails the test."""
    return CliRunner(catch_exceptions=False).invoke(command, [str(argument) for argument in arguments])


def pytest_addoption(parser: pytest.Parser) -> None:
    """A GPU machine without torch can run the tests marked ``gpu`` on bundles that another machine made."""
    parser.addoption(
        "--bundles", type=Path, help="folder of tiny.bundle and opset17.bundle, made if they are not there"
    )
    parser.addoption(
        "--thorough",
        action="store_true",
        help="many more examples of hostile input, others every time (robustness/); also what takes minutes",
    )


def pytest_terminal_summary(terminalreporter) -> None:
    """What the robustness tests tried."""
    if (outcomes := sys.modules.get("outcomes")) and outcomes.COUNTS:
        terminalreporter.section("hostile input")
        for line in outcomes.report():
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory, pytestconfig) -> Path:
    """A folder that all workers of a parallel run share."""
    if folder := pytestconfig.getoption("--bundles"):
        folder.mkdir(parents=True, exist_ok=True)
        return folder.resolve()  # some tests change the working directory
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def make_once(path: Path, make) -> Path:
    """``make(path)`` in the first worker that comes by; the others wait for it."""
    from filelock import FileLock

    with FileLock(f"{path}.lock"):
        if not path.exists():
            try:
                make(path)
            except BaseException:  # half of it does not stay
                shutil.rmtree(path, ignore_errors=True)
                raise
    return path


@pytest.fixture(scope="session")
def tiny_pipeline(shared_folder) -> Path:
    """A diffusers folder like FLUX.1-dev's."""

    def save(path: Path) -> None:
        from tiny import save_tiny_pipeline

        save_tiny_pipeline(path)

    return make_once(shared_folder / "tiny", save)


@pytest.fixture(scope="session")
def tiny_schnell(shared_folder) -> Path:
    """A diffusers folder like FLUX.1-schnell's: no guidance, another shift."""

    def save(path: Path) -> None:
        from tiny import save_tiny_pipeline

        save_tiny_pipeline(path, guidance=False)

    return make_once(shared_folder / "tiny-schnell", save)


@pytest.fixture(scope="session")
def tiny_adapter(shared_folder, tiny_pipeline) -> Path:
    """An adapter of random tensors for levels 4 and 8 of the tiny pipeline."""

    def save(path: Path) -> None:
        from tiny import save_tiny_adapter

        save_tiny_adapter(path, tiny_pipeline)

    return make_once(shared_folder / "tiny.adapter", save)


@pytest.fixture(scope="session")
def tiny_bundle(shared_folder, tiny_pipeline, tiny_adapter) -> Path:
    """The tiny pipeline with its adapter, exported at levels 2, 4 and 8 in float32."""
    from ddit.exporter.cli import main

    def export(path: Path) -> None:
        options = ("--levels", "2,4,8", "--adapter", tiny_adapter, "--dtype", "fp32", "--profile", "256", "--out", path)
        result = run(main, "flux", "--model", tiny_pipeline, *options)
        assert result.exit_code == 0, result.stderr

    return make_once(shared_folder / "tiny.bundle", export)


@pytest.fixture(scope="session")
def opset17_bundle(shared_folder, tiny_pipeline, tiny_adapter) -> Path:
    """The tiny pipeline at opset 17, levels 2 and 4: graphs that every TensorRT reads."""

    from ddit.exporter.cli import main

    def export(path: Path) -> None:
        options = ("--levels", "2,4", "--adapter", tiny_adapter, "--dtype", "fp32", "--profile", "256", "--opset", "17")
        result = run(main, "flux", "--model", tiny_pipeline, *options, "--out", path)
        assert result.exit_code == 0, result.stderr

    return make_once(shared_folder / "opset17.bundle", export)


@pytest.fixture(scope="session")
def rich_bundle(shared_folder, tiny_bundle) -> Path:
    """The tiny bundle with a curve of smooth pictures, paths and calibrations."""

    def enriched(path: Path) -> None:
        shutil.copytree(tiny_bundle, path)
        enrich(path, PICTURES)

    return make_once(shared_folder / "rich.bundle", enriched)


@pytest.fixture(scope="session")
def vectors(shared_folder, rich_bundle) -> Path:
    """The conformance vectors of that bundle."""
    size = ("--height", SIZE[0], "--width", SIZE[1])
    return make_once(shared_folder / "vectors", lambda path: write_vectors(rich_bundle, path, *size))


def write_vectors(bundle: Path, path: Path, *options: object) -> None:
    """The conformance vectors of a bundle."""
    from conformance import main

    result = run(main, bundle, "--out", path, "--steps", STEPS, *options)
    assert result.exit_code == 0, result.stderr


@pytest.fixture(scope="session")
def tiny_wan(shared_folder) -> Path:
    """A diffusers folder like Wan 2.1 T2V 1.3B's."""

    def save(path: Path) -> None:
        from tiny_wan import save_tiny_pipeline

        save_tiny_pipeline(path)

    return make_once(shared_folder / "tiny-wan", save)


WAN_PROFILE = """
[[entry]]
frames = [1, 9, 81]
height = [64, 64, 256]
width = [64, 64, 256]
text = [8, 16, 16]
batch = [1, 1, 4]
"""


def export_wan(path: Path, scheduler=None, *, levels: str) -> None:
    """A tiny Wan pipeline with an adapter for its coarse levels, exported in float32."""
    from ddit.exporter.cli import main
    from tiny_wan import save_tiny_adapter, save_tiny_pipeline

    model, profile, adapter = (path.with_suffix(suffix) for suffix in (".model", ".toml", ".adapter"))
    save_tiny_pipeline(model, scheduler=scheduler)
    profile.write_text(WAN_PROFILE)
    coarse = tuple(int(patch) for patch in levels.split(",")[1:])
    options: list[object] = ["--levels", levels, "--dtype", "fp32", "--profile", profile, "--out", path]
    if coarse:
        options += ["--adapter", save_tiny_adapter(adapter, model, coarse)]
    result = run(main, "wan", "--model", model, *options)
    assert result.exit_code == 0, result.stderr


@pytest.fixture(scope="session")
def wan_bundle(shared_folder) -> Path:
    """A tiny Wan 2.1 with UniPC, at levels 2, 4 and 8."""
    return make_once(shared_folder / "wan.bundle", lambda path: export_wan(path, levels="2,4,8"))


@pytest.fixture(scope="session")
def rich_wan_bundle(shared_folder, wan_bundle) -> Path:
    """The tiny Wan bundle with a curve of smooth clips, paths and calibrations."""

    def enriched(path: Path) -> None:
        shutil.copytree(wan_bundle, path)
        enrich(path, [CLIP])

    return make_once(shared_folder / "rich-wan.bundle", enriched)


@pytest.fixture(scope="session")
def clip_vectors(shared_folder, rich_wan_bundle) -> Path:
    """The conformance vectors of that bundle."""
    options: list[object] = [word for name, value in CLIP.items() for word in (f"--{name}", value)]
    options += [word for schedule in CLIP_SCHEDULES for word in ("--schedule", schedule)]
    return make_once(shared_folder / "clip-vectors", lambda path: write_vectors(rich_wan_bundle, path, *options))


@pytest.fixture(scope="session")
def wan_euler_bundle(shared_folder) -> Path:
    """The same with Euler's method, at the native level alone."""
    from tiny_wan import euler

    return make_once(shared_folder / "wan-euler.bundle", lambda path: export_wan(path, euler(), levels="2"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    if torch := sys.modules.get("torch"):  # imported by a test that needs it
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _accelerate_starts_anew() -> Iterator[None]:
    """A process trains in one precision only; here many trainings share a process."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)
