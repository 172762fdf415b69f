"""A training, planned: what the options leave open comes from the model, and what cannot be trained is refused."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from command_line.prompts import read_prompts
from ddit.exporter.adapter import Adapter, load_adapter
from ddit.exporter.families.flux.model import Flux
from ddit.exporter.models import find_model
from ddit.profiles import ProfileError, load_profile
from ddit.runtime import shapes
from ddit.runtime.errors import DditError, UsageError
from ddit.runtime.files import whole
from demo_model.scenes import sample_scenes
from training.config import MAX_STEPS, RATES, Config
from training.encoding import Picture, find_pictures, longest_text

SETTINGS = "run.json"
SCENES_SEED = 1  # the demo model's training scenes; the evaluation takes others
RANDOM_PROMPTS = 16


@dataclass(frozen=True)
class Plan:
    """A training with nothing left open."""

    config: Config
    flux: Flux  # its levels are those to train
    height: int  # pixels
    width: int
    text_length: int  # tokens
    captions: list[str]
    pictures: list[Picture]  # a caption's each; none where the sampler makes the states
    start: Adapter | None

    @classmethod
    def make(cls, config: Config) -> "Plan":
        """Fill in what the options leave open. Raises `UsageError` for what cannot be trained."""
        source = find_model(config.model, config.revision)
        patches = config.levels or tuple(patch for patch in source.defaults.levels or (4,) if patch != Flux.native)
        if Flux.native in patches:
            raise UsageError(f"level {Flux.native} is the base model and needs no training; leave it out")
        flux = Flux(source, patches, config.precision)
        if config.guidance and not flux.guidance.embedded:
            raise UsageError("this model takes no guidance scale (it was not distilled for one); leave it out")
        height, width = picture_size(flux, config.height, config.width)
        start = load_adapter(config.start) if config.start else None
        captions, pictures = find_captions(config.prompts, config.latents, config.random_weights)
        text_length = config.text_length or longest_text(flux, config.random_weights)
        return cls(config, flux, height, width, text_length, captions, pictures, start)

    @property
    def latent(self) -> tuple[int, int, int]:
        """A latent's channels, height and width."""
        symbols = shapes.to_symbols(self.flux.latent, {"height": self.height, "width": self.width})
        return self.flux.latent.channels, symbols["H"], symbols["W"]

    @property
    def steps(self) -> tuple[int, int]:
        """The fewest and the most denoising steps of a trajectory."""
        return self.config.steps or (self.flux.sampler.steps, self.flux.sampler.steps)

    @property
    def guidance(self) -> tuple[float, float] | None:
        """The least and the largest guidance scale; None for a model without guidance embedding."""
        scale = self.flux.guidance.default
        return self.config.guidance or (scale, scale) if self.flux.guidance.embedded else None

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
        name = self.flux.source.info.id
        return f"{name}, random weights" if self.config.random_weights else name

    def settings(self) -> dict[str, object]:
        """What a folder's checkpoints belong to; a run may go on with anything else changed."""
        config, info = self.config, self.flux.source.info
        return {
            "model": info.id,
            "revision": info.revision,
            "levels": ",".join(map(str, self.flux.levels)),
            "rank": config.rank,
            "lora": config.lora,
            "residual_width": config.residual_width,
            "identity": config.identity,
            "resize": config.resize,
            "height": self.height,
            "width": self.width,
            "text_length": self.text_length,
            "precision": config.precision,
            "batch": config.batch,
            "latents": config.latents,
            "prompts": short_hash(repr((self.captions, self.pictures)).encode()),
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


def picture_size(flux: Flux, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width in pixels, the profile's where they are not given. Raises `UsageError` if they do not fit."""
    try:
        usual = load_profile(flux.source.defaults.profile or "1024").entry[0]
    except ProfileError as error:
        raise UsageError(str(error)) from None
    height, width = height or usual.height.optimum, width or usual.width.optimum
    shapes.check(flux.latent, flux.levels, {"height": height, "width": width})
    return height, width


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
        raise UsageError("--prompts is missing; give a text file with a prompt a line, or scenes:N")
    asked = read_prompts(prompts)
    if isinstance(asked, range):
        return [scene.caption for scene in sample_scenes(asked.stop, SCENES_SEED)[asked.start :]], []
    return asked, []
