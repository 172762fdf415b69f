"""Procedural clips with captions: the video demo's world.

The things of scenes (`demo_model.scenes`) stand still, move, turn, grow, shrink or change into another shape, before
backgrounds that are plain or busy, still or drifting. So clips differ in how much detail they need, and in how much of
it changes. Captions come from a closed vocabulary and say what moves, and how.

    clips = sample_clips(4, seed=0)
    frames = render_clips(clips, frame_times(17))     # (4, 3, 17, 128, 128) in [-1, 1]
    captions = [clip.caption for clip in clips]
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from demo_model.scenes import (
    BACKGROUNDS,
    COLOURS,
    LAYOUTS,
    PLAIN,
    POSITIONS,
    SHAPES,
    Scene,
    background_colours,
    background_pattern,
    cover,
    make_thing,
)
from demo_model.scenes import vocabulary as scene_vocabulary

SIDE = 128  # pixels
RADII = {"small": 0.12, "": 0.17, "large": 0.24}  # of the side; larger than in scenes, because clips have fewer pixels
FREQUENCIES = (4.0, 8.0)  # periods of a background over the side
TRAVEL = (0.38, 0.5)  # of the side, over the clip
DRIFT = (0.15, 0.3)
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
TURNING = ("square", "triangle", "star", "cross")  # shapes whose turning shows
GROWTH = 2.2  # the largest radius over the smallest
CHANGE = (0.2, 0.8)  # of the clip: when a shape begins to change into another, and when it is that
LONGEST_CAPTION = 20  # words, and T5's mark of the end


@dataclass(frozen=True)
class Motion:
    """What becomes of a thing from the first frame to the last. In the middle it is as its scene says."""

    words: str = ""
    way: tuple[float, float] = (0.0, 0.0)  # in units of the sides
    turn: float = 0.0  # radians
    growth: float = 1.0  # the last radius over the first
    into: str | None = None  # the shape that it has in the end


@dataclass(frozen=True)
class Clip:
    """What to draw; the scene's caption is the clip's."""

    scene: Scene
    motions: tuple[Motion, ...]  # of the scene's things
    drift: tuple[float, float] = (0.0, 0.0)  # of the background, in units of the shorter side

    @property
    def caption(self) -> str:
        """The words for it."""
        return self.scene.caption

    @property
    def plain(self) -> bool:
        """Whether the background needs no detail."""
        return self.scene.plain

    @property
    def still(self) -> bool:
        """Whether all frames are the same."""
        return self.drift == (0.0, 0.0) and all(motion == Motion() for motion in self.motions)

    @property
    def kind(self) -> str:
        """Its class, as in ``still, plain``."""
        return f"{'still' if self.still else 'moving'}, {'plain' if self.plain else 'busy'}"


KINDS = ("still, plain", "moving, busy", "moving, plain", "still, busy")


def sample_clips(count: int, seed: int) -> list[Clip]:
    """Random clips; the same for the same seed."""
    rng = random.Random(seed)
    return [sample_clip(rng) for _ in range(count)]


def balanced_clips(count: int, seed: int) -> list[Clip]:
    """Random clips of all `KINDS` in turn; a larger number goes on from a smaller one."""
    rng = random.Random(seed)
    chosen: list[Clip] = []
    while len(chosen) < count:
        clip = sample_clip(rng)
        if clip.kind == KINDS[len(chosen) % len(KINDS)]:
            chosen.append(clip)
    return chosen


def sample_clip(rng: random.Random) -> Clip:
    """One random clip: one thing (two thirds of them), or two of different shapes and colours."""
    background = rng.choice(BACKGROUNDS)
    shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
    if rng.random() < 0.65:
        motion = _motion(rng, shape, tuple(DIRECTIONS))
        size = "" if motion.growth != 1 else rng.choice(list(RADII))
        position, (x, y) = _place(rng, motion)
        things = [make_thing(rng, shape, colour, x, y, RADII[size])]
        motions = [motion]
        words = " ".join(filter(None, ("a", size, colour, shape, position, motion.words)))
    else:
        shape2, colour2 = rng.choice([s for s in SHAPES if s != shape]), rng.choice([c for c in COLOURS if c != colour])
        beside, above = LAYOUTS[2][:2]
        places, ways = rng.choice(((beside, ("up", "down")), (above, ("left", "right"))))
        things = [
            make_thing(rng, *look, *place, RADII[""])
            for look, place in zip(((shape, colour), (shape2, colour2)), places, strict=True)
        ]
        motions = [_motion(rng, thing.shape, ways) for thing in things]
        each = [
            " ".join(filter(None, ("a", thing.colour, thing.shape, motion.words)))
            for thing, motion in zip(things, motions, strict=True)
        ]
        words = " and ".join(each)
    drift = (0.0, 0.0)
    if background not in PLAIN and rng.random() < 0.4:
        angle, speed = rng.uniform(0, 2 * math.pi), rng.uniform(*DRIFT)
        drift = (speed * math.cos(angle), speed * math.sin(angle))
    first, second = background_colours(rng)
    ground = f"drifting {background}" if any(drift) else background
    scene = Scene(
        tuple(things),
        background,
        first,
        second,
        frequency=rng.uniform(*FREQUENCIES),
        angle=rng.uniform(0, math.pi),
        seed=rng.randrange(1 << 20),
        caption=f"{words.replace('a orange', 'an orange')} on a {ground} background",
    )
    return Clip(scene, tuple(motions), drift)


def _motion(rng: random.Random, shape: str, ways: Sequence[str]) -> Motion:
    """What may become of a thing of this shape that has room in these directions."""
    kind = rng.choices(("still", "moving", "turning", "growing", "shrinking", "changing"), (35, 25, 12, 7, 7, 14))[0]
    if kind == "moving":
        way = rng.choice(ways)
        x, y = DIRECTIONS[way]
        travel = rng.uniform(*TRAVEL)
        return Motion(f"moving {way}", way=(x * travel, y * travel))
    if kind == "turning" and shape in TURNING:
        return Motion(kind, turn=rng.choice((-1, 1)) * rng.uniform(0.6, 1.0) * math.pi)
    if kind in ("growing", "shrinking"):
        return Motion(kind, growth=GROWTH if kind == "growing" else 1 / GROWTH)
    if kind == "changing":
        into = rng.choice([other for other in SHAPES if other != shape])
        return Motion(f"changing into a {into}", into=into)
    return Motion()


def _place(rng: random.Random, motion: Motion) -> tuple[str, tuple[float, float]]:
    """Words for a place and the place itself; what moves passes the middle of its way, and no words say where."""
    if motion.way[0]:
        return "", (0.5, rng.uniform(0.3, 0.7))
    if motion.way[1]:
        return "", (rng.uniform(0.3, 0.7), 0.5)
    position = rng.choice([*POSITIONS, ""])
    return position, POSITIONS.get(position) or (rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7))


def frame_times(frames: int, of: int | None = None, start: int = 0) -> Tensor:
    """When ``frames`` frames are, the first being number ``start`` of a clip of ``of``: from 0 to 1 over the clip."""
    of = of or frames
    return (start + torch.arange(frames)) / max(1, of - 1)


@torch.no_grad()
def render_clips(
    clips: Sequence[Clip], times: Tensor, size: int | tuple[int, int] = SIDE, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw clips at some times (F,) of theirs, from 0 to 1: ``(B, 3, F, height, width)`` float32 in [-1, 1].

    ``size``: a square's side, or height and width, in pixels; as for `demo_model.scenes.render`.
    """
    height, width = (size, size) if isinstance(size, int) else size
    short, frames = min(height, width), len(times)
    y, x = torch.meshgrid(
        *((torch.arange(side, device=device) + 0.5) / short for side in (height, width)), indexing="ij"
    )
    times = times.to(device)
    pixels = _backgrounds(clips, times, x, y, short)
    for slot in range(2):
        groups: dict[tuple[str, str | None], list[int]] = {}
        for row, clip in enumerate(clips):
            if len(clip.motions) > slot:
                groups.setdefault((clip.scene.things[slot].shape, clip.motions[slot].into), []).append(row)
        for (shape, into), rows in groups.items():
            numbers = []
            for row in rows:
                thing, motion = clips[row].scene.things[slot], clips[row].motions[slot]
                place = (thing.x * (width / short), thing.y * (height / short), thing.radius, thing.angle)
                way = (motion.way[0] * (width / short), motion.way[1] * (height / short))
                numbers.append((*place, *way, motion.turn, math.log(motion.growth), *COLOURS[thing.colour]))
            columns = torch.tensor(numbers, device=device)[:, :, None].unbind(1)  # each (N, 1)
            centre_x, centre_y, radius, angle, way_x, way_y, turn, growth = columns[:8]
            moved = times - 0.5  # (F,)
            radius = (radius * (growth * moved).exp()).flatten()[:, None, None]  # (N · F, 1, 1)
            angle = (angle + turn * moved).flatten()[:, None, None]
            dx = (x - (centre_x + way_x * moved).flatten()[:, None, None]) / radius
            dy = (y - (centre_y + way_y * moved).flatten()[:, None, None]) / radius
            shapes: dict[str, float | Tensor] = {shape: 1.0}
            if into is not None:
                share = ((times - CHANGE[0]) / (CHANGE[1] - CHANGE[0])).clamp(0, 1)
                share = (share * share * (3 - 2 * share)).repeat(len(rows))[:, None, None]
                shapes = {shape: 1 - share, into: share}
            alpha = cover(shapes, dx, dy, angle, radius * short).view(len(rows), 1, frames, height, width)
            colour = torch.cat(columns[8:], dim=1)[:, :, None, None, None]
            pixels[rows] = pixels[rows] * (1 - alpha) + colour * alpha
    return pixels * 2 - 1


