"""The recognisers: their numbers against the paper's, their own attention against timm and formulas, and swapping."""

import copy
import functools
import importlib
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention as TimmAttention

from classify import MODELS, PVT, CSwin, create, swap_attention
from classify.cswin import StripeAttention
from classify.pvt import SpatialReductionAttention
from vca import ATTENTIONS, VisualContrastAttention, lambda_init
from vca.layer import Attention
from vca_engine.training.cost import multiply_adds

DOCS = (Path(__file__).parent.parent / "docs" / "classify.md").read_text(encoding="utf-8")
TINY = [name for name in MODELS if name.endswith("tiny")]


def on_meta(name, attention, **sizes):
    with torch.device("meta"):
        return create(name, attention, **sizes)


def num_parameters(model):
    return sum(p.numel() for p in model.parameters())


@functools.cache
def measured(name, attention):
    """Parameters, multiply-adds and `doubled` of a network."""
    model = on_meta(name, attention)
    return num_parameters(model), num_macs(model), doubled(model)


def layers(model):
    return [m for m in model.modules() if isinstance(m, Attention)]


def num_macs(model, size=224):
    return multiply_adds(model, torch.empty(1, 3, size, size, device="meta"))


def doubled(model):
    """Multiply-adds that the layers spend beyond the formula: the one call of Stage II multiplies 2n values, not n.

    The formula subtracts the maps first, (A+ - lambda2 A-) V^.
    """
    found = [m for m in layers(model) if isinstance(m, VisualContrastAttention)]
    tokens = [m.num_prefix_tokens + m.grid_size[0] * m.grid_size[1] for m in found]
    return sum(m.num_contrast_tokens * n * m.proj.in_features for m, n in zip(found, tokens, strict=True))


