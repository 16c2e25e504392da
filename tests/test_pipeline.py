"""Pipelines: what is told by the content of published weights, and that what is saved draws the same images."""

import argparse
import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from huggingface_hub import ModelCard
from PIL import Image

import sample
from dit_vca import DDPM, Diffusion, DiT
from export import export
from sit_vca import SiT
from vca_engine import assemble
from vca_engine.config.reading import from_dict
from vca_engine.config.schema import Config, ModelConfig, SampleConfig, to_dict
from vca_engine.images.codecs import PixelCodec, VAECodec
from vca_engine.images.labels import DataInfo
from vca_engine.records import read_json
from vca_engine.sampling.pipeline import Pipeline
from vca_engine.sampling.tables import trajectories
from vca_engine.weights import checkpoint
from vca_engine.weights.diffusers import diffusers_config, to_diffusers
from vca_engine.weights.files import read_weights
from vca_engine.weights.published import read_published

pytestmark = pytest.mark.usefixtures("as_in_a_new_process")

S4 = {"input_size": 4, "patch_size": 4, "hidden_size": 384, "depth": 12, "num_heads": 6, "attention": "mhsa"}
EULER = {"name": "ode", "method": "euler"}
FEW = {"num_inference_steps": 3, "output_type": "np"}


def perturbed(network):
    """The output of a fresh network is zero; this one's is not, but for the half that a SiT drops."""
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.02 * torch.randn_like(p))
        if isinstance(network, SiT) and network.out_channels > network.in_channels:
            for p in (network.final_layer.linear.weight, network.final_layer.linear.bias):
                p.unflatten(0, (-1, network.out_channels))[:, network.in_channels :] = 0
    return network.eval()


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A small autoencoder in the form of diffusers, that divides the side by 2."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        latent_channels=4,
        norm_num_groups=2,
        mid_block_add_attention=False,
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Files in the forms of the published ones, with their networks."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("published")
    dit, sit = perturbed(DiT(**S4)), perturbed(SiT(learn_sigma=True, **S4))
    torch.save(dit.state_dict(), folder / "DiT.pt")
    torch.save(sit.state_dict(), folder / "SiT.pt")
    options = argparse.Namespace(
        model="SiT-S/4", path_type="GVP", prediction="score", loss_weight="likelihood", lr=1e-4
    )
    nothing = {k: torch.zeros_like(v) for k, v in sit.state_dict().items()}
    torch.save({"model": nothing, "ema": sit.state_dict(), "args": options}, folder / "training.pt")
    return folder, dit, sit


def test_published_weights_are_known_by_what_is_in_them(published, vae):
    folder, dit, sit = published
    x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([0.2, 0.7]), torch.tensor([3, 1000])
    for name, network, process in (
        ("DiT.pt", dit, {"name": "diffusion"}),
        ("SiT.pt", sit, {"name": "flow"}),
        ("training.pt", sit, {"name": "flow", "path": "gvp", "prediction": "score", "weight": "likelihood"}),
    ):
        pipe = Pipeline.from_pretrained(folder / name, vae=vae)
        assert pipe.config.process == process
        assert pipe.info.image_size == 8
        assert (pipe.class_names[0], pipe.class_names[207], len(pipe.class_names)) == (
            "tench",
            "golden retriever",
            1000,
        )
        assert torch.equal(pipe.network(x, t, y), network(x, t, y))
        assert assemble.process_kind(pipe.config).published_sampler == ("ddpm" if name == "DiT.pt" else "sde")
        assert pipe.label_ids(["golden retriever", 7, "tench"]) == [207, 7, 0]


