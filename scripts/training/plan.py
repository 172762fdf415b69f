"""A training, planned: what the options leave open comes from the model, and what cannot be trained is refused."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from command_line.prompts import read_prompts
from ddit.exporter.adapter import Adapter, load_adapter
from ddit.exporter.families import family_of
from ddit.exporter.families.base import Family
from ddit.exporter.models import find_model
from ddit.profiles import ProfileError, load_profile
from ddit.runtime import shapes
from ddit.runtime.conditioning.guidance import is_guided
from ddit.runtime.errors import DditError, UsageError
from ddit.runtime.files import whole
from ddit.runtime.shapes import Size
from demo_model.scenes import sample_scenes
from demo_video.clips import sample_clips
from training.config import MAX_STEPS, RATES, Config
from training.encoding import Picture, find_pictures
from training.states import Sampling

SETTINGS = "run.json"
SCENES_SEED = 1  # the demo models' training scenes and clips; the evaluation takes others
RANDOM_PROMPTS = 16


@dataclass(frozen=True)
class Plan:
    """A training with nothing left open."""

    config: Config
    family: Family  # its levels are those to train
    size: Size
    text_length: int  # tokens
    captions: list[str]
    pictures: list[Picture]  # a caption's each; none where the sampler makes the states
    negative: str | None  # prompt; None for a model that is not guided by two passes
    start: Adapter | None

    @classmethod
    def make(cls, config: Config) -> "Plan":
        """Fill in what the options leave open. Raises `UsageError` for what cannot be trained."""
        source = find_model(config.model, config.revision)
        kind = family_of(source)
        patches = config.levels or tuple(patch for patch in source.defaults.levels or (4,) if patch != kind.native)
        if kind.native in patches:
            raise UsageError(f"level {kind.native} is the base model and needs no training; leave it out")
        family = kind(source, patches, config.precision)
        guidance = guidance_span(family, config.guidance)
        negative = find_negative(family, guidance, config.negative_prompt)
        size = training_size(family, config.height, config.width, config.frames)
        start = load_adapter(config.start) if config.start else None
        captions, pictures = find_captions(config.prompts, config.latents, config.random_weights)
        if pictures and (size.frames or 1) > 1:
            raise UsageError(
                f"pictures are no clips of {size.frames} frames; add --frames 1, or train on --latents teacher"
            )
        # without weights there may be no tokenizer either
        text_length = config.text_length or (kind.longest_text if config.random_weights else family.text_length)
        return cls(config, family, size, text_length, captions, pictures, negative, start)

    @property
    def sampling(self) -> Sampling:
        """What is sampled, and how."""
        latent, sampler = self.family.latent, self.family.sampler
        symbols = shapes.to_symbols(latent, self.size.by_name())
        return Sampling(
            sampler=sampler,
            tokens=shapes.image_tokens(latent, self.family.native, symbols),
            latent=(latent.channels, *shapes.resolve(latent.patch_grid(1), symbols)),
            steps=self.config.steps or (sampler.steps, sampler.steps),
            guidance=guidance_span(self.family, self.config.guidance),
        )

    @property
    def max_steps(self) -> int | None:
        """A limit of training steps; None where minutes are the limit."""
        return self.config.max_steps or (None if self.config.minutes else MAX_STEPS)

    @property
    def lr(self) -> float:
        """The learning rate."""
        return self.config.lr or RATES[self.config.optimizer]

    @property
    def base_model(self) -> str:
        """What the adapter's file says that it belongs to."""
        name = self.family.source.info.id
        return f"{name}, random weights" if self.config.random_weights else name

    def settings(self) -> dict[str, object]:
        """What a folder's checkpoints belong to; a run may go on with anything else changed."""
        config, info = self.config, self.family.source.info
        return {
            "model": info.id,
            "revision": info.revision,
            "levels": ",".join(map(str, self.family.levels)),
            "rank": config.rank,
            "lora": config.lora,
            "residual_width": config.residual_width,
            "identity": config.identity,
            "resize": config.resize,
            "height": self.size.height,
            "width": self.size.width,
            "frames": self.size.frames,
            "text_length": self.text_length,
            "precision": config.precision,
            "batch": config.batch,
            "latents": config.latents,
            "prompts": short_hash(repr((self.captions, self.pictures)).encode()),
            "negative_prompt": self.negative,
            "optimizer": config.optimizer,
            "start": short_hash(config.start.read_bytes()) if config.start else None,
            "random_weights": config.random_weights,
        }


