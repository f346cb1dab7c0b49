"""Measurement operators by name, one family a file (paper, section 3.1)."""
from .base import LinearOperator, PaddedOperator, TransformedOperator
from .check import OperatorError, check_operator, warn_if_wrong
from .cs import BlockCompressedSensing, number_of_measurements, random_sampling_matrix
from .ct import CT
from .deblurring import Deblurring
from .deepinv_physics import as_deepinv
from .hadamard import HadamardSensing
from .inpainting import Inpainting
from .matrix import MatrixSensing
from .mri import MRI, MultiCoilMRI
from .pseudo_inverse import dagger, is_tight
from .super_resolution import SuperResolution

OPERATORS = {
    "cs": BlockCompressedSensing,
    "inpainting": Inpainting,
    "super_resolution": SuperResolution,
    "deblurring": Deblurring,
    "mri": MRI,
    "multicoil_mri": MultiCoilMRI,
    "ct": CT,
    "hadamard": HadamardSensing,
    "matrix": MatrixSensing,
}

__all__ = ["CT", "MRI", "OPERATORS", "BlockCompressedSensing", "Deblurring", "HadamardSensing", "Inpainting",
           "LinearOperator", "MatrixSensing", "MultiCoilMRI", "OperatorError", "PaddedOperator", "SuperResolution",
           "TransformedOperator", "as_deepinv", "check_operator", "dagger", "is_tight", "number_of_measurements",
           "random_sampling_matrix", "warn_if_wrong"]
