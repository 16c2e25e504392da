"""Each row of the table in docs/extending.md, done as the page says from outside of the packages, and used by its name."""

import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sample
import train
from dit_vca.diffusion import BETAS, Diffusion
from sit_vca.path import PATHS, Coefficients, broadcast
from sit_vca.path import Path as FlowPath
from sit_vca.prediction import PREDICTIONS, WEIGHTS
from sit_vca.transport import TIMES, Transport
from vca.layer import Attention
from vca.transformer import ATTENTIONS
from vca_engine.assemble import PROCESSES, ProcessKind
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

    def attend(self, q, k, v):
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


def test_every_row_of_the_page_is_done_here_and_names_its_registry():
    assert {row[0] for row in ROWS if not row[2].startswith("`fid.")} == {*RUNS}
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
