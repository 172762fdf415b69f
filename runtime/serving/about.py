"""What a server's bundle can do, for clients that offer a choice."""

from typing import Any

from ddit.runtime import shapes
from ddit.runtime.bundle.manifest import VideoDecoderInfo
from ddit.runtime.pipeline import Pipeline
from ddit.runtime.request import DEFAULT_SCHEDULE
from ddit.runtime.serving.schema import MAX_PICTURES, Limits


def describe(pipeline: Pipeline, limits: Limits) -> dict[str, Any]:
    """Levels, sizes, defaults and limits, as `/v1/models` shows them."""
    manifest = pipeline.bundle.manifest
    size = manifest.size()
    unit = shapes.units(manifest.latent, manifest.patches)
    names = ("width", "height", *(("frames",) if size.frames else ()))
    clips = {}
    if isinstance(manifest.decoder, VideoDecoderInfo):
        clips = {"frames": size.frames, "frames_per_second": manifest.decoder.frames_per_second}
    return {
        "family": manifest.family,
        "backend": str(pipeline.backend),
        "native": manifest.native,
        "levels": [{"patch": level.patch, "trained": level.trained} for level in manifest.levels],
        "steps": manifest.sampler.steps,
        "schedule": DEFAULT_SCHEDULE,
        "guidance": None if manifest.guidance.kind == "none" else manifest.guidance.default,
        "negative_prompt": manifest.guidance.two_passes,
        "size": {"width": size.width, "height": size.height, "multiple_of": unit},
        **clips,
        "sizes": [
            {name: [getattr(entry, name).minimum, getattr(entry, name).maximum] for name in names}
            for entry in manifest.profile.entry
        ],
        "limits": {
            "n": MAX_PICTURES,
            "prompt": limits.prompt,
            "steps": limits.steps,
            "pixels": limits.pixels,
            "seconds": limits.seconds,
        },
    }
