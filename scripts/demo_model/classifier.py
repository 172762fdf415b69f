"""A small classifier of `scenes`: it judges whether a picture shows what its prompt says.

classifier = SceneClassifier.load()
classifier.judge(pictures, scenes)         # {"shape": [True, …], "colour": …, "background": …, "count": …}
"""

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from demo_model.scenes import BACKGROUNDS, COLOURS, SHAPES, Scene, render, sample_scenes

WEIGHTS = Path(__file__).with_name("scene_classifier.safetensors")
NAMES = list(COLOURS)
SEEN_SIZE = 128  # enough for the smallest shape, and a quarter of the work


class SceneClassifier(nn.Module):
    """Convolutions down to a vector of 128 features, then four heads."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for taken, given in ((3, 32), (32, 64), (64, 96), (96, 128)):
            layers += [nn.Conv2d(taken, given, 3, stride=2, padding=1), nn.GroupNorm(8, given), nn.SiLU()]
            layers += [nn.Conv2d(given, given, 3, padding=1, groups=4), nn.GroupNorm(8, given), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.shape = nn.Linear(256, len(SHAPES))
        self.colour = nn.Linear(256, len(NAMES))
        self.background = nn.Linear(256, len(BACKGROUNDS))
        self.count = nn.Linear(256, 3)

    def features(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] → features (B, 256): mean and maximum over the picture at 128×128."""
        maps = self.body(F.interpolate(pictures, size=(SEEN_SIZE, SEEN_SIZE), mode="area"))
        return torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1)

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Logits: ``shape`` and ``colour`` tell of each if it is there, ``background`` and ``count`` choose one."""
        features = self.features(pictures)
        return {name: getattr(self, name)(features) for name in ("shape", "colour", "background", "count")}

    @torch.no_grad()
    def judge(self, pictures: Tensor, scenes: Sequence[Scene]) -> dict[str, list[bool]]:
        """Per picture, whether exactly its scene's shapes, colours, background and number of things are seen."""
        logits, truth = self(pictures), labels(scenes, pictures.device)
        right = {name: ((logits[name] > 0) == (truth[name] > 0.5)).all(dim=1) for name in ("shape", "colour")}
        right |= {name: logits[name].argmax(dim=1) == truth[name] for name in ("background", "count")}
        return {name: value.tolist() for name, value in right.items()}

    def save(self, path: Path = WEIGHTS) -> None:
        """Write the weights in half precision."""
        save_file({name: value.half().contiguous() for name, value in self.state_dict().items()}, path)

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> "SceneClassifier":
        """Read the weights."""
        classifier = cls()
        classifier.load_state_dict({name: value.float() for name, value in load_file(path).items()})
        return classifier.eval()


def labels(scenes: Sequence[Scene], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The truth in the form of the heads: presence of shapes and colours, index of the background, count minus one."""
    shapes = [[float(any(t.shape == name for t in scene.things)) for name in SHAPES] for scene in scenes]
    colours = [[float(any(t.colour == name for t in scene.things)) for name in NAMES] for scene in scenes]
    return {
        "shape": torch.tensor(shapes, device=device),
        "colour": torch.tensor(colours, device=device),
        "background": torch.tensor([BACKGROUNDS.index(scene.background) for scene in scenes], device=device),
        "count": torch.tensor([len(scene.things) - 1 for scene in scenes], device=device),
    }


def _disturb(pictures: Tensor) -> Tensor:
    """What a decoder may do to a picture: blur, noise, a shift of brightness. The labels stay true."""
    batch = len(pictures)
    soft = F.interpolate(F.avg_pool2d(pictures, 2), scale_factor=2, mode="bilinear")
    blur = torch.rand(batch, 1, 1, 1, device=pictures.device)
    noise = torch.randn_like(pictures) * torch.rand(batch, 1, 1, 1, device=pictures.device) * 0.12
    shift = (torch.rand(batch, 3, 1, 1, device=pictures.device) - 0.5) * 0.1
    return (pictures * (1 - blur) + soft * blur + noise + shift).clamp(-1, 1)


def train(seconds: float, *, batch: int = 64, size: int = SEEN_SIZE, device: str = "cpu") -> SceneClassifier:
    """Train on freshly rendered scenes for a time; prints the accuracy on scenes that it has not seen."""
    classifier = SceneClassifier().to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.01)
    start, step = perf_counter(), 0
    pool = sample_scenes(100 * batch, seed=77)
    while (done := (perf_counter() - start) / seconds) < 1:
        scenes = pool[(step % 100) * batch : (step % 100 + 1) * batch]
        truth = labels(scenes, device)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 100) * (1 - done)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = classifier(_disturb(render(scenes, size, device)))
            # the mean over six shapes is a sixth of what choosing one would cost
            shape, colour = (F.binary_cross_entropy_with_logits(logits[n], truth[n]) for n in ("shape", "colour"))
            background, count = (F.cross_entropy(logits[n], truth[n]) for n in ("background", "count"))
            loss = 6 * (shape + colour) + (background + count)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        step += 1
        if step % 500 == 0:
            print(f"classifier: step {step}, {done:.0%}, loss {loss.item():.3f}", flush=True)
    classifier.eval()
    fresh = sample_scenes(8 * batch, seed=5)
    right: list[bool] = []
    for i in range(0, len(fresh), batch):
        judged = classifier.judge(render(fresh[i : i + batch], size, device), fresh[i : i + batch])
        right += [all(values) for values in zip(*judged.values(), strict=True)]
    print(f"classifier: {step} steps, all heads right on {sum(right) / len(right):.2%} of unseen scenes", flush=True)
    return classifier
