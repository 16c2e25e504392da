"""The page of app.py: what it draws is what the command that it shows draws, and a mistake is a sentence."""

import dataclasses
import importlib.util
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
from vca_engine import assemble
from vca_engine.config.cli import parse
from vca_engine.config.options import with_options
from vca_engine.config.schema import Config, ModelConfig, SampleConfig
from vca_engine.images.labels import DataInfo
from vca_engine.sampling.pipeline import Pipeline

gr = pytest.importorskip("gradio", reason="the page needs gradio: pip install -e .[app]")

import app  # noqa: E402

pytestmark = pytest.mark.usefixtures("as_in_a_new_process")

NAMES = ["tench, Tinca tinca", "goldfish", "crane", "crane", "4", "5"]
BROWSER = os.environ.get("CHROMIUM") or shutil.which("chromium")
EULER = {"name": "ode", "method": "euler", "num_steps": 4}


def saved(folder, process="flow", sampler=None, **options):
    """A folder with a small network of random weights, none of them zero."""
    config = Config(
        run_dir="",
        process={"name": process},
        data={"name": "digits"},
        codec={"name": "pixels"},
        model=ModelConfig(hidden_size=16, depth=1, num_heads=2, **options),
        sample=SampleConfig(sampler=sampler, cfg_scale=2.0, group_size=4),
    )
    shape = DataInfo(8, 1, NAMES)
    codec = assemble.codec(config, 1)
    network = assemble.network(config, shape, codec)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.2)
    origin = {"path": str(folder), "kind": "checkpoint", "part": "ema", "step": 1, "size": "S/2", "attention": "vca"}
    Pipeline(config, shape, network, assemble.process(config), codec, origin, folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    return Pipeline.from_pretrained(saved(tmp_path_factory.mktemp("app") / "flow", sampler=EULER), device="cpu")


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    return Pipeline.from_pretrained(saved(tmp_path_factory.mktemp("app") / "diffusion", "diffusion"), device="cpu")


def button(pipe, shares=None, loaded_with=None):
    """What a click on Draw calls, with the fields of the page; a field not given is as the page has it at first."""
    (click,) = [fn for fn in app.build_page(pipe, loaded_with).fns.values() if fn.api_name == "draw"]
    defaults = {name: field.value for name, field in zip(FIELDS, click.inputs, strict=True)}

    def pressed(**fields):
        assert set(fields) <= set(defaults)
        return click.fn(
            lambda share: shares.append(share) if shares is not None else None, *(defaults | fields).values()
        )

    return pressed


FIELDS = app.Fields._fields


def drawn_by(command, folder):
    """The images of the command."""
    words = shlex.split(command)
    assert words[:2] == ["python", "sample.py"]
    assert words[-2] == "--out"
    sample.main([*words[2:-1], str(folder / "images.npz")])
    with np.load(folder / "images.npz") as arrays:
        return arrays["arr_0"], arrays["arr_1"]


CLICKS = [
    {},
    {"num": 1},
    {"num": 9, "classes": [3, 0], "seed": 7, "cfg_scale": 1, "steps": 3},  # groups of 4 would be 12: three of 3
    {"num": 5, "sampler": "ode", "method": "dopri5", "low": 0.2, "high": 0.7},  # one step size for a group, of 3
    {"num": 5, "sampler": "sde", "steps": 5, "high": 0.5},
]


@pytest.mark.parametrize("fields", CLICKS)
def test_the_command_on_the_page_draws_the_images_on_the_page(flow, tmp_path, fields):
    gallery, command, record = button(flow, loaded_with={"device": "cpu"})(**fields)
    images, labels = drawn_by(command, tmp_path)
    assert len(gallery) == fields.get("num", 4)
    assert (np.stack([image for image, _ in gallery]) == images).all()
    assert [caption for _, caption in gallery] == [NAMES[k] for k in labels]
    record = json.loads(record)
    assert record["labels"] == labels.tolist()
    assert record["seed"] == fields.get("seed", 0)
    assert record["checkpoint"]["path"] == flow.source["path"]


def test_so_does_that_of_a_diffusion(diffusion, tmp_path):
    gallery, command, record = button(diffusion)(num=3, sampler="dpm-solver", steps=5, seed=2)
    images, _ = drawn_by(command, tmp_path)
    assert (np.stack([image for image, _ in gallery]) == images).all()
    assert "--sampler.name dpm-solver" in command
    assert "method" not in command
    assert json.loads(record)["nfe"] == 10  # with guidance, two a step


def test_the_page_begins_with_the_defaults_of_the_model(flow, diffusion):
    (click,) = [fn for fn in app.build_page(flow).fns.values() if fn.api_name == "draw"]
    values = dict(zip(FIELDS, (field.value for field in click.inputs), strict=True))
    assert values == {
        "classes": [0, 1, 2, 3, 4, 5],
        "num": 4,
        "seed": 0,
        "cfg_scale": 2.0,
        "sampler": "ode",
        "method": "euler",
        "steps": 3,  # of 4 points of time
        "low": 0.0,
        "high": 1.0,
    }
    assert click.inputs[0].choices[2:5] == [("crane (2)", 2), ("crane (3)", 3), ("4", 4)]  # apart, and found by number
    (click,) = [fn for fn in app.build_page(diffusion).fns.values() if fn.api_name == "draw"]
    assert [name for name, _ in click.inputs[4].choices] == ["ddpm", "ddim", "dpm-solver", "unipc"]
    assert (click.inputs[4].value, click.inputs[6].value) == ("ddpm", 250)
    assert not click.inputs[5].visible


def test_another_sampler_comes_with_its_own_number_of_steps(flow):
    (choose,) = [fn.fn for fn in app.build_page(flow).fns.values() if fn.api_name != "draw"]
    assert choose("sde") == (250, gr.update(visible=False))
    assert choose("ode") == (3, gr.update(visible=True))  # as the model's config says


@pytest.mark.parametrize(
    ("fields", "num_steps", "nfe"),
    [
        ({"sampler": "ode", "method": "euler", "steps": 5}, 6, 10),  # with guidance, two evaluations a step
        ({"sampler": "ode", "method": "heun", "steps": 5}, 6, 20),
        ({"sampler": "sde", "steps": 5}, 5, 10),  # four between points, and the last one
        ({"sampler": "ode", "method": "euler", "steps": 1}, 2, 2),
    ],
)
def test_the_page_counts_steps_and_not_points_of_time(flow, fields, num_steps, nfe):
    _, command, record = button(flow)(num=1, **fields)
    assert f"--sampler.num_steps {num_steps} " in command
    assert (json.loads(record)["sampler"]["num_steps"], json.loads(record)["nfe"]) == (num_steps, nfe)


def test_an_empty_field_is_as_the_config_says(flow):
    draw = button(flow)
    assert draw(seed=None, cfg_scale=None, steps=None)[1:] == draw()[1:]


def test_options_that_the_page_does_not_show_stay_those_of_the_config(tmp_path):
    pipe = Pipeline.from_pretrained(saved(tmp_path / "a", sampler={**EULER, "time_shift": 3.0}), device="cpu")
    draw = button(pipe)
    assert "--sampler.time_shift 3.0" in draw()[1]
    assert "time_shift" not in draw(sampler="sde", steps=3)[1]


def test_the_bar_tells_the_share_of_evaluations(flow):
    shares = []
    button(flow, shares)(num=8, steps=4)  # 4 evaluations each of two groups
    assert shares == pytest.approx([k / 8 for k in range(8)])


MISTAKES = [
    ({"classes": []}, "classes is []; choose at least one."),
    ({"num": 0}, "images is 0; choose 1 to 256; sample.py draws more."),
    ({"num": None}, "images is None; choose 1 to 256"),
    ({"num": 1000}, "images is 1000; choose 1 to 256"),
    ({"seed": -1}, "seed is -1; choose at least 0, below 18,446,744,073,709,551,616."),
    ({"steps": 0}, "steps is 0; choose 1 to 1000"),
    ({"steps": 10**9}, "steps is 1000000000; choose 1 to 1000; sample.py takes more."),
    ({"cfg_scale": float("nan")}, "cfg scale is nan; choose -100 to 100; 1 is no guidance."),
    ({"cfg_scale": -1e38}, "cfg scale is -1e+38; choose"),
    ({"low": 0.8, "high": 0.2}, "sample.guidance_interval is (0.8, 0.2); choose two noise levels between 0 and 1"),
]


@pytest.mark.parametrize(("fields", "sentence"), MISTAKES)
def test_a_mistake_is_a_sentence(flow, fields, sentence):
    with pytest.raises(gr.Error) as error:
        button(flow)(**fields)
    assert error.value.message.startswith(sentence)
    assert not error.value.print_exception


def test_a_model_without_a_null_class_says_so(tmp_path):
    pipe = Pipeline.from_pretrained(saved(tmp_path / "a", sampler=EULER, class_dropout_prob=0.0), device="cpu")
    with pytest.raises(gr.Error, match=r"cfg_scale is 2\.0, but this model has no null class .* use cfg_scale 1"):
        button(pipe)()
    assert len(button(pipe)(cfg_scale=1)[0]) == 4


def test_what_torch_says_is_shown_too_and_its_traceback_printed(flow, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(app, "draw", full)
    with pytest.raises(gr.Error, match="CUDA out of memory") as error:
        button(flow)()
    assert error.value.print_exception


@pytest.mark.parametrize(
    "given",
    [
        {"weights": "ema-0.05", "precision": "bf16"},
        {"process": {"name": "flow", "path": "vp"}, "vae": "/a folder/vae", "device": "cpu"},
    ],
)
def test_the_command_loads_the_model_as_the_page_did(flow, given):
    sampled = app.settings(flow, app.Fields([1], 2, 0, 1.5, "sde", "euler", 3, 0.0, 1.0))
    words = shlex.split(app.command("a folder/x.pt", given, sampled, [1], 2))[2:]
    args = parse(sample.SampleArguments, words, prog="", description="", first="checkpoint")
    assert args.checkpoint == "a folder/x.pt"
    assert {name: getattr(args, name) for name in given} == given
    assert dataclasses.replace(with_options(flow.config.sample, args), classes=None) == sampled


def test_without_gradio_it_says_what_to_install():
    code = "import sys; sys.modules['gradio'] = None; import app"
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(app.__file__).parent, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr == "app.py: the page needs gradio; run `pip install -e .[app]`.\n"


def test_a_port_that_is_taken_is_a_sentence(flow, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SystemExit) as stop:
            app.main([flow.source["path"], "--device", "cpu", "--port", str(taken.getsockname()[1])])
    assert stop.value.code == 2
    assert "app.py: no page can be opened at 127.0.0.1, port" in capsys.readouterr().err


PAGE = {"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:7860", "content-length": "200"}


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("POST", PAGE, None),
        ("GET", {"host": "localhost:8000"}, None),  # a tunnel
        ("GET", {"host": "[::1]:7860"}, None),
        ("GET", {"host": "192.168.0.7"}, None),  # no site can have an address for its name
        ("GET", {"host": "lab.example"}, None),
        ("POST", PAGE | {"origin": "https://lab.example"}, None),  # a proxy that gives the address as the host
        ("GET", {"host": "evil.example"}, 400),  # whose name leads to this machine
        ("GET", {}, 400),
        ("GET", {"host": "[x"}, 400),
        ("POST", PAGE | {"origin": "http://evil.example"}, 403),
        ("POST", PAGE | {"origin": "http://127.0.0.1:8000"}, 403),
        ("POST", PAGE | {"origin": "null"}, 403),
        ("POST", PAGE | {"content-length": "100000000"}, 413),
        ("POST", PAGE | {"content-length": "-1"}, 413),
        ("POST", {"host": "localhost", "transfer-encoding": "chunked"}, 413),
        ("POST", {"host": "localhost"}, None),  # without content
    ],
)
def test_requests_of_other_sites_and_large_ones_are_refused(method, headers, status):
    refusal = app.OwnPagesOnly(None, ["lab.example"]).refusal(method, headers)
    assert (refusal and refusal[0]) == status