def test_an_image_is_what_the_published_loop_draws(published, vae):
    """Noise of the seed, the published sampler and guidance, written out with the network itself."""
    folder, dit, _ = published
    pipe = Pipeline.from_pretrained(folder / "DiT.pt", vae=vae)
    output = pipe([3, 5], guidance_scale=4.0, num_inference_steps=4, seed=1, output_type="np")
    image_sampler = pipe.image_sampler(SampleConfig(seed=1))
    noise, generators = image_sampler.begin([0, 1])
    y = torch.tensor([3, 5, 1000, 1000])

    @torch.no_grad()
    def predict(x_t, t):
        cond, uncond = dit(torch.cat([x_t, x_t]), torch.cat([t, t]), y).chunk(2)
        return torch.cat([uncond[:, :4] + 4 * (cond - uncond)[:, :4], cond[:, 4:]], dim=1)

    latents = DDPM(Diffusion(), num_steps=4)(predict, noise, generators)
    decoded = AutoencoderKL.from_pretrained(vae).decode(latents / 0.18215).sample
    pixels = (127.5 * decoded.detach() + 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(output.images - pixels).max() <= 1
    assert output.record["nfe"] == 8
    assert output.record["sampler"] == {"name": "ddpm", "num_steps": 4, "spacing": "even"}
    assert output.record["labels"] == [3, 5]


def test_a_call_gives_pictures_and_takes_names(published, vae):
    pipe = Pipeline.from_pretrained(published[0] / "SiT.pt", vae=vae)
    output = pipe("goldfish", num_inference_steps=3, sampler={"name": "ode", "method": "heun"}, seed=2)
    (image,) = output.images
    assert isinstance(image, Image.Image)
    assert image.size == (8, 8)
    again = pipe(
        [1, 1], num_inference_steps=3, sampler={"name": "ode", "method": "heun"}, seed=2, output_type="np"
    ).images
    assert np.abs(np.asarray(image).astype(int) - again[0]).max() <= 1
    assert (again[0] != again[1]).any()
    json.dumps(output.record)
    with pytest.raises(ValueError, match="'goldfsh' is no class of this model; did you mean 'goldfish'"):
        pipe("goldfsh")
    with pytest.raises(ValueError, match="output_type is 'pt'; choose pil or np"):
        pipe(0, output_type="pt")
    with pytest.raises(ValueError, match="class_labels is empty"):
        pipe([])
    with pytest.raises(ValueError, match="class True is neither a number nor a name"):
        pipe([True])
    for wrong in (0, 1.5, "2"):
        with pytest.raises(ValueError, match=f"num_images_per_class is {wrong!r}; choose a whole number"):
            pipe([1], num_images_per_class=wrong)
    heun = {"name": "ode", "method": "heun"}
    pipe.config = dataclasses.replace(pipe.config, sample=SampleConfig(sampler=heun))
    tensor = pipe(torch.tensor([1, 1]), sampler={"num_steps": 3}, seed=2, output_type="np")
    assert (tensor.images == again).all()  # options alone change the model's own sampler


def test_what_is_saved_draws_the_same_and_holds_all_it_needs(published, vae, tmp_path, capsys):
    pipe = Pipeline.from_pretrained(published[0] / "training.pt", vae=vae)
    pipe.config = dataclasses.replace(pipe.config, sample=SampleConfig(cfg_scale=2.0, sampler=EULER, group_size=2))
    pipe.save_pretrained(tmp_path / "model")
    assert {f.name for f in (tmp_path / "model").iterdir()} == {
        "checkpoint.json",
        "ema.safetensors",
        "vae",
        "README.md",
    }
    (tmp_path / "model").rename(tmp_path / "moved")
    again = Pipeline.from_pretrained(tmp_path / "moved")
    assert again.sha256 == pipe.sha256
    assert again.config.process == pipe.config.process
    assert again.source["kind"] == "published file"
    assert (pipe([1, 2], **FEW).images == again([1, 2], **FEW).images).all()
    text = "".join(f.read_text() for f in (tmp_path / "moved").rglob("*") if f.suffix in (".md", ".json"))
    assert vae not in (tmp_path / "moved" / "README.md").read_text()
    assert pipe.sha256 in text
    with pytest.raises(ValueError, match="is there already; choose another folder"):
        pipe.save_pretrained(tmp_path / "moved")
    # the same folder for sample.py, and the card's own code
    sample.main([str(tmp_path / "moved"), "--num", "2", "--sampler.num_steps", "3", "--out", str(tmp_path / "a.npy")])
    assert np.load(tmp_path / "a.npy").shape == (2, 8, 8, 3)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "moved" / "README.md").read_text(), re.DOTALL)
    code = code.replace('"model"', repr(str(tmp_path / "moved"))).replace("seed=0", "seed=0, num_inference_steps=2")
    space = {}
    exec(code, space)
    assert len(space["images"]) == 1
    record = read_json(tmp_path / "moved" / "checkpoint.json")
    assert str(tmp_path) not in json.dumps(record)  # no folder of this machine


