"""What clients of clips send and get: OpenAI's videos API, with what ddit adds to it."""

import secrets
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ddit.runtime import Request
from ddit.runtime.bundle import Manifest
from ddit.runtime.bundle.manifest import VideoDecoderInfo
from ddit.runtime.errors import UsageError
from ddit.runtime.serving.schema import Finite, Limits, Made, RunRequest

ClipFormat = Literal["mp4", "webp", "gif"]
Status = Literal["queued", "in_progress", "completed", "failed"]
LONGEST_SECONDS = 3600.0  # of a clip; the bundle's profile holds less


class ClipRequest(RunRequest):
    """A clip of a prompt. Forms bring every value as text."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"example": {"prompt": "a zebra runs through fog", "seconds": "5"}}
    )

    seconds: Finite | None = Field(
        None, gt=0, le=LONGEST_SECONDS, description="Of the clip; the nearest that its frames can have."
    )
    # ddit's own
    frames: int | None = Field(None, ge=1, description="In place of seconds.")
    output_format: ClipFormat | None = "mp4"

    def check(self, limits: Limits) -> None:
        """Raise `UsageError` for what the server does not do."""
        super().check(limits)
        if self.seconds is not None and self.frames is not None:
            raise UsageError("seconds and frames say the same; leave one out")

    def request(self, manifest: Manifest) -> Request:
        """What the pipeline is asked for."""
        frames = self.frames
        if self.seconds is not None:
            frames = nearest_frames(manifest, self.seconds)
        return self.run(secrets.randbelow(2**32) if self.seed is None else self.seed, frames)


def frames_per_second(manifest: Manifest) -> float:
    """At which a bundle's clips are played."""
    assert isinstance(manifest.decoder, VideoDecoderInfo)
    return manifest.decoder.frames_per_second


def nearest_frames(manifest: Manifest, seconds: float) -> int:
    """The number of frames that a latent can hold and that lasts nearly so long."""
    (axis,) = (axis for axis in manifest.latent.axes if axis.name == "frames")
    apart = axis.downscale  # frames of the clip between two of the latent
    return 1 + apart * max(0, round((seconds * frames_per_second(manifest) - 1) / apart))


class ClipError(BaseModel):
    """Why there is no clip."""

    code: str
    message: str


class ClipMade(Made):
    """How a clip came about."""

    frames: int
    frames_per_second: float


class Video(BaseModel):
    """A clip that is being made, or was."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Status
    progress: int = Field(description="Per cent.")
    created_at: int = Field(description="Seconds since 1970, as all times here.")
    completed_at: int | None = None
    expires_at: int | None = Field(None, description="When it is forgotten, or before, where others need its place.")
    size: str
    seconds: str
    prompt: str
    remixed_from_video_id: None = None
    error: ClipError | None = None
    ddit: ClipMade | None = None


class VideoList(BaseModel):
    """Clips, a page of them."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    """A clip is forgotten."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True
