"""Clips are scenes in motion: every frame is compared with the scene that it should be."""

import math
from dataclasses import replace

import pytest
import torch

from demo_model.scenes import PLAIN, Scene, render
from demo_video.clips import (
    GROWTH,
    KINDS,
    LONGEST_CAPTION,
    Clip,
    Motion,
    balanced_clips,
    frame_times,
    render_clips,
    sample_clips,
    vocabulary,
)

CLIPS = sample_clips(400, seed=5)
SIDE = 64


def scene_at(clip: Clip, time: float) -> Scene:
    """The scene that a clip is at a time, where neither its background drifts nor a shape changes."""
    things = tuple(
        replace(
            thing,
            x=thing.x + (time - 0.5) * motion.way[0],
            y=thing.y + (time - 0.5) * motion.way[1],
            angle=thing.angle + (time - 0.5) * motion.turn,
            radius=thing.radius * motion.growth ** (time - 0.5),
        )
        for thing, motion in zip(clip.scene.things, clip.motions, strict=True)
    )
    return replace(clip.scene, things=things)


def test_every_frame_is_the_scene_that_it_should_be():
    chosen = [clip for clip in CLIPS if not any(clip.drift) and all(motion.into is None for motion in clip.motions)]
    words = {motion.words.split(" ")[0] for clip in chosen for motion in clip.motions}
    assert words == {"", "moving", "turning", "growing", "shrinking"}
    times = frame_times(5)
    frames = render_clips(chosen, times, SIDE)
    for number, time in enumerate(times.tolist()):
        expected = render([scene_at(clip, time) for clip in chosen], SIDE)
        torch.testing.assert_close(frames[:, :, number], expected, atol=2e-3, rtol=0)


def test_a_shape_changes_into_another():
    clip = next(c for c in CLIPS if len(c.motions) == 1 and c.motions[0].into and not any(c.drift))
    frames = render_clips([clip], frame_times(9), SIDE)
    (thing,) = clip.scene.things
    for number, shape in ((0, thing.shape), (1, thing.shape), (8, clip.motions[0].into)):
        scene = replace(clip.scene, things=(replace(thing, shape=shape),))
        torch.testing.assert_close(frames[:, :, number], render([scene], SIDE), atol=2e-3, rtol=0)
    assert (frames[:, :, 4] - frames[:, :, 0]).abs().max() > 0.1


def test_a_background_drifts():
    scene = replace(CLIPS[0].scene, background="striped", angle=0.0, frequency=4.0, things=())
    period = 1 / 4.0
    still, drifting = (
        render_clips([Clip(scene, (), drift)], frame_times(5), SIDE)[0] for drift in ((0.0, 0.0), (period, 0.0))
    )
    torch.testing.assert_close(drifting[:, 0], drifting[:, 4], atol=1e-3, rtol=0)  # a period further
    torch.testing.assert_close(drifting[:, 2], still[:, 2], atol=1e-3, rtol=0)
    shifted = torch.roll(drifting[:, 2], SIDE // 16, dims=-1)  # a quarter of the period, in one frame
    torch.testing.assert_close(drifting[:, 3], shifted, atol=1e-3, rtol=0)


def test_nothing_changes_in_a_still_clip_and_something_in_every_other():
    frames = render_clips(CLIPS, frame_times(3), SIDE)
    changed = (frames[:, :, 1:] - frames[:, :, :-1]).abs().amax((1, 2, 3, 4)) > 0.01
    assert [not clip.still for clip in CLIPS] == changed.tolist()
    assert 0.1 < changed.float().mean() < 0.9


def test_a_window_shows_some_of_the_frames():
    whole, window = (render_clips(CLIPS[:8], times, SIDE) for times in (frame_times(17), frame_times(9, 17, 6)))
    torch.testing.assert_close(window, whole[:, :, 6:15])


def test_captions_are_short_and_say_what_moves():
    words = set(vocabulary())
    for clip in CLIPS:
        assert set(clip.caption.split()) <= words
        assert len(clip.caption.split()) <= LONGEST_CAPTION
        assert all(motion.words in clip.caption for motion in clip.motions)
        assert ("drifting" in clip.caption) == any(clip.drift)
    assert max(motion.growth for clip in CLIPS for motion in clip.motions) == GROWTH


def test_balanced_clips_are_of_all_kinds_in_turn_and_go_on():
    clips = balanced_clips(12, seed=1)
    assert [clip.kind for clip in clips] == [*KINDS] * 3
    assert balanced_clips(5, seed=1) == clips[:5]
    assert all(clip.plain == (clip.scene.background in PLAIN) for clip in clips)


@pytest.mark.parametrize(
    "motion", [Motion(way=(0.4, 0.0)), Motion(turn=math.pi), Motion(growth=2.0), Motion(into="star")]
)
def test_a_clip_of_any_motion_is_not_still(motion):
    assert not replace(CLIPS[0], motions=(motion,)).still