def test_weights_of_diffusers_say_their_classes(published, vae, tmp_path):
    torch.manual_seed(1)
    dit = perturbed(DiT(**{**S4, "hidden_size": 24, "depth": 2, "num_heads": 3}, num_classes=3))
    (tmp_path / "transformer").mkdir()
    config = {"_class_name": "DiTTransformer2DModel", **diffusers_config(dit)}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    torch.save(to_diffusers(dit.state_dict()), tmp_path / "transformer" / "diffusion_pytorch_model.bin")
    labels = {"0": "cat", "1": "dog, hound", "2": "cow"}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", "id2label": labels}))
    AutoencoderKL.from_pretrained(vae).save_pretrained(tmp_path / "vae")
    pipe = Pipeline.from_pretrained(tmp_path)
    assert pipe.class_names == ["cat", "dog, hound", "cow"]
    x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([2, 900]), torch.tensor([1, 3])
    assert torch.equal(pipe.network(x, t, y), dit(x, t, y))
    assert pipe.label_ids(["hound"]) == [1]
    said = f"{tmp_path}: DiT-S/4 (hidden_size 24, depth 2, num_heads 3) with mhsa, of diffusers; 8 pixels, 3 classes"
    assert str(pipe) == said


@pytest.mark.parametrize("betas, num_timesteps", [("cosine", 500), ("linear", 400)])
def test_a_schedule_comes_back_from_diffusers(vae, tmp_path, betas, num_timesteps):
    pipe = small(tmp_path, "diffusion")
    process = {"name": "diffusion", "betas": betas, "num_timesteps": num_timesteps}
    config = dataclasses.replace(
        pipe.config,
        process=process,
        codec={"name": "vae", "path": vae},
        model=ModelConfig(hidden_size=24, depth=2, num_heads=2, attention={"name": "mhsa"}),
    )
    shape, codec = DataInfo(8, 3, ["a", "b", "c"]), assemble.codec(config, 3)
    network = perturbed(assemble.network(config, shape, codec))
    record = {"config": to_dict(config), "shape": to_dict(shape), "codec": codec.identity}
    checkpoint.save(tmp_path / "run", 3, {"ema": network.state_dict()}, record)
    export(tmp_path / "run", tmp_path / "out")
    ours, back = Pipeline.from_pretrained(tmp_path / "run"), Pipeline.from_pretrained(tmp_path / "out")
    assert back.config.process == process
    assert back.class_names == ["a", "b", "c"]
    assert (ours([0, 2], guidance_scale=2.0, **FEW).images == back([0, 2], guidance_scale=2.0, **FEW).images).all()
    scheduler = tmp_path / "out" / "scheduler" / "scheduler_config.json"
    changed = {**json.loads(scheduler.read_text()), "prediction_type": "v_prediction"}
    scheduler.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="the scheduler has betas .* and predicts 'v_prediction'"):
        Pipeline.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("attention", ["mhsa", {"name": "vca", "contrast_grid": [1, 2]}])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_network_that_was_saved_alone_says_all_of_itself(vae, tmp_path, attention, dropout):
    sizes = {"input_size": 4, "patch_size": 2, "hidden_size": 384, "depth": 1, "num_heads": 12, "num_classes": 10}
    network = perturbed(SiT(**sizes, attention=attention, class_dropout_prob=dropout))
    network.save_pretrained(tmp_path / "model")
    pipe = Pipeline.from_pretrained(tmp_path / "model", vae=vae)
    x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([0.2, 0.7]), torch.tensor([3, 9])
    assert torch.equal(pipe.network(x, t, y), network(x, t, y))
    assert (len(pipe.class_names), pipe.network.null_class) == (10, 10 if dropout else None)


def test_weights_of_others_are_read_as_a_record_and_tensors_of_ours(published, vae):
    """The tensors are those of the network that the record describes: neither one too many, nor another shape."""
    folder, dit, sit = published
    for name, network, process in (("DiT.pt", dit, "diffusion"), ("training.pt", sit, "flow")):
        record, tensors = read_published(folder / name)
        config = from_dict(Config, record["config"], name)
        assert config.process["name"] == process
        assert record["latents"]["size"] == 4
        info = DataInfo(8, 3, record["latents"]["class_names"])
        state = assemble.network(config, info, VAECodec(path=vae)).state_dict()
        assert {key: value.shape for key, value in tensors.items()} == {key: v.shape for key, v in state.items()}
        assert torch.equal(tensors["pos_embed"], state["pos_embed"])
        assert torch.equal(tensors["blocks.3.mlp.fc1.weight"], network.blocks[3].mlp.fc1.weight)


