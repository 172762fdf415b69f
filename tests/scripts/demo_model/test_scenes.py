"""The scenes are what their captions say, and are drawn as they are described."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from demo_model import scenes
from demo_model.classifier import labels

# a scene of every background, drawn when all pictures were squares of 256 pixels
SQUARES = Path(__file__).parents[2] / "data" / "scenes-256.png"


@pytest.fixture(scope="module")
def sample() -> list[scenes.Scene]:
    return scenes.sample_scenes(600, seed=7)


def mask(thing: scenes.Thing, size: int = 128) -> torch.Tensor:
    """Where a thing is, on a canvas twice as wide as the picture, which is its middle half."""
    axis = (torch.arange(2 * size) + 0.5) / size - 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    dx, dy = (x - thing.x) / thing.radius, (y - thing.y) / thing.radius
    cos, sin = math.cos(thing.angle), math.sin(thing.angle)
    return scenes._distance(thing.shape, dx * cos + dy * sin, dy * cos - dx * sin) < 0


def test_a_seed_gives_the_same_scenes():
    assert scenes.sample_scenes(20, seed=3) == scenes.sample_scenes(20, seed=3)
    assert scenes.sample_scenes(20, seed=3) != scenes.sample_scenes(20, seed=4)


def test_captions_keep_to_the_vocabulary(sample):
    words = scenes.vocabulary()
    assert len(words) < 100
    assert {word for scene in sample for word in scene.caption.split()} <= set(words)


def test_captions_name_every_shape_and_colour_and_the_background(sample):
    for scene in sample:
        assert scene.caption.endswith(f"on a {scene.background} background")
        for thing in scene.things:
            assert thing.colour in scene.caption.split()
            assert thing.shape in scene.caption


def test_every_attribute_occurs(sample):
    things = [thing for scene in sample for thing in scene.things]
    assert {thing.shape for thing in things} == set(scenes.SHAPES)
    assert {thing.colour for thing in things} == set(scenes.COLOURS)
    assert {scene.background for scene in sample} == set(scenes.BACKGROUNDS)
    assert {len(scene.things) for scene in sample} == {1, 2, 3}


def test_things_stay_in_the_picture_and_apart(sample):
    for scene in sample:
        masks = [mask(thing) for thing in scene.things]
        for number, one in enumerate(masks):
            outside = one.clone()
            outside[64:192, 64:192] = False
            assert outside.sum() <= 0.002 * one.sum(), scene  # the corner of a large shape may touch the edge
            for other in masks[:number]:
                assert (one & other).sum() <= 0.015 * one.sum(), scene  # corners of three in a row may touch


def test_things_stand_out_from_the_background(sample):
    for scene in sample:
        for thing in scene.things:
            for colour in (scene.first, scene.second):
                assert math.dist(scenes.COLOURS[thing.colour], colour) > 0.25, scene


def test_pictures_are_within_range_and_show_the_colours(sample):
    chosen = sample[:60]
    pictures = scenes.render(chosen, 128)
    assert pictures.shape == (60, 3, 128, 128)
    assert pictures.abs().max() <= 1
    for scene, picture in zip(chosen, pictures, strict=True):
        for thing in scene.things:
            colour = torch.tensor(scenes.COLOURS[thing.colour])[:, None, None] * 2 - 1
            shown = ((picture - colour).abs().amax(0) < 0.02).sum() / 128**2
            assert shown > 0.2 * thing.radius**2, scene


def test_squares_are_drawn_as_before_there_were_other_formats():
    sample = scenes.sample_scenes(60, seed=5)
    rows = [next(scene for scene in sample if scene.background == kind) for kind in scenes.BACKGROUNDS]
    pictures = ((scenes.render(rows) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    with Image.open(SQUARES) as image:
        before = np.asarray(image).reshape(2, 256, 3, 256, 3).transpose(0, 2, 1, 3, 4).reshape(6, 256, 256, 3)
    np.testing.assert_array_equal(pictures, before)
    assert torch.equal(scenes.render(rows, (64, 64)), scenes.render(rows, 64))


@pytest.mark.parametrize("size", [(96, 160), (160, 96), (64, 192)])
def test_other_formats_show_round_things_where_the_caption_says(size):
    things = [scenes.Thing("circle", "red", x, y, 0.2, 0.0) for x, y in ((0.25, 0.5), (0.75, 0.5))]
    rows = [scenes.Scene((thing,), "plain", (0.4,) * 3, (0.4,) * 3, 8.0, 0.0, 0, "") for thing in things]
    for thing, picture in zip(things, scenes.render(rows, size), strict=True):
        y, x = torch.nonzero(picture[0] > 0.5, as_tuple=True)
        diameter = 2 * 0.2 * min(size)
        assert (y.max() - y.min() + 1).item() == pytest.approx(diameter, abs=1.5)
        assert (x.max() - x.min() + 1).item() == pytest.approx(diameter, abs=1.5)
        assert (x.double().mean() / size[1]).item() == pytest.approx(thing.x, abs=0.01)
        assert (y.double().mean() / size[0]).item() == pytest.approx(thing.y, abs=0.01)


@pytest.mark.parametrize("kind", ["striped", "checkered", "dotted", "noisy"])
def test_patterns_are_not_stretched(kind):
    scene = scenes.Scene((), kind, (0.4,) * 3, (0.7,) * 3, 8.0, 0.4, 3, "")
    square, wide = scenes.render([scene], 64), scenes.render([scene], (64, 192))
    torch.testing.assert_close(wide[..., :64], square)
    torch.testing.assert_close(scenes.render([scene], (192, 64))[..., :64, :], square)


def test_a_batch_is_drawn_as_its_scenes_alone(sample):
    together = scenes.render(sample[:30], 64)
    torch.testing.assert_close(together, torch.cat([scenes.render([scene], 64) for scene in sample[:30]]))


def test_busy_backgrounds_hold_more_detail_than_plain_ones(sample):
    pictures = scenes.render(sample[:120], 64)
    detail = [(p.diff(dim=1).abs().mean() + p.diff(dim=2).abs().mean()).item() for p in pictures]
    plain = [value for value, scene in zip(detail, sample, strict=False) if scene.plain]
    busy = [value for value, scene in zip(detail, sample, strict=False) if not scene.plain]
    assert sum(busy) / len(busy) > 2 * sum(plain) / len(plain)


def test_labels_follow_the_scene(sample):
    truth = labels(sample)
    for row, scene in enumerate(sample):
        shapes = {name for name, there in zip(scenes.SHAPES, truth["shape"][row], strict=True) if there}
        colours = {name for name, there in zip(scenes.COLOURS, truth["colour"][row], strict=True) if there}
        assert shapes == {thing.shape for thing in scene.things}
        assert colours == {thing.colour for thing in scene.things}
        assert scenes.BACKGROUNDS[truth["background"][row]] == scene.background
        assert truth["count"][row] + 1 == len(scene.things)