def short_hash(content: bytes) -> str:
    """Enough of a SHA-256 to tell contents apart."""
    return sha256(content).hexdigest()[:16]


def claim(out: Path, settings: Mapping[str, object]) -> None:
    """Take a folder for a run with these settings. Raises `UsageError` where it belongs to another."""
    path = out / SETTINGS
    try:
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings
    except (OSError, ValueError):
        raise DditError(f"{path} cannot be read; choose another --out") from None
    for name, value in settings.items():
        if before.get(name) != value:
            raise UsageError(f"{out} holds a run with {name} {before.get(name)}, not {value}; choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DditError(f"{out} cannot be written: {error.strerror}") from None
    with whole(path) as part:
        part.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def guidance_span(family: Family, asked: tuple[float, float] | None) -> tuple[float, float] | None:
    """The least and the largest guidance scale; None where the levels run once and are told none.

    Raises `UsageError` for a model that takes none.
    """
    info = family.guidance
    if info.kind == "none":
        if asked:
            raise UsageError("this model takes no guidance scale (it was not distilled for one); leave it out")
        return None
    span = asked or (info.default, info.default)
    return span if info.embedded or is_guided(info, span[1]) else None


def find_negative(family: Family, guidance: tuple[float, float] | None, asked: str | None) -> str | None:
    """The negative prompt; None where there is one pass only. Raises `UsageError` for one that nothing would read."""
    if family.guidance.two_passes and guidance:
        return asked or ""
    if asked is not None:
        two = family.guidance.two_passes
        reason = "a negative prompt needs guidance above 1" if two else "this model is not guided by a negative prompt"
        raise UsageError(f"{reason}; leave it out")
    return None


def training_size(family: Family, height: int | None, width: int | None, frames: int | None) -> Size:
    """The pictures' or clips' size, the profile's where it is not given. Raises `UsageError` if it does not fit."""
    latent, profile = family.latent, family.source.defaults.profile or family.info.profile
    if frames and not latent.has_frames:
        raise UsageError("this model makes pictures, which have no frames; leave --frames out")
    try:
        usual = load_profile(profile).entry[0]
    except ProfileError as error:
        raise UsageError(str(error)) from None
    if latent.has_frames and frames is None:
        if usual.frames is None:
            raise UsageError(f"profile {profile!r} is for pictures: it has no frames; give --frames")
        frames = usual.frames.optimum
    size = Size(height or usual.height.optimum, width or usual.width.optimum, frames)
    shapes.check(latent, family.levels, size.by_name())
    return size


def find_captions(prompts: str | None, latents: str, random_weights: bool) -> tuple[list[str], list[Picture]]:
    """Prompts, and the pictures that they belong to where there are some. Raises `UsageError`."""
    kind, _, folder = latents.partition(":")
    if latents not in ("teacher", "student") and (kind != "images" or not folder):
        raise UsageError(f"unknown latents {latents!r}; write teacher, student or images:FOLDER")
    if prompts and (folder or random_weights):
        reason = "the captions lie beside the pictures" if folder else "random weights know no words"
        raise UsageError(f"{reason}; leave --prompts out")
    if folder:
        pictures = find_pictures(Path(folder))
        return [picture.caption for picture in pictures], pictures
    if random_weights:
        return [f"prompt {number}" for number in range(RANDOM_PROMPTS)], []
    if not prompts:
        raise UsageError("--prompts is missing; give a text file with a prompt a line, or scenes:N or clips:N")
    found = read_prompts(prompts)
    if isinstance(found, list):
        return found, []
    count = found.asked.stop
    if found.kind == "clips":
        captions = [clip.caption for clip in sample_clips(count, SCENES_SEED)]
    else:
        captions = [scene.caption for scene in sample_scenes(count, SCENES_SEED)]
    return captions[found.asked.start :], []