def test_a_network_of_images_that_are_not_square_is_a_sentence(vae, tmp_path):
    sizes = {"input_size": (4, 8), "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    perturbed(SiT(**sizes)).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="image_size is .*; it must be a whole number"):
        Pipeline.from_pretrained(tmp_path / "model", vae=vae)


def test_what_is_given_of_the_process_is_added_to_what_the_file_says(published, vae):
    file = published[0] / "training.pt"
    for given in ("flow", {"name": "flow"}, {"weight": "none"}):
        pipe = Pipeline.from_pretrained(file, process=given, vae=vae)
        assert (pipe.config.process["path"], pipe.config.process["prediction"]) == ("gvp", "score")
    pipe = Pipeline.from_pretrained(published[0] / "SiT.pt", process={"path": "vp"}, vae=vae)
    assert pipe.config.process == {"name": "flow", "path": "vp"}
    with pytest.raises(ValueError, match="is 'diffusion', but the weights say themselves that they are of a flow"):
        Pipeline.from_pretrained(file, process="diffusion", vae=vae)


def test_weights_without_a_learned_variance_are_not_drawn_from_by_ddpm(vae, tmp_path):
    network = perturbed(DiT(**S4, out_channels=4))
    torch.save(network.state_dict(), tmp_path / "plain.pt")
    pipe = Pipeline.from_pretrained(tmp_path / "plain.pt", process="diffusion", vae=vae)
    with pytest.raises(
        ValueError, match="learned no variance, with which ddpm draws; choose ddim, dpm-solver or unipc"
    ):
        pipe([1], **FEW)
    x, t, y = torch.randn(1, 4, 4, 4), torch.tensor([500]), torch.tensor([1])
    assert torch.equal(pipe.network(x, t, y)[:, :4], network(x, t, y))
    assert pipe([1], sampler={"name": "ddim"}, **FEW).images.shape == (1, 8, 8, 3)


def small(tmp_path, kind="flow", num_classes=3, **sampling):
    """A pipeline of pixels, with a network of random weights."""
    config = Config(
        run_dir=str(tmp_path),
        process={"name": kind},
        data={"name": "digits"},
        codec={"name": "pixels"},
        model=ModelConfig(hidden_size=16, depth=1, num_heads=2),
        sample=SampleConfig(**sampling),
    )
    shape, codec = DataInfo(8, 1, [f"class {k}" for k in range(num_classes)]), PixelCodec(1)
    network = perturbed(assemble.network(config, shape, codec))
    origin = {"path": "here", "kind": "checkpoint", "part": "ema", "step": 7, "id": "x", "size": "", "attention": ""}
    return Pipeline(config, shape, network, assemble.process(config), codec, origin, Path(tmp_path))


def test_several_images_of_each_class_are_those_of_a_list_with_each_class_so_often(tmp_path):
    pipe = small(tmp_path, sampler=EULER)
    output = pipe([1, "class 2"], num_images_per_class=3, **FEW)
    assert output.record["labels"] == [1, 1, 1, 2, 2, 2]
    assert (output.images == pipe([1, 1, 1, 2, 2, 2], **FEW).images).all()
    assert len({image.tobytes() for image in output.images}) == 6


def test_a_pipeline_goes_to_a_device_as_a_whole_and_is_given_back(vae, published):
    pipe = Pipeline.from_pretrained(published[0] / "SiT.pt", vae=vae)
    assert pipe.to("meta") is pipe
    assert pipe.device.type == "meta"
    tensors = [*pipe.network.state_dict().values(), *pipe.codec.state_dict().values(), pipe.codec.scale]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.parametrize("license", [None, "cc-by-nc-4.0"])
def test_a_model_card_names_the_licence_that_was_given(license, tmp_path):
    given = {} if license is None else {"license": license}
    small(tmp_path / "run").save_pretrained(tmp_path / "model", **given)
    assert ModelCard.load(tmp_path / "model" / "README.md").data.license == license


def test_mistakes_with_weights_are_sentences(published, vae, tmp_path):
    folder, dit, _ = published
    with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
        Pipeline.from_pretrained(tmp_path / "nothing.pt")
    with pytest.raises(ValueError, match="holds one set of weights; leave it out"):
        Pipeline.from_pretrained(folder / "DiT.pt", weights="model", vae=vae)
    with pytest.raises(ValueError, match=r"process.name is 'flw'; did you mean 'flow'\?"):
        Pipeline.from_pretrained(folder / "DiT.pt", process="flw", vae=vae)
    wide = perturbed(DiT(**{**S4, "in_channels": 16})).state_dict()
    torch.save(wide, tmp_path / "wide.pt")
    with pytest.raises(
        ValueError, match="takes latents of 16 channels, and the autoencoder .* gives 4; name the right"
    ):
        Pipeline.from_pretrained(tmp_path / "wide.pt", vae=vae)
    torch.save({**dit.state_dict(), "extra": torch.zeros(1)}, tmp_path / "extra.pt")
    with pytest.raises(ValueError, match=r"extra.pt' holds another network than expected: it has extra too many"):
        Pipeline.from_pretrained(tmp_path / "extra.pt", vae=vae)
    pipe = small(tmp_path / "run")
    pipe.save_pretrained(tmp_path / "pixels")
    with pytest.raises(ValueError, match=r"weights is 'model'; .* has \['ema'\]"):
        Pipeline.from_pretrained(tmp_path / "pixels", weights="model")
    with pytest.raises(ValueError, match="the codec of this model is 'pixels'; leave it out"):
        Pipeline.from_pretrained(tmp_path / "pixels", vae=vae)


def test_a_guide_is_for_the_same_images(tmp_path):
    pipe, guide = small(tmp_path), small(tmp_path)
    strong = SampleConfig(cfg_scale=3.0, sampler={"name": "ode", "method": "euler", "num_steps": 2})
    led, plain = pipe.image_sampler(strong, guide=guide), pipe.image_sampler(dataclasses.replace(strong, cfg_scale=1.0))
    assert (led([0, 1], [0, 1]) != plain([0, 1], [0, 1])).any()
    x, t, y = torch.randn(1, 1, 8, 8), torch.rand(1), [2]
    with torch.no_grad():
        good, bad = pipe.network(x, t, torch.tensor(y)), guide.network(x, t, torch.tensor(y))
    torch.testing.assert_close(led.predict(y)(x, t), bad + 3 * (good - bad))
    settings = pipe.settings(strong, guide=guide, negative=1)
    assert settings["guide"] == {"sha256": guide.sha256, "step": 7}
    assert settings["negative_class"] == 1
    with pytest.raises(ValueError, match="the guide has .*name 'diffusion' .the model 'flow'.*predict the same thing"):
        pipe.image_sampler(strong, guide=small(tmp_path, "diffusion"))
    other = small(tmp_path)
    other.config = dataclasses.replace(
        other.config, process={"name": "flow", "time": "lognormal", "weight": "velocity"}
    )
    pipe.image_sampler(strong, guide=other)  # how it was trained does not matter
    with pytest.raises(ValueError, match="the guide has num_classes 4, the model 3"):
        pipe.image_sampler(strong, guide=small(tmp_path, num_classes=4))


# Pictures, by sample.py


@pytest.fixture
def saved(tmp_path):
    """A folder of a small flow, and its pipeline."""
    pipe = small(tmp_path / "run", sampler={"name": "ode", "method": "euler", "num_steps": 5}, per_class=2)
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model", pipe


def cells(file, rows, columns):
    """The images of a picture, (rows, columns, 8, 8, 3), from its right lower corner."""
    picture = np.asarray(Image.open(file).convert("RGB")) if isinstance(file, Path) else file
    size, gap = 64, 4
    inked = np.flatnonzero((picture[-rows * (size + gap) :] < 250).any((0, 2)))
    picture = picture[:, : inked[-1] + 1 + gap]  # a narrow picture is as wide as its title
    top, left = picture.shape[0] - rows * (size + gap), picture.shape[1] - columns * (size + gap)
    table = [[picture[top + i * 68 :, left + j * 68 :][:size:8, :size:8] for j in range(columns)] for i in range(rows)]
    return np.array(table)


def near(a, b):
    return np.abs(a.astype(int) - b).max() <= 1


def test_a_trajectory_goes_from_noise_to_the_image_and_predicts_it(saved, tmp_path):
    folder, pipe = saved
    out = tmp_path / "way.png"
    sample.main([str(folder), "--trajectory", "--classes", "[class 2,0]", "--columns", "4", "--out", str(out)])
    table = cells(out, 4, 4)
    image_sampler = pipe.image_sampler(pipe.config.sample)
    for row, (label, index) in enumerate([(2, 0), (0, 1)]):
        noise, _ = image_sampler.begin([index])
        image = image_sampler([label], [index])[0]
        assert near(table[2 * row, 0], image_sampler.images(noise)[0])
        assert near(table[2 * row, 3], image)
        assert near(table[2 * row + 1, 3], image)
        times = torch.zeros(1)  # of a velocity, at noise: x = x_t + u
        predicted = noise + image_sampler.predict([label])(noise, times)
        assert near(table[2 * row + 1, 0], image_sampler.images(predicted.detach())[0])
    record = json.loads(out.with_suffix(".json").read_text())
    assert (record["picture"], record["classes"], record["nfe"]) == ("trajectory", [2, 0], 4)


@pytest.mark.parametrize(
    "spec", [{"name": "ode", "method": "dopri5"}, {"name": "sde", "method": "heun", "num_steps": 9}]
)
def test_a_trajectory_goes_only_towards_data(tmp_path, spec):
    """Also where the solver looks beyond the data, or twice at one time."""
    pipe = small(tmp_path, sampler=spec)
    table = trajectories(pipe.image_sampler(pipe.config.sample), pipe.process.clean, [0, 1], pipe.class_names, 6)
    levels = [float(level) for level in table.columns[:-1]]
    assert levels[0] == 1
    assert (np.diff(levels) < 0).all()
    assert min(levels) >= 0
    assert table.columns[-1] == "image"
    assert table.images.shape == (4, len(levels) + 1, 8, 8, 3)


def test_an_interpolation_goes_from_one_seed_to_the_next(saved, tmp_path):
    folder, pipe = saved
    out = tmp_path / "way.gif"
    sample.main([str(folder), "--interpolate", "--classes", "1", "--columns", "5", "--seed", "3", "--out", str(out)])
    film = Image.open(out)
    assert film.n_frames == 5
    frames = []
    for k in range(5):
        film.seek(k)
        frames.append(cells(np.asarray(film.convert("RGB")), 1, 1)[0, 0].astype(int))
    for frame, seed in ((frames[0], 3), (frames[-1], 4)):
        image = pipe.image_sampler(dataclasses.replace(pipe.config.sample, seed=seed))([1], [0])[0]
        assert np.abs(frame - image).mean() < 3  # a GIF has 256 colours
    steps = [np.abs(a - b).mean() for a, b in zip(frames[1:], frames[:-1], strict=True)]
    assert max(steps) < np.abs(frames[0] - frames[-1]).mean()


def test_a_sweep_has_a_row_a_value(saved, tmp_path):
    folder, pipe = saved
    out = tmp_path / "sweep.png"
    for text, change in (
        ("cfg=1,4", [{"cfg_scale": 1.0}, {"cfg_scale": 4.0}]),
        ("steps=3,9", [{"sampler": {**pipe.config.sample.sampler, "num_steps": n}} for n in (3, 9)]),
        ("sampler=ode,sde", [{"sampler": {"name": name}} for name in ("ode", "sde")]),
        ("seed=5,6", [{"seed": 5}, {"seed": 6}]),
    ):
        sample.main([str(folder), "--sweep", text, "--out", str(out)])
        table = cells(out, 2, 3)
        for row, changed in zip(table, change, strict=True):
            image_sampler = pipe.image_sampler(dataclasses.replace(pipe.config.sample, **changed))
            assert near(row, image_sampler([0, 1, 2], [0, 1, 2]))
    sample.main([str(folder), "--sweep", "sampler=ode,sde", "--sampler.num_steps", "3", "--out", str(out)])
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert [(r["row"], r["sampler"]["num_steps"]) for r in rows] == [("sampler ode", 3), ("sampler sde", 3)]
    assert rows[0]["nfe"] > rows[1]["nfe"] == 3
    sample.main([str(folder), "--sweep", "cfg=1,4", "--negative_class", "1", "--out", str(tmp_path / "sweep.gif")])
    assert Image.open(tmp_path / "sweep.gif").n_frames == 2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--sweep", "cfg"], "--sweep is 'cfg'; write a setting and its values"),
        (["--sweep", "cfg=a"], "--sweep: cfg_scale is 'a'; it must be a number"),
        (["--sweep", "sampler.methd=euler"], "--sweep: sampler takes no 'methd'; did you mean 'method'?"),
        (["--sweep", "sampler=ode,odee"], "--sweep: sampler.name is 'odee'; did you mean 'ode'?"),
        (["--sweep", "sampler=ode,sde", "--sampler.rtol", "1"], "--sweep: sampler 'sde' takes no 'rtol'; it takes"),
        (["--sampler.methd", "euler"], "sampler takes no 'methd'; did you mean 'method'?"),
    ],
)
def test_a_wrong_sampler_or_sweep_is_refused_before_the_weights_are_looked_for(capsys, wrong, said):
    with pytest.raises(SystemExit) as stop:
        sample.main(["no/such run", *wrong])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("text", ["sampler.method=heun,eular", "sampler=ode,ddpm", "sampler.order=2"])
