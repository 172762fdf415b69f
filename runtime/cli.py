"""ddit-run: make pictures with a bundle, look into it, check it, measure it."""

import click

from ddit.runtime.commands.bench import bench
from ddit.runtime.commands.calibrate import calibrate
from ddit.runtime.commands.doctor import doctor
from ddit.runtime.commands.generate import generate
from ddit.runtime.commands.inspect import inspect
from ddit.runtime.commands.serve import serve
from ddit.runtime.commands.spectrum import spectrum
from ddit.runtime.commands.verify import verify
from ddit.runtime.console import DditGroup, set_up_logging


@click.group(cls=DditGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ddit")
@click.option("-v", "--verbose", count=True, help="Say more; twice for everything.")
def main(verbose: int) -> None:
    """Run a bundle that ddit-export made: one prompt, one picture, the patch size chosen anew at every step."""
    set_up_logging(verbose)


for command in (generate, inspect, verify, doctor, bench, calibrate, spectrum, serve):
    main.add_command(command)


if __name__ == "__main__":
    main()
