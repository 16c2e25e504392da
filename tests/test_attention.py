"""Visual-Contrast Attention and its controls against their formulas, written as loops over batch, heads and tokens."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from vca import (
    ATTENTIONS,
    Differential,
    DifferentialAttention,
    SelfAttention,
    VisualContrastAttention,
    build,
    lambda_init,
)

STAGES = [list(s) for s in itertools.product(["differential", "plain"], repeat=2)]
STREAMS = ["pool", "embed", "pool+embed"]


def perturb(module):
    """Every parameter moved away from its initial value, in float64, so that none is an inert zero or one."""
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return module


def numpy_state(module):
    return {name: value.detach().numpy() for name, value in module.state_dict().items()}


def loop_attend(queries, keys, values, scale):
    """softmax(scale q k^T) v, one query and one key at a time: (n, d), (m, d), (m, e) -> (n, e)."""
    rows = []
    for q in queries:
        scores = [scale * float(q @ k) for k in keys]
        top = max(scores)
        weights = [math.exp(s - top) for s in scores]
        rows.append(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
    return np.stack(rows)


def loop_pool(image, grid):
    """Adaptive average: cell (i, j) covers rows floor(i H / a) ... ceil((i+1) H / a) - 1, the columns alike."""
    height, width, _ = image.shape
    cells = []
    for i, j in itertools.product(range(grid[0]), range(grid[1])):
        rows = range(i * height // grid[0], -(-(i + 1) * height // grid[0]))
        columns = range(j * width // grid[1], -(-(j + 1) * width // grid[1]))
        cells.append(sum(image[r, c] for r in rows for c in columns) / (len(rows) * len(columns)))
    return np.stack(cells)


def loop_conv(image, weight, bias):
    """Depth-wise 3x3 convolution with zeros around: (H, W, C), (C, 1, 3, 3), (C,) -> (H, W, C)."""
    height, width, _ = image.shape
    out = np.tile(bias, (height, width, 1))
    for r, c, i, j in itertools.product(range(height), range(width), range(3), range(3)):
        if 0 <= r + i - 1 < height and 0 <= c + j - 1 < width:
            out[r, c] += weight[:, 0, i, j] * image[r + i - 1, c + j - 1]
    return out


def loop_differential(positive, negative, state, stage, layer_index):
    """(1 - lambda_init) RMSNorm(positive - lambda negative), a row at a time."""
    q1, k1, q2, k2 = (state[f"{stage}.lambda_{name}"] for name in ("q1", "k1", "q2", "k2"))
    start = 0.8 - 0.6 * math.exp(-0.3 * layer_index)
    lam = math.exp(q1 @ k1) - math.exp(q2 @ k2) + start
    rows = []
    for p, n in zip(positive, negative, strict=True):
        row = p - lam * n
        rows.append((1 - start) * row / math.sqrt(sum(row**2) / len(row) + 1e-5) * state[f"{stage}.norm.weight"])
    return np.stack(rows)


def loop_norm(rows, state, name):
    """gain row / sqrt(mean row^2 + 1e-6), where the layer has such a norm."""
    if f"{name}.weight" not in state:
        return rows
    return np.stack([state[f"{name}.weight"] * row / math.sqrt(sum(row**2) / len(row) + 1e-6) for row in rows])


def loop_layer(module, x, grid, prefix, head):
    """The frame of all three layers: split into heads, `head(q, k, v, index of the head)`, convolution, projection."""
    state, h = numpy_state(module), module.num_heads
    out = []
    for tokens in x.numpy():
        dim = tokens.shape[1]
        qkv = np.stack([state["qkv.weight"] @ token + state.get("qkv.bias", 0) for token in tokens])
        q, k, v = qkv[:, :dim], qkv[:, dim : 2 * dim], qkv[:, 2 * dim :]
        width = dim // h
        heads = [slice(i * width, (i + 1) * width) for i in range(h)]
        parts = [(loop_norm(q[:, s], state, "q_norm"), loop_norm(k[:, s], state, "k_norm"), v[:, s]) for s in heads]
        o = np.concatenate([head(*part, i) for i, part in enumerate(parts)], axis=1)
        if "dwc.weight" in state:
            image = loop_conv(v[prefix:].reshape(*grid, dim), state["dwc.weight"], state["dwc.bias"])
            o[prefix:] += image.reshape(-1, dim)
        out.append(np.stack([state["proj.weight"] @ token + state["proj.bias"] for token in o]))
    return torch.from_numpy(np.stack(out))


def loop_vca(module, x, grid, contrast_grid, prefix, layer_index, stages, positive, negative):
    state = numpy_state(module)

    def stream(kind, pooled, name, i):
        width = pooled.shape[1]
        if kind == "pool":
            return pooled
        embed = state[name][0][:, i * width : (i + 1) * width]
        return embed if kind == "embed" else pooled + embed

    def head(q, k, v, i):
        scale = 1 / math.sqrt(q.shape[1])
        pooled = loop_pool(q[prefix:].reshape(*grid, -1), contrast_grid)
        t_plus = stream(positive, pooled, "positive_embed", i)
        t_minus = stream(negative, pooled, "negative_embed", i) if "differential" in stages else None
        contrast = loop_attend(t_plus, k, v, scale)
        if stages[0] == "differential":
            contrast = loop_differential(contrast, loop_attend(t_minus, k, v, scale), state, "stage1", layer_index)
        out = loop_attend(q, t_plus, contrast, scale)
        if stages[1] == "differential":
            out = loop_differential(out, loop_attend(q, t_minus, contrast, scale), state, "stage2", layer_index)
        return out

    return loop_layer(module, x, grid, prefix, head)


@pytest.mark.parametrize("negative", STREAMS)
@pytest.mark.parametrize("positive", STREAMS)
@pytest.mark.parametrize("stages", STAGES, ids="-".join)
def test_vca_equals_its_formulas_for_every_ablation(stages, positive, negative):
    grid, contrast_grid, prefix = (5, 4), (3, 3), 2  # 3 divides neither side of the grid
    options = {"stages": stages, "positive": positive, "negative": negative}
    module = perturb(
        VisualContrastAttention(
            12, 2, grid, layer_index=2, contrast_grid=contrast_grid, num_prefix_tokens=prefix, **options
        )
    )
    x = torch.randn(2, prefix + 20, 12, dtype=torch.float64)
    expected = loop_vca(module, x, grid, contrast_grid, prefix, 2, **options)
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("grid", "contrast_grid", "expected_grid"),
    [((4, 6), None, (2, 3)), ((3, 5), None, (1, 2)), ((1, 7), None, (1, 3)), ((3, 2), [3, 2], (3, 2))],
)
@pytest.mark.parametrize(
    ("prefix", "qkv_bias", "dwc", "layer_index", "qk_norm"), [(0, True, True, 0, False), (1, False, False, 11, True)]
)
def test_vca_equals_its_formulas_for_every_geometry(
    grid, contrast_grid, expected_grid, prefix, qkv_bias, dwc, layer_index, qk_norm
):
    module = perturb(
        VisualContrastAttention(
            12,
            3,
            grid,
            layer_index=layer_index,
            contrast_grid=contrast_grid,
            num_prefix_tokens=prefix,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            dwc=dwc,
        )
    )
    x = torch.randn(2, prefix + grid[0] * grid[1], 12, dtype=torch.float64)
    streams = {"stages": ["differential"] * 2, "positive": "pool+embed", "negative": "pool+embed"}
    expected = loop_vca(module, x, grid, expected_grid, prefix, layer_index, **streams)
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(("prefix", "dwc", "qkv_bias"), [(0, False, True), (0, True, False), (2, True, True)])
def test_self_attention_equals_its_formula(prefix, dwc, qkv_bias, qk_norm):
    module = perturb(SelfAttention(12, 3, (3, 5), layer_index=4, dwc=dwc, qkv_bias=qkv_bias, qk_norm=qk_norm))
    x = torch.randn(2, prefix + 15, 12, dtype=torch.float64)

    def head(q, k, v, i):
        return loop_attend(q, k, v, 1 / math.sqrt(4))

    torch.testing.assert_close(module(x), loop_layer(module, x, (3, 5), prefix, head), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("prefix", "dwc", "qkv_bias"), [(0, False, True), (0, True, False), (2, True, True)])
def test_differential_attention_equals_its_formula(prefix, dwc, qkv_bias):
    module = perturb(DifferentialAttention(12, 2, (3, 5), layer_index=4, dwc=dwc, qkv_bias=qkv_bias))
    x = torch.randn(2, prefix + 15, 12, dtype=torch.float64)

    def head(q, k, v, i):
        streams = [loop_attend(q[:, s], k[:, s], v, 1 / math.sqrt(3)) for s in (slice(0, 3), slice(3, 6))]
        return loop_differential(*streams, numpy_state(module), "differential", 4)

    torch.testing.assert_close(module(x), loop_layer(module, x, (3, 5), prefix, head), rtol=0, atol=1e-10)


def test_lambda_init_starts_at_one_fifth_and_tends_to_four_fifths():
    assert lambda_init(0) == pytest.approx(0.2, abs=1e-15)
    assert lambda_init(1) == pytest.approx(0.8 - 0.6 / math.exp(0.3), abs=1e-15)
    assert lambda_init(100) == pytest.approx(0.8, abs=1e-12)


def test_vca_state_dict_keys_and_shapes_are_the_published_ones():
    module = VisualContrastAttention(12, 3, (4, 4), layer_index=0, contrast_grid=(2, 3))
    expected = {
        "qkv.weight": (36, 12),
        "qkv.bias": (36,),
        "proj.weight": (12, 12),
        "proj.bias": (12,),
        "positive_embed": (1, 6, 12),
        "negative_embed": (1, 6, 12),
        "dwc.weight": (12, 1, 3, 3),
        "dwc.bias": (12,),
    }
    for stage in ("stage1", "stage2"):
        expected |= {f"{stage}.lambda_{name}": (4,) for name in ("q1", "k1", "q2", "k2")}
        expected |= {f"{stage}.norm.weight": (4,)}
    assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == expected


@pytest.mark.parametrize(
    ("dim", "depth", "num_heads", "grid", "added"),
    [(256, 8, 8, 16, 285_184), (192, 12, 3, 14, 256_512), (384, 12, 6, 16, 643_584)],
)
def test_parameters_added_to_full_attention(dim, depth, num_heads, grid, added):
    def count(name):
        with torch.device("meta"):
            layers = [ATTENTIONS[name](dim, num_heads, (grid, grid), layer_index=i) for i in range(depth)]
        return sum(p.numel() for layer in layers for p in layer.parameters())

    assert count("vca") - count("mhsa") == added


def test_differential_attention_adds_four_vectors_of_half_a_head_and_a_gain():
    module, control = (ATTENTIONS[name](12, 2, (4, 4), layer_index=0) for name in ("differential", "mhsa"))
    added = {name: tuple(p.shape) for name, p in module.named_parameters() if name not in control.state_dict()}
    expected = {f"differential.lambda_{name}": (3,) for name in ("q1", "k1", "q2", "k2")}
    assert added == {**expected, "differential.norm.weight": (6,)}


def test_initial_values_are_those_of_the_specification():
    module = VisualContrastAttention(64, 1, (32, 32), layer_index=0)
    embeds = torch.cat([module.positive_embed, module.negative_embed])
    lambdas = torch.cat([p for name, p in module.named_parameters() if "lambda" in name])
    assert embeds.std().item() == pytest.approx(0.02, rel=0.05)
    assert lambdas.std().item() == pytest.approx(0.1, rel=0.15)
    assert (module.stage1.norm.weight == 1).all()
    assert (module.stage2.norm.weight == 1).all()
    assert not torch.equal(module.positive_embed, module.negative_embed)


ABLATIONS = (
    [(name, {}) for name in ATTENTIONS]
    + [(name, {"dwc": dwc}) for name in ATTENTIONS for dwc in (False, True)]
    + [(name, {"qk_norm": True}) for name in ("vca", "mhsa")]
    + [
        ("vca", {"stages": stages, "positive": positive, "negative": negative})
        for stages, positive, negative in itertools.product(STAGES, STREAMS, STREAMS)
    ]
)


@pytest.mark.parametrize(("name", "options"), ABLATIONS, ids=str)
def test_gradients_reach_every_parameter_and_every_token(name, options):
    module = ATTENTIONS[name](16, 2, (4, 3), layer_index=1, **options)
    x = torch.randn(2, 12, 16, requires_grad=True)
    (module(x) * torch.randn(2, 12, 16)).sum().backward()
    gradients = {key: parameter.grad for key, parameter in module.named_parameters()}
    q, k, v = gradients["qkv.weight"].chunk(3)
    for key, gradient in {**gradients, "x": x.grad, "q": q, "k": k, "v": v}.items():
        assert gradient is not None, key
        assert gradient.isfinite().all(), key
        assert gradient.abs().max() > 1e-8, key
    assert (x.grad.abs().amax(-1) > 0).all()
    for key in ("positive_embed", "negative_embed"):
        assert key not in gradients or (gradients[key].abs().amax(-1) > 0).all(), "a contrast token has no gradient"


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns, in the forward and the backward pass."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


class NaiveAttention(nn.Module):
    """Softmax attention with its map in memory."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2)


