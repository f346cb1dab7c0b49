"""Invertible diffusion models for compressed sensing."""
from .idm import IDM
from .operators import BlockCompressedSensing, LinearOperator
from .self_ensemble import SelfEnsemble
from .weight_files import WeightsError

__all__ = ["IDM", "BlockCompressedSensing", "LinearOperator", "SelfEnsemble", "WeightsError"]