def test_a_row_of_a_sweep_that_the_model_cannot_have_is_refused_before_the_first_is_drawn(saved, text, capsys):
    with pytest.raises(SystemExit) as stop:
        sample.main([str(saved[0]), "--sweep", text])
    printed = capsys.readouterr().err
    assert (stop.value.code, len(printed.splitlines())) == (2, 1)  # no progress bar
    assert printed.startswith("sample.py: ")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--sweep", "cfg"], "--sweep is 'cfg'; write a setting and its values"),
        (["--sweep", "classes=1,2"], "write a setting and its values"),
        (["--sweep", "cfg=a"], "cfg_scale is 'a'; it must be a number"),
        (["--sweep", "sampler.method=eular"], "did you mean 'euler'?"),
        (["--sweep", "cfg=1,2", "--trajectory"], "--trajectory and --sweep are two different things; choose one"),
        (["--trajectory", "--num", "3"], "--trajectory draws a picture, and --num many images; choose one"),
        (["--interpolate", "--columns", "1"], "columns is 1; choose at least 2"),
        (["--guide", "nowhere", "--cfg_scale", "2"], "no weights at 'nowhere'"),
        (["--negative_class", "1"], "cfg_scale is 1.0, which is no guidance"),
        (["--negative_class", "x", "--cfg_scale", "2"], "'x' is no class of this model"),
        (["--guidance_interval", "[0.5,0.2]"], "choose two noise levels between 0 and 1, the lower first"),
        (["--data.split", "test"], "--data is for --likelihood; leave it out"),
        (["--likelihood", "--cfg_scale", "2"], "a guided flow has no likelihood"),
        (["--likelihood", "--sampler", "sde"], "sampler.name is 'sde'; a likelihood needs ode"),
        (["--likelihood", "--out", "x.png"], "a likelihood is a .json file"),
        (["--likelihood"], "the images have 8 pixels and 10 classes, the model 8 and 3"),
    ],
)
def test_a_mistake_is_a_sentence(saved, capsys, wrong, said):
    with pytest.raises(SystemExit) as stop:
        sample.main([str(saved[0]), *wrong])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