SIDE, NUM_TOKENS, NUM_CONTRAST, HEADS = 32, 1024, 256, 2


def largest_tensor(module):
    x = torch.randn(1, NUM_TOKENS, 8, requires_grad=True)
    with LargestTensor() as record:
        module(x).sum().backward()
    return record.numel


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {"dwc": dwc}) for name in ATTENTIONS for dwc in (False, True)]
    + [("vca", {"positive": positive, "negative": "pool"}) for positive in STREAMS]
    + [("vca", {"stages": stages, "positive": "pool"}) for stages in STAGES],
    ids=str,
)
def test_no_attention_map_is_ever_in_memory(name, options):
    module = ATTENTIONS[name](8, HEADS, (SIDE, SIDE), layer_index=0, **options)
    largest = largest_tensor(module)
    assert largest >= 3 * NUM_TOKENS * 8, "the record misses even the queries, keys and values"
    assert largest < NUM_TOKENS * NUM_CONTRAST, "as large as one head's N x n map"


@pytest.mark.parametrize("name", ATTENTIONS)
def test_the_record_of_tensors_sees_the_map_of_the_plain_kernel(name):
    module = ATTENTIONS[name](8, HEADS, (SIDE, SIDE), layer_index=0)
    with sdpa_kernel(SDPBackend.MATH):
        assert largest_tensor(module) >= HEADS * NUM_TOKENS * NUM_CONTRAST


