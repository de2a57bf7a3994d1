"""What of a configuration decides the numbers of a run, and its hash."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

from pydantic import BaseModel, JsonValue

_IDENTITY = "identity"


class Change(NamedTuple):
    """A key whose value differs between two configurations; None stands for unset."""

    key: str
    old: JsonValue
    new: JsonValue


def identity_fields(config: BaseModel) -> dict[str, JsonValue]:
    """Dotted key to value of every set field that is marked as deciding what is computed.

    Unset fields are left out, so that an optional key that a later version adds changes no fingerprint.
    """
    return {key: value for key, value, identity in _leaves(config, "", False) if identity}


def operational_fields(config: BaseModel) -> dict[str, JsonValue]:
    """Dotted key to value of every other set field: these may change at resume."""
    return {key: value for key, value, identity in _leaves(config, "", False) if not identity}


def fingerprint(config: BaseModel, data_fingerprint: str) -> str:
    """SHA-256, in hex, over the identity fields and the data's own fingerprint.

    Args:
        config: the whole configuration.
        data_fingerprint: identifies the tokens, wherever they lie: their manifest's hash.
    """
    content = {"config": identity_fields(config), "data": data_fingerprint}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def diff(old: Mapping[str, JsonValue], new: Mapping[str, JsonValue]) -> list[Change]:
    """Keys whose values differ, sorted, with both values; takes what `identity_fields` and its like return."""
    return [
        Change(key, old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _leaves(model: BaseModel, prefix: str, inherited: bool) -> Iterator[tuple[str, JsonValue, bool]]:
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        identity = inherited or _IDENTITY in field.metadata
        if isinstance(value, BaseModel):
            yield from _leaves(value, f"{prefix}{name}.", identity)
        elif value is not None:
            yield f"{prefix}{name}", _json(value), identity


def _json(value: Any) -> JsonValue:
    if isinstance(value, PurePath):
        return str(value)
    return [_json(item) for item in value] if isinstance(value, tuple | list) else value
