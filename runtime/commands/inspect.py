"""Show what a bundle holds."""

from pathlib import Path

import click

from ddit.runtime import strict_json
from ddit.runtime.backends.artifacts import EngineStore
from ddit.runtime.bundle import Bundle
from ddit.runtime.commands.options import BUNDLE, JSON
from ddit.runtime.console import DditCommand
from ddit.runtime.tools.inspect import show


@click.command(cls=DditCommand)
@BUNDLE
@JSON
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what a bundle holds.

    Levels, tensors, shapes, profile, adapter state, parity, sizes, engines.
    """
    opened = Bundle.open(bundle)
    manifest, engines = opened.manifest, EngineStore(opened).engines()
    if as_json:
        infos = [{"key": engine.info.key, **engine.info.model_dump(mode="json")} for engine in engines]
        click.echo(strict_json.dump({**manifest.model_dump(mode="json"), "plans": infos}, indent=2))
        return
    show(bundle, manifest, engines)
