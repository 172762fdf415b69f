"""What `evaluate.py` measures in pictures.

There are three kinds of metric, by what they look at:

    paired          a picture beside the native schedule's picture of the same prompt and seed (PSNR, SSIM, LPIPS)
    absolute        a picture and its prompt (adherence, CLIP score, ImageReward)
    distribution    all pictures of a schedule beside a reference set (Fréchet distances)

Pictures are arrays (N, height, width, 3) of uint8. `METRICS` lists every metric; `why_not` says what one lacks here.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn

from ddit.runtime.errors import DditError, UsageError
from demo_model.classifier import SceneClassifier
from demo_model.scenes import Scene

Pictures = NDArray[np.uint8]

# Two 8-bit pictures of a million pixels that differ by one in one place lie at 113 dB; at 100 dB nobody sees anything.
# A cap keeps the mean finite where a schedule leaves a picture as it was.
PSNR_CAP = 100.0
CLIP_MODEL = "openai/clip-vit-large-patch14"


@dataclass(frozen=True)
class Sample:
    """A picture to make. ``prompt_number`` groups the seeds of one prompt."""

    prompt_number: int
    prompt: str
    seed: int
    scene: Scene | None = None  # what the prompt describes, where the prompts are scenes
    kind: str = ""  # of scene, ``plain`` or ``busy``, or of clip, ``still, plain`` or another


# ---- paired ----


def psnr(picture: Pictures, native: Pictures) -> float:
    """Peak signal-to-noise ratio in dB of one picture, 10 log₁₀(255² / MSE), at most `PSNR_CAP`."""
    if np.array_equal(picture, native):
        return PSNR_CAP
    return min(PSNR_CAP, float(peak_signal_noise_ratio(native, picture, data_range=255)))


def ssim(picture: Pictures, native: Pictures) -> float:
    """Structural similarity of one picture with the original's Gaussian window (Wang et al. 2004, σ = 1.5)."""
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(native, picture, data_range=255, channel_axis=2, **options))


def one_by_one(measure: Callable[[Pictures, Pictures], float]) -> "Paired":
    """A paired metric of sets from one of single pictures."""

    def paired(pictures: Pictures, natives: Pictures) -> list[float]:
        return [measure(picture, native) for picture, native in zip(pictures, natives, strict=True)]

    return paired


@torch.no_grad()
def _lpips(model: nn.Module, pictures: Pictures, natives: Pictures) -> list[float]:
    pairs = zip(to_tensor(pictures), to_tensor(natives), strict=True)
    return [float(model(picture[None], native[None])) for picture, native in pairs]


def make_lpips() -> "Paired":
    """LPIPS (arXiv 1801.03924) with AlexNet, 0 for identical pictures."""
    from torchmetrics.image import LearnedPerceptualImagePatchSimilarity

    return partial(_lpips, LearnedPerceptualImagePatchSimilarity(net_type="alex"))


# ---- absolute ----


class Adherence:
    """Whether the scene classifier sees what the prompt says: the shapes, the colours and the background, all right."""

    def __init__(self) -> None:
        self.classifier = SceneClassifier.load()

    def __call__(self, pictures: Pictures, samples: Sequence[Sample]) -> dict[str, list[float]]:
        """1 or 0 for every picture; the classifier's four answers beside it. The samples must have scenes."""
        judged = self.classifier.judge(to_tensor(pictures), [sample.scene for sample in samples if sample.scene])
        asked = zip(judged["shape"], judged["colour"], judged["background"], strict=True)
        answers = {"adherence": [all(one) for one in asked], **judged}
        return {name: [float(value) for value in values] for name, values in answers.items()}


