"""Procedural scenes with captions: the demo model's world.

Coloured shapes before backgrounds that range from plain to noisy, so that pictures differ in how much detail they need.
Captions come from a closed vocabulary. Rendering is vectorised over the batch with signed distance functions, so that a
GPU draws thousands of pictures a second.

    scenes = sample_scenes(4, seed=0)
    pictures = render(scenes)                  # (4, 3, 256, 256) in [-1, 1]
    wide = render(scenes, (192, 320))          # the same scenes in another format: height, width
    captions = [scene.caption for scene in scenes]
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE = 256
COLOURS = {
    "red": (0.85, 0.10, 0.12),
    "green": (0.08, 0.58, 0.20),
    "blue": (0.10, 0.22, 0.85),
    "yellow": (0.98, 0.88, 0.10),
    "orange": (0.98, 0.50, 0.05),
    "purple": (0.55, 0.12, 0.70),
    "white": (0.98, 0.98, 0.98),
    "black": (0.03, 0.03, 0.03),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
BACKGROUNDS = ("plain", "gradient", "striped", "checkered", "dotted", "noisy")
PLAIN = frozenset({"plain", "gradient"})  # the other backgrounds are busy
POSITIONS = {
    "on the left": (0.27, 0.5),
    "on the right": (0.73, 0.5),
    "at the top": (0.5, 0.27),
    "at the bottom": (0.5, 0.73),
    "in the center": (0.5, 0.5),
}
RADII = {"small": 0.09, "": 0.14, "large": 0.22}  # of the picture's shorter side; medium goes unsaid
NUMBERS = {2: "two", 3: "three"}
PLURALS = {"cross": "crosses"}
# where two or three objects stand: far enough apart for the radii that they may have
LAYOUTS = {
    2: (((0.27, 0.5), (0.73, 0.5)), ((0.5, 0.27), (0.5, 0.73)), ((0.28, 0.3), (0.72, 0.7)), ((0.28, 0.7), (0.72, 0.3))),
    3: (
        ((0.2, 0.5), (0.5, 0.5), (0.8, 0.5)),
        ((0.5, 0.24), (0.25, 0.72), (0.75, 0.72)),
        ((0.25, 0.28), (0.75, 0.28), (0.5, 0.74)),
    ),
}  # fmt: skip
JITTER = 0.03


@dataclass(frozen=True)
class Thing:
    """One object of a scene: its centre in units of each side, its radius in units of the shorter one."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    angle: float  # radians


@dataclass(frozen=True)
class Scene:
    """What to draw, and the words for it."""

    things: tuple[Thing, ...]
    background: str
    first: tuple[float, float, float]  # colours of the background's pattern
    second: tuple[float, float, float]
    frequency: float  # periods of the pattern over the picture's shorter side
    angle: float
    seed: int
    caption: str

    @property
    def plain(self) -> bool:
        """Whether the background needs no detail."""
        return self.background in PLAIN

    @property
    def kind(self) -> str:
        """``plain`` or ``busy``."""
        return "plain" if self.plain else "busy"


def sample_scenes(count: int, seed: int) -> list[Scene]:
    """Random scenes; the same for the same seed."""
    rng = random.Random(seed)
    return [sample_scene(rng) for _ in range(count)]


def balanced_scenes(count: int, seed: int) -> list[Scene]:
    """Random scenes, plain and busy backgrounds in turn; a larger number goes on from a smaller one."""
    rng = random.Random(seed)
    chosen: list[Scene] = []
    while len(chosen) < count:
        scene = sample_scene(rng)
        if scene.plain == (len(chosen) % 2 == 0):
            chosen.append(scene)
    return chosen


