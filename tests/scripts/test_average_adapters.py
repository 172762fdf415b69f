"""Averaging adapters: the mean, what has none, and bad input in one line."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import average_adapters
from conftest import run
from ddit.exporter.adapter import Adapter, load_adapter


@pytest.fixture
def pair(tiny_adapter, tmp_path):
    """An adapter and another of the same levels with other values."""
    first = load_adapter(tiny_adapter)
    other = tmp_path / "other.safetensors"
    tensors = {name: torch.full_like(tensor, 3.0) for name, tensor in first.tensors.items()}
    Adapter(other, first.base_model, first.family, first.configs, tensors).save()
    return tiny_adapter, other


def test_the_mean_is_weighted_and_an_adapter(pair, tmp_path):
    out = tmp_path / "mean.safetensors"
    result = run(average_adapters.main, *pair, "--weights", "3,1", "--out", out)
    assert result.exit_code == 0, result.stderr
    first, mean = load_adapter(pair[0]), load_adapter(out)
    assert (mean.configs, mean.base_model, mean.family) == (first.configs, first.base_model, first.family)
    assert mean.tensors.keys() == first.tensors.keys()
    for name, tensor in first.tensors.items():
        torch.testing.assert_close(mean.tensors[name], 0.75 * tensor + 0.75)
        assert mean.tensors[name].dtype == tensor.dtype


def test_the_result_may_replace_an_adapter(pair):
    before = load_file(pair[1])
    assert run(average_adapters.main, *pair, "--out", pair[1]).exit_code == 0
    after = load_file(pair[1])
    assert all(not torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [path.name for path in pair[1].parent.iterdir()] == [pair[1].name]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--weights", "1"), 2, "1 weights for 2 adapters"),
        (("--weights", "a,b"), 2, "cannot read the weights 'a,b'"),
        (("--weights", "1,-1"), 2, "weights must be 0 or more"),
        (("--weights", "0,0"), 2, "weights must be 0 or more"),
    ],
)
def test_bad_weights_are_refused(pair, tmp_path, options, code, words):
    result = run(average_adapters.main, *pair, *options, "--out", tmp_path / "out.safetensors")
    assert result.exit_code == code
    assert words in result.stderr
    assert not (tmp_path / "out.safetensors").exists()


def test_adapters_of_other_levels_have_no_mean(pair, tmp_path):
    one = load_adapter(pair[1])
    less = tmp_path / "less.safetensors"
    Adapter(less, one.base_model, one.family, {4: one.configs[4]}, one.tensors).save()
    result = run(average_adapters.main, pair[0], less, "--out", tmp_path / "out.safetensors")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {less} and ")
    save_file({"a": torch.ones(1)}, less)
    assert "is not an adapter file" in run(average_adapters.main, pair[0], less, "--out", less).stderr
