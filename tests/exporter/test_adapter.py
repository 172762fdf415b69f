"""Adapter files: written, read, and refused where they do not fit."""

import pytest
import torch
from safetensors.torch import save_file

from ddit.exporter.adapter import load_adapter, save_adapter
from ddit.exporter.families.flux.modules import FluxLevel
from ddit.runtime.errors import AdapterError
from tiny import tiny_adapter_config, tiny_transformer

CONFIG = tiny_adapter_config(rank=4, alpha=2.0, residual_width=8)


@pytest.fixture
def transformer():
    return tiny_transformer()


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        tiny_adapter_config(rank=0, residual_width=0, identity=False),
        tiny_adapter_config(targets=("ff.net.2",), rank=2),
    ],
)
def test_a_round_trip_keeps_everything(transformer, tmp_path, config):
    level = FluxLevel(transformer, 4, config)
    with torch.no_grad():
        for parameter in level.own_parameters().values():
            parameter.normal_()
    save_adapter(tmp_path / "a.safetensors", {4: level}, base_model="tiny", family="flux")
    adapter = load_adapter(tmp_path / "a.safetensors")
    assert adapter.configs == {4: config}
    assert (adapter.base_model, adapter.family) == ("tiny", "flux")
    again = FluxLevel(transformer, 4, config)
    adapter.apply(again, 4)
    for name, parameter in level.own_parameters().items():
        assert torch.equal(parameter, again.own_parameters()[name])
        assert torch.equal(parameter, adapter.value(4, name))


def test_what_does_not_fit_names_the_tensor(transformer, tmp_path):
    path = tmp_path / "a.safetensors"
    save_adapter(path, {4: FluxLevel(transformer, 4, CONFIG)}, base_model="tiny", family="flux")
    adapter = load_adapter(path)
    with pytest.raises(AdapterError, match=r"lora_A.weight' of level 4 is missing in the file"):
        adapter.apply(FluxLevel(tiny_transformer(layers=2), 4, CONFIG), 4)
    with pytest.raises(AdapterError, match=r"has shape \(8, 8, 3, 3\), the model needs \(6, 8, 3, 3\)"):
        adapter.apply(FluxLevel(transformer, 4, tiny_adapter_config(rank=4, residual_width=6)), 4)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, "is not an adapter file"),
        ({"format": "ddit-adapter", "format_version": "9", "levels": "{}"}, "reads up to 1; update ddit"),
        ({"format": "ddit-adapter", "format_version": "1"}, "cannot be read"),
        ({"format": "ddit-adapter", "format_version": "1", "levels": '{"4": {"rank": 1, "odd": 2}}'}, "cannot be read"),
    ],
)
def test_other_files_are_refused(tmp_path, metadata, words):
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata=metadata)
    with pytest.raises(AdapterError, match=words):
        load_adapter(path)


def test_a_file_that_is_no_safetensors(tmp_path):
    path = tmp_path / "noise.safetensors"
    path.write_bytes(b"noise")
    with pytest.raises(AdapterError, match="cannot be read"):
        load_adapter(path)


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        ('{"4": {"targets": ["ff"], "rank": -1}}', "rank must lie between"),
        ('{"4": {"targets": ["ff"], "alpha": NaN}}', "alpha must be a number"),
        ('{"4": {"targets": [1]}}', "targets must be names"),
        ("[]", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_settings_that_no_adapter_has_are_refused(tmp_path, levels, words):
    path = tmp_path / "a.safetensors"
    metadata = {"format": "ddit-adapter", "format_version": "1", "family": "flux", "levels": levels}
    save_file({"x": torch.zeros(1)}, path, metadata=metadata)
    with pytest.raises(AdapterError, match=words):
        load_adapter(path)


def test_an_adapter_of_nan_is_refused_when_it_is_read(transformer, tmp_path):
    path, level = tmp_path / "a.safetensors", FluxLevel(transformer, 4, CONFIG)
    with torch.no_grad():
        next(iter(level.own_parameters().values())).fill_(float("nan"))
    save_adapter(path, {4: level}, base_model="tiny", family="flux")
    with pytest.raises(AdapterError, match="holds NaN or infinity in 'level_4"):
        load_adapter(path)


def test_targets_that_are_no_layers_are_refused(transformer):
    with pytest.raises(AdapterError, match=r"targets nothing.here are no linear layers"):
        FluxLevel(transformer, 4, tiny_adapter_config(targets=("nothing.here",), rank=2))
