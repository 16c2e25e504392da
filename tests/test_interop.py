"""Out of a state dict its network, out of a run a folder for diffusers, and models to the hub and back."""

import copy
import json
from types import MappingProxyType

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from huggingface_hub import ModelCard
from test_weights import NAMES, TABLE, TINY, network, same, small_diffusers

from dit_vca import Diffusion, DiT
from export import main
from sit_vca import SiT
from vca import SIZES, Transformer
from vca_engine.config.schema import Config, ModelConfig, to_dict
from vca_engine.sampling.model_card import model_card
from vca_engine.weights import checkpoint
from vca_engine.weights.adapt import initialise
from vca_engine.weights.architecture import keywords_of, process_of
from vca_engine.weights.diffusers import diffusers_config, from_diffusers, scheduler_config, to_diffusers

# ---- what a state dict says ----

NETWORKS = [
    {"input_size": 8, "hidden_size": 16, "depth": 2, "num_heads": 2},
    {
        "input_size": 12,
        "hidden_size": 24,
        "depth": 1,
        "num_heads": 3,
        "patch_size": 4,
        "in_channels": 1,
        "num_classes": 3,
    },
    {"input_size": 8, "hidden_size": 16, "depth": 2, "num_heads": 4, "mlp_ratio": 2.7, "class_dropout_prob": 0.0},
    {"input_size": (4, 8), "hidden_size": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 1 / 3, "out_channels": 5},
    {"input_size": 8, "hidden_size": 16, "depth": 2, "num_heads": 2, "attention": {"name": "mhsa", "qkv_bias": False}},
    {
        "input_size": 8,
        "hidden_size": 16,
        "depth": 2,
        "num_heads": 2,
        "attention": {"name": "mhsa", "qk_norm": True, "dwc": True},
    },
]


@torch.no_grad()
@pytest.mark.parametrize("keywords", NETWORKS, ids=range(len(NETWORKS)))
@pytest.mark.parametrize("kind", [Transformer, DiT, SiT])
def test_a_state_dict_gives_the_network_that_gives_its_outputs(kind, keywords):
    model = network(kind, **{**keywords, "attention": keywords.get("attention", "mhsa")})
    given = {"num_heads": keywords["num_heads"], "num_classes": model.num_classes}
    if not isinstance(keywords["input_size"], int):
        given["input_size"] = keywords["input_size"]
    found = keywords_of(model.state_dict(), **given)
    other = Transformer(**found).eval()
    assert other.load_state_dict(model.state_dict()) is not None
    assert (other.null_class is None) == (model.null_class is None)
    x_t = torch.randn(2, model.in_channels, *model.input_size)
    t, y = torch.tensor([0.2, 7.0]), torch.tensor([0, 2])
    assert torch.equal(other(x_t, t, y), Transformer.forward(model, x_t, t, y))
    without = {key: value for key, value in model.state_dict().items() if key != "pos_embed"}
    assert keywords_of(without, **{**given, "input_size": keywords["input_size"]}) == found


@pytest.mark.parametrize("size", SIZES)
def test_the_heads_of_published_sizes_are_known(size):
    with torch.device("meta"):
        model = DiT(**SIZES[size], attention="mhsa", patch_size=4)
    found = keywords_of(model.state_dict())
    expected = {**SIZES[size], "input_size": 32, "patch_size": 4, "num_classes": 1000, "class_dropout_prob": 0.1}
    expected |= {"in_channels": 4, "out_channels": 8, "mlp_ratio": 4.0, "attention": {"name": "mhsa"}}
    assert found == expected


def test_the_mlp_ratio_gives_its_width_whatever_the_rounding():
    for dim in range(4, 200, 4):
        for rows in range(1, 4 * dim, 3):
            state = {"blocks.0.mlp.fc1.weight": torch.empty(rows, dim, device="meta")}
            state |= {"x_embedder.proj.weight": torch.empty(dim, 4, 2, 2, device="meta"), TABLE: torch.empty(3, 1)}
            state |= {"final_layer.linear.weight": torch.empty(16, dim, device="meta")}
            state |= {"blocks.0.attn.qkv.weight": torch.empty(1), "blocks.0.attn.qkv.bias": torch.empty(1)}
            assert int(dim * keywords_of(state, input_size=8, num_heads=1)["mlp_ratio"]) == rows


