"""Invertible diffusion models for compressed sensing: the public names, each imported when it is first asked for.

The network needs seconds to import; operators and errors do not wait for it.
"""
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .idm import IDM
    from .operators import BlockCompressedSensing, LinearOperator, OperatorError, as_deepinv, check_operator
    from .self_ensemble import SelfEnsemble
    from .weight_files import WeightsError

_MODULES = {"IDM": "idm", "BlockCompressedSensing": "operators", "LinearOperator": "operators",
            "OperatorError": "operators", "SelfEnsemble": "self_ensemble", "WeightsError": "weight_files",
            "as_deepinv": "operators", "check_operator": "operators"}

__all__ = ["IDM", "BlockCompressedSensing", "LinearOperator", "OperatorError", "SelfEnsemble", "WeightsError",
           "as_deepinv", "check_operator"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
