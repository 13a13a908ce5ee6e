"""The JSON Schema of report.json, made from the report's own types.

python -m benchmarks.schema > docs/report.schema.json
"""

import dataclasses
import json
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from benchmarks.report import SCHEMA, BenchmarkReport, is_required

_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean"}


def json_schema() -> dict[str, Any]:
    """Return a schema (draft 2020-12) that every report.json of this version fits."""
    definitions: dict[str, Any] = {}
    whole = _of(BenchmarkReport, definitions)
    report = definitions.pop(BenchmarkReport.__name__)
    assert whole == {"$ref": f"#/$defs/{BenchmarkReport.__name__}"}
    report["properties"]["schema"] = {"const": SCHEMA}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "onnxpress benchmark report",
        **report,
        "$defs": definitions,
    }


def _of(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a type; dataclasses go to `definitions` and are referred to."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if hint in _PLAIN:
        return {"type": _PLAIN[hint]}
    if hint is type(None):
        return {"type": "null"}
    if origin in (types.UnionType, Union):
        return {"anyOf": [_of(argument, definitions) for argument in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is list:
        return {"type": "array", "items": _of(arguments[0], definitions)}
    if origin is tuple:
        items = [_of(argument, definitions) for argument in arguments]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _of(arguments[1], definitions)}
    if hint.__name__ not in definitions:
        hints = get_type_hints(hint)
        fields = dataclasses.fields(hint)
        definitions[hint.__name__] = {
            "type": "object",
            "description": (hint.__doc__ or "").splitlines()[0],
            "properties": {field.name: _of(hints[field.name], definitions) for field in fields},
            "required": [field.name for field in fields if is_required(field)],
            "additionalProperties": False,
        }
    return {"$ref": f"#/$defs/{hint.__name__}"}


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=1))
