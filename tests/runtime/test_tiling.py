"""Decoding in tiles, beside diffusers' own."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan
from PIL import Image

from conftest import run
from ddit.runtime import Bundle, Pipeline
from ddit.runtime.backends.onnxruntime.host import OnnxRuntimeBackend
from ddit.runtime.batch.ray_data import Maker
from ddit.runtime.cli import main
from ddit.runtime.errors import NotFiniteError, UsageError
from ddit.runtime.request import Request
from ddit.runtime.shapes import Size
from ddit.runtime.tiling import spans, tilings, whole
from fake_engines import fake_pipeline

TILE = 64  # pixels, 8 latent ones
SMALL = {"height": 128, "width": 128, "steps": 1, "schedule": "native"}


def tiled(pipeline: Pipeline, latents: np.ndarray) -> np.ndarray:
    """Our pieces put together, before they are rounded: (B, 3, frames, height, width)."""
    decoder = pipeline._decoder
    tiles = decoder.tiling(*latents.shape[-2:], len(latents))
    height, width = (8 * extent for extent in latents.shape[-2:])
    chunks: dict[int, np.ndarray] = {}
    for number, rows, columns, values in tiles.decode(latents, decoder._decode):
        chunks.setdefault(number, np.full((*values.shape[:3], height, width), np.nan, np.float32))
        chunks[number][..., rows, columns] = values
    return np.concatenate([chunks[number] for number in sorted(chunks)], axis=2)


def pixels(clip) -> np.ndarray:
    """A clip's frames (3, frames, height, width) in 0 to 255."""
    return np.stack([np.asarray(frame, int) for frame in clip]).transpose(3, 0, 1, 2)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


@pytest.fixture(scope="module")
def vae(tiny_pipeline) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(tiny_pipeline / "vae")


@pytest.fixture(scope="module")
def wan_vae(tiny_wan) -> AutoencoderKLWan:
    return AutoencoderKLWan.from_pretrained(tiny_wan / "vae")


@pytest.fixture
def pipeline(tiny_bundle) -> Pipeline:
    return Pipeline.open(tiny_bundle, backend="cpu", vae_tiling=TILE)


@pytest.mark.parametrize(
    ("tile", "size"),
    [(64, size) for size in ((16, 16), (8, 20), (7, 9), (14, 15), (24, 6), (31, 17), (1, 33))]
    + [(32, (7, 11)), (96, (31, 17))],
    ids=str,
)
def test_a_picture_is_diffusers(tiny_bundle, vae, tile, size):
    pipeline = Pipeline.open(tiny_bundle, backend="cpu", vae_tiling=tile)
    latents = noise(2, 4, *size)
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // 8
    with torch.no_grad():
        scaled = torch.from_numpy(latents) / vae.config.scaling_factor + vae.config.shift_factor
        expected = vae.decode(scaled).sample.numpy()
    found = tiled(pipeline, latents)[:, :, 0]
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    for (image,), other in zip(pipeline.decode(latents), expected, strict=True):
        wanted = np.round((np.clip(other, -1, 1) + 1) * 127.5)
        assert np.abs(np.asarray(image, int).transpose(2, 0, 1) - wanted).max() <= 1


@pytest.mark.parametrize(("frames", "size"), [(1, (16, 16)), (2, (8, 20)), (3, (9, 5))], ids=str)
def test_a_clip_is_diffusers(wan_bundle, wan_vae, frames, size):
    pipeline = Pipeline.open(wan_bundle, backend="cpu", vae_tiling=TILE)
    latents = noise(2, 16, frames, *size)
    wan_vae.enable_tiling(TILE, TILE, TILE * 3 // 4, TILE * 3 // 4)
    mean, deviation = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (wan_vae.config.latents_mean, wan_vae.config.latents_std)
    )
    with torch.no_grad():
        expected = wan_vae.decode(torch.from_numpy(latents) * deviation + mean).sample.numpy()
    found = tiled(pipeline, latents).clip(-1, 1)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=2e-5)
    for clip, other in zip(pipeline.decode(latents), expected, strict=True):
        assert np.abs(pixels(clip) - np.round((other + 1) * 127.5)).max() <= 1


