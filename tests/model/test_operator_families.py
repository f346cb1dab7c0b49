"""Every operator of OPERATORS: against dense matrices at odd sizes, and against what other libraries compute."""
import math
import struct
import zlib

import cv2
import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch
from PIL import Image
from skimage.transform import radon
from torch import Tensor
from torch.nn import functional as F

from model.operators import OPERATORS, Deblurring, LinearOperator, MatrixSensing, MultiCoilMRI, check_operator, mri

KERNEL = np.array([[1, 2, 3], [0, 5, 1], [2, 1, 4.0]])  # like no mirror image of its own

CASES = {  # name, settings, (H, W)
    "cs": ("cs", {"cs_ratio": 0.3, "block_size": 3}, (9, 6)),
    "cs, all": ("cs", {"cs_ratio": 1.0, "block_size": 3}, (9, 6)),
    "pixels": ("inpainting", {"keep": 0.4}, (7, 9)),
    "box": ("inpainting", {"keep": 0.6, "kind": "box"}, (7, 9)),
    "text": ("inpainting", {"keep": 0.7, "kind": "text"}, (15, 11)),
    "mask": ("inpainting", {"mask": "mask.png"}, (7, 9)),
    "means": ("super_resolution", {"factor": 2}, (7, 10)),
    "means of 3": ("super_resolution", {"factor": 3}, (9, 8)),
    "bicubic": ("super_resolution", {"factor": 2, "kernel": "bicubic"}, (9, 12)),
    "bicubic 4": ("super_resolution", {"factor": 4, "kernel": "bicubic"}, (11, 13)),
    "gaussian": ("deblurring", {"side": 5, "sigma": 1.0}, (9, 8)),
    "motion": ("deblurring", {"kind": "motion", "side": 7}, (9, 11)),
    "kernel": ("deblurring", {"kernel": "kernel.npy"}, (5, 7)),
    "mri, real": ("mri", {"acceleration": 3.0}, (7, 12)),
    "mri, real, odd": ("mri", {"acceleration": 3.0, "center_fraction": 0.1}, (8, 13)),
    "mri, complex": ("mri", {"acceleration": 3.0, "complex_images": True}, (7, 9)),
    "coils, real": ("multicoil_mri", {"acceleration": 3.0, "coils": 2}, (5, 8)),
    "coils, complex": ("multicoil_mri", {"acceleration": 2.0, "coils": 3, "complex_images": True}, (6, 7)),
    "ct": ("ct", {"angles": 4}, (7, 10)),
    "ct, many views": ("ct", {"angles": 30}, (6, 5)),
    "hadamard": ("hadamard", {"cs_ratio": 0.3}, (6, 10)),
    "hadamard, whole": ("hadamard", {"cs_ratio": 0.1}, (4, 16)),
    "matrix of blocks": ("matrix", {"matrix": "blocks.npy"}, (6, 9)),
    "matrix, permuted": ("matrix", {"matrix": "blocks.npy", "permuted": True}, (6, 9)),
    "matrix, transposed": ("matrix", {"matrix": "transposed.npy"}, (6, 9)),
    "matrix of the image": ("matrix", {"matrix": "whole.npy"}, (5, 7)),
    "matrix, orthonormal": ("matrix", {"matrix": "orthonormal.npy"}, (3, 3)),
}
TIGHT = {"cs", "cs, all", "pixels", "box", "text", "mask", "means", "means of 3", "mri, complex", "hadamard",
         "hadamard, whole", "matrix, orthonormal"}
