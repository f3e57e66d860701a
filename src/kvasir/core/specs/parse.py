"""YAML text to a validated `Deployment` and back. Knows lines and near names; opens no file.

Names that live in higher layers (policies, bundled model shapes) come in as arguments. A fault is
one `ConfigError`: what, `file:line` of the offending key, the nearest valid name, the next step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from kvasir.core.errors import ConfigError, nearest
from kvasir.core.specs.base import Spec
from kvasir.core.specs.copies import CopiesSpec
from kvasir.core.specs.deployment import (
    Deployment,
    MeasuredCost,
    ModelSpec,
    PoolSpec,
    RouteSpec,
)  # fmt: skip
from kvasir.core.specs.faults import CrossTraffic
from kvasir.core.specs.model import ModelShape
from kvasir.core.specs.workload import WorkloadSpec
from kvasir.core.units import parse_bytes, parse_rate, parse_seconds

TEXT_CHARS_MAX: Final = 1024 * 1024
NODES_MAX: Final = 50_000
DEPTH_MAX: Final = 24

Path = tuple[str | int, ...]

_BOOLEANS: Final = {
    k for spec in (
        ModelShape, ModelSpec, MeasuredCost, PoolSpec, RouteSpec, CopiesSpec, CrossTraffic,
        WorkloadSpec,
    )
    for k, f in spec.model_fields.items() if f.annotation is bool
}  # fmt: skip
_NAMED: Final = (("adapters",),)  # keys under these are anybody's names, and say no unit
_POOL_REFERENCE: Final = re.compile(r"^pools\.(?P<pool>.+): (?P<key>hardware|model) ")


@dataclass(frozen=True, slots=True)
class _Problem:
    """What is wrong at one path; `rank` 0 is shown before 1, then by line."""

    path: Path
    what: str
    nearest: str = ""
    next_step: str = ""
    rank: int = 1


@dataclass(frozen=True, slots=True)
class _Source:
    """The text's name and the line on which each path's key (or list item) stands."""

    where: str
    lines: dict[Path, int] = field(default_factory=dict)

    def line(self, path: Path) -> int:
        while path not in self.lines:
            path = path[:-1]
        return self.lines[path]

    def error(self, problem: _Problem, *, more: int = 0) -> ConfigError:
        what = problem.what + (f" (and {more} more)" if more else "")
        return ConfigError(
            what,
            where=f"{self.where}:{self.line(problem.path)}",
            nearest=problem.nearest,
            next_step=problem.next_step or f"kvasir config validate {self.where}",
        )


def parse_deployment(
    text: str,
    where: str,
    *,
    known_routes: Collection[str] | None = None,
    known_batches: Collection[str] | None = None,
    known_admits: Collection[str] | None = None,
    known_evicts: Collection[str] | None = None,
    known_shapes: Collection[str] | None = None,
) -> Deployment:
    """The deployment that a `kvasir.yaml` describes.

    `where` names the text in errors, usually its path. `known_*` are the valid names of route,
    batch, admit and evict policies and of bundled model shapes; None leaves those unchecked.
    Byte, bandwidth and second fields take numbers (bytes, bytes per second, seconds) or text with
    a unit: `80 GiB`, `12.5 GB/s`, `100 Gb/s` (bits), `10 ms`.

    Raises ConfigError, of at most five lines.
    """
    source = _Source(where)
    data = _load(text, source)
    _convert(data, (), source)
    try:
        deployment = Deployment.model_validate(data)
    except ValidationError as error:
        problems = _problems(error, data)
        problems.sort(key=lambda p: (p.rank, source.line(p.path)))
        raise source.error(problems[0], more=len(problems) - 1) from None
    known: dict[Path, Collection[str] | None] = {
        ("policy", "route", "name"): known_routes,
        ("policy", "batch", "name"): known_batches,
        ("policy", "admit"): known_admits,
        ("policy", "evict"): known_evicts,
    }
    if deployment.policy.route.name == "session":
        known["policy", "route", "fallback"] = known_routes
    known |= {("models", i, "shape"): known_shapes for i in range(len(deployment.models))}
    problems = [*_not_finite(deployment.model_dump()), *_unknown_names(deployment, known)]
    if problems:
        raise source.error(problems[0], more=len(problems) - 1)
    return deployment


def resolved(deployment: Deployment) -> str:
    """Every field with its value in force, as YAML that `parse_deployment` reads back equal."""
    data = deployment.model_dump(mode="json")
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)


def json_schema() -> dict[str, Any]:
    """JSON Schema of `kvasir.yaml` (draft 2020-12), for editors."""
    schema = Deployment.model_json_schema()
    for part in (schema, *schema.get("$defs", {}).values()):
        for key, value in part.get("properties", {}).items():
            if _unit_of(key):
                part["properties"][key] = _with_text(value)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


# --- text to plain data, with lines ------------------------------------------------------------


def _load(text: str, source: _Source) -> dict[str, Any]:
    """Plain dicts, lists and scalars; fills `source.lines`. Duplicate keys are refused."""
    if len(text) > TEXT_CHARS_MAX:
        raise ConfigError(f"over {TEXT_CHARS_MAX} characters", where=source.where)
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            raise ConfigError("the file is empty", where=source.where, next_step=_START)
        _note_lines(root, source)
        data = loader.construct_document(root)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _malformed("it holds a control character", source, line) from None
    except yaml.MarkedYAMLError as error:
        simple = error.context == "while scanning a simple key"  # there the problem shows late
        mark = error.context_mark if simple else error.problem_mark or error.context_mark
        what = f"{error.context or ''} {error.problem or ''}"
        raise _malformed(what, source, mark.line + 1 if mark else 1) from None
    except RecursionError:
        raise ConfigError("nested too deep", where=source.where) from None
    except ValueError as error:  # a scalar with a wrong explicit or implied type, e.g. 2024-13-45
        raise ConfigError(f"not valid YAML: {error}", where=source.where) from None
    if not isinstance(data, dict):
        what = f"a deployment is lines of `key: value`, this is a {type(data).__name__}"
        raise ConfigError(what, where=source.where, next_step=_START)
    return data


_START: Final = "kvasir config show local > kvasir.yaml (a deployment to start from)"
_SCHEMA: Final = "kvasir config schema (prints every key and its type)"


def _malformed(what: str, source: _Source, line: int) -> ConfigError:
    check = f"kvasir config validate {source.where}"
    what = f"not valid YAML: {' '.join(what.split())}"
    return ConfigError(what, where=f"{source.where}:{line}", next_step=check)


def _note_lines(root: yaml.Node, source: _Source) -> None:
    """Visits all nodes, aliases as often as they are used; bounded, against alias bombs."""
    source.lines[()] = root.start_mark.line + 1
    waiting: list[tuple[yaml.Node, Path]] = [(root, ())]
    for count in range(NODES_MAX + 1):
        if not waiting:
            return
        node, path = waiting.pop()
        if len(path) > DEPTH_MAX or count == NODES_MAX:
            raise ConfigError("too large or nested too deep", where=source.where)
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                source.lines.setdefault((*path, i), item.start_mark.line + 1)
                waiting.append((item, (*path, i)))
        elif isinstance(node, yaml.MappingNode):
            waiting += _keys(node, path, source)


def _keys(node: yaml.MappingNode, path: Path, source: _Source) -> Iterator[tuple[yaml.Node, Path]]:
    first: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag == "tag:yaml.org,2002:merge":
            yield value, path
            continue
        if key.tag != "tag:yaml.org,2002:str":
            shown = _short(key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping")
            raise _malformed(f"the key {shown} is not text; put it in quotes", source, line)
        if key.value in first:
            what = f"{_dotted((*path, key.value))} is given twice, first on line {first[key.value]}"
            raise ConfigError(what, where=f"{source.where}:{line}", next_step="remove one of them")
        first[key.value] = line
        source.lines.setdefault((*path, key.value), line)  # a key of its own beats a merged one
        yield value, (*path, key.value)


# --- units -------------------------------------------------------------------------------------


def _unit_of(key: str) -> Literal["", "bytes", "rate", "seconds"]:
    """What a field counts, by its name (STYLE: units last)."""
    if "bytes_per_s" in key or key.endswith("bandwidth"):
        return "rate"
    if "bytes" in key.split("_"):
        return "bytes"
    return "seconds" if "s" in key.split("_") else ""


def _with_unit(key: str, text: str) -> float:
    unit = _unit_of(key)
    if unit == "seconds":
        return parse_seconds(text)
    return parse_bytes(text) if unit == "bytes" else parse_rate(text)


def _convert(value: Any, path: Path, source: _Source) -> Any:
    """Text with units becomes numbers, in place; true and false are refused for numbers, names."""
    if isinstance(value, dict):
        for key, inner in value.items():
            value[key] = _convert(inner, (*path, key), source)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            value[i] = _convert(inner, (*path, i), source)
    elif isinstance(value, bool):
        if path[-1] not in _BOOLEANS:
            what = f"{_dotted(path)} is {str(value).lower()} (YAML's yes, no, on, off, true, false)"
            raise source.error(_Problem(path, what + "; put it in quotes if it is a name"))
    elif isinstance(value, str) and path and path[-2:-1] not in _NAMED and _unit_of(str(path[-1])):
        try:
            return _with_unit(str(path[-1]), value)
        except ValueError as error:
            raise source.error(_Problem(path, f"{_dotted(path)}: {error}")) from None
    return value


def _with_text(schema: dict[str, Any]) -> dict[str, Any]:
    text = {"type": "string", "pattern": r"^\s*[0-9.]+([eE][-+]?[0-9]+)?\s*[A-Za-z/]*\s*$"}
    outer: dict[str, Any] = {
        k: schema[k] for k in ("title", "default", "description") if k in schema
    }
    inner = {k: v for k, v in schema.items() if k not in outer}
    return {**outer, "anyOf": [*inner.get("anyOf", [inner]), text]}


# --- pydantic's findings in our words ----------------------------------------------------------


def _problems(error: ValidationError, data: dict[str, Any]) -> list[_Problem]:
    found = [_problem(e, data) for e in error.errors(include_url=False)]
    paths = {p.path for p in found}
    # A value of a union gives one finding per member; those about its inside say the most.
    deep = [
        p for p in found
        if not any(len(q) > len(p.path) and q[: len(p.path)] == p.path for q in paths)
    ]  # fmt: skip
    return deep or found


def _problem(error: ErrorDetails, data: dict[str, Any]) -> _Problem:
    path = _path_in(error["loc"], data)
    spec, annotation = _typed(path, error["loc"])
    shown = _dotted(path) or "the deployment"
    match error["type"]:
        case "extra_forbidden":
            owner = _typed(path[:-1], error["loc"])[0] or Deployment
            near = _near_key(path, owner)
            return _Problem(path, f"{shown} is not a known key", near, _SCHEMA, rank=0)
        case "missing":
            path = (*path, str(error["loc"][-1]))
            return _Problem(path, f"{_dotted(path)} is missing", next_step=_SCHEMA)
        case "literal_error":
            choices = [str(c) for c in _choices(annotation)]
            what = f"{shown} is {_short(error['input'])}, not one of {', '.join(choices)}"
            return _Problem(path, what, nearest(str(error["input"]), choices))
        case "spec":
            inside = error["ctx"]
            path = (*path, *inside["path"])
            return _Problem(path, f"{_dotted(path)}: {inside['what']}", inside["near"])
        case "value_error" if not path:
            return _reference(error["msg"].removeprefix("Value error, "), data)
    if error["input"] is None:
        return _Problem(path, f"{shown} is empty; give it a value or remove the key")
    if spec is not None and not isinstance(error["input"], dict) and error["type"] != "value_error":
        return _Problem(path, f"{shown} is {_short(error['input'])}, not a set of `key: value`")
    return _Problem(path, f"{shown} is {_short(error['input'])}: {_plain(error['msg'])}")


def _path_in(loc: tuple[str | int, ...], data: Any) -> Path:
    """The part of pydantic's location that exists in the data (it also names union members)."""
    path: list[str | int] = []
    for step in loc:
        try:
            data = data[step]
        except (KeyError, IndexError, TypeError):
            continue
        path.append(step)
    return tuple(path)