# model -> millions of parameters, of the base and with VCA, and G multiply-adds with VCA: computed by hand, for these
# places; then the paper's two numbers with VCA.
ROWS = {
    "deit_tiny": (5.717, 5.974, 1.234, 6.0, 1.2),
    "deit_small": (22.051, 22.556, 4.56, 22.6, 4.6),
    "pvt_tiny": (13.229, 11.556, 2.03, 11.6, 2.0),
    "swin_tiny": (28.288, 28.547, 4.596, 28.5, 4.6),
    "cswin_tiny": (20.393, 20.414, 4.322, 20.4, 4.3),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_numbers_of_the_paper(name):
    own, with_vca, macs, printed, printed_macs = ROWS[name]
    assert round(measured(name, "own")[0] / 1e6, 3) == own
    parameters, executed, more = measured(name, "vca")
    assert round(parameters / 1e6, 3) == with_vca
    assert round(parameters / 1e6, 1) == printed
    formula = (executed - more) / 1e9
    assert abs(formula - macs) < (0.005 if macs == round(macs, 2) else 0.001)  # half of the last digit; a digit
    assert round(formula, 1) == printed_macs


def added(dim, heads, n):
    """Parameters of VCA beyond qkv and proj: e+ and e-, eight lambda vectors and two gains, the convolution."""
    return 2 * n * dim + (8 + 2) * dim // heads + 10 * dim


def test_the_parameters_exactly():
    deit, pvt, swin, cswin = (
        num_parameters(on_meta(f"{name}_tiny", "own")) for name in ("deit", "pvt", "swin", "cswin")
    )
    assert num_parameters(on_meta("deit_tiny", "vca")) == deit + 12 * added(192, 3, 49) == deit + 256_512

    reduction = sum(2 * ((r * c) ** 2 + 3 * c) for c, r in ((64, 8), (128, 4), (320, 2)))  # convolution and norm
    ending = 2 * 512 + 512 + 512  # last norm, class token and its place in the table of positions
    layer = added(64, 1, 9) + added(128, 2, 16) + added(320, 5, 49) + added(512, 8, 49)
    assert num_parameters(on_meta("pvt_tiny", "vca")) == pvt - reduction - ending + 2 * layer

    biases = 13 * 13 * (2 * 3 + 2 * 6 + 6 * 12)
    layer = 2 * added(96, 3, 9) + 2 * added(192, 6, 16) + 6 * added(384, 12, 49)
    assert num_parameters(on_meta("swin_tiny", "vca")) == swin - biases + layer

    encoding = 10 * (2 * 64 + 4 * 128)
    layer = 2 * added(64, 2, 9) + 4 * added(128, 4, 16)
    assert num_parameters(on_meta("cswin_tiny", "vca")) == cswin - encoding + layer


def test_the_multiply_adds_of_deit_tiny_by_hand():
    patches, head = 196 * 3 * 16 * 16 * 192, 192 * 1000
    linear = 197 * 192 * 192 * (3 + 1 + 4 + 4)
    stage1 = stage2 = 2 * (2 * 49) * 197 * 192  # scores and values of 2n contrast tokens
    convolution = 196 * 9 * 192
    model = on_meta("deit_tiny", "vca")
    assert num_macs(model) == patches + head + 12 * (linear + stage1 + stage2 + convolution)
    assert doubled(model) == 12 * 49 * 197 * 192


def test_the_table_of_the_docs_is_what_is_measured():
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| ([\d.]+) \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \|", DOCS, re.MULTILINE)
    assert [name for name, *_ in rows] == list(MODELS)
    for name, own, own_macs, with_vca, macs, formula in rows:
        parameters, executed, _ = measured(name, "own")
        assert (own, own_macs) == (f"{parameters:,}", f"{executed / 1e9:.3f}")
        parameters, executed, more = measured(name, "vca")
        assert more > 0
        assert (with_vca, macs) == (f"{parameters:,}", f"{executed / 1e9:.3f}")
        assert formula == f"{(executed - more) / 1e9:.3f}"


@pytest.mark.parametrize(
    ("name", "sides", "heads", "depths", "grids"),
    [
        ("deit_tiny", [14], [3], [12], [7]),
        ("deit_small", [14], [6], [12], [7]),
        ("deit_base", [14], [12], [4], [9]),
        ("pvt_tiny", [56, 28, 14, 7], [1, 2, 5, 8], [2, 2, 2, 2], [3, 4, 7, 7]),
        ("swin_tiny", [56, 28, 14], [3, 6, 12], [2, 2, 6], [3, 4, 7]),
        ("cswin_tiny", [56, 28], [2, 4], [2, 4], [3, 4]),
    ],
)
def test_where_vca_stands(name, sides, heads, depths, grids):
    found = layers(on_meta(name, "vca"))
    stages = [s for s, depth in enumerate(depths) for _ in range(depth)]
    assert [m.grid_size for m in found] == [(sides[s], sides[s]) for s in stages]
    assert [m.num_heads for m in found] == [heads[s] for s in stages]
    assert [m.contrast_grid for m in found] == [(grids[s], grids[s]) for s in stages]
    assert [m.stage2.lambda_init for m in found] == [lambda_init(i) for i in range(len(stages))]
    assert {m.num_prefix_tokens for m in found} == {int("deit" in name)}
    assert all(m.dwc for m in found)


def test_a_larger_image_keeps_the_contrast_grid_and_a_small_one_takes_its_map():
    assert {m.contrast_grid for m in layers(on_meta("deit_tiny", "vca", image_size=448))} == {(7, 7)}
    found = layers(on_meta("pvt_tiny", "vca", image_size=64))
    assert [m.contrast_grid[0] for m in found] == [3, 3, 4, 4, 4, 4, 2, 2]  # of maps of 16, 8, 4, 2
    options = {"name": "vca", "contrast_grid": [2, 2], "softmax": "separate"}
    found = layers(on_meta("pvt_tiny", options, image_size=64))
    assert {(m.contrast_grid, m.softmax) for m in found} == {((2, 2), "separate")}


@pytest.mark.parametrize("attention", ["own", *ATTENTIONS])
@pytest.mark.parametrize("name", TINY)
def test_every_network_trains_with_every_attention(name, attention):
    size = 224 if (name, attention) == ("swin_tiny", "own") else 32
    model = create(name, attention, num_classes=5, image_size=size, in_channels=1, drop_path_rate=0.1)
    kinds = {type(m) for m in layers(model)}
    assert kinds == ({ATTENTIONS[attention]} if attention in ATTENTIONS else set())
    logits = model(torch.randn(2, 1, size, size))
    assert logits.shape == (2, 5)
    assert logits.isfinite().all()
    F.cross_entropy(model.eval()(torch.randn(2, 1, size, size)), torch.tensor([1, 4])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", [n for n in MODELS if not n.endswith("tiny")])
def test_the_larger_networks(name):
    for attention in ("own", "vca"):
        model = on_meta(name, attention, num_classes=7).eval()
        assert model(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 7)


@pytest.mark.parametrize(
    ("name", "published", "size"),
    [("deit_tiny", "deit_tiny_patch16_224", 64), ("swin_tiny", "swin_tiny_patch4_window7_224", 224)],
)
def test_own_weights_of_timm_give_the_outputs_of_timm(name, published, size):
    theirs = timm.create_model(published, img_size=size, num_classes=10).eval()
    ours = create(name, "own", num_classes=10, image_size=size).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, size, size)
    assert torch.equal(ours(x), theirs(x))


def linear(name, width, out):
    return {f"{name}.weight": (out, width), f"{name}.bias": (out,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def conv(name, width, out, kernel, groups=1):
    return {f"{name}.weight": (out, width // groups, kernel, kernel), f"{name}.bias": (out,)}


def shapes(model):
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def test_pvt_has_the_published_keys():
    keys = {"cls_token": (1, 1, 512), **norm("norm", 512), **linear("head", 512, 1000)}
    stages = zip((64, 128, 320, 512), (8, 8, 4, 4), (8, 4, 2, 1), (3136, 784, 196, 50), strict=True)
    before = 3
    for i, (c, ratio, r, tokens) in enumerate(stages, 1):
        keys |= conv(f"patch_embed{i}.proj", before, c, 4 if i == 1 else 2) | norm(f"patch_embed{i}.norm", c)
        keys[f"pos_embed{i}"] = (1, tokens, c)
        for j in range(2):
            b = f"block{i}.{j}"
            keys |= norm(f"{b}.norm1", c) | norm(f"{b}.norm2", c)
            keys |= linear(f"{b}.attn.q", c, c) | linear(f"{b}.attn.kv", c, 2 * c) | linear(f"{b}.attn.proj", c, c)
            keys |= linear(f"{b}.mlp.fc1", c, ratio * c) | linear(f"{b}.mlp.fc2", ratio * c, c)
            keys |= (conv(f"{b}.attn.sr", c, c, r) | norm(f"{b}.attn.norm", c)) if r > 1 else {}
        before = c
    assert shapes(on_meta("pvt_tiny", "own")) == keys


def test_cswin_has_the_published_keys():
    keys = conv("stage1_conv_embed.0", 3, 64, 7) | norm("stage1_conv_embed.2", 64)
    keys |= norm("norm", 512) | linear("head", 512, 1000)
    for i, (c, depth) in enumerate(zip((64, 128, 256, 512), (1, 2, 21, 1), strict=True), 1):
        if i < 4:
            keys |= conv(f"merge{i}.conv", c, 2 * c, 3) | norm(f"merge{i}.norm", 2 * c)
        for j in range(depth):
            b = f"stage{i}.{j}"
            keys |= norm(f"{b}.norm1", c) | norm(f"{b}.norm2", c) | linear(f"{b}.qkv", c, 3 * c)
            keys |= linear(f"{b}.proj", c, c) | linear(f"{b}.mlp.fc1", c, 4 * c) | linear(f"{b}.mlp.fc2", 4 * c, c)
            width = c if i == 4 else c // 2
            for k in range(c // width):
                keys |= conv(f"{b}.attns.{k}.get_v", width, width, 3, groups=width)
    with torch.device("meta"):
        assert shapes(CSwin(depths=(1, 2, 21, 1))) == keys  # the published CSWin-T


def softmax_attention(q, k, v, num_heads, allowed=None):
    """softmax(q k^T / sqrt d) v of each head, keys that are not allowed left out: (B, N, C), 2 x (B, M, C)."""
    heads = [z.unflatten(-1, (num_heads, -1)) for z in (q, k, v)]
    scores = torch.einsum("bnhd,bmhd->bhnm", *heads[:2]) / heads[0].shape[-1] ** 0.5
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), heads[2]).flatten(2)


@pytest.mark.parametrize("reduction", [1, 2])
def test_the_keys_of_pvt_are_those_of_the_smaller_map(reduction):
    layer = SpatialReductionAttention(12, 3, 4, reduction).double()
    x = torch.randn(2, 16, 12, dtype=torch.float64)
    y = x
    if reduction == 2:  # a patch of 2 x 2 tokens at a time, by hand
        image = x.unflatten(1, (4, 4))
        patches = [image[:, i : i + 2, j : j + 2] for i in (0, 2) for j in (0, 2)]
        y = torch.stack([torch.einsum("bijc,ocij->bo", p, layer.sr.weight) + layer.sr.bias for p in patches], dim=1)
        y = F.layer_norm(y, (12,), layer.norm.weight, layer.norm.bias)
    key, value = layer.kv(y).chunk(2, dim=-1)
    expected = layer.proj(softmax_attention(layer.q(x), key, value, 3))
    assert torch.allclose(layer(x), expected, atol=1e-12)


@pytest.mark.parametrize("window", [(6, 2), (2, 6), (6, 6)])
def test_the_stripes_of_cswin_are_full_attention_with_a_mask(window):
    """The local encoding of a stripe does not see its neighbours: zeros are around each."""
    layer = StripeAttention(8, 2, 6, window).double()
    q, k, v = torch.randn(3, 2, 36, 8, dtype=torch.float64)
    rows, columns = torch.arange(36) // 6 // window[0], torch.arange(36) % 6 // window[1]
    stripe = 6 * rows + columns
    expected = softmax_attention(q, k, v, 2, allowed=stripe[:, None] == stripe)
    for number in stripe.unique():
        inside = (stripe == number).double()[:, None]
        image = (v * inside).transpose(1, 2).unflatten(2, (6, 6))
        expected = expected + layer.get_v(image).flatten(2).transpose(1, 2) * inside
    assert torch.allclose(layer(q, k, v), expected, atol=1e-12)


REGISTERS, DINOV2, CLASS_TOKEN = "vit_small_patch14_reg4_dinov2", "vit_small_patch14_dinov2", "vit_tiny_patch16_224"


def small(name, **options):
    torch.manual_seed(0)
    size = 14 * 4 if "patch14" in name else 16 * 4
    options = {"num_classes": 3, "depth": 3, "embed_dim": 48, "num_heads": 3, **options}
    model = timm.create_model(name, img_size=size, **options).eval()
    with torch.no_grad():  # DINOv2 starts with scales of 1e-5, with which no attention would matter
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model, torch.randn(2, 3, size, size)


@pytest.mark.parametrize(("name", "prefix"), [(REGISTERS, 5), (DINOV2, 1), (CLASS_TOKEN, 1)])
def test_swap_attention_keeps_what_a_vision_transformer_of_timm_has_learned(name, prefix):
    model, x = small(name)
    before, kept = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    assert swap_attention(model, "mhsa") is model
    assert torch.allclose(model(x), before, atol=1e-5)

    model, _ = small(name)
    swap_attention(model, "vca", blocks=[0, 2])
    assert [type(block.attn) for block in model.blocks] == [
        VisualContrastAttention,
        TimmAttention,
        VisualContrastAttention,
    ]
    first, _, last = (block.attn for block in model.blocks)
    assert (last.grid_size, last.num_prefix_tokens, last.training) == ((4, 4), prefix, False)
    assert (first.stage1.lambda_init, last.stage1.lambda_init) == (lambda_init(0), lambda_init(2))
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in kept.items())
    assert all(key.startswith(("blocks.0.attn.", "blocks.2.attn.")) for key in after.keys() - kept.keys())
    assert model(x).isfinite().all()
    assert not torch.allclose(model(x), before, atol=1e-3)


def test_swap_attention_keeps_dtype_and_device():
    model, x = small(CLASS_TOKEN)
    swap_attention(model.double(), {"name": "agent", "contrast_grid": [2, 2]})
    assert model(x.double()).dtype == torch.float64
    with torch.device("meta"):
        model, _ = small(CLASS_TOKEN)
    assert {p.device.type for p in swap_attention(model).parameters()} == {"meta"}


def test_whole_maps_of_the_hierarchical_networks_swapped_for_full_attention_change_nothing():
    """Where their own attention looks at the whole map, with nothing else to it, full attention is the same."""
    x = torch.randn(1, 3, 64, 64)
    pvt = PVT(image_size=64).eval()
    before = pvt(x)
    assert torch.allclose(swap_attention(pvt, "mhsa", blocks=[6, 7])(x), before, atol=1e-5)  # r = 1, a class token

    cswin = CSwin(image_size=64, depths=(1, 1, 1, 1)).eval()
    before, encoding = cswin(x), cswin.stage4[0].attns[0].get_v
    swap_attention(cswin, {"name": "mhsa", "dwc": True}, blocks=[3])
    cswin.stage4[0].attn.dwc.load_state_dict(encoding.state_dict())
    assert torch.allclose(cswin(x), before, atol=1e-5)

    x = torch.randn(1, 3, 224, 224)
    swin = create("swin_tiny", "own", num_classes=3).eval()
    with torch.no_grad():
        for block in swin.layers[3].blocks:
            block.attn.relative_position_bias_table.zero_()
        before = swin(x)
        assert torch.allclose(swap_attention(swin, "mhsa", blocks=[10, 11])(x), before, atol=1e-5)


def test_the_lines_of_the_docs_run(monkeypatch):
    """But for the download of weights."""
    create_model = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **options: create_model(name, **options))
    blocks = [block for block in re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL) if "logits" in block]
    assert len(blocks) == 2  # another is of a run, see test_recogniser.py
    for block in blocks:
        names = {}
        exec(block, names)
        assert names["logits"].isfinite().all()


def test_a_mask_is_refused():
    model, _ = small(CLASS_TOKEN)
    block, tokens = swap_attention(model).blocks[0], torch.randn(1, 17, 48)
    assert block(tokens).shape == tokens.shape
    with pytest.raises(ValueError, match="attn_mask was given, and VisualContrastAttention looks at all tokens"):
        block(tokens, attn_mask=torch.zeros(17, 17))
    with pytest.raises(ValueError, match="is_causal was given"):
        block(tokens, is_causal=True)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "eva02_tiny_patch14_224",
            {},
            r"Eva: block 0 has EvaAttention, which turns .* by their position \(rope\); swap",
        ),
        ("resnet18", {}, "ResNet has no blocks of a vision transformer; swap_attention takes a Swin of timm"),
        ("beit_base_patch16_224", {"depth": 1}, "Beit: block 0 has timm.models.beit.Attention; swap_attention takes"),
        (CLASS_TOKEN, {"qk_norm": True}, "block 0 has q_norm and k_norm in its attention; swap"),
        (CLASS_TOKEN, {"attn_drop_rate": 0.1}, "block 0 has attn_drop in its attention; swap"),
        (CLASS_TOKEN, {"dynamic_img_size": True}, r"gets images of any size \(dynamic_img_size\)"),
    ],
)
def test_networks_that_would_lose_something_are_refused(name, options, message):
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        swap_attention(model, "vca")
    assert [type(m) for m in model.modules()] == before


