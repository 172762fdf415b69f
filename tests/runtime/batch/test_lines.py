"""Files of prompts: what a line may say, and where an error says it is."""

import json

import pytest

from conftest import run
from ddit.runtime.batch.lines import read_lines
from ddit.runtime.bundle import Bundle
from ddit.runtime.cli import main
from ddit.runtime.request import Request


@pytest.fixture(scope="module")
def manifest(tiny_bundle):
    return Bundle.open(tiny_bundle).manifest


def test_json_and_csv_say_the_same(manifest, tmp_path):
    lines = [
        {"prompt": "a red circle", "id": "one", "seed": 7, "size": "128x64", "steps": 6, "schedule": "native"},
        {"prompt": 'a "blue", square', "file": "two.webp", "height": 64, "width": 128, "budget": 2.5, "carry": 0.25},
        {"prompt": "zwei\nZeilen", "schedule": "dynamic", "reuse": "adaptive:0.1", "guidance": 2.0, "text_length": 8},
    ]
    json_file = tmp_path / "prompts.jsonl"
    json_file.write_text("\n".join(json.dumps(line) for line in lines))
    csv_file = tmp_path / "prompts.csv"
    csv_file.write_text(
        "\ufeffprompt,id,file,seed,size,height,width,steps,schedule,reuse,budget,carry,guidance,text_length\n"
        "a red circle,one,,7,128x64,,,6,native,,,,,\n"
        '"a ""blue"", square",,two.webp,,,64,128,,,,2.5,.25,,\n'
        '"zwei\nZeilen",,,,,,,,dynamic,adaptive:0.1,,,2,8\n',
        encoding="utf-8",
    )
    wanted = read_lines(json_file, {}, manifest, ".png")
    assert [one.request for one in wanted] == [
        Request("a red circle", 7, 6, "native", height=64, width=128),
        Request('a "blue", square', height=64, width=128, budget=2.5, carry=0.25),
        Request("zwei\nZeilen", schedule="dynamic+adaptive:0.1", guidance=2.0, text_length=8),
    ]
    assert [(one.line, one.id, one.file) for one in wanted] == [
        (1, "one", "one.png"), (2, "00002", "two.webp"), (3, "00003", "00003.png")
    ]  # fmt: skip
    same = read_lines(csv_file, {}, manifest, ".png")
    assert [one.request for one in same] == [one.request for one in wanted]
    assert [one.key for one in same] == [one.key for one in wanted]


