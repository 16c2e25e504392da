"""The maps of the layer against their formula, written as loops, and the layer's output from its maps."""

import itertools
import math

import pytest
import torch
from torch import nn

from vca import (
    ATTENTIONS,
    AgentAttention,
    Transformer,
    VisualContrastAttention,
    contrast_layers,
    keep_inputs,
    maps_of,
    streams_of,
)

GRID, CONTRAST_GRID, DIM, HEADS = (3, 4), (2, 3), 8, 2  # neither 2 divides 3 nor 3 divides 4
STAGES = list(itertools.product(["differential", "plain"], repeat=2))
STREAMS = [("pool+embed", "pool+embed"), ("pool", "embed"), ("embed", "pool"), ("pool", "pool+embed")]


def make(prefix=1, kind=VisualContrastAttention, **options):
    """A layer in float64 whose parameters are all away from their start, and an input."""
    options = {"layer_index": 2, "contrast_grid": CONTRAST_GRID, "num_prefix_tokens": prefix, **options}
    layer = kind(DIM, HEADS, GRID, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return layer, torch.randn(2, prefix + 12, DIM, dtype=torch.float64)


def softmax(logits):
    weights = [math.exp(z) for z in logits]
    return [w / sum(weights) for w in weights]


def dots(q, keys):
    return [float(q @ k) / math.sqrt(len(q)) for k in keys]


def loop_maps(layer, x, prefix):
    """Stage I of t+ and t-, A+ and A- of every image and head, a token at a time."""
    state = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    width, n = DIM // HEADS, math.prod(CONTRAST_GRID)
    found = {"stage1_positive": [], "stage1_negative": [], "stage2_positive": [], "stage2_negative": []}

    def norm(z, name):
        weight = state.get(f"{name}.weight")
        return z if weight is None else weight * z / torch.sqrt((z**2).mean() + 1e-6)

    for tokens, head in itertools.product(x, range(HEADS)):
        s = slice(head * width, (head + 1) * width)
        qkv = [state["qkv.weight"] @ token + state["qkv.bias"] for token in tokens]
        q = [norm(z[:DIM][s], "q_norm") for z in qkv]
        k = [norm(z[DIM : 2 * DIM][s], "k_norm") for z in qkv]
        positive, negative = [], []
        for i, j in itertools.product(*map(range, CONTRAST_GRID)):
            rows = range(i * 3 // 2, -(-(i + 1) * 3 // 2))
            columns = range(j * 4 // 3, -(-(j + 1) * 4 // 3))
            cell = [q[prefix + 4 * r + c] for r in rows for c in columns]
            pooled, index = sum(cell) / len(cell), 3 * i + j
            for stream, kind, name in ((positive, layer.positive, "positive"), (negative, layer.negative, "negative")):
                embed = state[f"{name}_embed"][0, index, s] if f"{name}_embed" in state else 0 * pooled
                stream.append((pooled if "pool" in kind else 0) + (embed if "embed" in kind else 0))
        found["stage1_positive"].append([softmax(dots(t, k)) for t in positive])
        found["stage1_negative"].append([softmax(dots(t, k)) for t in negative])
        if layer.stage2 and layer.softmax == "joint":
            both = [softmax(dots(token, positive) + dots(token, negative)) for token in q]
        else:
            both = [softmax(dots(token, positive)) + softmax(dots(token, negative)) for token in q]
        found["stage2_positive"].append([row[:n] for row in both])
        found["stage2_negative"].append([row[n:] for row in both])
    return {name: torch.tensor(rows, dtype=torch.float64).unflatten(0, (len(x), HEADS)) for name, rows in found.items()}


@pytest.mark.parametrize("softmax", ["joint", "separate"])
@pytest.mark.parametrize(("positive", "negative"), STREAMS)
@pytest.mark.parametrize("stages", STAGES, ids="-".join)
@pytest.mark.parametrize(("prefix", "qk_norm"), [(0, False), (2, True)])
def test_maps_equal_their_formula_and_give_the_output(prefix, qk_norm, stages, positive, negative, softmax):
    options = {"stages": stages, "positive": positive, "negative": negative, "softmax": softmax, "qk_norm": qk_norm}
    layer, x = make(prefix, **options)
    maps, expected = maps_of(layer, x), loop_maps(layer, x, prefix)
    assert (maps.grid_size, maps.contrast_grid) == (GRID, CONTRAST_GRID)

    for i, stage in enumerate(stages, start=1):
        signs = ["positive", "negative"] if stage == "differential" else ["positive"]
        shape = (2, 2, 6, prefix + 12) if i == 1 else (2, 2, prefix + 12, 6)
        for sign in signs:
            found = getattr(maps, f"stage{i}_{sign}")
            assert found.shape == shape
            torch.testing.assert_close(
                found, expected[f"stage{i}_{sign}"], rtol=0, atol=1e-12
            )  # sums of some 20 numbers
        if stage == "plain":
            assert getattr(maps, f"stage{i}_negative") is None
            assert getattr(maps, f"lambda{i}") is None
            assert getattr(maps, f"stage{i}") is getattr(maps, f"stage{i}_positive")

    def assert_one(sums):
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-12)

    for one in (maps.stage1_positive, maps.stage1_negative):
        if one is not None:
            assert_one(one.sum(-1))
    if stages[1] == "plain" or softmax == "separate":
        assert_one(maps.stage2_positive.sum(-1))
    if stages[1] == "differential" and softmax == "separate":
        assert_one(maps.stage2_negative.sum(-1))
    if stages[1] == "differential" and softmax == "joint":
        assert_one((maps.stage2_positive + maps.stage2_negative).sum(-1))

    # 1e-10: the layer adds in another order, in float64
    v = layer.heads(x)[2]
    gathered = maps.stage1 @ v  # (B, h, n, d)
    contrast = layer.stage1.normalise(gathered) if layer.stage1 else gathered
    out = maps.stage2 @ contrast  # (B, h, P+N, d)
    out = layer.stage2.normalise(out) if layer.stage2 else out
    out = layer.proj(out.transpose(1, 2).flatten(2) + layer.dwc(v, GRID))
    torch.testing.assert_close(out, layer(x), rtol=0, atol=1e-10)

    gain = (1 - layer.stage1.lambda_init) * layer.stage1.norm.weight if layer.stage1 else 1
    for query in (0, prefix + 5):  # of a prefix token, too
        reached = (maps.reach(query)[:, :, None] @ v).squeeze(2)  # (B, h, d)
        torch.testing.assert_close(gain * reached, (maps.stage2 @ contrast)[:, :, query], rtol=0, atol=1e-10)


def test_lambdas_and_streams_are_those_of_the_weights():
    layer, x = make(softmax="separate")
    maps, streams = maps_of(layer.requires_grad_(False), x), streams_of(layer)
    for number in (1, 2):
        state = {name: p.detach() for name, p in getattr(layer, f"stage{number}").named_parameters()}
        first, second = (state[f"lambda_q{i}"] @ state[f"lambda_k{i}"] for i in (1, 2))
        expected = math.exp(first) - math.exp(second) + 0.8 - 0.6 * math.exp(-0.6)
        assert float(getattr(maps, f"lambda{number}")) == pytest.approx(expected, rel=1e-12)
        assert getattr(streams, f"lambda{number}") == pytest.approx(expected, rel=1e-5)  # in float32

    with torch.no_grad():
        layer.positive_embed.fill_(3)
        layer.negative_embed.copy_(torch.tensor([1.0, -1, -1, -1] * 12).reshape(1, 6, 8))
    streams = streams_of(layer)
    assert (streams.positive, streams.negative, streams.cosine) == pytest.approx((3, 1, -0.5))

    agent, x = make(kind=AgentAttention)
    assert set(vars(streams_of(agent)).values()) == {None}
    assert maps_of(agent, x).stage1_norm.unique() == 1
    half = streams_of(make(positive="pool")[0])
    assert (half.positive, half.cosine) == (None, None)
    assert half.negative > 0


def test_the_hook_keeps_the_last_input_changes_nothing_and_is_gone_afterwards():
    model = Transformer(input_size=8, hidden_size=16, depth=3, num_heads=2, num_classes=3).eval()
    for parameter in model.parameters():  # or the output of an untrained model is zero
        nn.init.normal_(parameter, std=0.2)
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 2])
    layers = contrast_layers(model)
    assert list(layers) == ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]
    before = model(x, t, y)
    chosen = {2: layers["blocks.2.attn"]}
    with keep_inputs(chosen) as inputs:
        model(2 * x, t, y)
        within = model(x, t, y)
        assert [bool(layer._forward_pre_hooks) for layer in layers.values()] == [False, False, True]
    assert torch.equal(before, within)
    assert inputs[2].shape == (2, 16, 16)
    assert not inputs[2].requires_grad

    seen = []
    handle = chosen[2].register_forward_hook(lambda layer, args, out: seen.append((args[0], out)))
    model(x, t, y)
    handle.remove()
    assert torch.equal(inputs[2], seen[0][0])
    assert torch.equal(chosen[2](inputs[2]), seen[0][1])

    with pytest.raises(RuntimeError, match="stop"), keep_inputs(layers):
        raise RuntimeError("stop")
    with keep_inputs({"one": chosen[2]}) as inputs:
        chosen[2](x=torch.ones(1, 16, 16))
    assert inputs["one"].shape == (1, 16, 16)
    assert not any(layer._forward_pre_hooks for layer in layers.values())


def test_maps_are_float32_at_least_whatever_autocast_does():
    layer, x = make()
    exact = maps_of(layer, x)
    layer.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = maps_of(layer, x.float())
    assert maps.stage1_positive.dtype == maps.stage2_negative.dtype == maps.reach(3).dtype == torch.float32
    # float32 has 24 bits, and logits of some 10 are exact to 1e-6; bf16 would be wrong by 1e-2
    torch.testing.assert_close(maps.stage2.double(), exact.stage2, rtol=0, atol=1e-5)
    assert maps_of(layer.bfloat16(), x.float()).stage2.dtype == torch.float32


@pytest.mark.parametrize("name", sorted(set(ATTENTIONS) - {"vca", "agent"}))
def test_a_model_without_contrast_tokens_is_refused(name):
    model = Transformer(input_size=4, hidden_size=8, depth=1, num_heads=1, attention=name)
    kind = ATTENTIONS[name].__name__
    with pytest.raises(ValueError, match=f"Transformer has no contrast tokens: its attention is {kind}; choose .* vca"):
        contrast_layers(model)
    with pytest.raises(ValueError, match="Linear has no contrast tokens: its attention is of another kind"):
        contrast_layers(nn.Linear(1, 1))
