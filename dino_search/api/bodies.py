"""How request bodies are documented that are a form with files, or JSON: we read both, so that FastAPI sees neither."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from dino_search.api.schemas import PictureGiven

_NO_DEFAULTS: list[tuple[str, Any]] = [("default", []), ("default", {}), ("default", None)]
_PICTURE_FIELDS = ("queries", "a", "b", "pictures")


def documented_body(
    model: type[BaseModel], example: dict[str, Any], *, files: dict[str, str] | None = None, several: bool = False
) -> dict[str, Any]:
    """The `requestBody` of an operation, for `openapi_extra`.

    files: what the form's files are, by field; None for the one file `image`. several: each field may come repeatedly.
    """
    schema = _inlined(model.model_json_schema())
    # In a form, files take the place of these.
    if needed := [name for name in _PICTURE_FIELDS if name in model.model_fields]:
        schema["required"] = needed
    form_properties: dict[str, Any] = {}
    for name, text in (files or {"image": "A picture file."}).items():
        one = {"type": "string", "format": "binary"}
        form_properties[name] = (
            {"type": "array", "items": one, "minItems": 1, "description": text}
            if several
            else one | {"description": text}
        )
    required = list(form_properties)
    for name, field in schema["properties"].items():
        if name not in PictureGiven.model_fields and name not in _PICTURE_FIELDS:
            form_properties[name] = _without_null(field)
    form = {"type": "object", "properties": form_properties, "required": required, "additionalProperties": False}
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": schema, "example": example},
                "multipart/form-data": {"schema": form},
            },
        }
    }


def _without_null(field: dict[str, Any]) -> dict[str, Any]:
    """The schema of a form's field: a form has no null."""
    kinds = [kind for kind in field.get("anyOf", []) if kind != {"type": "null"}]
    if not kinds:
        return field
    first: dict[str, Any] = kinds[0]
    return {name: value for name, value in field.items() if name not in ("anyOf", "default")} | first


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema without references, which would point into a document that is not there; and what null adds."""
    definitions = schema.pop("$defs", {})

    def inline(part: Any) -> Any:
        if isinstance(part, list):
            return [inline(each) for each in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return inline(definitions[part["$ref"].rsplit("/", 1)[1]])
        # A default that its own schema refuses: these fields are needed, which only the operation knows.
        return {name: inline(value) for name, value in part.items() if (name, value) not in _NO_DEFAULTS}

    result: dict[str, Any] = inline(schema)
    return result