def test_what_cannot_be_seen_has_to_be_said():
    state = network().state_dict()
    with pytest.raises(
        ValueError, match=r"width 16 and 2 blocks are none of the sizes S, B, L, XL, .*; give num_heads"
    ):
        keywords_of(state)
    without = {key: value for key, value in state.items() if key != "pos_embed"}
    with pytest.raises(ValueError, match=r"there is no pos_embed, .*; give input_size"):
        keywords_of(without, num_heads=2)
    with pytest.raises(ValueError, match=r"pos_embed has 8 tokens, which are not a square; give input_size"):
        keywords_of(network(input_size=(4, 8)).state_dict(), num_heads=2)
    with pytest.raises(ValueError, match=r"input_size is 16, but pos_embed has 16 tokens, of 2x2"):
        keywords_of(state, num_heads=2, input_size=16)
    with pytest.raises(ValueError, match=r"table.weight has 11 rows, which do not belong to 7 classes"):
        keywords_of(state, num_heads=2, num_classes=7)
    for attention in ("vca", "differential"):
        with pytest.raises(
            ValueError, match=r"blocks.0.attn.\S+ is of another attention than mhsa; .* the run's folder"
        ):
            keywords_of(network(attention=attention).state_dict(), num_heads=2)
    with pytest.raises(ValueError, match=r"no weights of a DiT or SiT: there is no x_embedder"):
        keywords_of({"weight": torch.zeros(1)})


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_training_tells_a_sit_from_a_dit_of_the_same_shapes(patch_size):
    """One step of each, with their own losses, from the zeros that they begin with."""
    options = {**TINY, "attention": "mhsa", "patch_size": patch_size}
    models = {"flow": SiT(**options, learn_sigma=True), "diffusion": DiT(**options)}
    x, y = torch.randn(4, 4, 8, 8), torch.arange(4)
    for process, model in models.items():
        with pytest.raises(ValueError, match=r"final_layer.linear is all zero, so the weights are untrained"):
            process_of(model.state_dict())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        loss = Diffusion().loss(model, x, y) if process == "diffusion" else (model(x, torch.rand(4), y) - x).square()
        loss.mean().backward()
        optimizer.step()
        assert process_of({key: value.half() for key, value in model.state_dict().items()}) == process
    assert {k: v.shape for k, v in models["flow"].state_dict().items()} == {
        k: v.shape for k, v in models["diffusion"].state_dict().items()
    }
    assert process_of(network(SiT).state_dict()) == "flow"
    with pytest.raises(ValueError, match=r"take 4 channels and give 5; a SiT gives 4 or 8, a DiT 8"):
        process_of(network(out_channels=5).state_dict())


# ---- diffusers ----


@pytest.mark.parametrize("options", [{}, {"attention_bias": False}, {"patch_size": 4, "in_channels": 3}])
def test_the_two_conversions_are_inverse(options):
    theirs = small_diffusers(**options).state_dict()
    assert "pos_embed.pos_embed" not in theirs  # a buffer that is not saved
    assert same(to_diffusers(from_diffusers(theirs)), theirs)
    ours = network().state_dict()
    table = ours.pop("pos_embed")
    assert same(from_diffusers(to_diffusers(ours)), ours)
    assert same(to_diffusers({**ours, "pos_embed": table}), to_diffusers(ours))


def test_a_config_builds_the_model_that_takes_the_weights_and_has_its_position_table():
    for options in (
        {},
        {"num_classes": 1, "class_dropout_prob": 0.0},
        {"patch_size": 1, "in_channels": 3, "hidden_size": 24},
    ):
        model = network(**options)
        theirs = DiTTransformer2DModel(**diffusers_config(model))
        theirs.load_state_dict(to_diffusers(model.state_dict()))
        torch.testing.assert_close(theirs.pos_embed.pos_embed, model.pos_embed, rtol=0, atol=1e-6)


