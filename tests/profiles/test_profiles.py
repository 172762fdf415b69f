"""Shape profiles: the built-in ones are valid, and broken ones say what is wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ddit.profiles import ProfileError, Range, built_in, load_profile

CLIPS = {"wan-480": (81, 480, 832, 512), "demo-video": (17, 128, 128, 24)}  # frames, height, width, text


@pytest.mark.parametrize("name", sorted({*built_in()} - {*CLIPS}))
def test_built_in_profiles_of_pictures_fit_levels_up_to_eight(name):
    profile = load_profile(name)
    assert profile.description
    for entry in profile.entry:
        for side in (entry.height, entry.width):
            assert all(value % 64 == 0 for value in (side.minimum, side.optimum, side.maximum))
    for side in map(int, name.split("-")):  # a size, or the smallest and the largest
        assert profile.contains(height=side, width=side, text=profile.entry[0].text.optimum, batch=1)


@pytest.mark.parametrize("name", CLIPS)
def test_built_in_profiles_of_clips_fit_wan_s_latents_and_levels_up_to_four(name):
    """480, Wan's usual height, is no multiple of the 64 pixels that a level of 8 asks for."""
    profile = load_profile(name)
    assert profile.description
    for entry in profile.entry:
        for side in (entry.height, entry.width):
            assert all(value % 32 == 0 for value in (side.minimum, side.optimum, side.maximum))
        assert all(value % 4 == 1 for value in (entry.frames.minimum, entry.frames.optimum, entry.frames.maximum))
    frames, height, width, text = CLIPS[name]
    assert profile.contains(frames=frames, height=height, width=width, text=text, batch=1)


def test_a_profile_of_one_s_own(tmp_path):
    path = tmp_path / "wide.toml"
    path.write_text(
        "[[entry]]\nheight = [64, 64, 128]\nwidth = [512, 512, 512]\ntext = [16, 16, 16]\nbatch = [1, 1, 1]\n"
    )
    profile = load_profile(path)
    assert profile.name == "wide"
    assert str(profile) == "height 64 to 128, width 512, text 16, batch 1"
    assert profile.contains(height=128, width=512)
    assert not profile.contains(height=128, width=256)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("entry = 3", "entry"),
        ("[[entry]]\nheight = [1, 2]", "give three numbers"),
        ("[[entry]]\nheight = [3, 2, 1]", "not ordered"),
        ("description = 'none'", "entry"),
        ("[[", "not valid TOML"),
    ],
)
def test_broken_profiles(tmp_path, text, words):
    path = tmp_path / "broken.toml"
    path.write_text(text)
    with pytest.raises(ProfileError, match=words):
        load_profile(path)


@given(values=st.tuples(*[st.integers(-5, 50)] * 3))
def test_ranges_are_ordered_and_positive(values):
    low, middle, high = values
    if 1 <= low <= middle <= high:
        assert all((value in Range.model_validate(values)) == (low <= value <= high) for value in range(-5, 55))
    else:
        with pytest.raises(ValidationError):
            Range.model_validate(values)
