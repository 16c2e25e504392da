"""`torch.compile` sees each attention and a whole network as one graph, and computes what they compute without it."""

import pytest
import torch

from vca import ATTENTIONS, Transformer

FORMS = [*({"name": name} for name in ATTENTIONS), {"name": "vca", "softmax": "separate", "qk_norm": True}]


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()


def with_gradients(function, module, *inputs):
    """Output, and the gradients of the parameters and of the first input for one fixed gradient of the output."""
    first = inputs[0].clone().requires_grad_()
    output = function(first, *inputs[1:])
    weight = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
    return output, *torch.autograd.grad(output, [first, *module.parameters()], weight)


def assert_equal(compiled, plain):
    """To 1e-5 of the largest value: the same operations in float32, of which sums may run in another order."""
    for a, b in zip(compiled, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * max(1.0, b.abs().max().item()))


def build_attention(form, grid):
    options = {key: value for key, value in form.items() if key != "name"}
    return ATTENTIONS[form["name"]](16, 2, grid, layer_index=1, **options)


def name_of(form):
    return "-".join(map(str, form.values()))


@pytest.mark.parametrize("form", FORMS, ids=name_of)
def test_an_attention_is_one_graph(form):
    """With static shapes, forward and backward; another grid is another layer."""
    for grid, backend in {(4, 4): "eager", (5, 6): "aot_eager"}.items():
        module, x = build_attention(form, grid), torch.randn(2, grid[0] * grid[1], 16)
        compiled = torch.compile(module, fullgraph=True, dynamic=False, backend=backend)
        assert_equal(with_gradients(compiled, module, x), with_gradients(module, module, x))


@pytest.mark.parametrize("form", FORMS, ids=name_of)
def test_an_attention_is_one_graph_for_batches_of_any_size(form):
    module, graphs = build_attention(form, (4, 6)), torch._dynamo.utils.counters["stats"]
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="eager")
    before = graphs["unique_graphs"]
    for batch in (2, 3, 7):
        x = torch.randn(batch, 24, 16)
        assert_equal(with_gradients(compiled, module, x), with_gradients(module, module, x))
    assert graphs["unique_graphs"] - before == 1


@pytest.mark.parametrize("name", ["mhsa", "vca"])
def test_a_network_is_one_graph_for_batches_of_any_size(name):
    """As it trains, so labels are dropped at random."""
    sizes = {"input_size": (8, 12), "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 10}
    network = Transformer(**sizes, attention=name)
    for parameter in network.parameters():  # as it begins, its output is 0
        torch.nn.init.normal_(parameter, std=0.1)
    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend="eager")
    for batch in (2, 5):
        inputs = torch.randn(batch, 4, 8, 12), torch.rand(batch), torch.arange(batch)
        results = []
        for function in (compiled, network):
            torch.manual_seed(batch)
            results.append(with_gradients(function, network, *inputs))
        assert_equal(*results)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_compiled_blocks_share_their_graphs(name):
    """Depth costs no further compilation, though lambda_init differs from block to block: torch gives up after eight."""
    network = Transformer(input_size=8, hidden_size=16, depth=9, num_heads=2, num_classes=10, attention=name)
    for block in network.blocks:
        block.compile(backend="eager", fullgraph=True)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    network(torch.randn(2, 4, 8, 8), torch.rand(2), torch.arange(2))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before <= 2