def test_the_record_of_tensors_sees_the_map_of_naive_attention():
    assert largest_tensor(NaiveAttention(8, HEADS)) == HEADS * NUM_TOKENS**2


def attention_multiply_adds(module, num_tokens, dim):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(torch.randn(1, num_tokens, dim))
    return counter.get_flop_counts()["Global"][torch.ops.aten.bmm] // 2


def test_default_contrast_grid_costs_what_full_attention_costs():
    dim, side = 16, 8
    for name in ("vca", "mhsa"):
        module = ATTENTIONS[name](dim, 2, (side, side), layer_index=0)
        assert attention_multiply_adds(module, side**2, dim) == 2 * side**4 * dim


@pytest.mark.parametrize("side", [4, 8, 16])
def test_fixed_contrast_grid_costs_linearly_in_the_tokens(side):
    module = VisualContrastAttention(16, 2, (side, side), layer_index=0, contrast_grid=(2, 3))
    assert attention_multiply_adds(module, side**2, 16) == 8 * side**2 * 6 * 16


@pytest.mark.parametrize(("side", "num_contrast"), [(16, 64), (14, 49), (1, 1)])
def test_default_contrast_grid_is_half_of_each_side(side, num_contrast):
    assert VisualContrastAttention(8, 2, (side, side), layer_index=0).positive_embed.shape[1] == num_contrast


