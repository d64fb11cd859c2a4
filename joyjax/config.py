"""Reading a component's config.json: every key is used, listed as without effect, or an error."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from joyjax.errors import ConfigError

T = TypeVar("T")

# A network is built as shapes before its tensors are looked up, so the sizes that a config can ask for are bounded:
# integers by LARGEST, lists by MOST_VALUES, and the fields in LIMITS by their limit.
LARGEST = 2**31 - 1
MOST_VALUES = 1000
LIMITS = {
    **dict.fromkeys(("depth", "num_hidden_layers", "num_layers"), 200),
    **dict.fromkeys(("attention_head_dim", "head_dim"), 2**16),
    **{"dim_mult": 16, "min_pixels": 2**24, "mlp_width_ratio": 1000, "num_res_blocks": 32},
}


def read_config(
    cls: type[T],
    raw: Mapping[str, Any],
    *,
    where: str,
    fixed: Mapping[str, tuple[Any, ...]],
    ignored: tuple[str, ...] = (),
    renamed: Mapping[str, str] | None = None,
    optional: Mapping[str, Any] | None = None,
) -> T:
    """Build the frozen dataclass `cls` from the JSON object `raw`.

    Every field of `cls` must be in `raw`, under its own name or the one in `renamed`, with the field's type. A field in
    `optional` may be missing or null and then takes the value given there, which may be None. `fixed` lists keys of
    which this code implements some values only; they may be missing. `ignored` keys have no effect on the result. Keys
    with a leading underscore are metadata. The class defaults of the reference are never filled in: a checkpoint
    without `theta`, for example, is refused. `where` names the file in messages.

    Raises:
        ConfigError: for a missing, unknown, mistyped or unimplemented value.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where}: expected a json object, got {type(raw).__name__}")
    renamed, optional = renamed or {}, optional or {}
    known = {renamed.get(field.name, field.name): field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key, value in raw.items():
        if key in fixed and value not in fixed[key]:
            wanted = " or ".join(repr(v) for v in fixed[key])
            raise ConfigError(f"{where}: {key} is {value!r:.200}; this version of joyjax implements {wanted}")
        if key not in known and key not in fixed and key not in ignored and not key.startswith("_"):
            raise ConfigError(
                f"{where}: {key:.200} = {value!r:.200} is not known to this version of joyjax; it may need a newer one"
            )
    values: dict[str, Any] = {}
    for key, field in known.items():
        value = raw.get(key)
        if value is None and field.name in optional:
            value = optional[field.name]
            if value is None:
                values[field.name] = None
                continue
        elif key not in raw:
            raise ConfigError(f"{where}: {key} is missing; expected {_type_name(field)}")
        values[field.name] = _typed(value, field, f"{where}: {key}")
    return cls(**values)


def _typed(value: Any, field: dataclasses.Field, where: str) -> Any:
    if dataclasses.is_dataclass(value):  # a nested config that is read already
        return value
    wanted, limit = _type_name(field), LIMITS.get(field.name)
    element: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool, "str": str}

    def fits(v: Any, name: str) -> bool:
        of_type = isinstance(v, element[name]) and (name == "bool" or not isinstance(v, bool))
        return of_type and not (isinstance(v, int) and abs(v) > LARGEST)

    if wanted.startswith("tuple["):
        name = wanted.removeprefix("tuple[").split(",")[0].rstrip("]")
        most = limit or MOST_VALUES
        if isinstance(value, list | tuple) and len(value) <= most and all(fits(v, name) for v in value):
            return tuple(float(v) for v in value) if name == "float" else tuple(value)
        wanted += f", {most} values at most"
    else:
        if fits(value, wanted) and not (limit and value > limit):
            return float(value) if wanted == "float" else value
        wanted += f", {limit or LARGEST} at most" if wanted == "int" or limit else ""
    raise ConfigError(f"{where} is {value!r:.200}; expected {wanted}")


def _type_name(field: dataclasses.Field) -> str:
    return field.type.__name__ if type(field.type) is type else str(field.type)