@pytest.mark.parametrize("blocks", [[3], [-1], 2, "01", [0.5]])
def test_blocks_that_are_not_there_are_refused(blocks):
    model, _ = small(CLASS_TOKEN)
    with pytest.raises(ValueError, match=r"^blocks is .*; give numbers from 0 to 2, e.g. \[0, 1\] or range\(2\)\.$"):
        swap_attention(model, "vca", blocks=blocks)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("deit_tinny", {}, "model is 'deit_tinny'; did you mean 'deit_tiny'? choose one of "),
        ("deit_tiny", {"attention": "vcaa"}, "attention is 'vcaa'; did you mean 'vca'? choose one of ['agent', "),
        ("deit_tiny", {"attention": None}, "attention is None; choose one of ['agent', "),
        ("deit_tiny", {"attention": {"name": "own", "dwc": True}}, "attention 'own' takes no 'dwc'; it takes []. "),
        ("deit_tiny", {"attention": {"name": "vca", "sofmax": "joint"}}, "takes no 'sofmax'; did you mean 'softmax'?"),
        (
            "deit_tiny",
            {"image_size": 225},
            "which the patches of deit_tiny with attention vca do not divide; choose 224 or 240.",
        ),
        (
            "pvt_tiny",
            {"image_size": 8},
            "image_size is 8, which the patches of pvt_tiny with attention vca do not divide; choose 32.",
        ),
        (
            "swin_tiny",
            {"image_size": 256, "attention": "own"},
            "image_size is 256, which the windows or stripes of swin_tiny with attention own do not divide; choose "
            "224 or 448.",
        ),
        ("swin_tiny", {"image_size": 256}, "choose 224 or 448."),  # the last stage keeps its windows
        ("cswin_tiny", {"image_size": 192}, "choose 96 or 224."),
        ("deit_tiny", {"image_size": "224"}, "image_size is '224'; choose a whole number of at least 1."),
        ("deit_tiny", {"num_classes": 0}, "num_classes is 0; choose a whole number of at least 1."),
        ("deit_tiny", {"drop_path_rate": 1.0}, "drop_path_rate is 1.0; choose a number from 0 to less than 1."),
    ],
)
def test_what_cannot_be_created_is_said(name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        on_meta(name, **{"attention": "vca", **options})


@pytest.mark.parametrize("attention", ["own", "vca"])
@pytest.mark.parametrize("name", TINY)
def test_images_of_another_size_are_refused(name, attention):
    size = 224 if (name, attention) == ("swin_tiny", "own") else 32
    model = create(name, attention, image_size=size)
    for shape in [(1, 3, 2 * size, 2 * size), (1, 3, size, size + 8), (1, 1, size, size), (3, size, size)]:
        said = (
            f"x is {shape}; this model was made for images (B, 3, {size}, {size}): resize them, or make it with another "
            "image_size or in_channels."
        )
        with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
            model(torch.randn(shape))


@pytest.mark.parametrize(
    "build",
    [
        lambda: create("deit_tiny", image_size=32, patch_size=16, depth=1, hidden_size=12, num_heads=2),
        lambda: PVT(image_size=32, depths=(1, 1, 1, 1)),
    ],
    ids=["DeiT, which timm makes", "PVT"],
)
def test_a_compiled_or_exported_network_checks_its_images_too(build):
    model, x = build().eval(), torch.randn(2, 3, 32, 32)
    expected = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected)  # the same operations
    torch._dynamo.reset()
    with pytest.raises(ValueError, match=r"^x is \(2, 3, 64, 64\); this model was made for images \(B, 3, 32, 32\)"):
        torch.compile(model, backend="eager")(torch.randn(2, 3, 64, 64))
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)).module()
    torch.testing.assert_close(exported(x), expected)
    assert exported(torch.randn(5, 3, 32, 32)).shape == (5, 1000)


