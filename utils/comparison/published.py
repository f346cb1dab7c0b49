"""Average PSNR of the Y channel as printed in one table of the IDM paper (TPAMI 2025): copied, not measured here."""
import math
from typing import NamedTuple

RATIOS = (0.1, 0.3, 0.5)
_ = None  # not published
_TABLE = {
    "DGUNet+ (CVPR 2022)": {"Set11": (30.92, _, 41.24), "CBSD68": (27.89, _, 36.86),
                            "Urban100": (27.42, _, 37.13), "DIV2K": (30.25, _, 40.33)},
    "MR-CCSNet+ (CVPR 2022)": {"Set11": (_, _, 39.27), "CBSD68": (_, _, 35.45),
                               "Urban100": (_, _, 34.40), "DIV2K": (_, _, 38.16)},
    "FSOINet (ICASSP 2022)": {"Set11": (30.44, 37.00, 41.08), "CBSD68": (28.12, 33.15, 37.18),
                              "Urban100": (26.87, 33.29, 37.25), "DIV2K": (30.01, 36.03, 40.38)},
    "CASNet (TIP 2022)": {"Set11": (30.31, 36.91, 40.93), "CBSD68": (28.16, 33.05, 36.99),
                          "Urban100": (26.85, 32.85, 36.94), "DIV2K": (30.01, 35.90, 40.14)},
    "TransCS (TIP 2022)": {"Set11": (29.54, 35.62, 40.50), "CBSD68": (27.76, 32.43, 36.65),
                           "Urban100": (25.82, 31.18, 36.64), "DIV2K": (29.09, 34.76, 39.75)},
    "OCTUF+ (CVPR 2023)": {"Set11": (30.70, 37.35, 41.36), "CBSD68": (28.18, 33.23, 37.28),
                           "Urban100": (27.28, 33.87, 37.82), "DIV2K": (30.17, 36.25, 40.61)},
    "CSformer (TIP 2023)": {"Set11": (30.66, _, 41.04), "CBSD68": (28.11, _, 36.75),
                            "Urban100": (27.13, _, 37.04), "DIV2K": (29.96, _, 40.04)},
    "PRL-PGD+ (IJCV 2023)": {"Set11": (31.70, 37.89, 41.78), "CBSD68": (28.50, 33.41, 37.37),
                             "Urban100": (28.77, 34.73, 38.57), "DIV2K": (30.75, 36.64, 40.97)},
    "IDM, T = 3 (TPAMI 2025)": {"Set11": (32.92, 38.85, 42.48), "CBSD68": (28.69, 34.67, 39.57),
                                "Urban100": (31.41, 36.76, 40.33), "DIV2K": (31.07, 36.98, 41.15)},
}


class Published(NamedTuple):
    """A method's published average over a whole test set."""

    name: str
    psnr: float  # dB


def published_averages(testset: str, cs_ratio: float) -> list[Published]:
    """Return what is published for a test set at a ratio; an empty list where nothing is."""
    columns = [column for column, ratio in enumerate(RATIOS) if math.isclose(ratio, cs_ratio)]
    return [Published(name, sets[testset][column]) for name, sets in _TABLE.items() for column in columns
            if testset in sets and sets[testset][column] is not None]
