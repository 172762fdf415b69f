"""Write the JSON Schema of `bundle.json` from the type that reads it: docs/spec/bundle.schema.json.

    python scripts/bundle_schema.py

A test keeps the file and the type equal. What a schema cannot say, that fields fit together, docs/spec/bundle.md says.
"""

import json
from pathlib import Path

import click

from ddit.runtime.bundle import Manifest
from ddit.runtime.console import DditCommand, say
from ddit.runtime.files import whole

SCHEMA = Path(__file__).parents[1] / "docs" / "spec" / "bundle.schema.json"


@click.command(cls=DditCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=SCHEMA, help="The file to write.")
def main(out: Path) -> None:
    """Write the JSON Schema of a bundle's manifest."""
    with whole(out) as part:
        part.write_text(schema_text(), encoding="utf-8")
    say(f"{out}: the schema of format {Manifest.model_fields['format_version'].default}")


def schema_text() -> str:
    """The schema as JSON."""
    schema = Manifest.model_json_schema(mode="validation")
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=2) + "\n"


if __name__ == "__main__":
    main()
