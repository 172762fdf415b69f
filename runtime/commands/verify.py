"""Check a bundle on this machine."""

import dataclasses
from pathlib import Path

import click
from rich.table import Table

from ddit.runtime import strict_json
from ddit.runtime.backends.artifacts import EngineStore
from ddit.runtime.backends.registry import open_backend
from ddit.runtime.bundle import Bundle
from ddit.runtime.commands.options import BACKEND, BUNDLE, JSON, THREADS
from ddit.runtime.console import DditCommand, red, say, terminal
from ddit.runtime.errors import BundleError


@click.command(cls=DditCommand)
@BUNDLE
@BACKEND
@THREADS
@JSON
def verify(bundle: Path, backend: str | None, threads: int | None, as_json: bool) -> None:
    """Check a bundle on this machine.

    Compares every file with its hash, loads every tokenizer and graph, and reproduces the exporter's parity values.
    """
    from ddit.runtime.tools.verify import check_names, check_tokenizers, verify_graphs

    opened = Bundle.open(bundle)
    unlisted = check_names(opened)
    files = list(opened.verify_files())
    engines = EngineStore(opened).engines()
    for engine in engines:
        engine.verify()
    check_tokenizers(opened)
    running = open_backend(backend, opened, threads)
    checks = list(verify_graphs(running))
    unchecked = sorted(opened.manifest.graphs.keys() - {check.graph for check in checks})
    failed = [check for check in checks if not check.passed]
    if as_json:
        report = {
            "files": len(files),
            "plans": len(engines),
            "backend": running.name,
            "checks": [{**dataclasses.asdict(check), "passed": check.passed} for check in checks],
            "without_reference": unchecked,
            "unlisted": unlisted,
            "passed": not failed,
        }
        click.echo(strict_json.dump(report, indent=2))
    else:
        table = Table("graph", "case", "tensor", "relative error", "allowed", "")
        for check in checks:
            verdict = "ok" if check.passed else red("FAILED")
            table.add_row(
                check.graph, str(check.case), check.tensor, f"{check.error:.1e}", f"{check.tolerance:g}", verdict
            )
        terminal().print(f"{len(files) + len(engines)} files have their recorded hash; backend: {running}")
        terminal().print(table)
        for name in unlisted:
            say(f"warning: {name} is not a file of the bundle's: its manifest does not list it")
        for name in unchecked:
            say(f"warning: {name} was not compared: no reference values of it fit the engines, or it has none")
    if failed:
        worst = max(failed, key=lambda check: check.error)
        raise BundleError(
            f"{bundle} does not reproduce its parity values: {worst.graph}.{worst.tensor} is off by {worst.error:.1e} "
            f"(allowed {worst.tolerance:g}); export it again, or report it with this machine's onnxruntime version"
        )
