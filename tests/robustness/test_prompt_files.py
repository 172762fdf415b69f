"""Files of prompts with anything in them: made, or refused in one line."""

import csv
import io
import json

from hypothesis import given
from hypothesis import strategies as st

from ddit.runtime.batch.lines import Line
from outcomes import count, judge

ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.lists(st.integers(), max_size=2),
    st.sampled_from(["", " ", "..", "a/b", "CON", "\x1b[2J", "\ud800", "x" * 300, "1e400", "64x64", "native", 10**400]),
)  # fmt: skip
USUAL = {"prompt": "a red star", "steps": 1, "height": 64, "width": 64, "schedule": "native"}


@st.composite
def lines(draw):
    """A usual line with odd values in some places, and now and then a field that there is not."""
    names = draw(st.lists(st.sampled_from([*Line.model_fields, "x", ""]), max_size=3, unique=True))
    return {**USUAL, **{name: draw(ODD) for name in names}}


def as_csv(rows: list[dict]) -> bytes:
    columns = [*dict.fromkeys(name for row in rows for name in row)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


def test_prompt_files(victim, examples, tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("prompts")
    monkeypatch.chdir(folder)

    def tried(name: str, content: bytes) -> None:
        (folder / name).write_bytes(content)
        out = tmp_path_factory.mktemp("out")
        count("prompt files", judge(["generate", victim, "--prompts", name, "--out", out, "--backend", "cpu"]))

    @examples(60, 600)
    @given(rows=st.lists(lines(), min_size=1, max_size=3))
    def json_lines(rows):
        tried("p.jsonl", "\n".join(map(json.dumps, rows)).encode())

    @examples(60, 600)
    @given(rows=st.lists(lines(), min_size=1, max_size=3))
    def rows_of_csv(rows):
        tried("p.csv", as_csv(rows))

    @examples(40, 300)
    @given(name=st.sampled_from(["p.jsonl", "p.csv"]), content=st.binary(max_size=60), whole=st.booleans())
    def bytes_of_any_kind(name, content, whole):
        usual = json.dumps(USUAL).encode() if name == "p.jsonl" else as_csv([USUAL])
        tried(name, content if whole else usual[: len(content)] + content + usual[len(content) :])

    json_lines()
    rows_of_csv()
    bytes_of_any_kind()
