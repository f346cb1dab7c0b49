"""What is drawn for a measurement: the published numbers, operators from outside, settings, noise, names."""
from pathlib import Path
from typing import Literal

import pytest
import torch

from model.operators import OPERATORS, BlockCompressedSensing, LinearOperator, random_sampling_matrix
from utils.errors import UserError
from utils.flags import noise
from utils.measurement import Measurement
from utils.measurement_flags import measurements
from utils.operator_settings import read_settings


class Mask(LinearOperator):
    """Keeps some pixels: a toy of the kind that a user adds."""

    def __init__(self, kept):
        super().__init__()
        self.register_buffer("kept", kept)

    @classmethod
    def random(cls, image_shape, generator, keep: float, rows: int = 1, kind: Literal["dots", "bars"] = "dots",
               wrap: bool = False, file: "Path | None" = None) -> "Mask":
        if not 0 < keep <= 1:
            raise ValueError(f"keep must lie in (0, 1], not {keep}")
        return cls((torch.rand(image_shape, generator=generator) < keep).float())

    @classmethod
    def side_multiple(cls, rows):
        return rows

    def A(self, x):
        return x * self.kept

    def A_adjoint(self, y):
        return y * self.kept


@pytest.fixture(autouse=True)
def mask(monkeypatch):
    monkeypatch.setitem(OPERATORS, "mask", Mask)


def small(**settings) -> Measurement:
    return Measurement(settings={"cs_ratio": 0.3, "block_size": 4, **settings}, seed=7)


def test_the_sampling_matrix_is_the_one_drawn_for_each_ratio():
    for ratio in (0.07, 0.1, 0.104, 0.3, 1e-9, 1.0):
        measurement = Measurement(settings={"cs_ratio": ratio, "block_size": 10}, seed=5)
        operator = measurement.draw((20, 10), torch.Generator().manual_seed(1))
        assert operator.sampling_matrix.equal(random_sampling_matrix(ratio, 10, torch.Generator().manual_seed(5)))
    assert not measurement.shared(seed=6)["sampling_matrix"].equal(measurement.shared()["sampling_matrix"])


def test_what_training_draws_is_the_generators_next_permutation():
    generator, twin = (torch.Generator().manual_seed(3) for _ in range(2))
    torch.rand((), generator=generator), torch.rand((), generator=twin)
    operator = small().draw((8, 12), generator, small().shared())
    assert operator.permutation.equal(torch.randperm(96, generator=twin))
    assert operator.same_for_all


def test_a_pictures_permutation_is_that_of_seed_and_name():
    # The first 8 bytes of `printf 2025:a | sha256sum`, last byte first: scores must stay reproducible.
    expected = torch.randperm(256, generator=torch.Generator().manual_seed(0x94D1F3AA42685752))
    measurement = Measurement(settings={"cs_ratio": 0.5, "block_size": 4})
    both = measurement.draw_for(["a", "b"], (16, 16))
    assert isinstance(both, BlockCompressedSensing) and both.permutation[0].equal(expected)
    alone = measurement.draw_for(["b"], (16, 16))
    assert both.permutation[1].equal(alone.permutation) and not alone.permutation.equal(expected)
    x = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(both.A(x)[1:], alone.A(x[1:]), atol=1e-6)


