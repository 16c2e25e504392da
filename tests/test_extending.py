"""Each row of the table in docs/extending.md, done as the page says from outside of the packages, and used by its name."""

import dataclasses
import importlib
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import fid
import sample
import train
from dit_vca.diffusion import BETAS, Diffusion
from fid.metrics import METRICS
from fid.metrics.metric import Metric
from fid.networks import EXTRACTORS
from fid.networks.inception import PRESETS, Preset
from sit_vca.path import PATHS, Coefficients, broadcast
from sit_vca.path import Path as FlowPath
from sit_vca.prediction import PREDICTIONS, WEIGHTS
from sit_vca.transport import TIMES, Transport
from vca.layer import Attention
from vca.transformer import ATTENTIONS
from vca_engine.assemble import PROCESSES, ProcessKind
from vca_engine.config.options import SampleOptions
from vca_engine.config.schema import SampleConfig
from vca_engine.images.codecs import CODECS, PixelCodec
from vca_engine.images.datasets import DATASETS, ImageDataset

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text(encoding="utf-8")
LINES = [line for line in PAGE.splitlines() if line.startswith("| ")]
ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in LINES[1:]]
CONFIGS = Path(__file__).parent.parent / "configs"
TINY = ["--model.hidden_size", "16", "--model.depth", "1", "--model.num_heads", "2", "--sample.sampler.num_steps", "3"]
TINY += ["--train.num_steps", "2", "--train.batch_size", "4", "--train.log_every", "1", "--sample.per_class", "1"]


class PowerAttention(Attention):
    """Full attention with sharper or softer logits."""

    def __init__(self, dim, num_heads, grid_size, *, layer_index, num_prefix_tokens=0, sharpness: float = 1.0):
        options = {"num_prefix_tokens": num_prefix_tokens, "qkv_bias": True, "qk_norm": False, "dwc": False}
        super().__init__(dim, num_heads, grid_size, **options)
        self.sharpness = sharpness

    def attend(self, q, k, v, grid):
        return F.scaled_dot_product_attention(self.sharpness * q, k, v)


class PlainModule(nn.Module):
    """Any module with the call of an attention."""

    def __init__(self, dim, num_heads, grid_size, *, layer_index):
        super().__init__()
        self.layer = nn.Linear(dim, dim)

    def forward(self, x):
        return self.layer(x)


exec(
    re.search(r"class QuadraticPath.*?(?=\n\n)\n\n.*?(?=\nPATHS)", PAGE, re.DOTALL).group(),
    globals_ := {"Path": FlowPath, "broadcast": broadcast, "Coefficients": Coefficients},
)
QuadraticPath = globals_["QuadraticPath"]


class DataPrediction:
    """output = x, the clean latent."""

    weighted = True

    def error(self, output, x, noise, c):
        return output - x

    def velocity(self, output, x_t, c):
        noise = self.noise(output, x_t, c)
        return c.d_alpha * output + c.d_sigma * noise

    def noise(self, output, x_t, c):
        return (x_t - c.alpha * output) / c.sigma.clamp(min=1e-3)

    def clean(self, output, x_t, c):
        return output


class QuadraticTimes:
    """More times near noise."""

    def __init__(self, *, power: float = 2.0):
        self.power = power

    def __call__(self, u):
        return u**self.power


class OneStep:
    """The cleanest guess, in one evaluation."""

    def __init__(self, process, *, num_steps: int = 1):
        self.process, self.num_steps = process, num_steps

    def __call__(self, predict, noise, generator=None):
        t = torch.full((len(noise),), self.process.times(torch.tensor([0.5], dtype=torch.float64)).item())
        t = t.to(torch.long) if isinstance(self.process, Diffusion) else t
        return self.process.clean(predict(noise, t), noise, t)


class Mirrored(Transport):
    """The published flow under another name."""


