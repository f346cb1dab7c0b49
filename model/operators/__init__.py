"""Measurement operators by name, one family a file (paper, section 3.1)."""
from .base import LinearOperator, PaddedOperator, TransformedOperator
from .cs import BlockCompressedSensing, number_of_measurements, random_sampling_matrix

OPERATORS = {"cs": BlockCompressedSensing}

__all__ = ["OPERATORS", "BlockCompressedSensing", "LinearOperator", "PaddedOperator", "TransformedOperator",
           "number_of_measurements", "random_sampling_matrix"]
