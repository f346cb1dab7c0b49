"""Attention against diffusers' own transformer, and within windows against a dense matrix with all else masked."""
import pytest
import torch
from diffusers import Transformer2DModel
from torch import Tensor

from model import IDM
from model.attention import Transformer
from tests.model.test_settings import assert_gradients_are_plain_autograds, measured, network


@pytest.fixture
def transformer() -> Transformer:
    torch.manual_seed(0)
    made = Transformer(16, heads=2, norm_groups=4).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def features(height: int, width: int) -> Tensor:
    return torch.randn(2, 16, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def dense(transformer: Transformer, x: Tensor, side: int) -> Tensor:
    """The transformer with all tokens' weights in one matrix, those of two windows set to 0."""
    _, channels, height, width = x.shape
    rows, columns = torch.arange(height) // side, torch.arange(width) // side
    window = (1000 * rows[:, None] + columns).flatten()
    tokens = transformer.proj_in(transformer.norm(x)).flatten(2).transpose(1, 2)
    (block,) = transformer.transformer_blocks
    attention, normed = block.attn1, block.norm1(tokens)
    heads = []
    for head in range(2):
        of_head = slice(8 * head, 8 * head + 8)
        q, k, v = (normed @ to.weight[of_head].T for to in (attention.to_q, attention.to_k, attention.to_v))
        scores = (q @ k.transpose(1, 2) / 8**0.5).masked_fill(window[:, None] != window, -torch.inf)
        heads.append(scores.softmax(-1) @ v)
    tokens = tokens + attention.to_out[0](torch.cat(heads, dim=-1))
    tokens = tokens + block.ff(block.norm3(tokens))
    return x + transformer.proj_out(tokens.transpose(1, 2).view(-1, channels, height, width))


def test_without_windows_it_is_diffusers_transformer(transformer):
    theirs = Transformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=16, norm_num_groups=4,
                                activation_fn="geglu").double()
    theirs.load_state_dict(transformer.state_dict())
    for x in (features(6, 10), features(1, 1)):
        assert torch.allclose(transformer(x), theirs(x, return_dict=False)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("height", "width", "side"), [
    (8, 8, 4), (8, 12, 4),  # windows that divide the features
    (6, 10, 4), (5, 4, 4), (4, 7, 3), (3, 9, 5), (7, 7, 6), (2, 2, 1)])
def test_windows_are_a_masked_dense_computation(transformer, height, width, side):
    transformer.window, x = side, features(height, width)
    with torch.no_grad():
        assert torch.allclose(transformer(x), dense(transformer, x, side), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("side", [10, 11, 1000])
def test_one_window_that_holds_all_is_attention_of_all(transformer, side):
    x = features(6, 10)
    full = transformer(x)
    transformer.window = side
    assert torch.equal(transformer(x), full)


@pytest.mark.parametrize("window", [2, (3, None), (5, 3)], ids=str)
def test_gradients_with_windows(window):
    """8×8 and 4×4 tokens, so that some windows are padded."""
    assert_gradients_are_plain_autograds(network(attention_window=window), batch=2)


def test_windows_of_a_network_can_be_changed(tmp_path):
    net, (operator, y) = network(), measured()
    with torch.no_grad():
        full, made_with = net(y, operator), network(attention_window=(2, 3))(y, operator)
        net.attention_window = (2, 3)
        assert torch.equal(net(y, operator), made_with) and not torch.allclose(full, made_with)
        net.save_pretrained(tmp_path)
        assert IDM.from_checkpoint(tmp_path).attention_window == (2, 3)
        net.attention_window = None
        assert torch.equal(net(y, operator), full)
    with pytest.raises(ValueError, match="attention_window must be None or at least 1"):
        net.attention_window = (4, 0)