class ClipScore:
    """CLIP score (arXiv 2104.08718): 100 times the cosine between a picture's and its prompt's embedding, at least 0.

    Computed with transformers' own model: torchmetrics' `CLIPScore` (1.9) does not run with transformers 5.
    """

    def __init__(self, model: Path | str = CLIP_MODEL) -> None:
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        self.model = CLIPModel.from_pretrained(model).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.processor = CLIPImageProcessor.from_pretrained(model)

    @torch.no_grad()
    def __call__(self, pictures: Pictures, samples: Sequence[Sample]) -> dict[str, list[float]]:
        """The score of every picture."""
        prompts = [sample.prompt for sample in samples]
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        pixels = self.processor(images=list(pictures), return_tensors="pt")
        seen = self.model(**tokens, pixel_values=pixels.pixel_values)  # both embeddings have unit length
        return {"clip": (100 * (seen.image_embeds * seen.text_embeds).sum(dim=1).clamp(min=0)).tolist()}


class Reward:
    """ImageReward-v1.0 (arXiv 2304.05977), about standard normal over the pictures that it was trained on."""

    def __init__(self) -> None:
        import ImageReward

        self.model = ImageReward.load("ImageReward-v1.0")

    @torch.no_grad()
    def __call__(self, pictures: Pictures, samples: Sequence[Sample]) -> dict[str, list[float]]:
        """The reward of every picture."""
        from tempfile import TemporaryDirectory

        from PIL import Image

        rewards = []
        with TemporaryDirectory() as folder:  # the package takes files
            for picture, sample in zip(pictures, samples, strict=True):
                path = f"{folder}/picture.png"
                Image.fromarray(picture).save(path)
                rewards.append(float(self.model.score(sample.prompt, path)))
        return {"imagereward": rewards}


# ---- distributions ----


class Frechet:
    """Fréchet distance between Gaussians fitted to two sets' features (FID's formula, arXiv 1706.08500).

    |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½). It is biased upwards for small sets, so compare only sets of equal size.
    """

    def __init__(self, features: nn.Module | int) -> None:
        """``features``: a module from (N, 3, H, W) uint8 to (N, D) with a ``num_features``, or Inception's layer."""
        from torchmetrics.image.fid import FrechetInceptionDistance

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # says that the features take memory
            self.metric = FrechetInceptionDistance(features, reset_real_features=False)

    @torch.no_grad()
    def refer_to(self, sets: Iterable[Pictures]) -> None:
        """Take the reference set, in batches."""
        for pictures in sets:
            self.metric.update(to_channels_first(pictures), real=True)

    @torch.no_grad()
    def __call__(self, sets: Iterable[Pictures]) -> float:
        """The distance of a set, given in batches, to the reference set. Both need two pictures or more."""
        self.metric.reset()
        for pictures in sets:
            self.metric.update(to_channels_first(pictures), real=False)
        return max(0.0, float(self.metric.compute()))  # rounding takes equal sets below zero


