"""The grow graph: a small latent becomes a larger one of the same picture.

Spectral Progressive Diffusion (arXiv 2605.18736, equations 5 and 6; docs/method.md). The discrete cosine transform of a
side is a product with a constant matrix, which depends on the size: the matrices are inputs, as the levels' rotary
tables are (`ddit.runtime.samplers.growing.growing_tables`).
"""

from collections.abc import Mapping

from torch import Tensor, nn

from ddit.exporter.graphs.job import GraphJob, Tables, equation_job, floats
from ddit.exporter.steps import equations
from ddit.exporter.steps.patches import per_sample
from ddit.runtime.bundle.manifest import LatentInfo
from ddit.runtime.samplers.growing import growing_tables


class GrowGraph(nn.Module):
    """The small latent's frequencies, noise in all higher ones."""

    def forward(
        self,
        latent: Tensor,
        noise: Tensor,
        timestep: Tensor,
        gain: Tensor,
        dct_small_height: Tensor,
        dct_small_width: Tensor,
        dct_height: Tensor,
        dct_width: Tensor,
        fresh: Tensor,
    ) -> Tensor:
        """The larger latent (B, C, H, W), at the noise level κ·t; every frame of a clip (B, C, F, H, W) by itself.

        Args:
            latent: (B, C, H, W) the small latent (h, w) in its low corner; what lies around that does not matter.
            noise: (B, C, H, W) standard normal DCT coefficients; those of the small latent's frequencies do not matter.
            timestep: (B,) the noise level t of the small latent.
            gain: (B,) κ.
            dct_small_height, dct_small_width: (H, H) and (W, W) the orthonormal DCT-II of the small latent's sides in
                the low corner of zeros.
            dct_height, dct_width: (H, H) and (W, W) that of the larger latent's sides.
            fresh: (H, W) 0 for the small latent's frequencies, 1 for all higher ones.
        """
        kept = dct_small_height @ latent @ dct_small_width.T
        coefficients = kept + per_sample(timestep, noise) * fresh * noise
        return per_sample(gain, noise) * (dct_height.T @ coefficients @ dct_width)


def growing_job(latent: LatentInfo) -> GraphJob:
    """The export job of a bundle's grow graph."""
    picture = latent.shape

    def grow(*, fresh: equations.Array, **inputs: equations.Array) -> equations.Array:
        small = int((fresh[:, 0] == 0).sum()), int((fresh[0] == 0).sum())
        return equations.grow(small, **{name: inputs[name] for name in ("latent", "noise", "timestep", "gain")})

    def tables(sizes: Mapping[str, int]) -> Tables:
        height, width = sizes["H"], sizes["W"]
        return growing_tables((max(1, height // 2), max(1, width // 2)), (height, width))

    return equation_job(
        "grow",
        GrowGraph(),
        grow,
        inputs=(
            floats("latent", *picture),
            floats("noise", *picture),
            floats("timestep", "B"),
            floats("gain", "B"),
            floats("dct_small_height", "H", "H"),
            floats("dct_small_width", "W", "W"),
            floats("dct_height", "H", "H"),
            floats("dct_width", "W", "W"),
            floats("fresh", "H", "W"),
        ),
        outputs=(floats("next_latent", *picture),),
        trace_sizes={"B": 2, "F": 3, "H": 8, "W": 12},
        tables=tables,
    )