def test_what_is_no_larger_than_a_tile_is_decoded_whole(tiny_bundle, wan_bundle):
    for bundle, latents in ((tiny_bundle, noise(2, 4, 8, 7)), (wan_bundle, noise(1, 16, 2, 8, 8))):
        expected = Pipeline.open(bundle, backend="cpu").decode(latents)
        found = Pipeline.open(bundle, backend="cpu", vae_tiling=TILE).decode(latents)
        for clip, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(pixels(clip), pixels(other))


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("tile", [4, 8, 12])
def test_tiles_cover_every_side(tile, each):
    for extent in range(1, 60):
        side = spans(extent, tile, whole=each)
        assert [one.start for one in side[1:]] == [one.end for one in side[:-1]]
        assert (side[0].begin, side[0].start, side[-1].end, side[-1].stop) == (0, 0, extent, extent)
        for one in side:
            assert one.begin <= one.start < one.end <= one.stop <= one.begin + tile
            assert one.stop - one.end <= tile // 4
        if each:
            assert {one.stop - one.begin for one in side} == {min(tile, extent)}
            assert len({one.begin for one in side}) == len(side), "no tile is decoded twice"


def test_whole_tiles_are_parts_of_one_picture(tiny_bundle):
    """A decoder without a neighbourhood gives the same picture whatever its tiles are."""
    latent = Pipeline.open(tiny_bundle, backend="cpu").bundle.manifest.latent

    def enlarge(some):
        yield some.repeat(8, axis=-2).repeat(8, axis=-1)

    latents = noise(1, 3, 21, 30)
    ((_, _, _, expected),) = whole(latent, 21, 30).decode(latents, enlarge)
    for tiles in tilings(latent, 21, 30, TILE):
        found = np.full_like(expected, np.nan)
        for _, rows, columns, values in tiles.decode(latents, enlarge):
            found[..., rows, columns] = values
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_engines_that_hold_no_short_tile_get_whole_ones(tiny_bundle, monkeypatch):
    """An engine is built for a range of sizes, and the tiles at the edges may be smaller."""
    asked: list[tuple[int, int]] = []

    def check(self, sizes, graphs=None):
        if graphs is not None:
            assert [*graphs] == ["vae_decoder"]
            asked.append((sizes["height"], sizes["width"]))
            if min(sizes["height"], sizes["width"]) < least:
                raise UsageError(f"height {sizes['height']} is outside what the engine was built for")

    monkeypatch.setattr(OnnxRuntimeBackend, "check", check)
    least = TILE
    pipeline = Pipeline.open(tiny_bundle, backend="cpu", vae_tiling=TILE)
    pipeline.resolve([Request("red", **SMALL)])
    assert asked == [(64, 64), (64, 32), (64, 64)]
    (picture,), (short,) = (
        one.decode(noise(1, 4, 16, 16))[0] for one in (pipeline, Pipeline.open(tiny_bundle, backend="cpu"))
    )
    assert picture.size == short.size == (128, 128)
    least = 128
    with pytest.raises(UsageError, match=r"^the VAE cannot decode tiles of 64 pixels here: height 64 is outside"):
        Pipeline.open(tiny_bundle, backend="cpu", vae_tiling=TILE).resolve([Request("red", **SMALL)])


def test_progress_is_told_of_every_tile(pipeline, wan_bundle):
    told: list[tuple[int, int]] = []
    pipeline.decode(noise(2, 4, 16, 8), lambda *done: told.append(done))
    assert told == [(done, 12) for done in range(1, 13)]
    told.clear()
    clips = Pipeline.open(wan_bundle, backend="cpu", vae_tiling=TILE)
    clips.decode(noise(2, 16, 3, 16, 6), lambda *done: told.append(done))
    assert told == [(done, 9) for done in range(1, 10)]
    pipeline("red", **SMALL, on_frame=lambda *done: told.append(done))
    assert told[-1] == (9, 9)


def test_a_failure_gives_the_buffers_back(wan_bundle):
    _, backend, _ = fake_pipeline(Bundle.open(wan_bundle))
    pipeline = Pipeline(backend.bundle, backend, vae_tiling=TILE)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.decode(noise(1, 16, 2, 16, 16), stop)
    assert not backend.workspaces
    backend.spoil = lambda graph, inputs, outputs: [values.fill(np.nan) for values in outputs.values()]
    with pytest.raises(NotFiniteError):
        pipeline.decode(noise(1, 16, 2, 16, 16))
    assert not backend.workspaces