def test_what_diffusers_cannot_be_ends_in_a_sentence():
    for model, reason in (
        (network(SiT), "a SiT cannot be a DiTTransformer2DModel"),
        (network(attention="vca"), "diffusers' DiT has no VisualContrastAttention, only attention mhsa"),
        (network(attention={"name": "mhsa", "dwc": True}), "without its options dwc and qk_norm"),
        (network(attention={"name": "mhsa", "qk_norm": True}), "without its options dwc and qk_norm"),
        (network(mlp_ratio=2), "an MLP of 4 times its width; that of this model is 32/16"),
        (network(input_size=(4, 8)), "square inputs; this model takes 4x8"),
    ):
        with pytest.raises(ValueError, match=reason):
            diffusers_config(model)
    with pytest.raises(ValueError, match=r"positive_embed is nothing that a DiTTransformer2DModel has"):
        to_diffusers({"blocks.0.attn.positive_embed": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"no weights of a DiT: there are no blocks"):
        to_diffusers({})


@pytest.mark.parametrize("betas", ["linear", "cosine"])
@pytest.mark.parametrize("num_timesteps", [1000, 400])
def test_the_scheduler_has_the_noise_of_the_process(betas, num_timesteps):
    process = Diffusion(betas=betas, num_timesteps=num_timesteps)
    config = scheduler_config(process)
    assert ("trained_betas" in config) == (betas == "cosine")
    scheduler = DDIMScheduler(**config)
    expected = torch.cumprod(1 - process.betas, 0)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), expected, rtol=1e-3, atol=1e-9)
    scheduler.set_timesteps(num_timesteps // 20)
    assert scheduler.timesteps.tolist() == list(range(num_timesteps - 1, 0, -20))


def write_run(folder, model, *, codec=None, process=None, options=None, names=NAMES, size=16):
    """A run whose newest checkpoint has `model` as its average, and an autoencoder of factor 2."""
    vae = folder.parent / "vae"
    if not vae.exists():
        AutoencoderKL(
            block_out_channels=(4, 4), norm_num_groups=2, layers_per_block=1, sample_size=16,
            down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        ).save_pretrained(vae)  # fmt: skip
    options = {
        "patch_size": 2,
        "hidden_size": 16,
        "depth": 2,
        "num_heads": 2,
        "attention": {"name": "mhsa"},
        **(options or {}),
    }
    config = Config(
        run_dir=str(folder),
        process=process or {"name": "diffusion"},
        data={"name": "folder", "images": "/home/me/private/cats", "image_size": size},
        codec=codec or {"name": "vae", "path": str(vae)},
        model=ModelConfig(**options),
    )
    shape = {"image_size": size, "channels": 3, "class_names": names}
    record = {
        "config": to_dict(config),
        "shape": shape,
        "codec": {"kind": "AutoencoderKL", "weights": "0123456789abcdef" * 4},
    }
    parts = {"ema": model.state_dict(), "model": network().state_dict()}
    checkpoint.save(
        folder / "checkpoints" / "step-00000002", 2, parts, {**record, "num_images": 1234, **checkpoint.versions()}
    )
    return folder


@torch.no_grad()
@pytest.mark.parametrize("num_classes", [3, 1000])
def test_an_exported_run_draws_in_diffusers_what_the_formula_gives(tmp_path, capsys, num_classes):
    """DDIM in two steps by hand, with our network and guidance, against `DiTPipeline` with the frequencies set right."""
    names = [f"kind {k}" for k in range(num_classes)]
    model = network(num_classes=num_classes)
    for parameter in model.final_layer.parameters():
        parameter.mul_(0.2)
    run, out = write_run(tmp_path / "run", model, names=names), tmp_path / "out"
    main([str(run), str(out)])
    assert ("copies of the row of the null class" in capsys.readouterr().out) == (num_classes < 1000)
    assert {f.name for f in tmp_path.iterdir()} == {"run", "vae", "out"}

    pipe = DiTPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.labels == {name: k for k, name in enumerate(names)}
    back, state = from_diffusers(pipe.transformer.state_dict()), model.state_dict()
    assert torch.equal(state.pop("pos_embed")[0], model.pos_embed[0])
    assert same(back, state)
    again = network(num_classes=num_classes)
    assert initialise(again, out).changed == {}
    assert same(again.state_dict(), model.state_dict())
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert same(pipe.vae.state_dict(), vae.state_dict())

    def draw():
        return pipe([2, 0], 3.0, torch.Generator().manual_seed(1), 2, "pt").images

    unmodified = draw()
    for block in pipe.transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, y = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([2, 0])
    t, null = torch.tensor([999, 4]), torch.full((2,), num_classes)
    torch.testing.assert_close(pipe.transformer(x, t, y).sample, model(x, t, y), rtol=1e-5, atol=1e-5)
    abar = torch.cumprod(1 - Diffusion().betas, 0)
    for step, before in ((999, abar[499]), (499, abar.new_ones(()))):
        cond, uncond = (model(x, torch.full((2,), step), labels)[:, :4] for labels in (y, null))
        noise = (uncond + 3 * (cond - uncond)).double()
        clean = (x - (1 - abar[step]).sqrt() * noise) / abar[step].sqrt()
        x = (before.sqrt() * clean + (1 - before).sqrt() * noise).float()
    expected = (vae.decode(x / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    assert ((expected > 0) & (expected < 1)).float().mean() > 0.2  # most are no flat black or white
    torch.testing.assert_close(draw(), expected, rtol=0, atol=2e-3)
    assert (unmodified - expected).abs().max() > 0.01

    card = ModelCard.load(out / "README.md")
    assert (card.data.library_name, card.data.license) == ("diffusers", None)
    assert "downscale_freq_shift = 0" in card.text
    assert "| training steps | 2 of 400,000, batch size 256 |" in card.text
    assert f"| classes | {num_classes}: kind 0, kind 1, kind 2" in card.text
    everything = "".join(f.read_text() for f in [*out.rglob("*.json"), out / "README.md"])
    assert str(tmp_path) not in everything
    assert "/home/me" not in everything
    code = (
        card.text.split("```")[1].removeprefix("python").replace("steps=50", "steps=2").replace("'out'", repr(str(out)))
    )
    scope = {}
    exec(code, scope)
    assert scope["image"].size == (16, 16)


@pytest.mark.parametrize("options", [{"num_classes": 1200}, {"class_dropout_prob": 0.0}])
def test_an_export_that_diffusers_cannot_guide_says_so(tmp_path, capsys, options):
    model = network(**options)
    names = [str(k) for k in range(model.num_classes)]
    dropped = {key: value for key, value in options.items() if key == "class_dropout_prob"}
    run = write_run(
        tmp_path / "run", model, names=names, options=dropped, process={"name": "diffusion", "betas": "cosine"}
    )
    main([str(run), str(tmp_path / "out"), "--weights", "ema"])
    note = (
        f"is not the null class of this model ({model.num_classes} classes), so guidance is not possible with it: set"
    )
    assert note in capsys.readouterr().out
    text = (tmp_path / "out" / "README.md").read_text()
    assert note in text
    assert "guidance_scale=1.0," in text
    pipe = DiTPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    state = model.state_dict()
    del state["pos_embed"]
    assert same(from_diffusers(pipe.transformer.state_dict()), state)
    assert pipe([model.num_classes - 1], 1.0, num_inference_steps=2).images[0].size == (16, 16)


def test_what_cannot_be_exported_ends_in_a_sentence_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    def refused(run, *words, out="out"):
        with pytest.raises(SystemExit, match="2"):
            main([str(run), str(tmp_path / out), *words])
        assert out != "out" or not (tmp_path / "out").exists()
        return capsys.readouterr().err

    dit = network()
    flow = write_run(tmp_path / "flow", network(SiT), process={"name": "flow"})
    assert "the process is 'flow', and diffusers draws from a diffusion; Pipeline.save_pretrained saves" in refused(
        flow
    )
    vca = write_run(tmp_path / "vca", network(attention="vca"), options={"attention": {"name": "vca"}})
    assert "diffusers' DiT has no VisualContrastAttention, only attention mhsa; Pipeline.save_pretrained" in refused(
        vca
    )
    pixels = write_run(tmp_path / "pixels", network(in_channels=3, input_size=16), codec={"name": "pixels"})
    assert "the codec is 'pixels', and DiTPipeline needs an autoencoder" in refused(pixels)
    AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
                    num_decoder_blocks=(1, 1)).save_pretrained(tmp_path / "tiny")  # fmt: skip
    tiny = write_run(tmp_path / "small", dit, codec={"name": "vae", "path": str(tmp_path / "tiny")})
    assert "the autoencoder is an AutoencoderTiny, and DiTPipeline needs an AutoencoderKL" in refused(tiny)

    run = write_run(tmp_path / "run", dit)
    assert "codec.path 'no/vae' is neither a folder saved by diffusers' AutoencoderKL nor a" in refused(
        run, "--vae", "no/vae"
    )
    assert "weights is 'last'; " in refused(run, "--weights", "last")
    assert "no checkpoint at" in refused(tmp_path / "nowhere")
    assert "is there already; choose another folder" in refused(run, out="vae")
    with monkeypatch.context() as patch:
        patch.setattr(DiTPipeline, "save_pretrained", lambda self, folder: (folder / "half" / "way").touch())
        assert f"cannot write '{tmp_path / 'out'}': No such file" in refused(run)
    file = tmp_path / "vae" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "shift_factor": 0.1}))
    assert "the autoencoder shifts its latents or scales each channel by itself" in refused(run)
    assert list(tmp_path.glob(".*")) == []