class SceneFeatures(nn.Module):
    """The scene classifier's 256 features of uint8 pictures."""

    num_features = 256

    def __init__(self) -> None:
        super().__init__()
        self.classifier = SceneClassifier.load()

    def forward(self, pictures: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 → (N, 256)."""
        return self.classifier.features(pictures / 127.5 - 1)


def to_channels_first(pictures: Pictures) -> Tensor:
    """(N, H, W, 3) → (N, 3, H, W), uint8."""
    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))


def to_tensor(pictures: Pictures) -> Tensor:
    """(N, H, W, 3) uint8 → (N, 3, H, W) float32 in [-1, 1]."""
    return to_channels_first(pictures) / 127.5 - 1


# ---- which there are ----

Paired = Callable[[Pictures, Pictures], list[float]]
Absolute = Callable[[Pictures, Sequence[Sample]], dict[str, list[float]]]


@dataclass(frozen=True)
class Pretrained:
    """What a metric needs that is not part of ddit."""

    packages: tuple[str, ...]  # as they are imported
    install: str
    weights: str  # in words
    fetch: str  # the command that fetches them once
    present: Callable[[], bool]


def in_torch_hub(name: str) -> bool:
    """Whether torch's cache holds a file of weights."""
    return (Path(torch.hub.get_dir()) / "checkpoints" / name).is_file()


def in_hub_cache(model: str, name: str) -> bool:
    """Whether the Hugging Face cache holds a model's file."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model, name), str)


@dataclass(frozen=True)
class Metric:
    """A row of `METRICS`."""

    name: str
    title: str  # with the unit, for tables and plots
    kind: Literal["paired", "absolute", "distribution"]
    better: Literal["higher", "lower"]
    make: Callable[[], Any]  # Paired, Absolute or Frechet
    needs_scenes: bool = False
    pretrained: Pretrained | None = None


ALEXNET = "alexnet-owt-7be5be79.pth"
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
METRICS = {
    metric.name: metric
    for metric in (
        Metric("adherence", "adherence", "absolute", "higher", Adherence, needs_scenes=True),
        Metric("psnr", "PSNR to native, dB", "paired", "higher", lambda: one_by_one(psnr)),
        Metric("ssim", "SSIM to native", "paired", "higher", lambda: one_by_one(ssim)),
        Metric(
            "frechet",
            "Fréchet distance, scene classifier",
            "distribution",
            "lower",
            lambda: Frechet(SceneFeatures()),
            needs_scenes=True,
        ),
        Metric(
            "lpips",
            "LPIPS to native",
            "paired",
            "lower",
            make_lpips,
            pretrained=Pretrained(
                ("torchvision",),
                "pip install torchvision",
                f"AlexNet's {ALEXNET} in torch's hub folder",
                "python -c \"import torchvision; torchvision.models.alexnet(weights='DEFAULT')\"",
                lambda: in_torch_hub(ALEXNET),
            ),
        ),
        Metric(
            "fid",
            "FID",
            "distribution",
            "lower",
            lambda: Frechet(2048),
            pretrained=Pretrained(
                ("torch_fidelity",),
                "pip install torch-fidelity",
                f"Inception's {INCEPTION} in torch's hub folder",
                'python -c "from torchmetrics.image.fid import FrechetInceptionDistance as F; F()"',
                lambda: in_torch_hub(INCEPTION),
            ),
        ),
        Metric(
            "clip",
            "CLIP score",
            "absolute",
            "higher",
            ClipScore,
            pretrained=Pretrained(
                ("transformers",),
                "pip install transformers",
                f"{CLIP_MODEL} in the Hugging Face cache",
                f"hf download {CLIP_MODEL}",
                lambda: in_hub_cache(CLIP_MODEL, "model.safetensors"),
            ),
        ),
        Metric(
            "imagereward",
            "ImageReward",
            "absolute",
            "higher",
            Reward,
            pretrained=Pretrained(
                ("ImageReward", "clip"),
                "pip install image-reward git+https://github.com/openai/CLIP (an environment of its own is best)",
                "ImageReward.pt in ~/.cache/ImageReward",
                "python -c \"import ImageReward; ImageReward.load('ImageReward-v1.0')\"",
                lambda: Path("~/.cache/ImageReward/ImageReward.pt").expanduser().is_file(),
            ),
        ),
    )
}


def why_not(metric: Metric, samples: Sequence[Sample]) -> DditError | None:
    """What keeps a metric from being measured here: an error with one line that ends with what to do; None if nothing.

    Nothing is downloaded to find out.
    """
    if metric.needs_scenes and not all(sample.scene for sample in samples):
        return UsageError(f"{metric.name} is judged by the scene classifier; it needs --prompts scenes:N")
    if metric.kind == "distribution" and len(samples) < 2:
        return UsageError(f"{metric.name} compares sets; it needs two pictures or more")
    needs = metric.pretrained
    if needs is None:
        return None
    if missing := [package for package in needs.packages if find_spec(package) is None]:
        return DditError(f"{metric.name} needs the package {missing[0]}, which is not installed: {needs.install}")
    if not needs.present():
        return DditError(f"{metric.name} needs pretrained weights that are not here, {needs.weights}: {needs.fetch}")
    return None


def load(metric: Metric) -> Any:
    """The metric's function. Raises `DditError` with one line for whatever goes wrong in a package that is not ours."""
    try:
        return metric.make()
    except Exception as error:
        what = (str(error) or type(error).__name__).strip().split("\n")[0]
        raise DditError(f"{metric.name} cannot be loaded: {what}") from error