def sample_scene(rng: random.Random) -> Scene:
    """One random scene: one thing (half of them), two of different kinds, or two or three of the same kind."""
    background = rng.choice(BACKGROUNDS)
    kind = rng.random()
    shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
    if kind < 0.5:
        size = rng.choice(list(RADII))
        position = rng.choice([*POSITIONS, ""])
        x, y = POSITIONS.get(position) or (rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7))
        things = [make_thing(rng, shape, colour, x, y, RADII[size])]
        words = " ".join(filter(None, ("a", size, colour, shape, position)))
    elif kind < 0.75:
        shape2, colour2 = rng.choice([s for s in SHAPES if s != shape]), rng.choice([c for c in COLOURS if c != colour])
        first, second = rng.choice(LAYOUTS[2])
        things = [
            make_thing(rng, shape, colour, *first, RADII[""]),
            make_thing(rng, shape2, colour2, *second, RADII[""]),
        ]
        words = f"a {colour} {shape} and a {colour2} {shape2}"
    else:
        count = rng.choice((2, 3))
        size = rng.choice(("small", ""))
        radius = RADII[size] * (0.85 if count == 3 else 1.0)  # three do not fit side by side otherwise
        things = [make_thing(rng, shape, colour, *place, radius) for place in rng.choice(LAYOUTS[count])]
        words = " ".join(filter(None, (NUMBERS[count], size, colour, PLURALS.get(shape, shape + "s"))))
    light, dark = background_colours(rng)
    return Scene(
        tuple(things),
        background,
        light,
        dark,
        frequency=rng.uniform(6, 12),
        angle=rng.uniform(0, math.pi),
        seed=rng.randrange(1 << 20),
        caption=f"{words.replace('a orange', 'an orange')} on a {background} background",
    )


def make_thing(rng: random.Random, shape: str, colour: str, x: float, y: float, radius: float) -> Thing:
    return Thing(
        shape,
        colour,
        x + rng.uniform(-JITTER, JITTER),
        y + rng.uniform(-JITTER, JITTER),
        radius * rng.uniform(0.93, 1.07),
        rng.uniform(-0.25, 0.25),
    )


def background_colours(rng: random.Random) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Two muted colours, a light and a darker one: never mistaken for a thing's colour, never as light as white."""
    hue, saturation = rng.uniform(0, 2 * math.pi), rng.uniform(0.0, 0.10)
    red, green, blue = (saturation * math.cos(hue + shift) for shift in (0.0, 2.1, 4.2))
    dark, light = rng.uniform(0.36, 0.46), rng.uniform(0.62, 0.74)
    pair = [(value + red, value + green, value + blue) for value in (dark, light)]
    rng.shuffle(pair)
    return pair[0], pair[1]


@torch.no_grad()
def render(scenes: Sequence[Scene], size: int | tuple[int, int] = SIZE, device: torch.device | str = "cpu") -> Tensor:
    """Draw scenes: ``(B, 3, height, width)`` float32 in [-1, 1].

    ``size``: a square's side, or height and width, in pixels. Things move apart with the longer side, but nothing is
    stretched: shapes and patterns keep to the shorter side, so that they are as they would be in a square of it.
    """
    height, width = (size, size) if isinstance(size, int) else size
    short = min(height, width)  # the unit of length
    y, x = torch.meshgrid(
        *((torch.arange(side, device=device) + 0.5) / short for side in (height, width)), indexing="ij"
    )
    pattern = torch.zeros(len(scenes), height, width, device=device)
    for kind in BACKGROUNDS:
        rows = [row for row, scene in enumerate(scenes) if scene.background == kind]
        if rows:
            numbers = torch.tensor(
                [[scenes[r].frequency, scenes[r].angle, scenes[r].seed] for r in rows], device=device
            )
            frequency, angle, seed = (column[:, None, None] for column in numbers.double().unbind(1))
            pattern[rows] = background_pattern(kind, x, y, frequency.float(), angle.float(), seed.long(), short)
    first = torch.tensor([scene.first for scene in scenes], device=device)[..., None, None]
    second = torch.tensor([scene.second for scene in scenes], device=device)[..., None, None]
    picture = first + (second - first) * pattern[:, None]
    for slot in range(3):
        rows = [row for row, scene in enumerate(scenes) if len(scene.things) > slot]
        for shape in SHAPES:
            chosen = [row for row in rows if scenes[row].things[slot].shape == shape]
            if not chosen:
                continue
            things = [scenes[row].things[slot] for row in chosen]
            numbers = torch.tensor(
                [[t.x * (width / short), t.y * (height / short), t.radius, t.angle] for t in things], device=device
            )
            centre_x, centre_y, radius, angle = (column[:, None, None] for column in numbers.unbind(1))
            alpha = cover({shape: 1.0}, (x - centre_x) / radius, (y - centre_y) / radius, angle, radius * short)[
                :, None
            ]
            colour = torch.tensor([COLOURS[t.colour] for t in things], device=device)[..., None, None]
            picture[chosen] = picture[chosen] * (1 - alpha) + colour * alpha
    return picture * 2 - 1


