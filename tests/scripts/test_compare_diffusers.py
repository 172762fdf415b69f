"""scripts/compare_diffusers.py as far as no GPU is needed: what diffusers is timed on, and the tables."""

import pytest
import torch
from diffusers import FluxPipeline

import compare_diffusers
from conftest import run
from ddit.runtime.shapes import Size


@pytest.mark.parametrize(("factor", "tokens"), [(1, 64), (2, 16)])
def test_diffusers_gets_as_many_tokens_as_a_level_has(tiny_pipeline, factor, tokens):
    pipeline = FluxPipeline.from_pretrained(tiny_pipeline, torch_dtype=torch.float32)
    size = compare_diffusers.shrunk(Size(128, 128), factor)
    (call,) = compare_diffusers.transformer_inputs(pipeline, size)
    assert call["hidden_states"].shape[1] == tokens
    assert compare_diffusers.step_of(pipeline.transformer, [call])()[0][0].shape == call["hidden_states"].shape


def test_a_guided_clip_takes_two_calls_a_step(tiny_wan):
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(tiny_wan, torch_dtype=torch.float32)
    calls = compare_diffusers.transformer_inputs(pipeline, Size(32, 48, 5))
    assert [call["hidden_states"].shape[2:] for call in calls] == [(2, 4, 6)] * 2


def test_a_constant_stands_in_for_the_position_embedding():
    table = (torch.ones(2), torch.zeros(2))
    assert compare_diffusers.Constant(table)(torch.arange(3)) is table


def test_tables_set_ours_against_every_other():
    steps = {"diffusers": {2: 10.0, 4: 5.0}, "compiled": {2: 8.0, 4: 2.0}, "cuda": {2: 9.0, 4: 1.0}}
    table = [
        ["ms", "level 2", "level 4"],
        ["diffusers", "10.000", "5.000"],
        ["compiled", "8.000", "2.000"],
        ["cuda", "9.000", "1.000"],
    ]
    against = [["cuda ÷ diffusers", "0.90", "0.20"], ["cuda ÷ compiled", "1.12", "0.50"]]
    assert compare_diffusers.step_table(steps, ["cuda"]) == table + against
    more = [[f"cuda-fp8 ÷ {name}", *ratios] for name, *ratios in (
        ("diffusers", "0.60", "0.10"), ("compiled", "0.75", "0.25"), ("cuda", "0.67", "0.50"))]  # fmt: skip
    steps["cuda-fp8"] = {2: 6.0, 4: 0.5}
    row = ["cuda-fp8", "6.000", "0.500"]
    assert compare_diffusers.step_table(steps, ["cuda", "cuda-fp8"]) == [*table, row, *against, *more]
    assert compare_diffusers.run_table({"diffusers": 12.0, "native": 8.0, "fixed": 4.0}) == [
        ["", "s", "against diffusers", "against native"],
        ["diffusers", "12.00", "", ""],
        ["native", "8.00", "1.50×", ""],
        ["fixed", "4.00", "3.00×", "2.00×"],
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tiny_pipeline, tiny_bundle):
    result = run(compare_diffusers.main, tiny_pipeline, tiny_bundle)
    assert result.exit_code == 2
    assert "torch finds no GPU here" in result.stderr
