"""What a configuration schema holds, by key: tables, names, and in words what each key takes."""

from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from functools import cached_property
from typing import Any, get_args

from nmoe.cli.toml_positions import KeyPath
from nmoe.cli.toml_writer import toml_value
from pydantic import BaseModel

Table = type[BaseModel]
_CLOSE = 0.6
_BOUNDS = {
    "exclusiveMinimum": "greater than",
    "minimum": "at least",
    "exclusiveMaximum": "less than",
    "maximum": "at most",
}
_TYPES = {"integer": "an integer", "number": "a number", "boolean": "true or false", "string": "a string"}


class SchemaIndex:
    """A schema by key. `root` is the model of the whole file; its fields are the sections."""

    def __init__(self, root: Table) -> None:
        self.root = root

    @cached_property
    def _json_schema(self) -> dict[str, Any]:
        return self.root.model_json_schema()

    def table(self, path: KeyPath) -> Table | None:
        """The model of the table at `path`; None where there is a value or nothing."""
        model: Table | None = self.root
        for key in path:
            field = model.model_fields.get(key) if model is not None and isinstance(key, str) else None
            model = _model_in(field.annotation) if field is not None else None
        return model

    def required(self, path: KeyPath) -> list[str]:
        """Keys that the table at `path` cannot do without."""
        table = self.table(path)
        return [name for name, field in table.model_fields.items() if field.is_required()] if table else []

    def homes(self, name: str) -> list[str]:
        """Every dotted key whose last part is `name`."""
        return [path for path in self._keys(self.root, "") if path.rpartition(".")[2] == name]

    def _keys(self, table: Table, prefix: str) -> Iterator[str]:
        for name, field in table.model_fields.items():
            yield prefix + name
            inner = _model_in(field.annotation)
            if inner is not None:
                yield from self._keys(inner, f"{prefix}{name}.")

    def allowed(self, path: KeyPath) -> str:
        """What the key at `path` takes, in words: `an integer greater than 0`, `"cpu" or "cuda"`."""
        return self._describe(self._schema_at(path))

    def _schema_at(self, path: KeyPath) -> dict[str, Any]:
        schema = self._resolve(self._json_schema)
        for key in path:
            inner = schema.get("items") if isinstance(key, int) else schema.get("properties", {}).get(key)
            schema = self._resolve(inner or {})
        return schema

    def _resolve(self, schema: dict[str, Any]) -> dict[str, Any]:
        """Follows a reference, and takes an optional value for what it is when it is there."""
        options = [option for option in schema.get("anyOf", []) if option.get("type") != "null"]
        if len(options) == 1:
            return self._resolve(options[0])
        if "$ref" in schema:
            return self._json_schema["$defs"][schema["$ref"].rpartition("/")[2]]
        return schema

    def _describe(self, schema: dict[str, Any]) -> str:
        choices = _choices(schema)
        if choices:
            return " or ".join(toml_value(choice) for choice in choices)
        kind = schema.get("type")
        if kind == "array":
            return f"a list of {self._describe(self._resolve(schema.get('items', {})))}"
        if kind == "object":
            return "a table"
        words = "a path" if schema.get("format") == "path" else _TYPES.get(str(kind), "a value")
        bounds = [f"{text} {schema[name]:g}" for name, text in _BOUNDS.items() if name in schema]
        return " ".join([words, " and ".join(bounds)]) if bounds else words


def _choices(schema: dict[str, Any]) -> list[str]:
    return [schema["const"]] if "const" in schema else list(schema.get("enum", []))


def _model_in(annotation: Any) -> Table | None:
    """The model that a field holds, alone or as an optional."""
    for option in (annotation, *get_args(annotation)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def nearest(name: str, valid: Sequence[str]) -> list[str]:
    """The valid names that `name` was probably meant to be, often one, or none.

    The closest spelling, or else the names that have `name` as one of their words (`window` for `attn_local_window`).
    """
    folded = name.lower().replace("-", "_")
    scores = {other: SequenceMatcher(None, folded, other.lower()).ratio() for other in valid}
    best = max(scores, key=lambda other: scores[other], default=None)
    if best is not None and scores[best] >= _CLOSE:
        return [best]
    return [other for other in valid if f"_{folded}_" in f"_{other}_"]