# Likelihood


def test_the_likelihood_of_pixels_is_that_of_the_gaussian_that_a_network_of_zeros_is(tmp_path, capsys):
    """Velocity 0: data and noise are the same, standard normal. So bits are known up to the uniform noise."""
    pipe = small(tmp_path / "run", num_classes=10)
    for p in pipe.network.parameters():
        p.data.zero_()
    pipe.info.class_names[:] = [str(k) for k in range(10)]
    pipe.save_pretrained(tmp_path / "model")
    out = tmp_path / "l.json"
    sample.main([str(tmp_path / "model"), "--likelihood", "--num", "20", "--data.split", "test", "--out", str(out)])
    found = json.loads(out.read_text())
    images = assemble.images(dataclasses.replace(pipe.config, data={"name": "digits", "split": "test"}))
    chosen = np.linspace(0, len(images) - 1, 20).round().astype(int)
    assert found["images"] == chosen.tolist()
    x = torch.stack([images[int(i), False][0] for i in chosen]).double()
    nats = 0.5 * (x.square() + 1 / 127.5**2 / 12) + 0.5 * np.log(2 * np.pi)  # expected over the uniform noise
    expected = nats.flatten(1).mean(1) / np.log(2) + np.log2(127.5)
    each = torch.tensor(found["bits_per_dim_of_each"])
    assert (each - expected).abs().max() < 4 * (x.square().flatten(1).sum(1) / 12).sqrt().max() / 127.5 / 64 / np.log(2)
    assert found["bits_per_dim"] == pytest.approx(each.mean().item())
    assert found["standard_error"] == pytest.approx(each.std().item() / 20**0.5)
    assert found["of"] == "8-bit pixels"
    assert found["sampler"]["method"] == "dopri5"
    assert (
        f"{each.mean():.3f} ± {found['standard_error']:.3f} bits per dimension of 8-bit pixels"
        in capsys.readouterr().out
    )
    sample.main([str(tmp_path / "model"), "--likelihood", "--num", "20", "--data.split", "test", "--out", str(out)])
    assert json.loads(out.read_text())["bits_per_dim_of_each"] == found["bits_per_dim_of_each"]


