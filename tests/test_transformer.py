"""The transformer that DiT and SiT share: published names and sizes, tables and blocks against plain formulas."""

import math

import pytest
import torch

from dit_vca import DiT
from sit_vca import SiT
from vca import ATTENTIONS, SIZES, LabelEmbedding, TimestepEmbedding, Transformer, parse_size, sincos_2d
from vca_engine.training.cost import multiply_adds
from vca_engine.training.dry_run import count_saved

TINY = {"input_size": (4, 6), "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 5}


def randomise(model):
    """Every parameter random, in float64, so that neither the output nor a gate is zero."""
    model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def on_meta(model, **options):
    with torch.device("meta"):
        return model(**options)


def published_keys(depth, attention_keys):
    layers = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2"]
    layers += ["final_layer.linear", "final_layer.adaLN_modulation.1"]
    for i in range(depth):
        layers += [f"blocks.{i}.{name}" for name in ("mlp.fc1", "mlp.fc2", "adaLN_modulation.1")]
    keys = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    keys |= {f"blocks.{i}.attn.{key}" for i in range(depth) for key in attention_keys}
    return keys | {"y_embedder.embedding_table.weight", "pos_embed"}


MHSA_KEYS = {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
VCA_KEYS = MHSA_KEYS | {"positive_embed", "negative_embed", "dwc.weight", "dwc.bias"}
VCA_KEYS |= {f"stage{i}.lambda_{name}" for i in (1, 2) for name in ("q1", "k1", "q2", "k2")}
VCA_KEYS |= {f"stage{i}.norm.weight" for i in (1, 2)}


@pytest.mark.parametrize("model", [DiT, SiT])
@pytest.mark.parametrize(("attention", "keys"), [("mhsa", MHSA_KEYS), ("vca", VCA_KEYS)])
def test_state_dict_keys_are_the_published_ones(model, attention, keys):
    state = on_meta(model, depth=3, attention={"name": attention}).state_dict()
    assert set(state) == published_keys(3, keys)


def test_state_dict_shapes_are_the_published_ones():
    state = on_meta(DiT, **parse_size("S/2"), attention="mhsa").state_dict()
    expected = {
        "x_embedder.proj.weight": (384, 4, 2, 2),
        "pos_embed": (1, 256, 384),
        "t_embedder.mlp.0.weight": (384, 256),
        "t_embedder.mlp.2.weight": (384, 384),
        "y_embedder.embedding_table.weight": (1001, 384),
        "blocks.11.attn.qkv.weight": (3 * 384, 384),
        "blocks.11.attn.proj.weight": (384, 384),
        "blocks.11.mlp.fc1.weight": (4 * 384, 384),
        "blocks.11.mlp.fc2.weight": (384, 4 * 384),
        "blocks.11.adaLN_modulation.1.weight": (6 * 384, 384),
        "final_layer.adaLN_modulation.1.weight": (2 * 384, 384),
        "final_layer.linear.weight": (2 * 2 * 8, 384),
    }
    assert {key: tuple(state[key].shape) for key in expected} == expected


def parameter_count(*, dim, depth, patch, channels=4, out_channels, num_rows=1001, mlp_ratio=4):
    """The weights and biases of every Linear of the architecture, counted from its description."""

    def linear(inputs, outputs):
        return inputs * outputs + outputs

    embedders = linear(patch**2 * channels, dim) + linear(256, dim) + linear(dim, dim) + num_rows * dim
    attention = linear(dim, 3 * dim) + linear(dim, dim)
    mlp = linear(dim, mlp_ratio * dim) + linear(mlp_ratio * dim, dim)
    final = linear(dim, 2 * dim) + linear(dim, patch**2 * out_channels)
    return embedders + depth * (attention + mlp + linear(dim, 6 * dim)) + final


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("size", "dim", "depth", "num_heads", "millions"),
    [("S", 384, 12, 6, 33), ("B", 768, 12, 12, 130), ("L", 1024, 24, 16, 458), ("XL", 1152, 28, 16, 675)],
)
def test_parameter_counts_of_the_published_sizes(size, dim, depth, num_heads, millions):
    dit = on_meta(DiT, **parse_size(f"{size}/2"), attention="mhsa")
    sit = on_meta(SiT, **parse_size(f"{size}/2"), attention="mhsa")
    published_sit = on_meta(SiT, **parse_size(f"{size}/2"), attention="mhsa", learn_sigma=True)
    assert count(dit) == parameter_count(dim=dim, depth=depth, patch=2, out_channels=8)
    assert count(sit) == parameter_count(dim=dim, depth=depth, patch=2, out_channels=4)
    assert count(published_sit) == count(dit)
    assert abs(count(dit) / 1e6 - millions) < 0.6  # the paper's table 1, rounded there
    assert dit.blocks[0].attn.num_heads == num_heads


SMALL_B4 = {"dim": 768, "depth": 12, "patch": 4, "out_channels": 4}


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ({}, {}),
        ({"hidden_size": 96}, {"dim": 96}),
        ({"depth": 3}, {"depth": 3}),
        ({"num_heads": 8}, {}),
        ({"patch_size": 8}, {"patch": 8}),
        ({"mlp_ratio": 2.0}, {"mlp_ratio": 2}),
        ({"in_channels": 3}, {"channels": 3, "out_channels": 3}),
        ({"out_channels": 7}, {"out_channels": 7}),
        ({"num_classes": 10}, {"num_rows": 11}),
        ({"class_dropout_prob": 0.0}, {"num_rows": 1000}),
    ],
    ids=str,
)
def test_every_size_can_be_overridden_alone(override, changed):
    model = on_meta(Transformer, **{**parse_size("B/4"), "attention": "mhsa", **override})
    assert count(model) == parameter_count(**{**SMALL_B4, **changed})
    assert model.blocks[0].attn.num_heads == override.get("num_heads", 12)
    assert model.grid_size == (32 // model.patch_size,) * 2


@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize(
    ("name", "depth", "dim", "num_heads"),
    [("S", 12, 384, 6), ("B", 12, 768, 12), ("L", 24, 1024, 16), ("XL", 28, 1152, 16)],
)
def test_parse_size_gives_the_published_sizes(name, depth, dim, num_heads, patch):
    expected = {"hidden_size": dim, "depth": depth, "num_heads": num_heads, "patch_size": patch}
    assert parse_size(f"{name}/{patch}") == expected
    assert set(SIZES) == {"S", "B", "L", "XL"}


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        ("S2", r"model.size is 'S2'; write SIZE/PATCH with SIZE in \['B', 'L', 'S', 'XL'\]"),
        ("S/0", r"model.size is 'S/0'; write SIZE/PATCH"),
        ("S/-2", r"model.size is 'S/-2'; write SIZE/PATCH"),
        ("S/2 ", r"model.size is 'S/2 '; write SIZE/PATCH"),
        ("/2", r"model.size is '/2'; write SIZE/PATCH"),
        ("XXL/2", r"model.size is 'XXL'; did you mean 'XL'\? choose one of \['B', 'L', 'S', 'XL'\]"),
        ("H/2", r"model.size is 'H'; choose one of"),
    ],
)
def test_parse_size_refuses_what_is_no_size(size, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse_size(size)


@pytest.mark.parametrize(("dim", "grid"), [(16, (3, 5)), (8, (4, 1)), (4, (2, 2))])
def test_position_table_equals_a_loop(dim, grid):
    table = sincos_2d(dim, grid)
    assert table.shape == (grid[0] * grid[1], dim)
    for row in range(grid[0]):
        for column in range(grid[1]):
            expected = []
            for place in (column, row):  # width first
                frequencies = [10000 ** (-2 * i / (dim / 2)) for i in range(dim // 4)]
                expected += [math.sin(place * f) for f in frequencies] + [math.cos(place * f) for f in frequencies]
            torch.testing.assert_close(table[row * grid[1] + column], torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("t", [0.0, 1e-3, 0.37, 1.0, 1, 500, 999])
def test_time_embedding_equals_a_loop(t):
    embedding = TimestepEmbedding(256)
    with torch.no_grad():
        for linear in (embedding.mlp[0], embedding.mlp[2]):
            linear.weight.copy_(torch.eye(256))
            linear.bias.zero_()
    angles = [t * 10000 ** (-i / 128) for i in range(128)]
    features = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
    expected = torch.tensor([[f / (1 + math.exp(-f)) for f in features]])  # Linear, SiLU, Linear with identity weights
    tolerance = 1e-6 if t <= 1 else 1e-4
    torch.testing.assert_close(embedding(torch.tensor([t])), expected, rtol=0, atol=tolerance)


def plain_transformer(state, x_t, t, y, *, patch, grid, num_heads, depth, out_channels):
    """The published network with multi-head self-attention, written from its description, one image at a time."""

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def silu(x):
        return x / (1 + torch.exp(-x))

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def layer_norm(x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def attend(name, x):
        q, k, v = linear(f"{name}.qkv", x).split(x.shape[-1], dim=-1)
        heads = []
        for q_h, k_h, v_h in zip(*(part.chunk(num_heads, dim=-1) for part in (q, k, v)), strict=True):
            weights = torch.exp(q_h @ k_h.T / math.sqrt(q_h.shape[-1]))
            heads.append(weights @ v_h / weights.sum(-1, keepdim=True))
        return linear(f"{name}.proj", torch.cat(heads, dim=-1))

    images = []
    for image, time, label in zip(x_t, t, y, strict=True):
        kernel = state["x_embedder.proj.weight"]
        tokens = []
        for r in range(grid[0]):
            for c in range(grid[1]):
                cut = image[:, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch]
                tokens.append((kernel * cut).sum((1, 2, 3)) + state["x_embedder.proj.bias"])
        x = torch.stack(tokens) + state["pos_embed"][0]

        angles = [float(time) * 10000 ** (-i / 128) for i in range(128)]
        features = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=x.dtype)
        c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", features)))
        c = c + state["y_embedder.embedding_table.weight"][label]

        for i in range(depth):
            parts = linear(f"blocks.{i}.adaLN_modulation.1", silu(c)).chunk(6)
            shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = parts
            x = x + gate_attn * attend(f"blocks.{i}.attn", layer_norm(x) * (1 + scale_attn) + shift_attn)
            hidden = linear(f"blocks.{i}.mlp.fc1", layer_norm(x) * (1 + scale_mlp) + shift_mlp)
            x = x + gate_mlp * linear(f"blocks.{i}.mlp.fc2", gelu(hidden))

        shift, scale = linear("final_layer.adaLN_modulation.1", silu(c)).chunk(2)
        x = linear("final_layer.linear", layer_norm(x) * (1 + scale) + shift)

        out = torch.zeros(out_channels, grid[0] * patch, grid[1] * patch, dtype=x.dtype)
        for n, token in enumerate(x):
            for k, value in enumerate(token):
                row, column, channel = k // (patch * out_channels), k // out_channels % patch, k % out_channels
                out[channel, n // grid[1] * patch + row, n % grid[1] * patch + column] = value
        images.append(out)
    return torch.stack(images)


@pytest.mark.parametrize("depth", [1, 3])
@torch.no_grad()
def test_the_network_equals_a_plain_reimplementation(depth):
    model = randomise(DiT(**{**TINY, "depth": depth, "in_channels": 3, "attention": "mhsa"}))
    x_t = torch.randn(3, 3, 4, 6, dtype=torch.float64)
    t, y = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64), torch.tensor([0, 4, 5])
    expected = plain_transformer(
        model.state_dict(), x_t, t, y, patch=2, grid=(2, 3), num_heads=2, depth=depth, out_channels=6
    )
    torch.testing.assert_close(model(x_t, t, y), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [(4, 4), (4, 6), (8, 2)])
def test_unpatchify_inverts_a_patch_embedding_with_identity_weights(size):
    p, channels = 2, 3
    model = Transformer(
        input_size=size, patch_size=p, in_channels=channels, hidden_size=p * p * channels, depth=0, num_heads=1
    )
    with torch.no_grad():
        model.x_embedder.proj.weight.zero_()
        for row in range(p):
            for column in range(p):
                for channel in range(channels):
                    model.x_embedder.proj.weight[(row * p + column) * channels + channel, channel, row, column] = 1
    image = torch.randn(2, channels, *size)
    torch.testing.assert_close(model.unpatchify(model.x_embedder(image)), image, rtol=0, atol=1e-6)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize(("network", "out_channels"), [(DiT, 8), (SiT, 4)])
@torch.no_grad()
def test_the_output_is_zero_at_first_and_depends_on_every_input_later(network, out_channels, attention):
    model = network(**TINY, attention=attention).eval()
    x_t, t, y = torch.randn(2, 4, 4, 6), torch.tensor([0.3, 0.8]), torch.tensor([1, 5])
    assert torch.equal(model(x_t, t, y), torch.zeros(2, out_channels, 4, 6))
    randomise(model)
    x_t, t = x_t.double(), t.double()
    out = model(x_t, t, y)
    assert out.shape == (2, out_channels, 4, 6)
    for other in (model(x_t + 1, t, y), model(x_t, t + 0.1, y), model(x_t, t, y - 1)):
        assert (out - other).abs().amax((1, 2, 3)).min() > 1e-6
    torch.testing.assert_close(model(x_t[1:], t[1:], y[1:]), out[1:])  # no image sees another


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_initial_weights_follow_the_published_scheme(attention):
    model = Transformer(hidden_size=96, depth=2, num_heads=4, num_classes=200, attention=attention)
    zeros = ["final_layer.linear", "final_layer.adaLN_modulation.1"]
    zeros += [f"blocks.{i}.adaLN_modulation.1" for i in range(2)]
    normal = ["t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.embedding_table"]
    xavier = ["x_embedder.proj"]
    xavier += [f"blocks.{i}.{name}" for i in range(2) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    for name in zeros + normal + xavier:
        module = model.get_submodule(name)
        weight, bias = module.weight.detach().flatten(1), getattr(module, "bias", None)
        assert bias is None or not bias.any(), name
        if name in zeros:
            assert not weight.any(), name
        elif name in normal:
            assert weight.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            bound = math.sqrt(6 / sum(weight.shape))
            assert 0.99 * bound < weight.abs().max() <= bound * (1 + 1e-6), name
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name


def test_layer_index_of_the_attention_is_the_index_of_the_block():
    model = Transformer(**{**TINY, "depth": 4}, attention="vca")
    for i, block in enumerate(model.blocks):
        assert block.attn.stage1.lambda_init == pytest.approx(0.8 - 0.6 * math.exp(-0.3 * i))


def test_the_position_table_is_never_trained_but_saved():
    model = Transformer(**TINY)
    assert "pos_embed" not in dict(model.named_parameters())
    torch.testing.assert_close(model.state_dict()["pos_embed"][0], sincos_2d(16, (2, 3)))


@pytest.mark.parametrize("probability", [0.1, 0.6])
@torch.no_grad()
def test_labels_are_dropped_in_training_only_and_with_their_probability(probability):
    embedding = LabelEmbedding(10, 4, probability)
    embedding.embedding_table.weight.copy_(torch.arange(11.0)[:, None].expand(11, 4))  # row y is filled with y
    y = torch.arange(10).repeat(2000)
    kept = embedding.eval()(y)[:, 0]
    assert torch.equal(kept, y.float())
    seen = embedding.train()(y)[:, 0]
    dropped = seen == 10
    assert torch.equal(seen[~dropped], y[~dropped].float())
    deviation = math.sqrt(probability * (1 - probability) / len(y))
    assert abs(dropped.float().mean().item() - probability) < 4 * deviation


def test_labels_are_dropped_by_given_numbers():
    embedding = LabelEmbedding(10, 4, 0.25)
    y = torch.tensor([3, 4, 5, 6])
    assert embedding.drop(y, torch.tensor([0.0, 0.249, 0.25, 0.9])).tolist() == [10, 10, 5, 6]
    assert LabelEmbedding(10, 4, 0.0).drop(y, torch.zeros(4)).tolist() == y.tolist()


@pytest.mark.parametrize("attention", ["mhsa", "vca"])
def test_gradient_checkpointing_changes_the_memory_and_nothing_else(attention):
    model = randomise(SiT(**TINY, attention=attention)).eval()
    x_t, t, y = torch.randn(2, 4, 4, 6, dtype=torch.float64), torch.rand(2), torch.tensor([0, 3])
    kept, gradients = [], []
    for enabled in (False, True):
        model.grad_checkpointing = enabled
        model.zero_grad()
        with count_saved(model) as saved:
            loss = model(x_t, t, y).square().sum()
        kept.append(saved.num_bytes)
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert kept[1] < kept[0] / 3
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
    with torch.no_grad():
        torch.testing.assert_close(model(x_t, t, y).square().sum(), loss.detach())


PUBLISHED_GFLOPS = {"S/2": 6.06, "B/2": 23.01, "L/2": 80.71, "XL/2": 118.64}


@pytest.mark.parametrize("size", PUBLISHED_GFLOPS)
def test_multiply_adds_are_the_gflops_of_the_paper(size):
    """Table of arXiv:2212.09748, where a multiply-add counts as one."""
    with torch.device("meta"):
        model = DiT(input_size=32, attention="mhsa", **parse_size(size))
    assert multiply_adds(model) / 1e9 == pytest.approx(PUBLISHED_GFLOPS[size], rel=1e-3)


def test_bytes_kept_for_the_backward_pass_are_counted_once():
    """Of x W + b: the input. Of exp: its output. A view of something counted costs nothing."""
    linear, x = torch.nn.Linear(6, 5), torch.randn(7, 6)
    with count_saved(linear) as saved:
        linear(x).sum()
    assert saved.num_bytes == x.nbytes
    with count_saved(linear) as saved:
        y = linear(x).exp()
        (y[:3] * y[3:6]).sum()
    assert saved.num_bytes == x.nbytes + y.nbytes


@torch.no_grad()
def test_the_null_class_is_the_row_after_the_last_label():
    model = randomise(DiT(**TINY, class_dropout_prob=1.0))
    assert model.null_class == 5
    assert model.y_embedder.embedding_table.num_embeddings == 6
    x_t, t = torch.randn(2, 4, 4, 6, dtype=torch.float64), torch.tensor([3, 700])
    labelled, null = model(x_t, t, torch.tensor([0, 4])), model(x_t, t, torch.tensor([5, 5]))
    assert (labelled - null).abs().max() > 1e-3
    torch.testing.assert_close(model.train()(x_t, t, torch.tensor([0, 4])), null)  # here every label is dropped


@torch.no_grad()
def test_without_class_dropout_there_is_no_null_row():
    model = randomise(DiT(**TINY, class_dropout_prob=0.0))
    assert model.null_class is None
    assert model.y_embedder.embedding_table.num_embeddings == 5
    y = torch.arange(5).repeat(100)
    assert torch.equal(model.y_embedder.train()(y), model.y_embedder.eval()(y))


@torch.no_grad()
def test_learn_sigma_drops_the_second_half_of_the_channels():
    published = randomise(SiT(**TINY, learn_sigma=True))
    state = published.state_dict()
    assert state["final_layer.linear.weight"].shape[0] == 2 * 2 * 8
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):  # rows are (row, column, channel)
        state[name] = state[name].unflatten(0, (4, 8))[:, :4].flatten(0, 1)
    model = SiT(**TINY).double().eval()
    model.load_state_dict(state)
    x_t, t, y = torch.randn(2, 4, 4, 6, dtype=torch.float64), torch.tensor([0.1, 0.9]), torch.tensor([2, 5])
    out = published(x_t, t, y)
    assert out.shape == x_t.shape
    torch.testing.assert_close(out, model(x_t, t, y))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"input_size": (6, 5)}, r"input of 6x5 cannot be cut into patches of 2x2"),
        ({"input_size": 9}, r"input of 9x9 cannot be cut into patches of 2x2"),
        ({"num_classes": 0}, r"num_classes is 0; .* at least 1"),
        ({"num_heads": 3}, r"hidden_size 16 is not a multiple of num_heads 3"),
        ({"hidden_size": 18}, r"hidden_size is 18; .* multiple of 4"),
        ({"attention": "mhas"}, r"model.attention.name is 'mhas'; did you mean 'mhsa'\?"),
        ({"attention": {"name": "mhsa", "dcw": True}}, r"model.attention 'mhsa' takes no 'dcw'; did you mean 'dwc'\?"),
    ],
)
def test_sizes_that_do_not_fit_end_in_a_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Transformer(**{**TINY, **options})


@pytest.mark.parametrize("shape", [(2, 4, 6, 4), (2, 3, 4, 6), (2, 4, 24)])
def test_an_input_of_another_shape_ends_in_a_sentence(shape):
    model = Transformer(**TINY)
    with pytest.raises(ValueError, match=r"x_t is \(2, .*; this model takes \(B, 4, 4, 6\)"):
        model(torch.zeros(shape), torch.zeros(2), torch.zeros(2, dtype=torch.long))
