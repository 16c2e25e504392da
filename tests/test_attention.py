"""Visual-Contrast Attention and its controls against their formulas, written as loops over batch, heads and tokens."""

import copy
import itertools
import math

import pytest
import torch
from timm.layers.diff_attention import DiffAttention
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from vca import (
    ATTENTIONS,
    Differential,
    DifferentialAttention,
    VisualContrastAttention,
    create,
    lambda_init,
)
from vca.attention import interpolate
from vca.layer import HeadNorm
from vca_engine.weights.adapt import interpolate_embeddings

STAGES = [list(s) for s in itertools.product(["differential", "plain"], repeat=2)]
STREAMS = ["pool", "embed", "pool+embed"]


def perturb(module):
    """Every parameter moved away from its initial value, in float64, so that none is an inert zero or one."""
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return module


def loop_attend(queries, keys, values, scale):
    """softmax(scale q k^T) v, one query and one key at a time: (n, d), (m, d), (m, e) -> (n, e)."""
    rows = []
    for q in queries:
        weights = [torch.exp(scale * (q @ k)) for k in keys]
        rows.append(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
    return torch.stack(rows)


def loop_pool(image, grid):
    """Adaptive average: cell (i, j) covers rows floor(i H / a) ... ceil((i+1) H / a) - 1, the columns alike."""
    height, width, _ = image.shape
    cells = []
    for i, j in itertools.product(range(grid[0]), range(grid[1])):
        rows = range(i * height // grid[0], -(-(i + 1) * height // grid[0]))
        columns = range(j * width // grid[1], -(-(j + 1) * width // grid[1]))
        cells.append(sum(image[r, c] for r in rows for c in columns) / (len(rows) * len(columns)))
    return torch.stack(cells)


def loop_conv(image, weight, bias):
    """Depth-wise 3x3 convolution with zeros around: (H, W, C), (C, 1, 3, 3), (C,) -> (H, W, C)."""
    height, width, _ = image.shape
    rows = []
    for r, c in itertools.product(range(height), range(width)):
        total = bias
        for i, j in itertools.product(range(3), range(3)):
            if 0 <= r + i - 1 < height and 0 <= c + j - 1 < width:
                total = total + weight[:, 0, i, j] * image[r + i - 1, c + j - 1]
        rows.append(total)
    return torch.stack(rows).reshape(image.shape)


def loop_lambda(state, stage, layer_index):
    """exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init, and lambda_init."""
    q1, k1, q2, k2 = (state[f"{stage}.lambda_{name}"] for name in ("q1", "k1", "q2", "k2"))
    start = 0.8 - 0.6 * math.exp(-0.3 * layer_index)
    return torch.exp(q1 @ k1) - torch.exp(q2 @ k2) + start, start


def loop_differential(positive, negative, state, stage, layer_index):
    """(1 - lambda_init) RMSNorm(positive - lambda negative), a row at a time."""
    lam, start = loop_lambda(state, stage, layer_index)
    rows = [p - lam * n for p, n in zip(positive, negative, strict=True)]
    gain = (1 - start) * state[f"{stage}.norm.weight"]
    return torch.stack([gain * row / torch.sqrt(sum(row**2) / len(row) + 1e-5) for row in rows])


def loop_norm(rows, state, name):
    """gain row / sqrt(mean row^2 + 1e-6), where the layer has such a norm."""
    if f"{name}.weight" not in state:
        return rows
    return torch.stack([state[f"{name}.weight"] * row / torch.sqrt(sum(row**2) / len(row) + 1e-6) for row in rows])


def loop_layer(module, x, grid, prefix, head, halves=1):
    """The frame of all layers: split into heads, `head(q, k, v, index of the head)`, convolution, projection."""
    state, h = dict(module.named_parameters()), module.num_heads
    out = []
    for tokens in x:
        dim = tokens.shape[1]
        qkv = torch.stack([state["qkv.weight"] @ token + state.get("qkv.bias", 0) for token in tokens])
        q, k, v = qkv[:, :dim], qkv[:, dim : 2 * dim], qkv[:, 2 * dim :]
        width = dim // h
        heads = [slice(i * width, (i + 1) * width) for i in range(h)]

        def normed(z, s, name):
            return torch.cat([loop_norm(half, state, name) for half in z[:, s].chunk(halves, dim=1)], dim=1)

        parts = [(normed(q, s, "q_norm"), normed(k, s, "k_norm"), v[:, s]) for s in heads]
        o = torch.cat([head(*part, i) for i, part in enumerate(parts)], dim=1)
        if "dwc.weight" in state:
            image = loop_conv(v[prefix:].reshape(*grid, dim), state["dwc.weight"], state["dwc.bias"])
            o = torch.cat([o[:prefix], o[prefix:] + image.reshape(-1, dim)])
        out.append(torch.stack([state["proj.weight"] @ token + state["proj.bias"] for token in o]))
    return torch.stack(out)


def loop_vca(module, x, grid, contrast_grid, prefix, layer_index, stages, positive, negative, softmax):
    state = dict(module.named_parameters())

    def stream(kind, pooled, name, i):
        width = pooled.shape[1]
        if kind == "pool":
            return pooled
        embed = state[name][0][:, i * width : (i + 1) * width]
        return embed if kind == "embed" else pooled + embed

    def stage2(q, t_plus, t_minus, contrast, scale):
        if softmax == "separate":
            parts = (loop_attend(q, t, contrast, scale) for t in (t_plus, t_minus))
            return loop_differential(*parts, state, "stage2", layer_index)
        rows = []
        for token in q:  # one softmax over 2n columns, then split
            weights = torch.stack([torch.exp(scale * (token @ t)) for t in (*t_plus, *t_minus)])
            rows.append(weights / weights.sum())
        a_plus, a_minus = torch.stack(rows).chunk(2, dim=1)
        return loop_differential(a_plus @ contrast, a_minus @ contrast, state, "stage2", layer_index)

    def head(q, k, v, i):
        scale = 1 / math.sqrt(q.shape[1])
        pooled = loop_pool(q[prefix:].reshape(*grid, -1), contrast_grid)
        t_plus = stream(positive, pooled, "positive_embed", i)
        t_minus = stream(negative, pooled, "negative_embed", i) if "differential" in stages else None
        contrast = loop_attend(t_plus, k, v, scale)
        if stages[0] == "differential":
            contrast = loop_differential(contrast, loop_attend(t_minus, k, v, scale), state, "stage1", layer_index)
        if stages[1] == "differential":
            return stage2(q, t_plus, t_minus, contrast, scale)
        return loop_attend(q, t_plus, contrast, scale)

    return loop_layer(module, x, grid, prefix, head)


def assert_equals(module, x, reference):
    """Values and all gradients, of the input and of every parameter, to 1e-10: float64 after some hundred operations."""
    x = x.requires_grad_()
    found, expected = module(x), reference(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    weights, inputs = torch.randn_like(found), [x, *module.parameters()]
    ours, theirs = (torch.autograd.grad((out * weights).sum(), inputs) for out in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


FORMS = ["joint", "separate"]


@pytest.mark.parametrize("softmax", FORMS)
@pytest.mark.parametrize("negative", STREAMS)
@pytest.mark.parametrize("positive", STREAMS)
@pytest.mark.parametrize("stages", STAGES, ids="-".join)
def test_vca_equals_its_formulas_for_every_ablation(stages, positive, negative, softmax):
    grid, contrast_grid, prefix = (3, 4), (2, 3), 1  # neither 2 divides 3 nor 3 divides 4
    options = {"stages": stages, "positive": positive, "negative": negative, "softmax": softmax}
    module = perturb(
        VisualContrastAttention(
            8, 2, grid, layer_index=2, contrast_grid=contrast_grid, num_prefix_tokens=prefix, **options
        )
    )
    x = torch.randn(2, prefix + 12, 8, dtype=torch.float64)
    assert_equals(module, x, lambda x: loop_vca(module, x, grid, contrast_grid, prefix, 2, **options))


@pytest.mark.parametrize("softmax", FORMS)
@pytest.mark.parametrize(
    ("grid", "contrast_grid", "expected_grid"),
    [
        ((4, 6), None, (2, 3)),
        ((3, 5), None, (1, 2)),
        ((1, 7), None, (1, 3)),
        ((3, 2), [3, 2], (3, 2)),
        (3, "half", (1, 1)),
    ],
)
@pytest.mark.parametrize(
    ("prefix", "qkv_bias", "dwc", "layer_index", "qk_norm"), [(0, True, True, 0, False), (2, False, False, 11, True)]
)
def test_vca_equals_its_formulas_for_every_geometry(
    grid, contrast_grid, expected_grid, prefix, qkv_bias, dwc, layer_index, qk_norm, softmax
):
    options = {"qkv_bias": qkv_bias, "qk_norm": qk_norm, "dwc": dwc, "num_prefix_tokens": prefix, "softmax": softmax}
    module = perturb(
        VisualContrastAttention(6, 3, grid, layer_index=layer_index, contrast_grid=contrast_grid, **options)
    )
    grid = (grid, grid) if isinstance(grid, int) else grid
    x = torch.randn(2, prefix + grid[0] * grid[1], 6, dtype=torch.float64)
    streams = {"stages": ["differential"] * 2, "positive": "pool+embed", "negative": "pool+embed", "softmax": softmax}
    assert_equals(module, x, lambda x: loop_vca(module, x, grid, expected_grid, prefix, layer_index, **streams))


COMMON = [(0, False, True, False), (0, True, False, True), (2, True, True, False), (1, False, False, True)]


def layer(name, prefix, dwc, qkv_bias, qk_norm, **options):
    """Of 12 channels and 2 heads on a grid of 3x4, its parameters perturbed; and an input for it."""
    common = {"num_prefix_tokens": prefix, "dwc": dwc, "qkv_bias": qkv_bias, "qk_norm": qk_norm}
    module = perturb(ATTENTIONS[name](12, 2, (3, 4), layer_index=4, **common, **options))
    return module, torch.randn(2, prefix + 12, 12, dtype=torch.float64)


@pytest.mark.parametrize(("prefix", "dwc", "qkv_bias", "qk_norm"), COMMON)
def test_self_attention_equals_its_formula(prefix, dwc, qkv_bias, qk_norm):
    module, x = layer("mhsa", prefix, dwc, qkv_bias, qk_norm)

    def head(q, k, v, i):
        return loop_attend(q, k, v, 1 / math.sqrt(6))

    assert_equals(module, x, lambda x: loop_layer(module, x, (3, 4), prefix, head))


@pytest.mark.parametrize(("prefix", "dwc", "qkv_bias", "qk_norm"), COMMON)
def test_differential_attention_equals_its_formula(prefix, dwc, qkv_bias, qk_norm):
    module, x = layer("differential", prefix, dwc, qkv_bias, qk_norm)

    def head(q, k, v, i):
        streams = [loop_attend(q[:, s], k[:, s], v, 1 / math.sqrt(3)) for s in (slice(0, 3), slice(3, 6))]
        return loop_differential(*streams, dict(module.named_parameters()), "differential", 4)

    assert_equals(module, x, lambda x: loop_layer(module, x, (3, 4), prefix, head, halves=2))


@pytest.mark.parametrize(("prefix", "dwc", "qkv_bias", "qk_norm"), COMMON)
def test_agent_attention_equals_its_formula(prefix, dwc, qkv_bias, qk_norm):
    module, x = layer("agent", prefix, dwc, qkv_bias, qk_norm, contrast_grid=(2, 3))

    def head(q, k, v, i):
        agents = loop_pool(q[prefix:].reshape(3, 4, -1), (2, 3))
        scale = 1 / math.sqrt(6)
        return loop_attend(q, agents, loop_attend(agents, k, v, scale), scale)

    assert_equals(module, x, lambda x: loop_layer(module, x, (3, 4), prefix, head))
    assert {name.split(".")[0] for name in module.state_dict()} <= {"qkv", "proj", "dwc", "q_norm", "k_norm"}


@pytest.mark.parametrize(("prefix", "dwc", "qkv_bias", "qk_norm"), COMMON)
def test_linear_attention_equals_its_formula(prefix, dwc, qkv_bias, qk_norm):
    module, x = layer("linear", prefix, dwc, qkv_bias, qk_norm)

    def head(q, k, v, i):
        rows = []
        for token in q.relu():
            weights = [token @ key for key in k.relu()]
            rows.append(sum(w * value for w, value in zip(weights, v, strict=True)) / (sum(weights) + 1e-6 * len(k)))
        return torch.stack(rows)

    assert_equals(module, x, lambda x: loop_layer(module, x, (3, 4), prefix, head))


@pytest.mark.parametrize(("qkv_bias", "qk_norm"), [(True, False), (False, True)])
def test_differential_attention_is_that_of_timm(qkv_bias, qk_norm):
    """With equal weights, to 1e-6, since timm rounds lambda to float32. The norms of queries and keys are ours in both."""
    ours, x = layer("differential", 2, False, qkv_bias, qk_norm)
    options = {"qkv_bias": qkv_bias, "qk_norm": qk_norm, "depth": 4, "norm_layer": lambda dim, **_: HeadNorm(dim)}
    theirs = DiffAttention(12, 2, **options).double()
    names = {"differential.norm.weight": "sub_norm.weight"}
    state = {names.get(key, key).removeprefix("differential."): value for key, value in ours.state_dict().items()}
    theirs.load_state_dict(state)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-6)


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
    assert embeds.std().item() == pytest.approx(1.0, rel=0.05)
    assert lambdas.std().item() == pytest.approx(0.1, rel=0.15)
    assert (module.stage1.norm.weight == 1).all()
    assert (module.stage2.norm.weight == 1).all()
    assert not torch.equal(module.positive_embed, module.negative_embed)


ABLATIONS = (
    [(name, {}) for name in ATTENTIONS]
    + [(name, {"dwc": dwc}) for name in ATTENTIONS for dwc in (False, True)]
    + [(name, {"qk_norm": True}) for name in ATTENTIONS]
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


SIDE, NUM_TOKENS, NUM_CONTRAST, HEADS = 32, 1024, 64, 2  # with the default contrast grid


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


@pytest.mark.parametrize("name", [name for name in ATTENTIONS if name != "linear"])  # which has no map
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


def test_half_of_each_side_costs_what_full_attention_costs():
    dim, side = 16, 8
    for name, options in (("vca", {"contrast_grid": "half"}), ("vca", {}), ("mhsa", {})):
        module = ATTENTIONS[name](dim, 2, (side, side), layer_index=0, **options)
        assert attention_multiply_adds(module, side**2, dim) == 2 * side**4 * dim


@pytest.mark.parametrize(("name", "of_a_token"), [("vca", 8 * 64 * 16), ("agent", 4 * 64 * 16)])
def test_the_default_costs_linearly_beyond_16x16_tokens(name, of_a_token):
    for side in (16, 24, 32):
        module = ATTENTIONS[name](16, 2, side, layer_index=0)
        assert attention_multiply_adds(module, side**2, 16) == side**2 * of_a_token


@pytest.mark.parametrize("side", [4, 8, 16])
def test_fixed_contrast_grid_costs_linearly_in_the_tokens(side):
    module = VisualContrastAttention(16, 2, (side, side), layer_index=0, contrast_grid=(2, 3))
    assert attention_multiply_adds(module, side**2, 16) == 8 * side**2 * 6 * 16


@pytest.mark.parametrize(("side", "num_contrast"), [(16, 64), (14, 49), (1, 1), (32, 64), (18, 64)])
def test_default_contrast_grid_is_half_of_each_side_and_at_most_8(side, num_contrast):
    assert VisualContrastAttention(8, 2, (side, side), layer_index=0).positive_embed.shape[1] == num_contrast


GRIDS = [((6, 4), (3, 2)), ((3, 8), (1, 4)), ((20, 5), (8, 2))]  # of a call, and the default contrast grid of each


@pytest.mark.parametrize(("grid", "contrast_grid"), GRIDS)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_call_with_another_grid_is_that_of_a_layer_built_for_it(name, grid, contrast_grid):
    """Bit for bit, e+ and e- interpolated as `train.py --init` does it: they are the only tables with a grid."""
    built = perturb(ATTENTIONS[name](12, 2, (8, 8), layer_index=1, num_prefix_tokens=1))
    there = ATTENTIONS[name](12, 2, grid, layer_index=1, num_prefix_tokens=1).double()
    state = built.state_dict()
    for key in ("positive_embed", "negative_embed") if name == "vca" else ():
        state[key], _ = interpolate_embeddings(key, state[key], contrast_grid)
    there.load_state_dict(state)
    x = torch.randn(2, 1 + math.prod(grid), 12, dtype=torch.float64)
    assert torch.equal(built(x, grid=grid), there(x))
    with torch.no_grad():
        for _ in range(2):  # the second time with what was kept
            assert torch.equal(built(x, grid=grid), there(x))
    own = torch.randn(2, 65, 12, dtype=torch.float64)
    assert torch.equal(built(own, grid=(8, 8)), built(own))


@pytest.mark.parametrize(
    ("rule", "grid", "expected"),
    [(None, (4, 40), (2, 8)), ("half", (4, 40), (2, 20)), ((3, 5), (4, 40), (3, 5)), ((3, 5), (2, 4), (2, 4))],
)
def test_the_contrast_grid_of_a_call_follows_the_rule_of_construction(rule, grid, expected):
    assert VisualContrastAttention(8, 2, 16, layer_index=0, contrast_grid=rule).contrast_grid_of(grid) == expected


def test_interpolation_is_linear_between_centres_and_keeps_the_mean_of_a_smaller_grid():
    a, b = torch.randn(2, 1, 1, 5, dtype=torch.float64)
    wider = interpolate(torch.cat([a, b], dim=1), (1, 2), (1, 4))
    expected = torch.cat([a, 0.75 * a + 0.25 * b, 0.25 * a + 0.75 * b, b], dim=1)
    torch.testing.assert_close(wider, expected, rtol=0, atol=1e-14)  # sums of two numbers in float64
    ramp = torch.arange(8, dtype=torch.float64).reshape(1, 8, 1)
    torch.testing.assert_close(interpolate(ramp, (2, 4), (1, 1)), ramp.mean(1, keepdim=True), rtol=0, atol=1e-14)


class Interpolations(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "upsample_bilinear2d_aa" in str(func)
        return func(*args, **(kwargs or {}))


def test_without_gradients_embeddings_are_interpolated_once_for_a_grid_until_they_change():
    module = perturb(VisualContrastAttention(8, 2, 8, layer_index=0)).eval()
    x = torch.randn(1, 24, 8, dtype=torch.float64)

    def times(change=None):
        if change:
            change()
        with torch.no_grad(), Interpolations() as counted:
            found = module(x, grid=(4, 6))
        there = VisualContrastAttention(8, 2, (4, 6), layer_index=0).to(x.dtype)
        with torch.no_grad():
            state = {**module.state_dict()}
            for key in ("positive_embed", "negative_embed"):
                state[key] = interpolate(state[key], (4, 4), (2, 3))
            there.load_state_dict(state)
            assert torch.equal(found, there(x))
        return counted.count

    def step():
        with torch.no_grad():
            module.positive_embed.add_(1)

    def write():
        module.negative_embed.data.mul_(2)
        module.eval()

    assert [times(), times()] == [2, 0]  # e+ and e-
    assert [times(step), times()] == [1, 0]
    assert [times(write), times()] == [2, 0]
    assert [times(lambda: module.load_state_dict({k: 2 * v for k, v in module.state_dict().items()})), times()] == [
        2,
        0,
    ]
    module = copy.deepcopy(module)
    assert [times(step), times()] == [2, 0]
    x = x.float()
    assert [times(module.float), times()] == [2, 0]
    assert list(module.state_dict()) == list(VisualContrastAttention(8, 2, 8, layer_index=0).state_dict())


@pytest.mark.parametrize("training", [True, False])
def test_gradients_reach_the_embeddings_through_another_grid(training):
    """Also after a call without gradients, whose embeddings were kept."""
    module = perturb(VisualContrastAttention(8, 2, 8, layer_index=0)).train(training)
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    with torch.inference_mode():
        module(x, grid=(2, 3))

    def call(positive, negative):
        return torch.func.functional_call(
            module, {"positive_embed": positive, "negative_embed": negative}, (x,), {"grid": (2, 3)}
        )

    assert torch.autograd.gradcheck(call, (module.positive_embed, module.negative_embed))
    module(x, grid=(2, 3)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


def test_at_the_start_the_streams_differ_with_embeddings_of_one_and_hardly_with_those_of_a_fiftieth():
    """|V+ - V-| / |V+| of Stage I on white tokens: this is what makes the layer more than agent attention at the start."""
    torch.manual_seed(0)
    x = torch.randn(4, 64, 64)
    for std, low, high in ((1.0, 0.3, 2.0), (0.02, 0.0, 0.05)):
        module = VisualContrastAttention(64, 2, 8, layer_index=3, embed_std=std)
        q, k, v = module.heads(x)
        both = nn.functional.scaled_dot_product_attention(module.contrast_tokens(q, module.grid_size), k, v)
        positive, negative = both.chunk(2, dim=2)
        assert low < (positive - negative).norm() / positive.norm() < high


def test_a_layer_made_before_the_joint_softmax_computes_what_it_computed():
    """Bit for bit: the plain operations that it consisted of, with softmax separate and half of each side."""
    torch.manual_seed(0)
    old = VisualContrastAttention(32, 2, 8, layer_index=2, softmax="separate", contrast_grid="half", embed_std=0.02)
    x, attention = torch.randn(16, 64, 32), nn.functional.scaled_dot_product_attention
    q, k, v = old.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)

    def as_map(tokens):
        return tokens.transpose(2, 3).flatten(1, 2).unflatten(2, (8, 8))

    def difference(stage, positive, negative):
        contrast = positive - stage.scale() * negative
        gain = stage.norm.weight
        return (1 - stage.lambda_init) * nn.functional.rms_norm(contrast, gain.shape, gain, stage.norm.eps)

    pooled = nn.functional.adaptive_avg_pool2d(as_map(q), (4, 4)).flatten(2).unflatten(1, (2, -1)).transpose(2, 3)
    streams = [
        pooled.contiguous() + e.unflatten(-1, (2, -1)).transpose(1, 2) for e in (old.positive_embed, old.negative_embed)
    ]
    both = attention(torch.cat(streams, dim=2), k, v)
    contrast = difference(old.stage1, *both.chunk(2, dim=2))
    out = difference(old.stage2, *(attention(q, stream, contrast) for stream in streams)).transpose(1, 2).flatten(2)
    local = nn.functional.conv2d(as_map(v), old.dwc.weight, old.dwc.bias, padding=1, groups=32)
    assert torch.equal(old(x), old.proj(out + local.flatten(2).transpose(1, 2)))


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
        return lambda: create(ATTENTIONS, spec, "model.attention", 16, 2, (8, 6), layer_index=0)

    expected = [
        (vca(contrast_grid=(9, 2)), r"contrast_grid 9x2 is larger than the 8x6 grid .* at most \[8, 6\]"),
        (vca(contrast_grid=(2, 7)), r"contrast_grid 2x7 is larger than the 8x6 grid"),
        (vca(contrast_grid=8), r"contrast_grid is 8; write two positive integers, e.g. \[8, 8\], or half"),
        (vca(contrast_grid=(0, 2)), r"contrast_grid is \(0, 2\); write two positive integers"),
        (vca(contrast_grid=(2.0, 2)), r"contrast_grid is \(2.0, 2\); write two positive integers"),
        (vca(stages=["differential", "plane"]), r"stages is \['differential', 'plane'\]; write two of .*'plain'"),
        (vca(stages=["plain"]), r"stages is \['plain'\]; write two of"),
        (vca(softmax="jiont"), r"softmax is 'jiont'; choose joint or separate"),
        (vca(embed_std=0), r"embed_std is 0; choose a positive number"),
        (vca(embed_std=-1.0), r"embed_std is -1.0; choose a positive number"),
        (lambda: vca()()(torch.zeros(1, 48, 16), attn_mask=torch.ones(48, 48)), "attn_mask was given"),
        (lambda: vca()()(torch.zeros(1, 48, 16), is_causal=True), "is_causal was given"),
        (lambda: ATTENTIONS["mhsa"](16, 2, (4,), layer_index=0), r"grid_size is \(4,\); give the sides"),
        (lambda: ATTENTIONS["mhsa"](16, 2, 0, layer_index=0), r"grid_size is 0; give the sides"),
        (named({"name": "agent", "stages": ["plain", "plain"]}), r"'agent' takes no 'stages'"),
        (vca(positive="pooled"), r"positive is 'pooled'; choose one of 'pool', 'embed', 'pool\+embed'"),
        (vca(negative="none"), r"negative is 'none'; choose one of"),
        (named("vac"), r"model.attention.name is 'vac'; did you mean 'vca'\? choose one of \['agent'"),
        (named({"name": "vca", "contrast_gird": [2, 2]}), r"takes no 'contrast_gird'; did you mean 'contrast_grid'\?"),
        (
            named({"name": "mhsa", "stages": ["plain", "plain"]}),
            r"'mhsa' takes no 'stages'.*'dwc', 'num_prefix_tokens', 'qk_norm', 'qkv_bias'",
        ),
        (named({"name": "vca", "layer_index": 3}), r"takes no 'layer_index'"),
        (named({"dwc": True}), r"needs a name, one of \['agent', 'differential', 'linear', 'mhsa', 'vca'\]"),
        (lambda: vca(num_prefix_tokens=1)()(torch.zeros(1, 48, 16)), r"got 48 tokens; .* 1 prefix .* 8x6 grid, 49 in"),
        (
            lambda: vca()()(torch.zeros(1, 48, 16), grid=(3, 5)),
            r"got 48 tokens; .* with a grid for 0 .* 3x5 grid, 15 in",
        ),
        (lambda: vca()()(torch.zeros(1, 12, 16)), r"8x6 grid, 48 in all; .* give the grid, layer\(x, grid=\(H, W\)\)"),
        (lambda: vca()()(torch.zeros(1, 48, 16), grid=(8.0, 6)), r"grid_size is \(8.0, 6\); give the sides"),
        (lambda: DifferentialAttention(18, 6, (8, 6), layer_index=0), r"18 / 6 = 3 is odd"),
    ]
    for attention in ATTENTIONS.values():
        expected.append((lambda a=attention: a(16, 3, (8, 6), layer_index=0), r"16 is not a multiple of num_heads 3"))
        expected.append((lambda a=attention: a(16, 0, (8, 6), layer_index=0), r"16 is not a multiple of num_heads 0"))
    for call, sentence in expected:
        with pytest.raises(ValueError, match=sentence):
            call()


@pytest.mark.parametrize("name", ATTENTIONS)
def test_every_attention_can_be_counted_without_memory(name):
    """On the meta device, as the dry run of train.py does."""
    with torch.device("meta"):
        module = ATTENTIONS[name](16, 2, 4, layer_index=0)
        assert module(torch.randn(1, 16, 16)).shape == (1, 16, 16)
