"""Command lines with any value in any place."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddit.runtime import Pipeline, Request
from ddit.runtime.errors import UsageError
from outcomes import count, judge

ODD = st.sampled_from([
    *("", " ", "-1", "0", "-0", "1e400", "nan", "inf", "-inf", "1e38", "10000000000000", "9" * 5000, "0x10", "١", "²"),
    *("None", "[red]", "[/b]", "\x1b[2J", "a\nerror: b", "\udcff", "x" * 3000, "--", "$\\frac$", "%s", "{0}"),
    "/dev/null",
])  # fmt: skip


def values(*usual: str) -> st.SearchStrategy[str]:
    """Usual values and odd ones."""
    return st.one_of(st.sampled_from(usual), ODD)


def schedules() -> st.SearchStrategy[str]:
    setting = st.tuples(
        st.sampled_from(["tau", "rho", "warmup", "hold", "coarsest", "absolute", "x"]), values("1", "4", "0.5", "3")
    ).map("=".join)
    part = st.tuples(values("2", "4", "8", "16"), values("1", "0", "3", "99999")).map("x".join)
    return st.one_of(
        values("native", "dynamic", "fixed", "fixed:", "dynamic:", "native:1"),
        st.lists(setting, max_size=3).map(lambda settings: "dynamic:" + ",".join(settings)),
        st.lists(part, min_size=1, max_size=3).map(lambda parts: "fixed:" + ",".join(parts)),
    )


OPTIONS = {
    "--seed": values("7", "12345678901234567890"),
    "--steps": values("1", "4", "5"),
    "--schedule": schedules(),
    "--budget": values("1s", "20ms", "0.3", "1e9s"),
    "--height": values("64", "128", "65"),
    "--width": values("64", "128"),
    "--guidance": values("1", "3.5"),
    "--carry": values("0", "0.5", "1"),
    "--text-length": values("16", "20", "5"),
    "--threads": values("1", "2", "100000"),
    "--vae-tiling": values("32", "64", "65"),
    "--backend": values("cpu", "cuda", "tensorrt", "CPUExecutionProvider"),
    "--out": values("o.png", "o.jpg", "no/o.png", "o.blp", "o", ".", "o.webp", ".png"),
    "--trace": values("t.json", "no/t.json", "."),
    "--plot": values("p.png", "p.svg", "p.pgf"),
    "--map": values("m.png", "m.pgf"),
}


@st.composite
def generate_lines(draw, bundle):
    chosen = draw(st.lists(st.sampled_from(sorted(OPTIONS)), max_size=4, unique=True))
    asked = [word for name in chosen for word in (name, draw(OPTIONS[name]))]
    small = {"--height": "64", "--width": "64", **({} if "--schedule" in chosen else {"--steps": "4"})}
    small = [word for name, value in small.items() if name not in chosen for word in (name, value)]
    return ["generate", bundle, draw(values("a red star", "two blue squares")), *small, *asked]


@st.composite
def other_lines(draw, bundle):
    """Lines of the other commands, which end before they measure anything."""
    name = draw(st.sampled_from(["inspect", "bench", "calibrate", "verify", "", "no-such"]))
    where = draw(st.one_of(ODD, st.just(str(bundle)) if name == "inspect" else st.just("no.bundle")))
    flags = ["--repeat", "--prompts", "--speedup", "--quality", "--json", "--dry-run", "--height", "--steps", "-v"]
    asked = [
        word
        for flag in draw(st.lists(st.sampled_from(flags), max_size=3))
        for word in ([flag] if flag in ("--json", "--dry-run", "-v") else [flag, draw(values("3", "0.5"))])
    ]
    return [*([name] if name else []), where, *asked]


def test_command_lines(victim, examples, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("lines"))

    @examples(60, 1500)
    @given(line=generate_lines(victim))
    def generate(line):
        count("lines: generate", judge(line))

    @examples(100, 1500)
    @given(line=other_lines(victim))
    def others(line):
        count("lines: other commands", judge(line))

    generate()
    others()


THINGS = st.sampled_from(
    [None, True, 0, -1, 1, 1.5, 10**30, float("nan"), float("inf"), "4", "", [], {}, b"x", object()]
)


@pytest.mark.parametrize(
    "name",
    [
        *("prompt", "seed", "steps", "schedule", "height", "width", "guidance", "text_length", "carry", "budget"),
        *("latent", "first_step"),
    ],
)
def test_requests(tiny_bundle, name):
    pipeline = Pipeline.open(tiny_bundle, backend="cpu")

    @given(thing=THINGS)
    def try_one(thing):
        try:
            pipeline.resolve([Request(**{"prompt": "a star", name: thing})])
            count("requests", "ran")
        except UsageError:
            count("requests", "refused")

    try_one()
