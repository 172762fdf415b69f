"""Measure what decoding a picture takes, whole and in tiles: peak memory and seconds.

    python scripts/decoder_memory.py flux.bundle --backend cpu --size 1024x1024 --size 2048x2048 --tile 0 --tile 512

Every figure is of a process of its own, which opens nothing but the decoder and decodes one latent of random numbers.
The size may lie outside the bundle's profile. Needs the runtime only.
"""

import multiprocessing
from itertools import product
from pathlib import Path
from time import perf_counter

import click
import numpy as np

from benchmark import read_size
from ddit.runtime import Bundle, Pipeline
from ddit.runtime.commands.options import THREADS
from ddit.runtime.console import DditCommand, set_up_logging
from ddit.runtime.errors import UsageError
from ddit.runtime.shapes import Size, resolve, to_symbols
from ddit.runtime.tiling import check_side
from ddit.runtime.tools.bench import peak_memory_mb


@click.command(cls=DditCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("path", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option("--backend", default="cpu", show_default=True)
@click.option(
    "--size", "sizes", multiple=True, default=("1024x1024",), show_default=True, help="HEIGHTxWIDTH in pixels."
)
@click.option("--tile", "tiles", type=int, multiple=True, default=(0, 512), show_default=True,
              help="Side of the tiles in pixels; 0 for none.")  # fmt: skip
@THREADS
def main(path: Path, backend: str, sizes: tuple[str, ...], tiles: tuple[int, ...], threads: int | None) -> None:
    """Measure what decoding a picture takes, whole and in tiles."""
    set_up_logging(0)
    manifest = Bundle.open(path).manifest
    if manifest.latent.has_frames:
        raise UsageError("this bundle makes clips; name one that makes pictures")
    for tile in tiles:
        check_side(manifest.latent, tile or None)
    weights = sum(
        manifest.files[file].size for graph in manifest.decoder.graphs for file in manifest.graphs[graph].weights
    )
    wanted = [Size(*read_size(size)) for size in sizes]
    click.echo("| size | tiles | peak memory | over the weights | seconds |\n|---|---|---|---|---|")
    for size, tile in product(wanted, tiles):
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # a peak belongs to a process
            peak, seconds = pool.apply(measure, (path, backend, threads, size, tile or None))
        over = peak - weights / 1e9
        click.echo(f"| {size} | {tile or 'none'} | {peak:.2f} GB | {over:.2f} GB | {seconds:.1f} |")


def measure(path: Path, backend: str, threads: int | None, size: Size, tile: int | None) -> tuple[float, float]:
    """Peak memory in GB, on a GPU the GPU's, and seconds of a first picture, in which the decoder is opened."""
    pipeline = Pipeline.open(path, backend=backend, threads=threads, vae_tiling=tile)
    latent = pipeline.bundle.manifest.latent
    shape = resolve(latent.shape, {**to_symbols(latent, size.by_name()), "B": 1})
    latents = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    begin = perf_counter()
    pipeline.decode(latents)
    seconds = perf_counter() - begin
    on_gpu = pipeline.backend.memory_used()
    return peak_memory_mb() / 1e3 if on_gpu is None else on_gpu / 1e9, seconds


if __name__ == "__main__":
    main()
