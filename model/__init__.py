"""Invertible diffusion models for compressed sensing."""
from .checkpoint import WeightsError
from .idm import IDM
from .operators import BlockCompressedSensing, LinearOperator

__all__ = ["IDM", "BlockCompressedSensing", "LinearOperator", "WeightsError"]