@pytest.mark.parametrize(("name", "size", "larger"), [("deit_tiny", 32, 64), ("swin_tiny", 224, 448)])
def test_the_own_attention_of_timms_networks_can_be_given_another_size(name, size, larger):
    model = on_meta(name, "own", num_classes=3, image_size=size).eval()
    model.set_input_size(img_size=(larger, larger))
    assert model(torch.empty(1, 3, larger, larger, device="meta")).shape == (1, 3)
    with pytest.raises(ValueError, match=rf"made for images \(B, 3, {larger}, {larger}\)"):
        model(torch.empty(1, 3, size, size, device="meta"))


@pytest.mark.parametrize("name", ["deit_tiny", "swin_tiny"])
def test_layers_that_were_swapped_in_keep_their_size(name):
    model, x = create(name, num_classes=3, image_size=32).eval(), torch.randn(1, 3, 32, 32)
    expected = model(x)
    for network in (model, copy.deepcopy(model)):
        with pytest.raises(
            ValueError, match=r"^set_input_size was called, but .*Transformer has layers of swap_attention"
        ):
            network.set_input_size(img_size=(64, 64))
        assert torch.equal(network(x), expected)
    before = swap_attention(timm.create_model("vit_tiny_patch16_224", img_size=32), "vca", blocks=[])
    before.set_input_size(img_size=(64, 64))  # nothing was swapped


@pytest.mark.parametrize("name", ["swin_tiny", "cswin_tiny"])
@pytest.mark.parametrize("attention", ["own", "vca"])
def test_the_sizes_that_fit_are_those_that_run(name, attention):
    """A size that is refused would be padded by timm, or would not be cut by the stripes."""
    recogniser = MODELS[name]
    fits = [m for m in range(1, 22) if recogniser.fits(32 * m, attention == "own")]
    for m in fits[:4]:
        model = on_meta(name, attention, image_size=32 * m).eval()
        assert model(torch.empty(1, 3, 32 * m, 32 * m, device="meta")).shape == (1, 1000)


def test_without_timm_one_sentence_says_what_to_install(monkeypatch):
    for module in [m for m in sys.modules if m.split(".")[0] == "classify"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="classify needs timm; run `pip install timm`"):
        importlib.import_module("classify").create("deit_tiny")