# ---- the hub ----

VCA = {"name": "vca", "contrast_grid": [1, 3], "stages": ["differential", "plain"], "dwc": False}


@pytest.mark.parametrize("kind", [DiT, SiT])
@pytest.mark.parametrize("attention", ["mhsa", VCA, MappingProxyType({"name": "mhsa", "qk_norm": True})], ids=str)
def test_saved_models_come_back_as_they_were(tmp_path, kind, attention):
    options = {
        "input_size": (8, 12),
        "attention": attention,
        "mlp_ratio": 2.5,
        **({"learn_sigma": True} if kind is SiT else {}),
    }
    model = network(kind, **options)
    assert (
        model.state_dict().keys()
        == Transformer(**{**TINY, "input_size": (8, 12), "attention": attention}).state_dict().keys()
    )
    model.save_pretrained(tmp_path / "saved")
    other = kind.from_pretrained(tmp_path / "saved")
    x_t, t, y = torch.randn(2, 4, 8, 12), torch.tensor([0.1, 0.7]), torch.tensor([3, 10])
    assert same(other.state_dict(), model.state_dict())
    assert not other.training
    assert torch.equal(other(x_t, t, y), model(x_t, t, y))
    other.save_pretrained(tmp_path / "again")
    copy.deepcopy(model).save_pretrained(tmp_path / "copied")
    for folder in ("again", "copied"):
        assert (tmp_path / folder / "config.json").read_text() == (tmp_path / "saved" / "config.json").read_text()
    card = ModelCard.load(tmp_path / "saved" / "README.md").data
    assert (card.library_name, card.license) == ("vca-diffusion", None)
    assert {"class-conditional", "visual-contrast-attention", kind.__name__.lower()} <= set(card.tags)


