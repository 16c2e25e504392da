"""Starting from weights: what is read, that nothing in it runs, and that each change is the one it should be."""

import argparse
import json
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from diffusers import DiTTransformer2DModel
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file

from dit_vca import DiT
from sit_vca import SiT
from vca import sincos_2d
from vca_engine.weights import checkpoint
from vca_engine.weights.adapt import adapt, initialise, rows_by_name
from vca_engine.weights.diffusers import from_diffusers
from vca_engine.weights.files import locate, read_weights

TINY = {"input_size": 8, "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 10}
TABLE = "y_embedder.embedding_table.weight"
NAMES = [f"n{k}" for k in range(10)]


def network(model=DiT, attention="mhsa", **options):
    """A network whose parameters are all random, so that neither its output nor a gate is zero."""
    model = model(**{**TINY, "attention": attention, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def inputs(size=8, num_labels=10):
    return torch.randn(3, 4, size, size), torch.tensor([0.0, 0.4, 0.9]), torch.tensor([0, 2, num_labels])


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def write_run(folder, model, class_names):
    """A run with two checkpoints of which the newer holds `model` as its average, and other weights beside it."""
    record = {"config": {}, "shape": {"image_size": 8, "channels": 4, "class_names": class_names}}
    other = network(class_dropout_prob=0.1 if model.null_class else 0.0)
    for step, average in ((1, other), (2, model)):
        parts = {"model": other.state_dict(), "ema": average.state_dict()}
        checkpoint.save(folder / "checkpoints" / f"step-{step:08d}", step, parts, record)
    return folder


def small_diffusers(**options):
    """A random DiT of diffusers, its embedders the same in all blocks, as in converted weights."""
    model = DiTTransformer2DModel(
        **{"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "norm_eps": 1e-6},
        **{"out_channels": 8, "num_embeds_ada_norm": 10, **options},
    ).eval()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


# ---- reading ----


def test_a_run_a_checkpoint_and_its_file_give_the_averaged_weights_bit_for_bit(tmp_path):
    model = network()
    run = write_run(tmp_path / "run", model, NAMES)
    folder = run / "checkpoints" / "step-00000002"
    for path, kind, names in ((run, "ours", NAMES), (folder, "ours", NAMES)):
        tensors, *rest = read_weights(path)
        assert rest == [kind, names, None]
        assert same(tensors, model.state_dict())
    tensors, *rest = read_weights(str(folder / "ema.safetensors"))
    assert rest == ["safetensors", None, None]
    other = network()
    report = initialise(other, run)
    assert same(other.state_dict(), model.state_dict())
    assert (report.changed, report.missing, report.unused) == ({}, [], [])
    assert str(report) == f"{len(tensors) - 1} of {len(tensors) - 1} tensors loaded"


@pytest.mark.parametrize("wrapper", ["ema", "model", "state_dict", None])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["DiT-XL-2-256x256.pt", "weights.anything"])
def test_torch_files_are_known_by_their_content(tmp_path, wrapper, zipped, name):
    state = network().state_dict()
    content = state
    if wrapper:
        content = {wrapper: state, "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]}, "train_steps": 7}
        options = {
            "model": "SiT-XL/2",
            "prediction": "velocity",
            "image_size": 256,
            "ckpt": None,
            "betas": (0.9, 0.999),
        }
        content["args"] = argparse.Namespace(**options, device=torch.zeros(2), more=[{"a": 1}])
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
    tensors, *rest = read_weights(tmp_path / name)
    assert rest == ["torch", None, options if wrapper else None]
    assert same(tensors, state)


def test_the_averaged_weights_are_preferred_and_wrapping_prefixes_are_dropped(tmp_path):
    average, state = network().state_dict(), network().state_dict()
    wrapped = {f"module._orig_mod.{key}": value for key, value in state.items()}
    torch.save({"model": wrapped, "ema": average}, tmp_path / "both.pt")
    torch.save({"model": wrapped, "ema": None}, tmp_path / "one.pt")
    assert same(read_weights(tmp_path / "both.pt").tensors, average)
    assert same(read_weights(tmp_path / "one.pt").tensors, state)
    save_file(wrapped, tmp_path / "one.safetensors")
    assert same(read_weights(tmp_path / "one.safetensors").tensors, state)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_becomes_float32(tmp_path, dtype, tolerance):
    model, other = network(), network()
    save_file({key: value.to(dtype) for key, value in model.state_dict().items()}, tmp_path / "half")
    initialise(other, tmp_path / "half")
    for key, value in other.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, model.state_dict()[key], rtol=tolerance, atol=1e-6)
    assert torch.equal(other.pos_embed, model.pos_embed)  # not the rounded one


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (self.target, "w"))


def test_no_file_runs_code(tmp_path):
    for zipped in (True, False):
        content = {"model": network().state_dict(), "extra": Bomb(str(tmp_path / "fired"))}
        torch.save(content, tmp_path / "bomb.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=r"bomb.pt' holds a \S*open, and loading that would run its code"):
            read_weights(tmp_path / "bomb.pt")
    torch.save(network(), tmp_path / "module.pt")
    with pytest.raises(
        ValueError, match=r"module.pt' holds a dit_vca.model.DiT, .*; if the file is whole and you trust it, load"
    ):
        read_weights(tmp_path / "module.pt")
    assert not (tmp_path / "fired").exists()


@pytest.mark.parametrize("kind", ["safetensors", "zip", "pickle"])
def test_files_cut_anywhere_end_in_a_sentence(tmp_path, kind):
    file, state = tmp_path / "weights", network().state_dict()
    if kind == "safetensors":
        save_file(state, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=kind == "zip")
    content = file.read_bytes()
    for length in [*range(0, 1000, 7), *range(1000, len(content), len(content) // 50), len(content) - 1]:
        file.unlink()  # and not shortened in place, since memory maps of it may live
        file.write_bytes(content[:length])
        with pytest.raises(
            ValueError, match=r"weights' is (truncated or not a|empty, or neither|damaged, or)|weights' holds a "
        ):
            read_weights(file)


def test_what_holds_no_weights_ends_in_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights at '.*nowhere': there is no such file or folder"):
        read_weights(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no weights; give a run's folder, one of its checkpoints"):
        read_weights(tmp_path)
    (tmp_path / "runs" / "demo" / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(
        ValueError, match=r"runs' holds no weights; it holds the run demo; name one, e.g. .*runs/demo\.$"
    ):
        read_weights(tmp_path / "runs")
    with pytest.raises(FileNotFoundError, match=r"no weights at '.*dem': .*; the nearest there is '.*runs/demo'\."):
        read_weights(tmp_path / "runs" / "dem")
    (tmp_path / "text").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"text' is empty, or neither a safetensors nor a torch file"):
        read_weights(tmp_path / "text")
    for content in ([1, 2], {"model": {"lr": 1}}):
        torch.save(content, tmp_path / "numbers.pt")
        with pytest.raises(
            ValueError, match=r"numbers.pt' holds no state dict, .* under one of ema, model, state_dict"
        ):
            read_weights(tmp_path / "numbers.pt")
    run = write_run(tmp_path / "run", network(), NAMES)
    (run / "checkpoints" / "step-00000002" / "ema.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"the checkpoint lacks '.*ema.safetensors'"):
        read_weights(run)


def test_what_the_hub_cannot_give_ends_in_a_sentence_and_what_it_gives_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def download(name, allow_patterns):
        asked.append(name)
        wanted = ["model_index.json", "transformer/config.json", "transformer/diffusion_pytorch_model.bin", "vae/x.bin"]
        assert not set(wanted) - set(filter_repo_objects(wanted, allow_patterns=allow_patterns))
        assert not list(
            filter_repo_objects(
                ["DiT-XL-2-256x256.pt", "text_encoder/pytorch_model.bin"], allow_patterns=allow_patterns
            )
        )
        if name == "owner/none":
            raise RepositoryNotFoundError("404 Client Error", response=MagicMock())
        if name == "owner/far":
            raise OSError("Name or service\n\nnot known.")
        if name == "owner/offline":
            raise LocalEntryNotFoundError("Cannot find the files.") from OSError("no route\nto host")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("vca_engine.hub.snapshot_download", download)
    model = network()
    model.save_pretrained(tmp_path / "snapshot")
    tensors, kind, names, options = read_weights("facebook/DiT")
    assert same(tensors, model.state_dict())
    assert (kind, names) == ("safetensors", None)
    assert options == {**TINY, "in_channels": 4, "attention": model.attention}  # with every option
    assert locate("snapshot") == Path("snapshot")
    for name, reason in (
        ("owner/none", "has no model of that name, or none that you may see; check the name"),
        ("owner/far", "cannot give it now; check the name, or the network: Name or service not known"),
        ("owner/offline", "cannot be reached, so check the network, or the name: no route to host"),
    ):
        with pytest.raises(
            FileNotFoundError, match=f"'{name}': there is no such .*, and the Hugging Face hub {reason}.$"
        ):
            locate(name)
    assert asked == ["facebook/DiT", "owner/none", "owner/far", "owner/offline"]
    for path in ("snapshot/none", "/nowhere/else", "nowhere", "a/b/c", "./a", "facebook/DiT.pt/"):
        with pytest.raises(FileNotFoundError, match=r"no weights at '.*': there is no such file or folder.$"):
            locate(path)
    assert len(asked) == 4


# ---- diffusers ----


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_converted_weights_of_diffusers_give_its_output(bias):
    theirs = small_diffusers(attention_bias=bias)
    ours = network(attention={"name": "mhsa", "qkv_bias": bias})
    report = adapt(from_diffusers(theirs.state_dict()), ours)
    assert (report.changed, report.missing, report.unused) == ({}, [], [])
    ours.load_state_dict(report.state)
    x_t, y = torch.randn(4, 4, 8, 8), torch.tensor([0, 3, 9, 10])
    zero, t = torch.zeros(4, dtype=torch.long), torch.tensor([1, 57, 500, 999])
    torch.testing.assert_close(ours(x_t, zero, y), theirs(x_t, zero, y).sample, rtol=1e-5, atol=1e-6)
    for block in theirs.transformer_blocks:  # exponents i / 127 in diffusers, i / 128 in the published DiT
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    out = ours(x_t, t, y)
    torch.testing.assert_close(out, theirs(x_t, t, y).sample, rtol=1e-5, atol=5e-6)
    assert (out - ours(x_t, zero, y)).abs().amax((1, 2, 3)).min() > 1e-3  # time, and so its frequencies, matters here


@pytest.mark.parametrize("form", [{}, {"max_shard_size": "20KB"}, {"safe_serialization": False}], ids=str)
def test_folders_of_diffusers_are_read(tmp_path, form):
    theirs = small_diffusers()
    theirs.save_pretrained(tmp_path / "pipeline" / "transformer", **form)
    files = {f.name for f in (tmp_path / "pipeline" / "transformer").iterdir()}
    assert ("diffusion_pytorch_model.safetensors.index.json" in files) == ("max_shard_size" in form)
    assert ("diffusion_pytorch_model.bin" in files) == ("safe_serialization" in form)
    (tmp_path / "pipeline" / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    expected = adapt(from_diffusers(theirs.state_dict()), network()).state
    for path in (tmp_path / "pipeline", tmp_path / "pipeline" / "transformer"):
        assert read_weights(path).kind == "diffusers"
        model = network()
        initialise(model, path)
        assert same(model.state_dict(), expected)
    if not form:  # the bare file is known by its keys, and the class by its older name
        folder = tmp_path / "pipeline" / "transformer"
        assert read_weights(folder / "diffusion_pytorch_model.safetensors").kind == "diffusers"
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "_class_name": "Transformer2DModel"}))
        assert read_weights(folder).kind == "diffusers"


def test_what_diffusers_cannot_give_ends_in_a_sentence(tmp_path):
    tensors = small_diffusers().state_dict()
    tensors["pos_embed.pos_embed"] = torch.zeros(1, 16, 16)  # older versions saved it
    from_diffusers(tensors)
    key = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"
    with pytest.raises(ValueError, match=f"{key} differs from that of another block; a DiT has one embedder for all"):
        from_diffusers({**tensors, key: tensors[key] + 1})
    with pytest.raises(ValueError, match=r"caption_projection.weight is nothing that a DiT has"):
        from_diffusers({**tensors, "caption_projection.weight": torch.zeros(1)})
    lacking = {k: v for k, v in tensors.items() if k != "transformer_blocks.0.attn1.to_k.bias"}
    with pytest.raises(ValueError, match=r"to_q.bias is there, but transformer_blocks.0.attn1.to_k.bias is not"):
        from_diffusers(lacking)

    folder = tmp_path / "dit"
    small_diffusers().save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("*.safetensors"))
    shards[-1].unlink()
    with pytest.raises(FileNotFoundError, match=rf"{shards[-1].name}' is missing"):
        read_weights(folder)
    (folder / "diffusion_pytorch_model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks its weights, diffusion_pytorch_model.safetensors or .bin"):
        read_weights(folder)
    (folder / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(
        ValueError, match=r"holds a UNet2DModel; of diffusers, only a DiTTransformer2DModel can be read"
    ):
        read_weights(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json' is damaged"):
        read_weights(folder)


# ---- classes ----


@pytest.mark.parametrize("dropped", [0.0, 0.1])
@pytest.mark.parametrize("kept", [0.0, 0.1])
@pytest.mark.parametrize("num_classes", [3, 10, 14])
def test_class_rows_and_the_null_row_keep_their_places(dropped, kept, num_classes):
    old, new = network(class_dropout_prob=dropped), network(num_classes=num_classes, class_dropout_prob=kept)
    before = new.state_dict()[TABLE].clone()
    report = adapt(old.state_dict(), new, num_classes=10)
    table, shared = report.state[TABLE], min(10, num_classes)
    assert torch.equal(table[:shared], old.state_dict()[TABLE][:shared])
    assert torch.equal(table[shared:num_classes], before[shared:num_classes])
    if kept:
        assert torch.equal(table[num_classes], old.state_dict()[TABLE][10] if dropped else before[num_classes])
    assert (TABLE in report.loaded) == (num_classes == 10 and dropped == kept)
    if TABLE in report.changed:
        left = max(num_classes - 10, 0) + (kept > dropped)
        expected = f"{shared} of 10 class rows" + " and the null row" * bool(dropped and kept)
        assert report.changed[TABLE] == expected + f"; {left} keep their initial values" * bool(left)


def test_a_table_of_unknown_classes_is_taken_to_have_a_null_row_unless_it_fits_as_it_is():
    old = network().state_dict()
    assert adapt(old, network(num_classes=3)).changed == {TABLE: "3 of 10 class rows and the null row"}
    assert TABLE in adapt(old, network()).loaded
    without = network(class_dropout_prob=0.0)
    report = adapt(without.state_dict(), network(class_dropout_prob=0.0))
    assert torch.equal(report.state[TABLE], without.state_dict()[TABLE])
    assert TABLE in report.loaded
    with pytest.raises(ValueError, match=r"embedding_table.weight has 11 rows, which do not belong to 7 classes"):
        adapt(old, network(), num_classes=7)


def test_rows_go_by_name_where_names_are_shared(tmp_path):
    old = network(class_dropout_prob=0.0)
    run = write_run(tmp_path / "run", old, NAMES)
    rows = old.state_dict()[TABLE]
    new = network(num_classes=3)
    before = new.state_dict()[TABLE].clone()
    report = initialise(new, run, class_names=["n7", "zebra", "n2"])
    assert torch.equal(new.state_dict()[TABLE], torch.stack([rows[7], before[1], rows[2], before[3]]))
    assert report.changed == {TABLE: "2 of 10 class rows; 2 keep their initial values"}
    for names in (None, ["a", "b", "c"]):
        initialise(new, run, class_names=names)
        assert torch.equal(new.state_dict()[TABLE][:3], rows[:3])


@torch.no_grad()
def test_a_network_of_fewer_classes_gives_what_the_old_one_gave():
    old, new = network(), network(num_classes=3)
    new.load_state_dict(adapt(old.state_dict(), new).state)
    x_t, t, _ = inputs()
    out = new(x_t, t, torch.tensor([0, 2, 3]))
    assert torch.equal(out, old(x_t, t, torch.tensor([0, 2, 10])))


# ---- resolution and attention ----


def with_contrast(model, values):
    """Its state dict, all contrast embeddings set to values (a, b) in each channel."""
    state = model.state_dict()
    for key in state:
        if key.endswith("tive_embed"):
            state[key] = values.reshape(1, -1, 1).expand(1, -1, 16).contiguous()
    return state


@pytest.mark.parametrize(("old_size", "new_size"), [(8, 16), (16, 8), (8, 12), (12, 10), (12, (4, 20))])
def test_contrast_embeddings_are_interpolated_and_positions_computed(old_size, new_size):
    old, new = network(attention="vca", input_size=old_size), network(attention="vca", input_size=new_size)
    side, (a, b) = old_size // 4, new.blocks[0].attn.contrast_grid
    constant = adapt(with_contrast(old, torch.full((side, side), 0.7)), new)
    keys = [f"blocks.{i}.attn.{sign}tive_embed" for i in range(2) for sign in ("posi", "nega")]
    assert constant.changed == {key: f"interpolated from {side}x{side} to {a}x{b}" for key in keys}
    assert (constant.missing, constant.unused) == ([], [])
    assert torch.equal(constant.state["pos_embed"][0], sincos_2d(16, new.grid_size))
    rising = adapt(with_contrast(old, torch.arange(side).float().expand(side, side)), new)
    falling = adapt(with_contrast(old, -torch.arange(side).float()[:, None].expand(side, side)), new)
    for key in keys:
        torch.testing.assert_close(constant.state[key], torch.full((1, a * b, 16), 0.7))
        columns = rising.state[key].reshape(a, b, 16)
        torch.testing.assert_close(columns, columns[:1].expand(a, b, 16))
        assert (columns.diff(dim=1) >= 0).all()
        assert columns[:, -1].gt(columns[:, 0]).all()
        rows = falling.state[key].reshape(a, b, 16)
        torch.testing.assert_close(rows, rows[:, :1].expand(a, b, 16))
        assert (rows.diff(dim=0) <= 0).all()
        for values in (columns, -rows):  # the mean of a ramp, from either side symmetric, stays
            torch.testing.assert_close(values.mean(), torch.tensor((side - 1) / 2))
    back = adapt(constant.state, old) if a == b else None
    if back:
        torch.testing.assert_close(back.state[keys[0]], torch.full((1, side * side, 16), 0.7))


def test_shrinking_averages_all_and_doubling_is_bilinear():
    old, half = network(attention="vca", input_size=16), network(attention="vca", input_size=8)
    state, key = with_contrast(old, torch.zeros(4, 4)), "blocks.0.attn.positive_embed"
    for token in range(16):  # every old token has a say, though 2x2 samples without smoothing would miss some
        state[key] = torch.eye(16)[token].reshape(1, 16, 1).expand(1, 16, 16)
        assert adapt(state, half).state[key].max() > 0
    state = with_contrast(half, torch.tensor([[0.0, 4.0], [8.0, 12.0]]))
    grown = adapt(state, old).state[key].reshape(4, 4, 16)[..., 0]
    steps = torch.tensor([0.0, 0.25, 0.75, 1.0])
    torch.testing.assert_close(grown, 8 * steps[:, None] + 4 * steps)


def test_a_contrast_grid_that_is_not_known_ends_in_a_sentence():
    old = network(attention={"name": "vca", "contrast_grid": (1, 3)})
    with pytest.raises(ValueError, match=r"blocks.0.attn.positive_embed has 3 contrast tokens, not a square"):
        adapt(old.state_dict(), network(attention="vca"))


@pytest.mark.parametrize("dwc", [False, True])
def test_mhsa_and_vca_share_what_both_have(dwc):
    mhsa, vca = network(attention={"name": "mhsa", "dwc": dwc}), network(attention="vca")
    shared = mhsa.state_dict().keys() & vca.state_dict().keys()
    extra = {key for key in vca.state_dict() if ".attn." in key} - shared
    assert len(extra) == 2 * (2 + 10 + 2 * (not dwc))
    before = {key: value.clone() for key, value in vca.state_dict().items()}
    report = adapt(mhsa.state_dict(), vca)
    assert (set(report.loaded), set(report.missing)) == (shared - {"pos_embed"}, extra)
    assert (report.changed, report.unused) == ({}, [])
    for key, value in report.state.items():
        assert torch.equal(value, mhsa.state_dict()[key] if key in shared else before[key])
    lines = str(report).splitlines()
    assert lines[0] == f"{len(shared) - 1} of {len(before) - 1} tensors loaded"
    assert lines[1].startswith(
        "  not in the file, so with their initial values: blocks.*.attn.positive_embed, blocks.*.a"
    )
    assert lines[1].count("blocks.*.attn.") == len(extra) / 2
    assert ("blocks.*.attn.dwc.weight" in lines[1]) == (not dwc)
    assert len(lines) == 2

    back = adapt(vca.state_dict(), mhsa)
    assert (set(back.loaded), set(back.unused), back.missing) == (shared - {"pos_embed"}, extra, [])
    assert ("blocks.1.attn.dwc.bias" in back.loaded) == dwc
    assert str(back).splitlines()[1].startswith("  not in the model, so unused: blocks.*.attn.positive_embed, ")


# ---- output channels ----


@torch.no_grad()
def test_the_first_half_of_the_channels_is_what_a_sit_takes_and_gives():
    published = network(SiT, learn_sigma=True)
    model = network(SiT)
    report = adapt(published.state_dict(), model)
    keys = {"final_layer.linear.weight", "final_layer.linear.bias"}
    assert report.changed == dict.fromkeys(keys, "4 of 8 output channels")
    model.load_state_dict(report.state)
    x_t, t, y = inputs()
    torch.testing.assert_close(model(x_t, t, y), published(x_t, t, y), rtol=1e-6, atol=1e-6)

    dit = network()
    with torch.no_grad():
        for key in keys:
            dit.get_parameter(key).zero_()
    report = adapt(model.state_dict(), dit)
    assert report.changed == dict.fromkeys(keys, "4 of 4 output channels; 4 keep their initial values")
    dit.load_state_dict(report.state)
    mean, variance = dit(x_t, t, y).chunk(2, dim=1)
    torch.testing.assert_close(mean, model(x_t, t, y), rtol=1e-6, atol=1e-6)
    assert torch.equal(variance, torch.zeros_like(variance))


# ---- what does not fit ----


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"hidden_size": 32}, r"x_embedder.proj.weight is \(16, 4, 2, 2\) in the file and \(32, .*; .* another width"),
        ({"mlp_ratio": 2.0}, r"blocks.0.mlp.fc1.weight is \(64, 16\) in the file and \(32, 16\) in the model"),
        ({"patch_size": 4}, r"x_embedder.proj.weight is \(16, 4, 2, 2\) .* another patch size or number of channels"),
        (
            {"in_channels": 3},
            r"x_embedder.proj.weight is .* \(16, 3, 2, 2\) in the model; .* another patch size or num",
        ),
        ({"out_channels": 5}, r"final_layer.linear.weight is \(32, 16\) in the file and \(20, 16\) .* number of chan"),
        ({"depth": 1}, r"adaLN_modulation.1.weight is there for 2 blocks, and the model has 1; .* another depth"),
        ({"depth": 3}, r"adaLN_modulation.1.weight is there for 2 blocks, and the model has 3; .* another depth"),
    ],
    ids=str,
)
def test_weights_of_another_size_end_in_a_sentence(tmp_path, options, sentence):
    torch.save(network().state_dict(), tmp_path / "w.pt")
    model = network(**options)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"the weights at '.*w.pt' do not fit: .*{sentence}"):
        initialise(model, tmp_path / "w.pt")
    assert same(model.state_dict(), before)


def test_weights_of_something_else_and_broken_ones_end_in_a_sentence():
    vit = {"blocks.0.attn.qkv.weight": torch.zeros(48, 16), "cls_token": torch.zeros(1, 1, 16)}
    for tensors in ({}, {"conv.weight": torch.zeros(1)}, vit):
        with pytest.raises(ValueError, match=r"it holds no weights of a DiT or SiT"):
            adapt(tensors, network())
    for value in (float("nan"), float("inf")):
        state = network().state_dict()
        for key in ("blocks.1.mlp.fc1.bias", "final_layer.linear.bias"):
            state[key] = torch.full_like(state[key], value)
        with pytest.raises(ValueError, match=r"^blocks.1.mlp.fc1.bias holds values that are not finite"):
            adapt(state, network())


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_file_of_weights_of_a_run_that_has_diverged_is_named(tmp_path, name):
    state = network().state_dict()
    state["blocks.1.mlp.fc1.bias"] = torch.full_like(state["blocks.1.mlp.fc1.bias"], torch.nan)
    (save_file if name.endswith("safetensors") else torch.save)(state, tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}' holds values that are not finite in blocks\.1\.mlp\.fc1\.bias: "):
        read_weights(tmp_path / name)


def test_classes_go_by_names_that_look_the_same():
    """An accented letter as one character, and as two; the first of names that stand twice."""
    assert rows_by_name(["caf\u00e9", "b", "b"], ["b", "x", "cafe\u0301"]) == [(1, 0), (0, 2)]
