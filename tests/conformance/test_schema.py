"""The published JSON Schema is the type's, and says of bundles what the type says."""

import json

import jsonschema
import pytest

import bundle_schema
from conftest import run

SCHEMA = json.loads(bundle_schema.SCHEMA.read_text(encoding="utf-8"))


def test_the_schema_is_the_type_s(tmp_path):
    assert run(bundle_schema.main, "--out", tmp_path / "schema.json").exit_code == 0
    assert (tmp_path / "schema.json").read_text() == bundle_schema.SCHEMA.read_text(encoding="utf-8"), (
        "run python scripts/bundle_schema.py"
    )


def test_a_bundle_is_valid(rich_bundle):
    jsonschema.validate(json.loads((rich_bundle / "bundle.json").read_text()), SCHEMA)


@pytest.mark.parametrize(
    ("field", "value"), [("native", 0), ("carry", 2), ("opset", "17"), ("dtype", "int8"), ("x", 1), ("levels", [])]
)
def test_a_damaged_manifest_is_not(rich_bundle, field, value):
    manifest = json.loads((rich_bundle / "bundle.json").read_text())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**manifest, field: value}, SCHEMA)