def test_differential_computes_in_float32_under_autocast():
    module = Differential(32, layer_index=3)
    positive, negative = torch.randn(2, 4, 50, 32).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(positive, negative)
    expected = module(positive.float(), negative.float())
    assert expected.dtype == torch.float32
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected.to(torch.bfloat16))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_autocast_stays_near_float32(name):
    module = ATTENTIONS[name](32, 4, (6, 6), layer_index=0)
    x = torch.randn(2, 36, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    expected = module(x)
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("name", ["vca", "mhsa"])
def test_normalised_queries_and_keys_bound_the_logits(name):
    """|q . k| / sqrt d <= sqrt d at gains of 1, however large the input; computed in float32 under autocast."""
    module = ATTENTIONS[name](16, 2, (4, 4), layer_index=1, qk_norm=True)
    x = torch.randn(2, 16, 16) * 1000
    q, k, _ = module.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    logits = module.q_norm(q) @ module.k_norm(k).mT / 8**0.5
    assert logits.abs().max() <= 8**0.5 * 1.0001
    with torch.autocast("cpu", torch.bfloat16):
        normed = module.q_norm(q.bfloat16())
    assert normed.dtype == torch.bfloat16
    torch.testing.assert_close(normed, module.q_norm(q.bfloat16().float()).bfloat16(), rtol=0, atol=0)
    assert {k for k in module.state_dict() if "_norm" in k} == {"q_norm.weight", "k_norm.weight"}


def test_wrong_values_end_in_a_sentence():
    def vca(**options):
        return lambda: VisualContrastAttention(16, 2, (8, 6), layer_index=0, **options)

    def named(spec):
        return lambda: build(ATTENTIONS, spec, "model.attention", 16, 2, (8, 6), layer_index=0)

    expected = [
        (vca(contrast_grid=(9, 2)), r"contrast_grid 9x2 is larger than the 8x6 grid .* at most \[8, 6\]"),
        (vca(contrast_grid=(2, 7)), r"contrast_grid 2x7 is larger than the 8x6 grid"),
        (vca(contrast_grid=8), r"contrast_grid is 8; write two positive integers"),
        (vca(contrast_grid=(0, 2)), r"contrast_grid is \(0, 2\); write two positive integers"),
        (vca(contrast_grid=(2.0, 2)), r"contrast_grid is \(2.0, 2\); write two positive integers"),
        (vca(stages=["differential", "plane"]), r"stages is \['differential', 'plane'\]; write two of .*'plain'"),
        (vca(stages=["plain"]), r"stages is \['plain'\]; write two of"),
        (vca(positive="pooled"), r"positive is 'pooled'; choose one of 'pool', 'embed', 'pool\+embed'"),
        (vca(negative="none"), r"negative is 'none'; choose one of"),
        (named("vac"), r"model.attention.name is 'vac'; did you mean 'vca'\? choose one of \['differential'"),
        (named({"name": "vca", "contrast_gird": [2, 2]}), r"takes no 'contrast_gird'; did you mean 'contrast_grid'\?"),
        (
            named({"name": "mhsa", "stages": ["plain", "plain"]}),
            r"'mhsa' takes no 'stages'.*'dwc', 'qk_norm', 'qkv_bias'",
        ),
        (named({"name": "vca", "layer_index": 3}), r"takes no 'layer_index'"),
        (named({"dwc": True}), r"needs a name, one of \['differential', 'mhsa', 'vca'\]"),
        (lambda: vca(num_prefix_tokens=1)()(torch.zeros(1, 48, 16)), r"got 48 tokens; .* 1 prefix .* 8x6 grid, 49 in"),
        (lambda: DifferentialAttention(18, 6, (8, 6), layer_index=0), r"18 / 6 = 3 is odd"),
    ]
    for attention in ATTENTIONS.values():
        expected.append((lambda a=attention: a(16, 3, (8, 6), layer_index=0), r"16 is not a multiple of num_heads 3"))
        expected.append((lambda a=attention: a(16, 0, (8, 6), layer_index=0), r"16 is not a multiple of num_heads 0"))
    for call, sentence in expected:
        with pytest.raises(ValueError, match=sentence):
            call()