def test_the_decoder_takes_its_memory_once(pipeline):
    """ONNX Runtime's plan of all buffers would lie beside what the first tile of a size took."""
    plans = {
        graph: pipeline.backend.engine(graph).session.get_session_options().enable_mem_pattern
        for graph in ("vae_decoder", "level-2")
    }
    assert plans == {"vae_decoder": False, "level-2": True}


def test_a_budget_is_planned_from_what_tiles_cost(rich_bundle):
    assert Pipeline.open(rich_bundle, backend="cpu").bundle.manifest.calibrations
    pipeline = Pipeline.open(rich_bundle, backend="cpu", vae_tiling=32)
    known = pipeline.bundle.manifest.calibrations[0]
    assert pipeline.tiled(known.size)
    assert pipeline.costs(known.size) != known.costs


@pytest.mark.parametrize(
    ("side", "words"),
    [
        (100, r"tiles of 100 pixels do not fit the VAE: their side is a multiple of 32; nearest: 96 or 128"),
        (0, "nearest: 32"),
        (-64, "nearest: 32"),
        (31, "nearest: 32"),
        (10**9, "nearest: 65536"),
        (True, "nearest: 32"),
        (64.0, "must be a whole number of pixels, not 64.0"),
        ("64", "must be a whole number of pixels, not '64'"),
    ],
)
def test_tiles_that_do_not_fit_are_refused(tiny_bundle, side, words):
    with pytest.raises(UsageError, match=words):
        Pipeline.open(tiny_bundle, backend="cpu", vae_tiling=side)


def test_generate_decodes_in_tiles(tiny_bundle, tmp_path):
    out, lines = tmp_path / "a.png", tmp_path / "lines.jsonl"
    options = ("--backend", "cpu", "--vae-tiling", TILE, "--steps", 1, "--height", 128, "--width", 64, "--seed", 3)
    result = run(main, "generate", tiny_bundle, "red", *options, "--out", out)
    assert result.exit_code == 0, result.stderr
    pipeline = Pipeline.open(tiny_bundle, backend="cpu", vae_tiling=TILE)
    expected = pipeline("red", steps=1, height=128, width=64, seed=3).image
    np.testing.assert_array_equal(np.asarray(Image.open(out)), np.asarray(expected))
    untiled = Pipeline.open(tiny_bundle, backend="cpu")("red", steps=1, height=128, width=64, seed=3).image
    assert np.any(np.asarray(untiled) != np.asarray(expected))
    lines.write_text('{"prompt": "red"}\n')
    result = run(main, "generate", tiny_bundle, "--prompts", lines, *options, "--out", tmp_path / "many")
    assert result.exit_code == 0, result.stderr
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "many" / "00001.png")), np.asarray(expected))


@pytest.mark.parametrize(
    "arguments", [["generate", "red"], ["generate", "--prompts"], ["generate", "--ray", "--prompts"], ["serve"]]
)
def test_commands_refuse_tiles_first(tiny_bundle, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"prompt": "red"}\n')
    command, *rest = arguments
    more = [lines] if rest and rest[-1] == "--prompts" else []
    result = run(main, command, tiny_bundle, *rest, *more, "--backend", "cpu", "--vae-tiling", 100)
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "error: tiles of 100 pixels do not fit the VAE: their side is a multiple of 32; nearest: 96 or 128"
    ]
    assert [*tmp_path.iterdir()] == [lines]


def test_servers_decode_in_tiles(tiny_bundle, tmp_path, monkeypatch):
    from ddit.runtime.serving import server

    served: list[Pipeline] = []
    monkeypatch.setattr(server, "serve", lambda pipeline, listening, **options: served.append(pipeline))
    for options in ((), ("--vae-tiling", TILE)):
        result = run(main, "serve", tiny_bundle, "--backend", "cpu", "--port", 0, *options)
        assert result.exit_code == 0, result.stderr
    assert [pipeline.tiled(Size(128, 128)) for pipeline in served] == [False, True]


def test_processes_of_a_cluster_decode_in_tiles(tiny_bundle, tmp_path):
    maker = Maker(str(tiny_bundle), "cpu", 1, TILE, 1, str(tmp_path), None)
    assert maker._worker.room.pipeline.tiled(Size(128, 128))
    maker._worker.stop()