def test_weights_that_do_not_fit_their_config_are_no_random_ones(tmp_path):
    network().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "attention": "vca"}))
    with pytest.raises(RuntimeError, match="Missing key"):
        DiT.from_pretrained(tmp_path)


def test_models_for_the_hub_are_still_networks():
    with torch.device("meta"):
        assert all(p.is_meta for p in DiT(**TINY).parameters())
    model = network()
    x = (torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([3, 10]))
    sharded = type("FSDPDiT", (DiT,), {})  # as fully_shard changes the class of a module
    clone = copy.deepcopy(model)
    clone.__class__ = sharded
    compiled = torch.compile(model, backend="eager")
    for other in (clone, compiled, copy.deepcopy(clone)):
        assert torch.equal(other(*x), model(*x))
    assert compiled._orig_mod.state_dict().keys() == clone.state_dict().keys()


# ---- the card ----


def test_a_card_is_what_the_hub_reads():
    facts = {"FID-50K": "2.27 | of 50,000", "steps": 400_000, "unknown": None, "two\nlines": 1}
    text = model_card("A title", "\nprint(1)\n", facts, notes=["One.", "Two."], tags=["image-generation", "flow"])
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    expected = {"library_name": "vca-diffusion", "tags": ["image-generation", "flow"]}
    assert yaml.safe_load(front) == expected
    assert "| FID-50K | 2.27 \\| of 50,000 |\n| steps | 400000 |\n| two lines | 1 |" in body
    assert "unknown" not in body
    assert "```python\nprint(1)\n```\n\n* One.\n* Two.\n\n| | |\n|---|---|\n" in body
    assert "\n* " not in model_card("A title", "print(1)", {"a": 1})
    assert "\nlicense: mit\n" in model_card("A title", "print(1)", {"a": 1}, license="mit")


@pytest.mark.parametrize("kind", [DiT, SiT])
def test_a_folder_from_before_the_joint_softmax_has_two_and_a_new_one_says_which(kind, tmp_path):
    """config.json lacked the option; the network of it computes, bit for bit, what it was trained to."""
    sizes = {"input_size": 8, "patch_size": 2, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    old = kind(**sizes, attention={"name": "vca", "softmax": "separate"}).eval()
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    old.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["attention"]["softmax"] == "separate"
    assert config["attention"]["embed_std"] == 1.0
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 2])
    for written in ("vca", {"name": "vca"}, None):
        now = {key: value for key, value in config.items() if key != "attention"}
        (tmp_path / "config.json").write_text(json.dumps(now if written is None else {**now, "attention": written}))
        assert torch.equal(kind.from_pretrained(tmp_path).eval()(x, t, y), old(x, t, y))