def test_a_diffusion_has_no_likelihood(tmp_path, capsys):
    small(tmp_path / "run", "diffusion").save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit):
        sample.main([str(tmp_path / "model"), "--likelihood"])
    assert "integrates the ODE of a flow, and this model is a diffusion" in capsys.readouterr().err


def test_a_saved_pipeline_is_a_checkpoint(saved):
    record = checkpoint.read_record(saved[0])
    assert (record["step"], record["id"], record["origin"]["kind"]) == (7, "x", "checkpoint")


def nodes(value, path=()):
    """The place of every value in nested dicts and lists, the containers themselves, too."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, child in children:
        yield from nodes(child, (*path, key))


EVIL = {"class_path": "os.system", "init_args": {"command": "touch executed"}}
ODD = [EVIL, "os.system", 7, -1, 2.5, None, [], True, 10**30]


def test_a_folder_whose_name_is_not_utf_8_is_written_and_read(tmp_path):
    pipe = small(tmp_path / "run", sampler={"name": "ode", "method": "euler", "num_steps": 2}, per_class=1)
    folder = tmp_path / os.fsdecode(b"saved\xff")
    pipe.save_pretrained(folder)
    assert "# saved?" in (folder / "README.md").read_text()
    assert Pipeline.from_pretrained(folder).sha256 == pipe.sha256
    assert read_weights(folder / "ema.safetensors").tensors.keys() == pipe.network.state_dict().keys()


def test_no_value_in_a_record_is_called_or_ends_without_a_sentence(tmp_path, capsys, monkeypatch):
    """Each place of checkpoint.json in turn holds what does not belong there: an image is drawn, or a sentence said."""
    monkeypatch.chdir(tmp_path)
    pipe = small(tmp_path / "run", sampler={"name": "ode", "method": "euler", "num_steps": 2}, per_class=1)
    pipe.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "checkpoint.json"
    record = read_json(file)
    said = 0
    for number, path in enumerate(
        nodes({name: record[name] for name in ("format", "step", "id", "config", "shape", "codec")})
    ):
        for odd in (ODD[number % len(ODD)], EVIL):
            changed = json.loads(json.dumps(record))
            owner = changed
            for key in path[:-1]:
                owner = owner[key]
            if path:
                owner[path[-1]] = odd
            file.write_text(json.dumps(changed if path else odd))
            try:
                sample.main([str(tmp_path / "saved"), "--classes", "0", "--out", str(tmp_path / "x.png")])
            except SystemExit as stop:
                assert stop.code == 2, (path, odd)
                said += 1
    assert said > 100
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("_class_name", EVIL, "it is a {'class_path'"),
        ("latents_mean", EVIL, "neither a folder saved by"),
        ("layers_per_block", 3, "asks for weights that its file has not"),
        ("act_fn", EVIL, "neither a folder saved by"),
    ],
)
def test_a_config_of_an_autoencoder_that_is_none_is_a_sentence(vae, tmp_path, key, value, said):
    folder = Path(shutil.copytree(vae, tmp_path / "vae"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(FileNotFoundError, match=re.escape(said)):
        VAECodec(path=str(folder))
