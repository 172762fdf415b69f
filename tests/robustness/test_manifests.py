"""Manifests with fields deleted, replaced, doubled, renamed and swapped."""

import json

from hypothesis import given
from hypothesis import strategies as st

from outcomes import count, judge

NUMBERS = (0, -1, 1, 2, 3, 7, 10**12, -(10**12), 10**400, 0.5, -0.5, 1e-300, 1e300)
NO_NUMBERS = (None, True, False, float("nan"), float("inf"), -float("inf"), [], {}, [[]], [1, 2, 3], ["B"], {"x": 1})
NAMES = ("", "x", "step", "level-2", "latent", "B", "H", "L", "H/0", "H/3", "H*8", "../x", "/dev/zero", "engines")
TEXTS = ("a\nerror: forged", "\x1b[2J", "[/red]", "\ud800", "x" * 5000, "None")
VALUES = (*NUMBERS, *NO_NUMBERS, *NAMES, *TEXTS)


def places(node, path=()):
    """The paths of all values in nested dicts and lists."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


def parent(manifest, path):
    for key in path[:-1]:
        manifest = manifest[key]
    return manifest


def mutate(manifest, data) -> None:
    """One change somewhere."""
    known = [path for path in places(manifest) if path[0] not in ("parity", "made_with") or len(path) < 4]
    path = data.draw(st.sampled_from(known))
    inside, key = parent(manifest, path), path[-1]
    how = data.draw(st.sampled_from(["delete", "replace", "replace", "replace", "nudge", "double", "rename", "swap"]))
    if how == "delete":
        del inside[key]
    elif how == "double" and isinstance(inside, list):
        inside.insert(key, inside[key])
    elif how == "rename" and isinstance(inside, dict):
        inside[data.draw(st.sampled_from(["x", "", "../y", "step", "0", "[red]", "a\nb"]))] = inside.pop(key)
    elif how == "swap":
        other = data.draw(st.sampled_from(known))
        there = parent(manifest, other)
        inside[key], there[other[-1]] = there[other[-1]], json.loads(json.dumps(inside[key]))
    elif how == "nudge" and isinstance(inside[key], int | float):
        inside[key] = data.draw(st.sampled_from([inside[key] + 1, inside[key] - 1, inside[key] * 2, -inside[key]]))
    else:
        inside[key] = data.draw(st.sampled_from(VALUES))


def test_manifests(tiny_bundle, victim, examples, tmp_path_factory):
    whole = (tiny_bundle / "bundle.json").read_text()
    folder = tmp_path_factory.mktemp("manifests")
    options = ("--steps", 5, "--height", 64, "--width", 64, "--out", folder / "o.png", "--trace", folder / "t.json")

    @examples(150, 3000)
    @given(data=st.data())
    def try_one(data):
        manifest = json.loads(whole)
        for _ in range(data.draw(st.sampled_from([1, 1, 2, 3]))):
            try:
                mutate(manifest, data)
            except (KeyError, IndexError, TypeError):  # the change before took this place away
                continue
        (victim / "bundle.json").write_text(json.dumps(manifest))
        shown = judge(["inspect", victim])
        count("manifests: inspect", shown)
        made = judge(["generate", victim, "a red star", *options], folder / "t.json")
        count("manifests: generate", made)

    try:
        try_one()
    finally:
        (victim / "bundle.json").write_text(whole)
