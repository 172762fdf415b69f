"""What the documents say is so: links lead somewhere, commands are ones that there are, examples run."""

import doctest
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from conftest import run

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
PACKAGES = ("exporter", "runtime", "profiles")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
RUN_HERE = ("generate", "inspect", "verify")  # of ddit-run: what needs a bundle and nothing else


def blocks(document: Path, language: str) -> Iterator[str]:
    """A document's fenced blocks."""
    for found, text in FENCE.findall(document.read_text(encoding="utf-8")):
        if found == language:
            yield text


def command_lines(document: Path) -> Iterator[list[str]]:
    """The words of every command of ours in a document's blocks of shell lines."""
    for block in blocks(document, ""):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.sub(r"\s[#>].*", "", line).split("&&"):
                words = shlex.split(part) if re.match(r"\s*(ddit-\w+|python scripts/\S+)\s", part) else []
                if words:
                    yield words


def command(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that words of a shell line start, and its arguments."""
    if words[0] == "python":
        return importlib.import_module(Path(words[1]).stem).main, words[2:]
    package = {"ddit-run": "runtime", "ddit-export": "exporter"}[words[0]]
    return importlib.import_module(f"ddit.{package}.cli").main, words[1:]


def parse(called: click.Command, arguments: list[str], parent: click.Context | None = None) -> None:
    """Let click read arguments without running anything. Raises what click raises for words that it does not know."""
    with called.make_context(called.name, [*arguments], parent=parent) as context:
        if isinstance(called, click.Group):
            _, chosen, rest = called.resolve_command(context, context._protected_args + context.args)
            assert chosen is not None
            parse(chosen, rest, context)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    """In a clean clone this also finds files that git was told to ignore."""
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_ones_that_there_are(document):
    for words in command_lines(document):
        try:
            parse(*command(words))
        except click.ClickException as error:
            pytest.fail(f"{document.name}: {shlex.join(words)}: {error.format_message()}")


def test_readme_s_commands_run(tiny_bundle, wan_bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("flux.bundle", "demo.bundle"):
        (tmp_path / name).symlink_to(tiny_bundle)
    (tmp_path / "Wan2.1-T2V-1.3B-Diffusers.bundle").symlink_to(wan_bundle)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a zebra in fog", "steps": 4}\n{"prompt": "a red circle"}\n')
    tried = [words for words in command_lines(ROOT / "README.md") if words[0] == "ddit-run" and words[1] in RUN_HERE]
    assert {words[1] for words in tried} == set(RUN_HERE)
    for words in tried:
        called, arguments = command(words)
        result = run(called, *arguments)
        assert result.exit_code == 0, (words, result.stderr)
    assert (tmp_path / "zebra.png").is_file()
    assert (tmp_path / "zebra.mp4").is_file()
    assert (tmp_path / "pictures" / "00002.png").is_file()


def test_readme_s_python_runs(tiny_bundle, tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FLUX.1-dev").symlink_to(tiny_pipeline)
    for name in ("flux.bundle", "demo.bundle"):
        (tmp_path / name).symlink_to(tiny_bundle)
    examples = [*blocks(ROOT / "README.md", "python")]
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})


MODULES = [
    ".".join(("ddit", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
    if ">>>" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_run(module, tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.bundle").symlink_to(tiny_bundle)
    result = doctest.testmod(importlib.import_module(module), raise_on_error=False)
    assert result.attempted
    assert not result.failed