NOTHING_DRAWN = {"mask", "means", "means of 3", "bicubic", "bicubic 4", "gaussian", "kernel", "ct", "ct, many views",
                 "matrix of blocks", "matrix, transposed", "matrix of the image", "matrix, orthonormal"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    blocks = generator.standard_normal((4, 9))
    blocks[3] = blocks[0] - blocks[1]  # of less rank than it has rows
    cv2.imwrite(str(folder / "mask.png"), 255 * (generator.random((7, 9)) < 0.5).astype(np.uint8))
    arrays = {"kernel": KERNEL, "blocks": blocks, "transposed": blocks.T, "whole": generator.standard_normal((12, 35)),
              "orthonormal": np.linalg.qr(generator.standard_normal((9, 4)))[0].T}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def with_files(settings: dict, files) -> dict:
    return {key: files / value if str(value).endswith((".npy", ".png")) else value for key, value in settings.items()}


def make(case: str, files, seed: int = 0) -> LinearOperator:
    name, settings, shape = CASES[case]
    return OPERATORS[name].random(image_shape=shape, generator=torch.Generator().manual_seed(seed),
                                  **with_files(settings, files))


def images(operator: LinearOperator, count: int, seed: int = 0) -> Tensor:
    shape = (count, getattr(operator, "channels", 1), *operator.image_shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(operator: LinearOperator) -> Tensor:
    """A as a matrix, (measurements, pixels), by its columns."""
    shape = images(operator, 1).shape[1:]
    return operator.A(torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)).flatten(1).T


@pytest.mark.parametrize("case", CASES)
def test_adjoint_and_pseudo_inverse(case: str, files):
    operator = make(case, files).double()
    matrix, x = dense(operator), images(operator, 2)
    y = torch.randn(operator.A(x).shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert y.shape[0] == 2
    torch.testing.assert_close(operator.A(x).flatten(1), x.flatten(1) @ matrix.T)
    torch.testing.assert_close(operator.A_adjoint(y).flatten(1), y.flatten(1) @ matrix)
    gram = matrix @ matrix.T
    assert operator.tight == (case in TIGHT) == bool((gram @ gram - gram).abs().max() < 1e-5)
    eye, cutoff = torch.eye(len(gram), dtype=torch.float64), torch.finfo(torch.float64).eps ** 0.5
    factored = "ct" in case or "coils" in case  # A Aᵀ + λI, for want of an inverse
    floor = (1e-6 if "ct" in case else 1e-4 if factored else 0) * eye
    inverse = torch.linalg.solve(gram + floor, matrix).T if factored else torch.linalg.pinv(matrix, rtol=cutoff)
    accuracy = dict.fromkeys(("rtol", "atol"), 1e-3 if factored else 1e-5)  # of what is kept in fp32
    found = operator.A_dagger(y).flatten(1)
    torch.testing.assert_close(found / inverse.norm(), y.flatten(1) @ inverse.T / inverse.norm(), **accuracy)
    for damping in (torch.tensor([0.3], dtype=torch.float64), torch.tensor([0.2, 0.5], dtype=torch.float64)):
        expected = [matrix.T @ torch.linalg.solve(gram + floor + lam * eye, each.flatten())
                    for lam, each in zip(damping.expand(2), y, strict=True)]
        torch.testing.assert_close(operator.A_dagger(y, damping).flatten(1), torch.stack(expected), **accuracy)
    if not case.startswith("mri, real"):  # whose imaginary part of the mean is 0 as well
        zero = 0 if "ct" in case else int((matrix.abs().sum(1) == 0).sum())  # rays that miss the image are counted
        assert operator.measured(y) == len(matrix) - zero


@pytest.mark.parametrize("case", CASES)
def test_in_single_precision(case: str, files):
    """As the network uses it: real, consistent, the same under autocast, and for an image alone or in a batch."""
    operator = make(case, files)
    x = images(operator, 2).float()
    check_operator(operator, x.shape)
    y = operator.A(x)
    back = operator.A_dagger(y)
    assert back.shape == x.shape and operator.same_for_all
    accuracy = dict.fromkeys(("rtol", "atol"), 2e-3 if "coils" in case else 1e-4)
    torch.testing.assert_close(operator.A_dagger(operator.A(x[1:])), back[1:], **accuracy)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(operator.A_dagger(operator.A(x)), back, **accuracy)


@pytest.mark.parametrize("case", set(CASES) - TIGHT - {"matrix, transposed", "bicubic 4", "mri, real, odd"})
def test_gradients_through_the_pseudo_inverse(case: str, files):
    """Of measurements and of the damping, against finite differences in float64."""
    operator = make(case, files).double()
    y = torch.randn(operator.A(images(operator, 2)).shape, dtype=torch.float64, requires_grad=True,
                    generator=torch.Generator().manual_seed(0))
    damping = torch.tensor([0.3, 0.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(operator.A_dagger, (y, damping), fast_mode=True, atol=1e-4)
    assert torch.autograd.gradcheck(operator.A, images(operator, 1).requires_grad_(), fast_mode=True)
    inverse = torch.func.jacrev(lambda flat: operator.A_dagger(flat.view_as(y)).flatten())(y.detach().flatten()) \
        if case in ("gaussian", "mri, real", "bicubic", "matrix of blocks") else None
    if inverse is not None:
        weights = torch.randn(2, *operator.A_adjoint(y).shape[1:], dtype=torch.float64)
        (gradient,) = torch.autograd.grad((operator.A_dagger(y) * weights).sum(), y)
        torch.testing.assert_close(gradient.flatten(), weights.flatten() @ inverse)


@pytest.mark.parametrize("case", CASES)
def test_one_seed_one_operator(case: str, files):
    a, b, other = make(case, files, 5), make(case, files, 5), make(case, files, 6)
    x = images(a, 1).float()
    assert torch.equal(a.A(x), b.A(x))
    same = a.A(x).shape == other.A(x).shape and torch.equal(a.A(x), other.A(x))
    assert same == (case in NOTHING_DRAWN)
    if CASES[case][0] == "cs":  # whose sampling matrix is drawn once for all
        other = type(a)(a.sampling_matrix, other.permutation, other.image_shape)
    stacked = type(a).stacked([a, other])
    both = images(a, 2).float()
    expected = torch.cat((a.A(both[:1]), other.A(both[1:])))
    torch.testing.assert_close(stacked.A(both), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stacked.A_dagger(expected)[1:], other.A_dagger(expected[1:]), rtol=1e-3, atol=1e-3)


# --- what they compute ----------------------------------------------------------------------------------------------

def random(name: str, shape: tuple[int, int] = (12, 16), **settings) -> LinearOperator:
    return OPERATORS[name].random(image_shape=shape, generator=torch.Generator().manual_seed(0), **settings)


def test_masks(files):
    for keep in (0.1, 0.5, 0.9, 1.0):
        assert int(random("inpainting", keep=keep).mask.sum()) == round(keep * 192)
        hidden = random("inpainting", (50, 80), keep=keep, kind="box").mask == 0
        assert abs(float(hidden.float().mean()) - (1 - keep)) < 0.02
        rows, columns = hidden.any(1), hidden.any(0)
        assert torch.equal(hidden, rows[:, None] & columns) and int(rows.int().diff().abs().sum()) <= 2
        text = float(random("inpainting", (50, 80), keep=keep, kind="text").mask.mean())
        assert keep - 0.02 < text <= keep
    assert torch.equal(make("mask", files).mask, torch.from_numpy(
        (cv2.imread(str(files / "mask.png"))[..., 0] > 127).astype(np.float32)))
    strokes = random("inpainting", (120, 120), keep=0.8, kind="text").mask.numpy() == 0
    pieces, count = scipy.ndimage.label(strokes, np.ones((3, 3)))
    thickness = scipy.ndimage.distance_transform_edt(strokes)
    assert count > 3 and np.median(thickness[strokes]) <= 2  # lines, of which no one covers all


def test_smaller_images():
    x = torch.rand(2, 1, 12, 16)
    torch.testing.assert_close(random("super_resolution", factor=4).A(x), 4 * F.avg_pool2d(x, 4))
    picture = np.random.default_rng(0).random((33, 20)).astype(np.float32)
    for factor in (2, 3):
        expected = Image.fromarray(picture).resize((math.ceil(20 / factor), math.ceil(33 / factor)), Image.BICUBIC)
        found = random("super_resolution", (33, 20), factor=factor, kernel="bicubic").A(
            torch.from_numpy(picture)[None, None])[0, 0]
        assert np.abs(found.numpy() - np.asarray(expected)).max() < 1e-5


def test_blur():
    x = np.random.default_rng(0).random((9, 8))
    for kernel in (KERNEL, np.random.default_rng(1).random((5, 1)), np.random.default_rng(1).random((9, 7))):
        operator = Deblurring(torch.from_numpy(kernel), (9, 8)).double()
        found = operator.A(torch.from_numpy(x)[None, None])[0, 0].numpy()
        assert np.abs(found - scipy.ndimage.convolve(x, kernel, mode="wrap")).max() < 1e-6
    impulse = torch.zeros(1, 1, 31, 31)
    impulse[..., 15, 15] = 1
    gaussian = random("deblurring", (31, 31), side=15, sigma=1.6).A(impulse)[0, 0].numpy()
    expected = scipy.ndimage.gaussian_filter(impulse[0, 0].numpy(), 1.6, truncate=7 / 1.6)
    assert np.abs(gaussian - expected).max() < 1e-6
    motion = random("deblurring", (31, 31), kind="motion", side=15).A(impulse)[0, 0].double()
    assert abs(float(motion.sum()) - 1) < 1e-5 and torch.allclose(motion, motion.flip(0, 1), atol=1e-6)
    at = torch.arange(31) - 15.0
    spread = torch.linalg.eigvalsh(torch.tensor([[float((motion * a * b).sum()) for a in (at[:, None], at)]
                                                 for b in (at[:, None], at)]))
    assert spread[0] < 0.5 and abs(float(spread[1]) - 14**2 / 12) < 1  # thin, and as long as a line of 14 pixels


def test_k_space():
    x = np.random.default_rng(0).random((2, 12, 15))
    operator = random("mri", (12, 15), acceleration=3.0, complex_images=True).double()
    shift, back = np.fft.fftshift, np.fft.ifftshift
    k = shift(np.fft.fft2(back(x[0] + 1j * x[1]), norm="ortho")) * operator.columns.numpy()
    y = operator.A(torch.from_numpy(x)[None])[0].numpy()
    assert np.abs(y[0] + 1j * y[1] - k).max() < 1e-12
    coils = random("multicoil_mri", (12, 15), coils=3, complex_images=True).double()
    sensitivities = torch.view_as_complex(coils.sensitivities)
    torch.testing.assert_close(sensitivities.abs().square().sum(0), torch.ones(12, 15, dtype=torch.float64))
    for coil in range(3):
        k = shift(np.fft.fft2(back(sensitivities[coil].numpy() * (x[0] + 1j * x[1])), norm="ortho"))
        y = coils.A(torch.from_numpy(x)[None])[0, :, coil].numpy()
        assert np.abs(y[0] + 1j * y[1] - k * coils.columns.numpy()).max() < 1e-6


def test_columns_are_drawn_as_fastmri_draws_them():
    """round(0.08 · 320) columns in the middle, from (320 − 26 + 1) // 2 on, and 54 of the others on average at 4×."""
    generator, counts = torch.Generator().manual_seed(0), []
    for _ in range(200):
        columns = OPERATORS["mri"].random((4, 320), generator, acceleration=4.0).columns
        assert columns[147:173].all()
        counts.append(int(columns.sum()))
    assert abs(np.mean(counts) - 80) < 4 * np.sqrt(294 * 0.1837 * 0.8163 / 200) and np.std(counts) > 3
    assert OPERATORS["mri"].random((4, 320), generator, acceleration=8.0).columns[154:167].all()


@pytest.mark.parametrize("shape", [(16, 16), (9, 14), (15, 11)])
def test_projections_are_scikit_images(shape):
    x = np.random.default_rng(0).random(shape)
    operator = random("ct", shape, angles=7).double()
    expected = radon(x, np.arange(7) * 180 / 7, circle=False) / math.sqrt(7 * max(shape))
    assert np.abs(operator.A(torch.from_numpy(x)[None, None])[0, 0].numpy() - expected.T).max() < 1e-6


def test_walsh_hadamard_coefficients():
    x = torch.rand(1, 1, 4, 16, dtype=torch.float64)
    operator = random("hadamard", (4, 16), cs_ratio=0.5)
    expected = scipy.linalg.hadamard(64)[operator.chosen] @ x.flatten().numpy() / 8
    assert np.abs(operator.A(x).flatten().numpy() - expected).max() < 1e-12


def test_a_matrix_of_blocks_and_of_the_image(files):
    x = torch.rand(1, 1, 6, 9, dtype=torch.float64)
    blocks = np.load(files / "blocks.npy")
    y = make("matrix of blocks", files).double().A(x)[0, 0].numpy()
    for number, (row, column) in enumerate((row, column) for row in (0, 3) for column in (0, 3, 6)):
        expected = blocks @ x[0, 0, row:row + 3, column:column + 3].flatten().numpy()
        assert np.abs(y[number] - expected).max() < 1e-5
    whole = make("matrix of the image", files).double()
    x = torch.rand(1, 1, 5, 7, dtype=torch.float64)
    assert np.abs(whole.A(x).flatten().numpy() - np.load(files / "whole.npy") @ x.flatten().numpy()).max() < 1e-5
    assert MatrixSensing.side_multiple(matrix=files / "blocks.npy") == 3
    assert MatrixSensing.side_multiple(matrix=files / "whole.npy") == 1


@pytest.mark.parametrize("case", CASES)
def test_no_damping_is_damping_0_to_the_bit(case: str, files):
    """In single precision, in every batch: that of one image, of all, of each its own."""
    operator = make(case, files)
    y = operator.A(torch.randn(3, getattr(operator, "channels", 1), *CASES[case][2]))
    for damping in (torch.zeros(1), torch.zeros(3)):
        assert torch.equal(operator.A_dagger(y), operator.A_dagger(y, damping))


def test_coils_whose_factor_would_be_too_large_are_solved_for_by_conjugate_gradients(monkeypatch):
    factored = random("multicoil_mri", (8, 12)).double()
    monkeypatch.setattr(mri, "FACTORED", 8 * 12 * 12 - 1)
    operator = random("multicoil_mri", (8, 12)).double()
    assert operator.factor is None
    x = torch.eye(96, dtype=torch.float64).view(96, 1, 8, 12)
    matrix = operator.A(x).flatten(1).T
    expected = torch.linalg.solve(matrix.T @ matrix + 1e-4 * torch.eye(96), matrix.T)
    for damping in (None, torch.zeros(1, dtype=torch.float64)):
        eye = torch.eye(len(matrix), dtype=torch.float64)
        found = operator.A_dagger(eye.view(-1, *operator.A(x).shape[1:]), damping)
        assert torch.allclose(found.flatten(1).T, expected, atol=1e-9)
    y = operator.A(torch.rand(2, 1, 8, 12, dtype=torch.float64))
    assert torch.allclose(operator.A_dagger(y), factored.A_dagger(y), atol=1e-3)


# --- mistakes -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "settings", "message"), [
    ("inpainting", {"keep": 0.0}, "keep must lie in .0, 1., not 0.0"),
    ("inpainting", {"mask": "mask.png"}, "mask .*mask.png is 7x9, but the images are 12x16"),
    ("inpainting", {"mask": "kernel.npy"}, "kernel.npy is no picture"),
    ("super_resolution", {"factor": 0}, "factor must be at least 1, not 0"),
    ("deblurring", {"side": 4}, "side must be odd .*, not 4"),
    ("deblurring", {"side": 13}, "kernel of 13x13 is larger than the images, 12x16"),
    ("deblurring", {"sigma": 0.0}, "sigma must be above 0, not 0.0"),
    ("deblurring", {"kernel": "blocks.npy"}, "must have odd sides, .* this is 4x9"),
    ("deblurring", {"kernel": "mask.png"}, "mask.png is no array of numbers in a .npy file"),
    ("deblurring", {"kernel": "none.npy"}, "none.npy is no array of numbers in a .npy file"),
    ("mri", {"acceleration": 0.5}, "acceleration must lie between 1 and the 16 columns, not 0.5"),
    ("mri", {"center_fraction": 2.0}, "center_fraction must lie in .0, 1., not 2.0"),
    ("multicoil_mri", {"coils": 0}, "coils must be at least 1, not 0"),
    ("ct", {"angles": 0}, "angles must be at least 1, not 0"),
    ("hadamard", {"cs_ratio": 1.5}, "cs_ratio must lie in .0, 1., not 1.5"),
    ("matrix", {"matrix": "blocks.npy"}, "matrix for 9 pixels does not fit images of 12x16: .* a multiple of 3 a side"),
    ("matrix", {"matrix": "whole.npy"}, "matrix for 35 pixels .* not to be cut into square blocks"),
    ("matrix", {"matrix": "mask.png"}, "mask.png is no array of numbers"),
])
def test_impossible_settings(name: str, settings: dict, message: str, files):
    with pytest.raises(ValueError, match=message):
        random(name, **with_files(settings, files))


@pytest.mark.parametrize(("content", "message"), [
    (b"PK\x03\x04 no archive", "magic string"),
    (b"\x93NUMPY\x01\x00\x13\x00{'descr': '''<f8', ", "no array of numbers"),  # a header that does not end
    (b"\x93NUMPY\x01\x00\x20\x4e" + b"-" * 20000, "no array of numbers"),
    (b"", "no array of numbers"),
    (np.ones((3, 9)) * (1 + 1j), "no array of real numbers, but of complex128"),
    (np.array([["1", "2"]]), "no array of real numbers"),
    (np.full((3, 9), 1e300), "finite numbers"),  # which float32 cannot hold
    (np.full((3, 9), 1e-300), "not all 0"),
    (np.full((3, 9), np.nan), "finite numbers"),
    (np.ones(9), r"in 2 dimensions; its shape is \(9,\)"),
    (None, "no array of numbers"),
])
@pytest.mark.parametrize(("name", "setting"), [("matrix", "matrix"), ("deblurring", "kernel")])
def test_files_that_hold_no_matrix(name: str, setting: str, content, message: str, tmp_path):
    path = tmp_path / "numbers.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(ValueError, match=f"the {setting} .*numbers.npy .*{message}"):
        random(name, **{setting: path})


def test_a_file_is_read_anew_when_it_has_changed(tmp_path):
    path, x = tmp_path / "matrix.npy", torch.rand(1, 1, 3, 3)
    for matrix in (np.eye(9)[:4], np.eye(9)[5:]):
        np.save(path, matrix)
        y = random("matrix", (3, 3), matrix=path).A(x)
        assert torch.allclose(y.flatten(), torch.from_numpy(matrix).float() @ x.flatten())


def test_a_mask_of_more_pixels_than_can_be_read(tmp_path):
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    (tmp_path / "mask.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(9))) +
        chunk(b"IEND", b""))
    with pytest.raises(ValueError, match="mask.png is no picture"):
        random("inpainting", mask=tmp_path / "mask.png")


def test_factors_beyond_the_image_are_those_of_all_of_it():
    x = torch.rand(1, 1, 12, 16)
    y = random("super_resolution", factor=10**30).A(x)
    assert torch.allclose(y, x.sum().view(1, 1, 1, 1) / math.sqrt(12 * 16))
    y = random("super_resolution", factor=10**30, kernel="bicubic").A(x)
    assert torch.allclose(y, F.interpolate(x, (1, 1), mode="bicubic", antialias=True), atol=1e-6)


@pytest.mark.parametrize(("sigma", "kernel"), [(1e200, np.full((3, 3), 1 / 9)), (1e-200, np.eye(3) * [0, 1, 0])])
def test_widths_of_a_blur_whose_squares_overflow(sigma: float, kernel: np.ndarray):
    blurred = random("deblurring", (5, 5), side=3, sigma=sigma).A(F.pad(torch.ones(1, 1, 1, 1), (2, 2, 2, 2)))
    assert np.allclose(blurred[0, 0, 1:4, 1:4], kernel, atol=1e-6)


@pytest.mark.parametrize(("name", "settings", "x", "message"), [
    ("mri", {"complex_images": True}, torch.zeros(1, 1, 12, 16), "MRI takes images .batch, 2, 12, 16. .complex ones"),
    ("mri", {}, torch.zeros(1, 2, 12, 16), r"MRI takes images \(batch, 1, 12, 16\), not \(1, 2, 12, 16\)"),
    ("mri", {}, torch.zeros(1, 1, 12, 16, dtype=torch.complex64), "takes real images; .* two channels"),
    ("ct", {}, torch.zeros(1, 1, 16, 16), r"CT takes images \(batch, channels, 12, 16\), not \(1, 1, 16, 16\)"),
    ("inpainting", {}, torch.zeros(1, 16, 16), "Inpainting takes images"),
])
def test_images_that_do_not_fit(name: str, settings: dict, x: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        random(name, **settings).A(x)


def test_measurements_that_do_not_fit():
    for name in ("super_resolution", "mri", "multicoil_mri", "ct", "hadamard"):
        operator = random(name)
        y = operator.A(torch.zeros(1, 1, 12, 16))
        for wrong in (y[..., :-1], y[None]):
            with pytest.raises(ValueError, match=f"measurements of {type(operator).__name__} are"):
                operator.A_adjoint(wrong)
    with pytest.raises(ValueError, match="sensitivities must be complex"):
        MultiCoilMRI(torch.ones(2, 4, 4), torch.ones(4))
