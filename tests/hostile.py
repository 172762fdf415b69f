"""Hostile input: manifests with fields deleted, replaced, doubled, renamed and swapped, and files with other bytes."""

import json

from hypothesis import strategies as st

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


def damaged(content: bytes, data) -> bytes:
    """The same with a few bytes changed, a piece taken out or doubled, or the end cut off."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        # where formats keep their structure is at the beginning, more often than not
        limit = data.draw(st.sampled_from([64, 512, len(changed)]))
        place = data.draw(st.integers(0, max(0, min(limit, len(changed)) - 1)))
        length = data.draw(st.integers(1, 40))
        how = data.draw(st.sampled_from(["flip", "flip", "byte", "fill", "drop", "double", "cut"]))
        if how == "flip":
            changed[place] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "byte":
            changed[place] = data.draw(st.sampled_from([0, 1, 0x22, 0x5B, 0x7B, 0x7F, 0x80, 0xFF]))
        elif how == "fill":
            changed[place : place + length] = b"\xff" * len(changed[place : place + length])
        elif how == "drop":
            del changed[place : place + length]
        elif how == "double":
            changed[place:place] = changed[place : place + length]
        else:
            del changed[place:]
        if not changed:
            break
    return bytes(changed)
