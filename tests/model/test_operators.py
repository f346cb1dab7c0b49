"""The published operator against its definition, written out with dense matrices."""
import math

import pytest
import torch

from model import BlockCompressedSensing
from model.operators import MatrixSensing, random_sampling_matrix


def make(image_shape=(8, 12), cs_ratio=0.3, block_size=4, seed=0, dtype=torch.float64) -> BlockCompressedSensing:
    generator = torch.Generator().manual_seed(seed)
    return BlockCompressedSensing.random(image_shape, cs_ratio, block_size, generator).to(dtype)


def dense(operator: BlockCompressedSensing) -> torch.Tensor:
    """A as a matrix, (measurements, pixels), built column by column from the definition A x = (π x) Φ."""
    pixels, n = math.prod(operator.image_shape), len(operator.sampling_matrix)
    shuffle = torch.eye(pixels, dtype=operator.sampling_matrix.dtype)[operator.permutation]
    blocks = torch.block_diag(*[operator.sampling_matrix.T] * (pixels // n))
    return blocks @ shuffle


def test_equals_the_dense_matrix_and_its_transpose():
    operator = make()
    matrix = dense(operator)
    x = torch.randn(3, 1, 8, 12, dtype=torch.float64)
    y = operator.A(x)
    assert y.shape == (3, 96 // 16, math.ceil(0.3 * 16))
    assert torch.allclose(y.flatten(1), x.flatten(1) @ matrix.T, atol=1e-6)
    assert torch.allclose(operator.A_adjoint(y).flatten(1), y.flatten(1) @ matrix, atol=1e-6)
    assert torch.allclose(matrix @ matrix.T, torch.eye(len(matrix), dtype=torch.float64), atol=1e-6)


def test_adjoint_and_pseudo_inverse():
    operator = make(cs_ratio=0.5)
    x = torch.randn(2, 1, 8, 12, dtype=torch.float64)
    y = torch.randn_like(operator.A(x))
    assert torch.allclose((operator.A(x) * y).sum(), (x * operator.A_adjoint(y)).sum(), atol=1e-6)
    assert torch.allclose(operator.A_dagger(y).flatten(1), y.flatten(1) @ torch.linalg.pinv(dense(operator)).T,
                          atol=1e-6)


def test_each_image_of_a_batch_can_have_its_own_permutation():
    phi = random_sampling_matrix(0.3, 4, torch.Generator().manual_seed(0)).double()
    permutations = torch.stack([torch.randperm(96, generator=torch.Generator().manual_seed(seed)) for seed in range(3)])
    operator = BlockCompressedSensing(phi, permutations, (8, 12))
    alone = [BlockCompressedSensing(phi, permutation, (8, 12)) for permutation in permutations]
    x = torch.randn(3, 1, 8, 12, dtype=torch.float64, requires_grad=True)
    y = operator.A(x)
    adjoint = operator.A_adjoint(y)
    for i, single in enumerate(alone):
        matrix = dense(single)
        assert torch.allclose(y[i].flatten(), matrix @ x[i].flatten(), atol=1e-12)
        assert torch.allclose(adjoint[i].flatten(), matrix.T @ matrix @ x[i].flatten(), atol=1e-12)
        assert torch.equal(y[i], single.A(x[i:i + 1])[0])  # the same numbers, to the last bit
    assert not torch.allclose(y[1].flatten(), dense(alone[0]) @ x[1].flatten())
    assert torch.autograd.gradcheck(operator.A, x)
    assert torch.autograd.gradcheck(operator.A_adjoint, torch.randn_like(y, requires_grad=True))


def test_gradients_are_the_adjoint():
    operator = make()
    x = torch.randn(1, 1, 8, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(operator.A, x)
    assert torch.autograd.gradcheck(operator.A_adjoint, torch.randn(1, 6, 5, dtype=torch.float64, requires_grad=True))


def test_keeps_fp32_under_autocast():
    operator = make(dtype=torch.float32)
    x = torch.rand(1, 1, 8, 12)
    with torch.autocast("cpu", torch.bfloat16):
        y = operator.A(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, operator.A(x))


def test_sampling_matrix():
    phi = random_sampling_matrix(0.25, 8, torch.Generator().manual_seed(3))
    gaussian = torch.randn(64, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    # U Vᵀ of the singular value decomposition is the orthogonal factor of the polar decomposition, G (GᵀG)^(-1/2).
    values, vectors = torch.linalg.eigh(gaussian.T @ gaussian)
    polar = gaussian @ vectors @ torch.diag(values**-0.5) @ vectors.T
    assert phi.shape == (64, 16)
    assert phi.dtype == torch.float32
    assert torch.allclose(phi, polar[:, :16].float(), atol=1e-6)
    larger = random_sampling_matrix(0.5, 8, torch.Generator().manual_seed(3))
    assert torch.equal(larger[:, :16], phi)


@pytest.mark.parametrize(("ratio", "block", "columns"), [(0.1, 32, 103), (0.3, 16, 77), (1, 4, 16), (0.07, 10, 7),
                                                         (0.01, 4, 1), (1e-12, 4, 1)])
def test_number_of_measurements(ratio, block, columns):
    assert random_sampling_matrix(ratio, block, torch.Generator()).shape == (block**2, columns)


def test_one_seed_one_operator():
    a, b, other = make(seed=5), make(seed=5), make(seed=6)
    assert torch.equal(a.sampling_matrix, b.sampling_matrix)
    assert torch.equal(a.permutation, b.permutation)
    assert not torch.equal(a.permutation, other.permutation)


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, float("nan")])
def test_impossible_ratio(ratio):
    with pytest.raises(ValueError, match="cs_ratio must lie in"):
        random_sampling_matrix(ratio, 4, torch.Generator())


def test_shapes_that_do_not_fit():
    phi, operator = torch.eye(16)[:, :4], make()
    with pytest.raises(ValueError, match="5x5 image cannot be cut into rows of 16"):
        BlockCompressedSensing(phi, torch.arange(25), (5, 5))
    with pytest.raises(ValueError, match="permutation must be .64,. or"):
        BlockCompressedSensing(phi, torch.arange(63), (8, 8))
    for shape in ((2, 63), (1, 2, 64), ()):
        with pytest.raises(ValueError, match="permutation must be .64,. or"):
            BlockCompressedSensing(phi, torch.zeros(shape, dtype=torch.int64), (8, 8))
    with pytest.raises(ValueError, match="int64, not .64,. and torch.float32"):
        BlockCompressedSensing(phi, torch.arange(64.0), (8, 8))
    for matrix in (torch.zeros(16, 0), torch.zeros(16, 17), torch.zeros(16), torch.zeros(())):
        with pytest.raises(ValueError, match="sampling matrix must be"):
            BlockCompressedSensing(matrix, torch.arange(64), (8, 8))
    with pytest.raises(ValueError, match="-8x-8 image"):
        BlockCompressedSensing(phi, torch.arange(64), (-8, -8))
    own = BlockCompressedSensing(phi, torch.arange(64).repeat(3, 1), (8, 8))
    for call in (lambda: own.A(torch.zeros(2, 1, 8, 8)), lambda: own.A_adjoint(torch.zeros(1, 4, 4))):
        with pytest.raises(ValueError, match="has permutations for 3 images, not [12]"):
            call()
    with pytest.raises(ValueError, match="measures .* images"):
        operator.A(torch.zeros(1, 1, 12, 8))
    with pytest.raises(ValueError, match="measurements are"):
        operator.A_adjoint(torch.zeros(1, 6, 6))


def test_learned_sampling_matrix_stays_a_parameter():
    phi = torch.nn.Parameter(torch.eye(16)[:, :4])
    operator = BlockCompressedSensing(phi, torch.arange(64), (8, 8))
    assert list(operator.parameters()) == [phi]
    assert operator.to(torch.float64).sampling_matrix.dtype == torch.float64


def test_other_libraries_can_differentiate_it():
    """By torch.func's transforms, as deepinv does; the operator is linear, so its derivative is itself."""
    operator, x = make(), torch.randn(3, 2, 1, 8, 12, dtype=torch.float64)
    operator = operator.double()
    y, pull_back = torch.func.vjp(operator.A, x[0])
    assert torch.equal(y, operator.A(x[0]))
    torch.testing.assert_close(pull_back(y)[0], operator.A_adjoint(y))
    torch.testing.assert_close(torch.func.jvp(operator.A, (x[0],), (x[1],))[1], operator.A(x[1]))
    torch.testing.assert_close(torch.func.vmap(operator.A)(x), torch.stack([operator.A(one) for one in x]))


def test_a_batch_may_be_empty():
    operator = make()
    y = operator.A(torch.zeros(0, 1, 8, 12))
    assert len(y) == 0 and operator.A_adjoint(y).shape == (0, 1, 8, 12)


@pytest.mark.parametrize("kind", ["cs", "matrix"])
def test_numbers_loaded_into_an_operator_decide_anew_whether_it_is_tight(kind):
    generator = torch.Generator().manual_seed(0)
    other = torch.randn(16, 6, generator=generator)
    orthonormal = torch.linalg.qr(other).Q
    permutation = torch.randperm(64, generator=generator)

    def operator(phi: torch.Tensor):
        phi = phi.clone()  # loading writes into it
        return (BlockCompressedSensing(phi, permutation, (8, 8)) if kind == "cs" else
                MatrixSensing(phi.T, (8, 8), permutation))

    now, wanted = operator(orthonormal), operator(other)
    assert now.tight and not wanted.tight
    now.load_state_dict(wanted.state_dict())
    assert not now.tight
    y = now.A(torch.rand(1, 1, 8, 8, generator=generator))
    blocks = (y.reshape(4, 6).double() @ torch.linalg.pinv(other.double())).reshape(-1)  # z with Φᵀz = y, of least norm
    image = torch.empty(64, dtype=torch.float64)
    image[permutation] = blocks
    torch.testing.assert_close(now.A_dagger(y).flatten().double(), image, rtol=1e-4, atol=1e-4)
    now.load_state_dict(operator(orthonormal).state_dict())
    assert now.tight
