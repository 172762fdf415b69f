"""scripts/decoder_memory.py: what decoding takes, in processes of their own."""

import re

import decoder_memory
from conftest import run


def test_tiles_take_less_memory(tiny_bundle):
    options = ("--size", "1024x1024", "--tile", 0, "--tile", 128, "--threads", 1)
    result = run(decoder_memory.main, tiny_bundle, *options)
    assert result.exit_code == 0, result.stderr
    rows = re.findall(r"\| 1024×1024 \| (none|128) \| (\S+) GB \| (\S+) GB \| \S+ \|", result.stdout)
    assert [row[0] for row in rows] == ["none", "128"]
    whole, tiled = (float(row[1]) for row in rows)
    assert tiled < 0.8 * whole


def test_what_cannot_be_measured_is_refused_first(tiny_bundle, wan_bundle):
    for bundle, options, words in (
        (tiny_bundle, ("--tile", 100), "tiles of 100 pixels do not fit"),
        (tiny_bundle, ("--size", "large"), "cannot read the size"),
        (wan_bundle, (), "makes clips"),
    ):
        result = run(decoder_memory.main, bundle, *options)
        assert (result.exit_code, words in result.stderr) == (2, True), result.stderr