def cover(shapes: Mapping[str, float | Tensor], x: Tensor, y: Tensor, angle: Tensor, radius: Tensor) -> Tensor:
    """How much of every pixel a thing covers, in [0, 1].

    ``shapes``: shares of shapes that it is between, usually one. ``x``, ``y``: pixels seen from its centre, in units of
    its radius. ``angle``: that it is turned by. ``radius``: in pixels.
    """
    cos, sin = angle.cos(), angle.sin()
    along, across = x * cos + y * sin, y * cos - x * sin
    distances = (share * _distance(shape, along, across) for shape, share in shapes.items())
    return (0.5 - sum(distances, torch.zeros_like(along)) * radius).clamp(0, 1)


def background_pattern(
    kind: str, x: Tensor, y: Tensor, frequency: Tensor, angle: Tensor, seed: Tensor, size: int
) -> Tensor:
    """A background's pattern in [0, 1]: how much of its second colour shows. ``size``: pixels of a unit of length."""
    along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    sharp = size / frequency / 3  # edges one or two pixels wide
    if kind == "plain":
        return torch.zeros_like(along)
    if kind == "gradient":
        return ((along - along.amin((1, 2), True)) / (along.amax((1, 2), True) - along.amin((1, 2), True))).clamp(0, 1)
    if kind == "striped":
        return (0.5 + torch.sin(2 * math.pi * frequency * along) * sharp / 2).clamp(0, 1)
    if kind == "checkered":
        wave = torch.sin(math.pi * frequency * x) * torch.sin(math.pi * frequency * y)
        return (0.5 + wave * sharp).clamp(0, 1)
    if kind == "dotted":
        u, v = (frequency * along) % 1 - 0.5, (frequency * across) % 1 - 0.5
        return (0.5 - ((u * u + v * v).sqrt() - 0.27) * size / frequency).clamp(0, 1)
    return _noise(x, y, frequency * 4.5, seed)


def _noise(x: Tensor, y: Tensor, frequency: Tensor, seed: Tensor) -> Tensor:
    """Value noise with ``frequency`` grains along the shorter side: hashed lattice values, smoothly interpolated."""
    u, v = x * frequency, y * frequency
    i, j = u.floor().long(), v.floor().long()
    s, t = (w * w * (3 - 2 * w) for w in (u - i, v - j))

    def lattice(di: int, dj: int) -> Tensor:
        mixed = (i + di) * 73856093 ^ (j + dj) * 19349663 ^ seed * 83492791
        mixed = (mixed ^ (mixed >> 13)) * 1274126177
        return ((mixed ^ (mixed >> 16)) & 0xFFFF).float() / 0xFFFF

    top = lattice(0, 0) * (1 - s) + lattice(1, 0) * s
    bottom = lattice(0, 1) * (1 - s) + lattice(1, 1) * s
    return ((top * (1 - t) + bottom * t - 0.5) * 1.6 + 0.5).clamp(0, 1)


def _distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance to a shape of about unit radius at the origin, y downwards; negative inside."""
    if shape == "circle":
        return (x * x + y * y).sqrt() - 1
    if shape == "ring":
        return ((x * x + y * y).sqrt() - 0.74).abs() - 0.26
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.88
    if shape == "cross":
        a, b = x.abs(), y.abs()
        return torch.minimum(torch.maximum(a - 1, b - 0.33), torch.maximum(a - 0.33, b - 1))
    if shape == "triangle":
        y = y - 0.2
        return torch.maximum(y, x.abs() * math.sqrt(0.75) - y * 0.5) - 0.58
    # star: fold the plane to one tenth, then one edge from the outer to the inner corner
    radius, step = (x * x + y * y).sqrt(), 2 * math.pi / 5
    folded = ((torch.atan2(x, -y) + step / 2) % step - step / 2).abs()
    inner = 0.45
    normal = (inner * math.sin(step / 2), 1.1 - inner * math.cos(step / 2))
    length = math.hypot(*normal)
    return ((radius * folded.cos() - 1.1) * normal[0] + radius * folded.sin() * normal[1]) / length


def vocabulary() -> list[str]:
    """Every word that a caption may hold."""
    words = {
        "a",
        "an",
        "and",
        "on",
        "background",
        *NUMBERS.values(),
        *filter(None, RADII),
        *COLOURS,
        *SHAPES,
        *BACKGROUNDS,
    }
    words |= {PLURALS.get(shape, shape + "s") for shape in SHAPES}
    words |= {word for position in POSITIONS for word in position.split()}
    return sorted(words)