def _backgrounds(clips: Sequence[Clip], times: Tensor, x: Tensor, y: Tensor, short: int) -> Tensor:
    """The clips without their things: (B, 3, F, height, width) in [0, 1]."""
    pattern = torch.zeros(len(clips), len(times), *x.shape, device=x.device)
    for kind in BACKGROUNDS:
        for drifting in (False, True):
            rows = [
                row for row, clip in enumerate(clips) if clip.scene.background == kind and any(clip.drift) == drifting
            ]
            if not rows:
                continue
            scenes = [clips[row].scene for row in rows]
            numbers = torch.tensor(
                [[s.frequency, s.angle, s.seed, *clips[r].drift] for s, r in zip(scenes, rows, strict=True)],
                device=x.device,
                dtype=torch.float64,
            )
            moved = times - 0.5 if drifting else torch.zeros(1, device=x.device)  # a still one is drawn once
            columns = numbers[:, :, None].expand(-1, -1, len(moved)).unbind(1)
            frequency, angle, seed, drift_x, drift_y = (column.flatten()[:, None, None] for column in columns)
            passed = moved.repeat(len(rows))[:, None, None]
            drawn = background_pattern(
                kind,
                x - drift_x.float() * passed,
                y - drift_y.float() * passed,
                frequency.float(),
                angle.float(),
                seed.long(),
                short,
            )
            pattern[rows] = drawn.view(len(rows), len(moved), *x.shape).expand(-1, len(times), -1, -1)
    first, second = (
        torch.tensor([getattr(clip.scene, name) for clip in clips], device=x.device)[:, :, None, None, None]
        for name in ("first", "second")
    )
    return first + (second - first) * pattern[:, None]


def vocabulary() -> list[str]:
    """Every word that a caption may hold."""
    motions = {"moving", *DIRECTIONS, "turning", "growing", "shrinking", "changing", "into", "drifting"}
    return sorted({*scene_vocabulary(), *motions})