def _typed(
    path: Path, loc: tuple[str | int, ...] = ()
) -> tuple[type[Spec] | None, Any]:
    """The spec class at a path (None for a scalar) and the annotation there.

    Of several classes the one that pydantic's location names, else the first.
    """
    spec: type[Spec] | None = Deployment
    annotation: Any = Deployment
    for step in path:
        if isinstance(step, str):
            found = spec.model_fields.get(step) if spec else None
            if found is None:
                return None, None
            annotation = found.annotation
        classes = list(_spec_classes(annotation))
        spec = next((c for c in classes if c.__name__ in loc), classes[0] if classes else None)
    return spec, annotation


def _spec_classes(annotation: Any) -> Iterator[type[Spec]]:
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        yield annotation
    for inner in get_args(annotation):
        yield from _spec_classes(inner)


def _choices(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return next((c for inner in get_args(annotation) if (c := _choices(inner))), ())


def _near_key(path: Path, owner: type[Spec]) -> str:
    """The closest key of the same section; else where that very key belongs; else all keys."""
    key = str(path[-1])
    close = nearest(key, owner.model_fields)
    if close in owner.model_fields:
        return close
    return next((p for p in _key_places(Deployment) if p.split(".")[-1] == key), close)


def _key_places(spec: type[Spec], prefix: str = "") -> Iterator[str]:
    for key, info in spec.model_fields.items():
        yield prefix + key
        for inner in _spec_classes(info.annotation):
            yield from _key_places(inner, f"{prefix}{key}.")


def _reference(message: str, data: dict[str, Any]) -> _Problem:
    """A finding of the whole deployment's validator, put at the pool's key that it speaks of."""
    what, _, near = message.partition("; nearest: ")
    found = _POOL_REFERENCE.match(what)
    path: Path = ("pools",)
    if found:
        names = [p.get("name") for p in data["pools"]]
        at = names.index(found["pool"])
        path = ("pools", at, found["key"]) if found["key"] in data["pools"][at] else ("pools", at)
    return _Problem(path, what, near)


def _not_finite(value: Any, path: Path = ()) -> Iterator[_Problem]:
    if isinstance(value, float) and not math.isfinite(value):
        yield _Problem(path, f"{_dotted(path)} is {value}, not a finite number")
    elif isinstance(value, (dict, list, tuple)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for step, inner in pairs:
            yield from _not_finite(inner, (*path, step))


def _unknown_names(
    deployment: Deployment, known: Mapping[Path, Collection[str] | None]
) -> Iterator[_Problem]:
    for path, names in known.items():
        value: Any = deployment
        for step in path:
            value = value[step] if isinstance(step, int) else getattr(value, step)
        if names is not None and isinstance(value, str) and value not in names:
            yield _Problem(path, f"{_dotted(path)}: no {_short(value)}", nearest(value, names))


def _dotted(path: Path) -> str:
    text = "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in path)
    return text.removeprefix(".")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _plain(message: str) -> str:
    message = message.removeprefix("Value error, ").removeprefix("Input ")
    return " ".join(message.split())
