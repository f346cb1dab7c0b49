"""Measurement operators by name, one family a file (paper, section 3.1)."""
from .base import LinearOperator, PaddedOperator, TransformedOperator
from .check import OperatorError, check_operator, warn_if_wrong
from .cs import BlockCompressedSensing, number_of_measurements, random_sampling_matrix
from .pseudo_inverse import dagger

OPERATORS = {"cs": BlockCompressedSensing}

__all__ = ["OPERATORS", "BlockCompressedSensing", "LinearOperator", "OperatorError", "PaddedOperator",
           "TransformedOperator", "check_operator", "dagger", "number_of_measurements", "random_sampling_matrix",
           "warn_if_wrong"]
