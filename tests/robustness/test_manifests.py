"""Manifests with fields deleted, replaced, doubled, renamed and swapped."""

import json

from hypothesis import given
from hypothesis import strategies as st

from hostile import mutate
from outcomes import count, judge


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