@pytest.fixture
def served(flow, monkeypatch):
    """The address of the page on a server of its own, which stops after the test."""
    pages = []
    monkeypatch.setattr(gr.Blocks, "block_thread", lambda page: pages.append(page))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app.main([flow.source["path"], "--device", "cpu", "--port", str(port)])
    yield f"http://127.0.0.1:{port}"
    pages[0].close()


def ask(address, *values, timeout=60):
    """Send the fields of the page; gives the open answer, of which lines can be read."""
    content = json.dumps({"data": values}).encode()
    request = urllib.request.Request(f"{address}/gradio_api/call/draw", content, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        event = json.load(answer)["event_id"]
    return urllib.request.urlopen(f"{address}/gradio_api/call/draw/{event}", timeout=timeout)


DRAWN = ([0], 2, 0, 1.0, "ode", "euler", 3, 0, 1)


def test_drawing_stops_when_nobody_waits_for_it(served, monkeypatch):
    began, stopped = threading.Event(), threading.Event()

    def draw(pipe, sampling, classes, num, report):
        try:
            while True:
                report(0.5)
                began.set()
        finally:
            stopped.set()

    with monkeypatch.context() as patch:
        patch.setattr(app, "draw", draw)
        answer = ask(served, *DRAWN)
        assert began.wait(60)
        assert not stopped.is_set()
        answer.close()
        assert stopped.wait(60)
    with ask(served, *DRAWN) as answer:  # the next one is served
        assert b"event: complete" in answer.read()


def test_a_field_that_gradio_refuses_is_named(served):
    for wrong in (["x"], [{}]):
        with ask(served, [0], *wrong, *DRAWN[2:]) as answer:
            said = answer.read().decode()
        assert "event: error" in said
        assert "null" not in said
        assert "number" in said


def test_what_a_page_shows_is_text(tmp_path):
    """Names of classes and folders are no HTML and no formula."""
    pipe = Pipeline.from_pretrained(saved(tmp_path / "<b>a", sampler=EULER), device="cpu")
    (first,) = [block.value for block in app.build_page(pipe).blocks.values() if isinstance(block, gr.HTML)]
    assert "&lt;b&gt;a" in first
    assert "<b>" not in first


def test_nothing_is_sent_to_anybody(flow):
    page = app.build_page(flow)
    assert not page.analytics_enabled
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


@pytest.mark.skipif(not importlib.util.find_spec("playwright"), reason="no playwright: pip install playwright")
@pytest.mark.skipif(not BROWSER, reason="no chromium on the path, and none in the variable CHROMIUM")
def test_in_a_browser(flow):
    """See tests/browser.py; the command is left out, since it is run above."""
    script = Path(__file__).with_name("browser.py")
    run = subprocess.run(
        [sys.executable, str(script), flow.source["path"], "--quick"], capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stdout + run.stderr