def test_a_batch_is_measured_each_image_by_its_own_operator():
    measurement = Measurement("mask", {"keep": 0.5})
    operator, x = measurement.draw_for(["a", "b"], (6, 7)), torch.rand(2, 1, 6, 7)
    masks = torch.stack([torch.rand(6, 7, generator=measurement.generator(name)) < 0.5 for name in "ab"])[:, None]
    for result in (operator.A(x), operator.A_adjoint(x), operator.A_dagger(x)):
        assert result.equal(x * masks)
    with pytest.raises(ValueError, match="2 images, not for 3"):
        operator.A(torch.rand(3, 1, 6, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_noise_is_that_of_each_images_generator(dtype):
    y = torch.rand(2, 4, 5).to(dtype)
    measurement = Measurement("mask", {"keep": 1.0}, noise=(0.1, 0.3))
    noisy, sigma = measurement.add_noise(y, [measurement.generator(name, "noise") for name in "ab"])
    for image, name in enumerate("ab"):
        generator = measurement.generator(name, "noise")
        level = 0.1 + 0.2 * float(torch.rand((), generator=generator))
        assert float(sigma[image]) == pytest.approx(level)
        parts = torch.randn((4, 5, 2) if dtype.is_complex else (4, 5), generator=generator)
        added = torch.complex(parts[..., 0], parts[..., 1]) if dtype.is_complex else parts
        assert torch.allclose(noisy[image], y[image] + level * added)
    noisy, sigma = Measurement("mask", {"keep": 1.0}).add_noise(y, [torch.Generator()] * 2)
    assert sigma is None and noisy is y


def test_settings_are_read_by_the_signature():
    pairs = ["keep=0.5", "rows=3", "kind=bars", "wrap=true", "file=~/a b/mask.png"]
    settings = read_settings("mask", pairs)
    assert settings == {"keep": 0.5, "rows": 3, "kind": "bars", "wrap": True, "file": Path.home() / "a b" / "mask.png"}
    measurement = Measurement("mask", settings, noise=(0.05, 0.05))
    assert measurement.name == "mask_keep_0.5_rows_3_kind_bars_wrap_True_file_mask_noise_0.05"
    assert measurement.side_multiple == 3
    assert Measurement("mask", {"keep": 0.5}).name == "mask_keep_0.5"
    assert Measurement("mask", {"keep": 0.5, "wrap": True}).title == "mask keep=0.5 wrap=True"
    assert Measurement("mask", {"keep": 0.5}).settings == {"keep": 0.5, "rows": 1, "kind": "dots", "wrap": False,
                                                            "file": None}


def test_several_values_of_settings_are_several_measurements():
    def measured(*pairs: str) -> list[str]:
        return [each.described for each in measurements("mask", list(pairs), None, None, (0.0, 0.0), 2025)]
    assert measured("keep=0.5/1", "kind=bars/dots") == [
        "keep=0.5 kind=bars", "keep=0.5", "keep=1.0 kind=bars", "keep=1.0"]
    assert measured("keep=1/1", "file=a/b.png") == [f"keep=1.0 file={Path('a/b.png')}"]
    with pytest.raises(UserError, match="keep must be a number, not half"):
        measured("keep=1/half")


@pytest.mark.parametrize("operator, pairs, message", [
    ("lens", [], "there is no operator lens; there are cs"),
    ("mask", ["kep=1"], "takes no kep=1; its settings are keep, rows=1, kind=dots, wrap=False, file"),
    ("mask", ["keep"], "takes key=value, not keep; its settings are keep"),
    ("mask", ["keep=half"], "keep must be a number, not half"),
    ("mask", ["keep=nan"], "keep must be a number, not nan"),
    ("mask", ["keep=1", "rows=2.5"], "rows must be a whole number, not 2.5"),
    ("mask", ["keep=1", "kind=\x1b[2J"], r"kind must be one of dots, bars, not '\x1b[2J'"),
    ("mask", ["keep=1", "wrap=2"], "wrap must be true or false, not 2"),
    ("mask", [], "needs a value of keep; its settings are keep"),
    ("mask", ["keep=3"], "keep must lie in (0, 1], not 3.0"),
    ("mask", ["keep=1", "keep=0.5"], "gives keep twice; several values are keep=FIRST/SECOND"),
    ("mri", ["complex_images=true", "acceleration=2"], "images of 2 channels, but pictures are measured in one"),
    ("multicoil_mri", ["complex_images=true", "acceleration=2"], "images of 2 channels, but pictures are measured in"),
    ("multicoil_mri", ["coils=1000000000"], "coils must be at most 256, not 1000000000"),
    ("mri", ["center_fraction=1", "acceleration=2"], "1.0 is more than the 0.5 of the columns that acceleration 2.0"),
    ("ct", ["angles=1000000000"], "the matrix of 1000000000 angles and 8x8 pixels would be too large"),
    ("deblurring", [f"side={10**30 + 1}"], "is larger than the images, 8x8"),
    ("cs", ["cs_ratio=2", "block_size=8"], "cs_ratio must lie in (0, 1], not 2.0"),
    ("cs", ["cs_ratio=1", "sampling_matrix=2"], "takes no sampling_matrix=2; its settings are cs_ratio, block_size"),
])
def test_mistakes_are_a_sentence(operator, pairs, message):
    with pytest.raises(UserError) as error:
        Measurement(operator, read_settings(operator, pairs)).draw((8, 8), torch.Generator(), {})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_blocks_too_large_for_the_memory_are_said_in_a_sentence(monkeypatch):
    def exhausted(generator, block_size):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 34359738368 bytes.")
    monkeypatch.setattr(BlockCompressedSensing, "shared", exhausted)
    with pytest.raises(UserError, match="not enough memory for the operator cs with cs_ratio=0.3 block_size=256"):
        small(block_size=256).shared()


def test_names_are_the_published_ones_for_cs():
    assert Measurement().name == "10" and Measurement().run_name(3) == "R_0.10_T_3_B_32"
    noisy = Measurement(settings={"cs_ratio": 0.025, "block_size": 8}, noise=(0.0, 0.05))
    assert noisy.name == "2.5_noise_0-0.05" and noisy.run_name(1) == "R_0.025_T_1_B_8_noise_0-0.05"
    assert Measurement().with_settings(cs_ratio=0.5).name == "50"


def test_a_name_tells_no_setting_in_whose_place_a_file_stands():
    assert Measurement("inpainting", {"mask": Path("a/strokes.png")}).name == "inpainting_mask_strokes"
    assert Measurement("deblurring", {"kernel": Path("k.npy")}).title == "deblurring kernel=k.npy"
    assert Measurement("matrix", {"matrix": Path("phi.npy")}).name == "matrix_matrix_phi"


def test_a_new_setting_of_cs_leaves_the_published_names_alone(monkeypatch):
    class Blocks(BlockCompressedSensing):
        @classmethod
        def random(cls, image_shape, cs_ratio: float, block_size: int, generator, permuted: bool = True):
            """As `cs` with one more setting."""

    monkeypatch.setitem(OPERATORS, "cs", Blocks)
    assert Measurement().name == "10" and Measurement().run_name(3) == "R_0.10_T_3_B_32"
    assert Measurement().with_settings(permuted=False).name == "10_permuted_False"


def test_noise_is_a_level_or_a_range():
    assert noise("0.05") == (0.05, 0.05) and noise("0-0.05") == (0.0, 0.05) and noise("1e-3-5e-3") == (0.001, 0.005)
    for text in ("-1", "0.05-0", "nan", "much", "1e400", "0-1e400"):
        with pytest.raises(Exception, match="standard deviation, or a range"):
            noise(text)
