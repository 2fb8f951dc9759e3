"""How request bodies are documented that are a form with files, or JSON: we read both, so that FastAPI sees neither."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from dino_search.api.schemas import PictureGiven

_ONLY_JSON = ("image_base64", "embedding")


def documented_body(
    model: type[BaseModel], example: dict[str, Any], *, files: dict[str, str] | None = None, several: bool = False
) -> dict[str, Any]:
    """The `requestBody` of an operation, for `openapi_extra`.

    files: what the form's files are, by field; None for the one file `image`. several: each field may come repeatedly.
    """
    schema = _inlined(model.model_json_schema())
    is_one_picture = issubclass(model, PictureGiven)
    if is_one_picture:
        schema["oneOf"] = [{"required": [name]} for name in PictureGiven.model_fields]
    form_properties: dict[str, Any] = {
        name: {"type": "array", "items": {"type": "string", "format": "binary"}, "description": text}
        if several
        else {"type": "string", "format": "binary", "description": text}
        for name, text in (files or {"image": "A picture file."}).items()
    }
    required = list(form_properties)
    for name, field in schema["properties"].items():
        if name not in PictureGiven.model_fields and name not in ("queries", "a", "b"):
            form_properties[name] = field
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
        return {name: inline(value) for name, value in part.items()}

    result: dict[str, Any] = inline(schema)
    return result
