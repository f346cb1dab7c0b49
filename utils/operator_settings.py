"""Settings of measurement operators as key=value, read by the signature of the operator's `random`."""
import inspect
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.operators import OPERATORS
from utils.errors import UserError, listed


def setting_parameters(operator: str) -> dict[str, inspect.Parameter]:
    """Return the settings of an operator of OPERATORS: what its `random` takes that text can say, with its type."""
    if operator not in OPERATORS:
        raise UserError(f"there is no operator {listed([operator])}; there are {', '.join(OPERATORS)}")
    method = OPERATORS[operator].random
    kinds = _annotations(getattr(method, "__func__", method))
    parameters = {name: parameter.replace(annotation=_kind(kinds.get(name, str)))
                  for name, parameter in inspect.signature(method).parameters.items()
                  if name not in ("image_shape", "generator")}
    return {name: parameter for name, parameter in parameters.items() if parameter.annotation is not None}


def read_settings(operator: str, pairs: Sequence[str]) -> dict[str, Any]:
    """Read key=value pairs by the signature of the operator's `random`; raises UserError that lists what there is."""
    known, values = setting_parameters(operator), {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or name not in known:
            said = f"takes no {listed([pair])}" if equals else f"takes key=value, not {listed([pair])}"
            raise UserError(f"--operator_settings of {operator} {said}; {settings_of(known)}")
        if name in values:
            raise UserError(f"--operator_settings gives {name} twice; several values are {name}=FIRST/SECOND")
        values[name] = _read(f"--operator_settings {name}", known[name].annotation, text)
    return values


def _annotations(function: types.FunctionType) -> dict[str, Any]:
    """The types of a function's parameters, also where they are written as strings."""
    written = {name: kind for name, kind in function.__annotations__.items() if name != "return"}
    return typing.get_type_hints(types.SimpleNamespace(__annotations__=written), function.__globals__)


def _kind(annotation: Any) -> Any:
    """What a setting is read as: int, float, bool, str, Path or a Literal; None for what text does not say."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        annotation = next((part for part in typing.get_args(annotation) if part is not types.NoneType), None)
    if annotation in (int, float, bool, str, Path) or typing.get_origin(annotation) is typing.Literal:
        return annotation
    return None


def _read(setting: str, kind: Any, text: str) -> Any:
    if typing.get_origin(kind) is typing.Literal:
        if text not in typing.get_args(kind):
            raise UserError(f"{setting} must be one of {', '.join(typing.get_args(kind))}, not {listed([text])}")
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{setting} must be true or false, not {listed([text])}")
        return text.lower() == "true"
    try:
        value = Path(text).expanduser() if kind is Path else kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError("neither inf nor nan")
        return value
    except (ValueError, RuntimeError):  # RuntimeError: ~ of a user who is not here
        words = {int: "a whole number", float: "a number"}
        raise UserError(f"{setting} must be {words.get(kind, 'a path')}, not {listed([text])}") from None


def settings_of(known: Mapping[str, inspect.Parameter]) -> str:
    """Say what settings there are, with their defaults."""
    shown = [name if parameter.default in (parameter.empty, None) else f"{name}={parameter.default}"
             for name, parameter in known.items()]
    return f"its settings are {', '.join(shown)}" if shown else "it has no settings"