class Stripes(ImageDataset):
    """Eight images of two classes, upright and level stripes."""

    def __init__(self, *, period: int = 2):
        super().__init__(np.arange(8) % 2, ["upright", "level"], image_size=8, channels=1, flip=False)
        self.period = period

    def pixels(self, index):
        stripe = np.uint8(255) * (np.arange(8) // self.period % 2).astype(np.uint8)
        image = np.broadcast_to(stripe, (8, 8))
        return np.ascontiguousarray(image if index % 2 else image.T)[:, :, None]


class HalfCodec(PixelCodec):
    """Pixels at half their size."""

    def __init__(self, channels, *, factor: float = 0.5):
        super().__init__(channels)
        self.factor, self.identity = factor, {"name": "half", "factor": factor}

    def moments(self, images):
        return self.factor * images

    def decode(self, latents):
        return latents / self.factor


FLOW, DIFFUSION = "digits_sit", "digits_dit"
RUNS = {  # row -> entries (registry, name, what), config, words on the command line; of each way that the row names
    "an attention layer": [
        (ATTENTIONS, "power", PowerAttention, FLOW, ["--model.attention.sharpness", "2"]),
        (ATTENTIONS, "plain", PlainModule, DIFFUSION, []),
    ],
    "a path": [(PATHS, "quadratic", QuadraticPath, FLOW, [])],
    "a prediction": [(PREDICTIONS, "data", DataPrediction, FLOW, [])],
    "a loss weight": [(WEIGHTS, "snr", lambda c: (c.alpha / c.sigma) ** 2, FLOW, ["--process.prediction", "noise"])],
    "betas": [(BETAS, "constant", lambda num: torch.full((num,), 0.01, dtype=torch.float64), DIFFUSION, [])],
    "a sampler": [
        (PROCESSES["flow"].samplers, "one", OneStep, FLOW, []),
        (PROCESSES["diffusion"].samplers, "one", OneStep, DIFFUSION, []),
    ],
    "times of training": [(TIMES, "quadratic", QuadraticTimes, FLOW, ["--process.time.power", "3"])],
    "a process": [
        (
            PROCESSES,
            "mirrored",
            ProcessKind(Mirrored, PROCESSES["flow"].network, PROCESSES["flow"].samplers, "ode"),
            FLOW,
            [],
        )
    ],
    "images": [(DATASETS, "stripes", Stripes, FLOW, ["--data.period", "4"])],
    "a codec": [(CODECS, "half", HalfCodec, FLOW, ["--codec.factor", "0.25"])],
}
KEYS = {
    "an attention layer": "model.attention.name",
    "a path": "process.path",
    "a prediction": "process.prediction",
    "a loss weight": "process.weight",
    "betas": "process.betas",
    "a sampler": "sample.sampler",
    "times of training": "process.time.name",
    "a process": "process.name",
    "images": "data.name",
    "a codec": "codec.name",
}
CASES = [(row, *case) for row, cases in RUNS.items() for case in cases]


@pytest.mark.usefixtures("as_in_a_new_process")
@pytest.mark.parametrize(
    ("row", "registry", "name", "what", "config", "words"), CASES, ids=[f"{row}, {name}" for row, _, name, *_ in CASES]
)
def test_a_new_entry_trains_and_draws_by_its_name(row, registry, name, what, config, words, monkeypatch, tmp_path):
    monkeypatch.setitem(registry, name, what)
    run = tmp_path / "run"
    argv = [
        "--config",
        str(CONFIGS / f"{config}.yaml"),
        "--run_dir",
        str(run),
        *TINY,
        f"--{KEYS[row]}",
        f"{{name: {name}}}" if row == "a sampler" else name,
        *words,
    ]
    train.main(argv)
    record = json.loads(next(run.glob("checkpoints/*/checkpoint.json")).read_text())
    value = record["config"]
    for key in KEYS[row].removesuffix(".name").split("."):
        value = value[key]
    assert name in (value, value["name"] if isinstance(value, dict) else None)
    for key, number in zip(words[::2], words[1::2], strict=True):  # its options are settings, of their own type
        option = key.rpartition(".")[2]
        assert not isinstance(value, dict) or option not in value or value[option] == float(number)
    sample.main([str(run), "--num", "2", "--labels", "balanced", "--out", str(tmp_path / "two.npz")])
    assert np.load(tmp_path / "two.npz")["arr_0"].shape[0] == 2


@pytest.mark.usefixtures("as_in_a_new_process")
@pytest.mark.parametrize(("shape", "channels"), [((12, 8, 8), 1), ((12, 8, 8, 3), 3)])
def test_the_data_set_of_the_page_trains_by_the_command_in_its_file(shape, channels, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(CONFIGS)
    code = next(block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "class Arrays" in block)
    Path("arrays.py").write_text(code, encoding="utf-8")
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez("mine.npz", images=images, labels=np.arange(12) % 3, class_names=["bee", "cat", "dog"])
    words = shlex.split(re.search(r"^python (arrays\.py .*)$", code, re.MULTILINE)[1])
    monkeypatch.setitem(DATASETS, "arrays", None)  # so that what the file enters is taken out again
    monkeypatch.setattr(sys, "argv", [*words, *TINY, "--train.num_workers", "0"])
    data = runpy.run_path("arrays.py", run_name="__main__")["Arrays"](file="mine.npz")
    assert all((data.pixels(i) == images[i].reshape(8, 8, channels)).all() for i in range(12))
    monkeypatch.delitem(DATASETS, "arrays")  # sample.py knows nothing of it
    sample.main(["runs/mine", "--num", "2", "--classes", "[dog]", "--out", "two.npz"])
    drawn = np.load("two.npz")
    assert drawn["arr_0"].shape == (2, 8, 8, 3)
    assert drawn["arr_1"].tolist() == [2, 2]


class Colours(fid.FeatureExtractor):
    """Mean and largest value of each channel."""

    dims = {"features": 6}

    @classmethod
    def load(cls, path):
        return cls()

    def forward(self, images):
        x = images.float() / 255
        return {"features": torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1)}


class Gap(Metric):
    """How far the means of the features are apart."""

    numbers = ("gap",)
    columns = {"gap": ("gap", 3)}

    def compute(self, samples, reference, options):
        return {"gap": float((samples.rows["features"].mean(0) - reference.rows["features"].mean(0)).norm())}


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A run of two steps and a folder of 8 real images."""
    root = tmp_path_factory.mktemp("judged")
    train.main(["--config", str(CONFIGS / "digits_sit.yaml"), "--run_dir", str(root / "run"), *TINY])
    (root / "real").mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (8, 8, 8), dtype=np.uint8)):
        Image.fromarray(image).convert("RGB").save(root / "real" / f"{i:02}.png")
    return root


def measure(root, capsys, *words):
    out = root / f"{'-'.join(words).replace('/', '-')[-60:]}.json"
    sample.main([str(root / "run"), "--num", "8", "--fid", str(root / "real"), "--out", str(out), *words])
    return json.loads(out.read_text()), capsys.readouterr().out


@pytest.mark.usefixtures("as_in_a_new_process")
class TestTheEvaluator:
    def test_features_for_a_distance(self, judged, monkeypatch, capsys):
        monkeypatch.setitem(EXTRACTORS, "colours", Colours)
        record, line = measure(judged, capsys, "--fid_extractor", "colours")
        assert record["extractor"].startswith("colours")
        assert record["fd"] > 0
        assert "Frechet distance" in line

    def test_a_metric(self, judged, monkeypatch, capsys):
        monkeypatch.setitem(EXTRACTORS, "colours", Colours)
        monkeypatch.setitem(METRICS, "gap", Gap())
        record, line = measure(judged, capsys, "--fid_extractor", "colours", "--fid_metrics", "[fd,gap]")
        assert 0 < record["gap"] < 3
        assert f"gap {record['gap']:.3f}" in line

    def test_a_protocol_of_inception(self, judged, monkeypatch, capsys, inception_weights):
        blurred = Preset(lambda images, size: F.interpolate(images.float(), size=(size, size)) / 128 - 1, ("fid",))
        monkeypatch.setitem(PRESETS, "nearest", blurred)
        record, _ = measure(judged, capsys, "--fid_preset", "nearest", "--fid_weights", str(inception_weights))
        assert "nearest" in record["protocol"]
        assert record["fid"] > 0


EVALUATOR = {"features for a distance", "a metric", "a protocol of Inception"}  # rows that `TestTheEvaluator` does


def test_every_row_of_the_page_is_done_here_and_names_its_registry():
    assert {row[0] for row in ROWS} == {*RUNS} | EVALUATOR | {"an option of guidance"}
    for _, _, where in ROWS:
        for dotted in re.findall(r"`((?:\w+\.)+[A-Z]+)`", where):
            module, _, name = dotted.rpartition(".")
            assert isinstance(getattr(importlib.import_module(module), name), dict)


def test_an_option_of_a_new_entry_is_checked_as_any_other(monkeypatch, tmp_path):
    monkeypatch.setitem(ATTENTIONS, "power", PowerAttention)
    argv = ["--config", str(CONFIGS / "digits_sit.yaml"), "--run_dir", str(tmp_path), "--model.attention.name", "power"]
    for words in (["--model.attention.sharpness", "much"], ["--model.attention.sharp", "1"]):
        with pytest.raises(SystemExit) as error:
            train.main([*argv, *words])
        assert error.value.code == 2


def test_an_option_of_guidance_is_a_field_that_every_program_takes(monkeypatch):
    """What draws takes its options from the fields of `SampleConfig`, so that one more is one more everywhere."""
    for f in dataclasses.fields(SampleConfig):
        assert f.name in {g.name for g in dataclasses.fields(sample.SampleArguments)}
        assert f.name in {g.name for g in dataclasses.fields(SampleOptions)}
