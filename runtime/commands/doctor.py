"""Say what this machine can run, and how."""

import dataclasses
from pathlib import Path

import click
from rich.table import Table

from ddit.runtime import strict_json
from ddit.runtime.bundle import Bundle
from ddit.runtime.commands.options import JSON
from ddit.runtime.console import DditCommand, printable, red, terminal
from ddit.runtime.tools.doctor import LevelState, Machine, engines, look_at_levels, look_at_machine, try_backends


@click.command(cls=DditCommand)
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@JSON
def doctor(bundle: Path | None, as_json: bool) -> None:
    """Say what this machine can run, and how.

    GPU, driver, libraries and cuDNN. With a bundle also which backends can open it, which attention kernel its levels
    take on the cuda backend, and which of their nodes fall to the CPU there.
    """
    opened = Bundle.open(bundle) if bundle else None
    machine = look_at_machine()
    backends = list(try_backends(opened)) if opened else []
    levels = list(look_at_levels(opened, machine)) if opened else []
    if as_json:
        report = {
            "machine": dataclasses.asdict(machine),
            "backends": [dataclasses.asdict(one) for one in backends],
            "levels": [dataclasses.asdict(one) for one in levels],
            "engines": engines(opened) if opened else {},
        }
        click.echo(strict_json.dump(report, indent=2))
        return
    console = terminal()
    console.print(_machine_table(machine))
    if opened is None:
        return
    table = Table("backend", "", title=f"Backends for {printable(str(bundle))}", title_justify="left")
    for one in backends:
        table.add_row(one.name, printable(one.says) if one.ready else red(printable(one.says)))
    console.print(table)
    console.print(_levels_table(levels))
    for built_for, number in engines(opened).items():
        console.print(f"{number} engines for {printable(built_for)}")


def _machine_table(machine: Machine) -> Table:
    table = Table(show_header=False)
    table.add_row("system", f"{machine.system}, Python {machine.python}")
    if gpu := machine.gpu:
        table.add_row("GPU", f"{printable(gpu.name)}, compute capability {gpu.capability}, "
                             f"{gpu.free_bytes / 1e9:.1f} GB free, driver for CUDA {gpu.driver}")  # fmt: skip
    else:
        table.add_row("GPU", red(f"none: {machine.no_gpu}"))
    for name, version in machine.libraries.items():
        table.add_row(name, version)
    table.add_row("ONNX Runtime's providers", ", ".join(machine.providers) or red("none"))
    missing = "not found" if machine.gpu is None else red("not found: pip install 'ddit[cuda]'")
    table.add_row("cuDNN", machine.cudnn or missing)
    table.add_row("ddit's kernels for CUDA", "installed" if machine.kernels else "not built: there was no C++ compiler")
    table.add_row("products in FP8", f"no: {machine.no_float8}" if machine.no_float8 else "yes: --backend cuda-fp8")
    return table


def _levels_table(levels: list[LevelState]) -> Table:
    table = Table("level's graph", "file", "attention kernel to expect", "nodes on the CPU",
                  title="Levels on the cuda backend", title_justify="left")  # fmt: skip
    for one in levels:
        kernels = "\n".join(
            f"{kernel}: {', '.join(printable(where) for where, its in one.attention.items() if its == kernel)}"
            for kernel in dict.fromkeys(one.attention.values())
        )
        on_cpu = (
            "not looked: no session here" if one.on_cpu is None else "\n".join(map(printable, one.on_cpu)) or "none"
        )
        table.add_row(one.graph, one.file, kernels, red(on_cpu) if one.on_cpu else on_cpu)
    return table