def test_a_line_goes_before_the_options(manifest, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b", "steps": 9, "schedule": "native"}\n{"prompt": "c", "budget": 1}')
    options = {"steps": 5, "schedule": "dynamic", "seed": 3}
    first, second, third = (one.request for one in read_lines(file, options, manifest, ".png"))
    assert (first.steps, first.schedule, first.seed) == (5, "dynamic", 3)
    assert (second.steps, second.schedule, second.seed) == (9, "native", 3)
    assert (third.budget, third.schedule) == (1, None)
    (with_schedule,) = [one.request for one in read_lines(file, {"budget": 2.0}, manifest, ".png")][1:2]
    assert with_schedule.budget is None


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": }', "line 3: it is not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n["a"]', "line 2: it is not a JSON object"),
        ("p.jsonl", '{"prompt": "a", "prompt": "b"}', "line 1: it is not JSON: 'prompt' stands twice"),
        ("p.jsonl", '{"prompt": "a"}\n{"seed": 1}', "line 2: prompt: Field required"),
        ("p.jsonl", '{"prompt": "a", "sede": 1}', "line 1: there is no option 'sede'"),
        ("p.jsonl", '{"prompt": "a", "seed": "7"}', "line 1: seed: "),
        ("p.jsonl", '{"prompt": "a", "seed": true}', "line 1: seed: "),
        ("p.jsonl", '{"prompt": "a", "seed": -1}', "line 1: seed: "),
        ("p.jsonl", '{"prompt": "a", "size": "64"}', "line 1: size: "),
        ("p.jsonl", '{"prompt": "a", "size": "64x64", "width": 64}', "line 1: give size, or height and width"),
        ("p.jsonl", '{"prompt": "a", "id": "../a"}', "line 1: the id '../a' cannot name a file"),
        ("p.jsonl", '{"prompt": "a", "file": ".a.png"}', "line 1: the file name '.a.png' cannot name a file"),
        ("p.jsonl", '{"prompt": "a", "id": ""}', "line 1: the id is empty"),
        ("p.jsonl", '{"prompt": "a", "file": "a.blp"}', "line 1: a.blp has an unknown file type"),
        ("p.jsonl", '{"prompt": "a", "id": "A"}\n{"prompt": "b", "id": "a"}', "line 2: line 1 has the same file"),
        ("p.jsonl", '{"prompt": "a", "id": 1}\n{"prompt": "b", "id": "1"}', "line 2: line 1 has the same id"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b", "schedule": "x"}', "line 2: unknown schedule"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b", "height": 65}', "line 2: "),
        ("p.jsonl", '{"prompt": "a", "negative_prompt": "b"}', "line 1: this model is not guided"),
        ("p.jsonl", '{"prompt": "a", "frames": 5}', "line 1: this model makes pictures"),
        ("p.jsonl", '{"prompt": "a", "budget": 1, "schedule": "native"}', "line 1: a budget chooses the schedule"),
        ("p.jsonl", '{"prompt": "\\ud800"}', "line 1: "),
        ("p.jsonl", "[" * 100_000, "line 1: it is not JSON"),
        ("p.jsonl", "\n", "has no prompts"),
        ("p.csv", "text\na", "line 1: the first line must name the columns"),
        ("p.csv", "prompt,seed\na,1\nb,x", "line 3: seed: "),
        ("p.csv", "prompt,seed\na,1,2", "line 2: it has 3 cells for 2 columns"),
        ("p.csv", 'prompt,seed\n"a\nb",1\nc,"x"y', "line 4: it is not CSV"),
        ("p.csv", "prompt,sede\na,1", "line 2: there is no option 'sede'"),
        ("p.csv", "", "line 1: the first line must name the columns"),
        ("p.txt", "a", "name it .jsonl or .csv"),
        ("p.jsonl", b"\xff\xfe", "it is not UTF-8"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named_before_anything_is_made(tiny_bundle, tmp_path, name, text, words):
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    result = run(main, "generate", tiny_bundle, "--prompts", file, "--out", tmp_path / "out", "--backend", "cpu")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {file}")
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give a prompt, or a file of them"),
        (["a", "--prompts", "p.jsonl"], "give a prompt, or a file of them"),
        (["a", "--ray"], "--ray is for many pictures"),
        (["a", "--in-flight", "3"], "--in-flight is for many pictures"),
        (["--prompts", "p.jsonl", "--trace", "t.json"], "are for one picture"),
        (["--prompts", "p.jsonl", "--replicas", "2"], "--replicas is for --ray"),
        (["--prompts", "p.jsonl", "--ray", "--replicas", "3-2"], "the fewest and the most"),
        (["--prompts", "p.jsonl", "--fps", "3"], "--fps is for clips"),
        (["--prompts", "none.jsonl"], "none.jsonl cannot be read: No such file"),
    ],
)
def test_options_that_do_not_go_together(tiny_bundle, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}')
    result = run(main, "generate", tiny_bundle, *arguments, "--backend", "cpu")
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_request_survives_its_way_to_another_process(manifest, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "seed": 9007199254740993, "carry": 0.1, "schedule": "native"}')
    (one,) = read_lines(file, {}, manifest, ".png")
    assert type(one).from_json(one.to_json()) == one


def test_another_bundle_makes_another_picture(manifest, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}')
    (one,) = read_lines(file, {}, manifest, ".png")
    (other,) = read_lines(file, {}, manifest.model_copy(update={"carry": 0.125}), ".png")
    (same,) = read_lines(file, {}, manifest.model_copy(), ".png")
    assert one.key == same.key != other.key
