"""A web page on this machine that draws from a checkpoint: classes by name, settings, a gallery and its record.

    python app.py runs/demo                                      then open http://127.0.0.1:7860
    python app.py facebook/DiT-XL-2-256 --precision bf16 --port 8000

The checkpoint is what sample.py takes. The page shows the command of sample.py that draws the same images, bit for bit on
one kind of device. It needs gradio, `pip install -e .[app]`, and sends nothing to anybody; who reaches --host can draw.
"""

import dataclasses
import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported
try:
    import gradio as gr
except ModuleNotFoundError as error:
    raise SystemExit("app.py: the page needs gradio; run `pip install -e .[app]`.") from error

import numpy as np
from torch import Tensor

from sit_vca.sampler import ODE, ODE_METHODS
from vca import defaults_of
from vca_engine import assemble
from vca_engine.config.cli import parse, report_errors
from vca_engine.config.reading import Spec, Strict
from vca_engine.config.schema import SampleConfig, require
from vca_engine.sampling.classes import spread
from vca_engine.sampling.pipeline import Pipeline, chosen_device

MOST = 256  # images of one click
STYLE = """#gallery .grid-container {grid-template-columns: repeat(auto-fill, minmax(%dpx, 1fr))}
#gallery img {image-rendering: %s}"""


@dataclass(frozen=True)
class Arguments(Strict):
    """What to draw from, and where the page is.

    Args:
        checkpoint: A run's folder, for its newest checkpoint, or one of its checkpoints/step-* folders; a published .pt; a
            folder of diffusers' DiT; a name on the hub. May stand first, without its name.
        weights: ema, the averaged weights; ema-0.05 and the like, the power-function averages; model, those of the last
            training step.
        vae: Where the autoencoder is now, if not where it was in training, or for published weights another than theirs.
        process: diffusion or flow, with its options, where published weights do not say it.
        device: cuda or cpu; auto is the GPU if there is one.
        precision: no, the weights' float32, or bf16.
        host: Address of the page; 0.0.0.0 lets other machines in.
        port: Its port.
    """

    checkpoint: str
    weights: str = "ema"
    vae: str | None = None
    process: Spec | None = None
    device: Literal["auto", "cuda", "cpu"] = "auto"
    precision: Literal["no", "bf16"] = "no"
    host: str = "127.0.0.1"
    port: int = 7860

    def __post_init__(self) -> None:
        require(0 < self.port < 65536, "port", self.port, "choose 1 to 65535")


@report_errors("app.py")
def main(argv: Sequence[str] | None = None) -> None:
    """See the module."""
    args = parse(Arguments, argv, prog="app.py", description=__doc__, first="checkpoint", parts=assemble.parts())
    device = chosen_device(args.device)
    of_the_model = ("weights", "vae", "process", "device", "precision")
    defaults = {f.name: f.default for f in dataclasses.fields(Arguments)}
    given = {name: getattr(args, name) for name in of_the_model if getattr(args, name) != defaults[name]}
    pipe = Pipeline.from_pretrained(args.checkpoint, **given | {"device": device})
    page = build_page(pipe, given)
    try:
        page.launch(
            server_name=args.host,
            server_port=args.port,
            share=False,
            ssr_mode=False,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            css=STYLE % ((96, "pixelated") if pipe.info.image_size <= 64 else (180, "auto")),
        )
    except OSError:
        raise OSError(
            f"no page can be opened at {args.host}, port {args.port}; choose another --port or --host."
        ) from None
    print(f"{pipe}\nopen http://{args.host}:{args.port}", flush=True)
    page.block_thread()


def build_page(pipe: Pipeline, loaded_with: Mapping[str, Any] | None = None) -> gr.Blocks:
    """The page, with the defaults of the model's config.

    Args:
        pipe: What draws.
        loaded_with: The options of sample.py that load the same model from `pipe.source["path"]`.
    """
    default, names = pipe.config.sample, pipe.class_names
    sampler = assemble.describe_sampling(pipe.config)["sampler"]
    samplers = assemble.process_kind(pipe.config).samplers
    steps_of = {name: defaults_of(entry)["num_steps"] for name, entry in samplers.items()}
    steps_of[sampler["name"]] = sampler["num_steps"]
    choices = [(name if name == str(k) else f"{name} ({k})", k) for k, name in enumerate(names)]
    first = pipe.label_ids(default.classes or []) or spread(range(len(names)))

    def clicked(progress: gr.Progress = gr.Progress(), *fields: Any) -> tuple:  # noqa: B008
        try:
            sample, classes, num = settings(pipe, *fields), fields[0], fields[1]
            images, record = draw(pipe, sample, classes, num, progress)
        except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: of torch, such as a GPU without memory
            raise gr.Error(str(error), print_exception=isinstance(error, RuntimeError)) from error
        captions = [names[k].split(",")[0] for k in record["labels"]]
        again = command(pipe.source["path"], loaded_with or {}, sample, classes, num)
        return list(zip(images, captions, strict=True)), again, json.dumps(record, indent=2)

    def chosen(name: str) -> tuple:
        return steps_of[name], gr.update(visible=name == "ode")

    with gr.Blocks(title="Visual-Contrast Attention", fill_width=True, delete_cache=(3600, 3600)) as page:
        gr.Markdown(str(pipe))
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                classes = gr.Dropdown(choices, value=first, multiselect=True, label="Classes", elem_id="classes")
                with gr.Row():
                    num = gr.Number(default.group_size, precision=0, label="Images", min_width=90, elem_id="num")
                    seed = gr.Number(default.seed, precision=0, label="Seed", min_width=90, elem_id="seed")
                    cfg = gr.Number(default.cfg_scale, step=0.5, label="Cfg scale", min_width=90, elem_id="cfg")
                with gr.Row():
                    name = gr.Dropdown(list(samplers), value=sampler["name"], label="Sampler", min_width=90)
                    ode = sampler if sampler["name"] == "ode" else defaults_of(ODE)
                    methods = {"value": ode["method"], "visible": ode is sampler}
                    method = gr.Dropdown(list(ODE_METHODS), label="Method", min_width=90, **methods)
                    steps = gr.Number(sampler["num_steps"], precision=0, label="Steps", min_width=90, elem_id="steps")
                low, high = default.guidance_interval or (0.0, 1.0)
                with gr.Accordion(
                    "Guidance interval: 0 is data, 1 is noise", open=default.guidance_interval is not None
                ):
                    low = gr.Slider(0, 1, low, step=0.01, label="From noise level")
                    high = gr.Slider(0, 1, high, step=0.01, label="To noise level")
                button = gr.Button("Draw", variant="primary", elem_id="draw")
            with gr.Column(scale=5):
                gallery = gr.Gallery(show_label=False, format="png", object_fit="contain", elem_id="gallery")
                again = gr.Textbox(
                    label="The command that draws the same images", lines=2, buttons=["copy"], elem_id="command"
                )
                record = gr.Code(label="Record", language="json", lines=12, max_lines=12, elem_id="record")
        name.input(chosen, name, [steps, method], api_visibility="private")
        fields = [classes, num, seed, cfg, name, method, steps, low, high]
        button.click(clicked, fields, [gallery, again, record], show_progress_on=gallery, api_name="draw")
    return page


def settings(
    pipe: Pipeline,
    classes: Sequence[int],
    num: int | None,
    seed: int | None,
    cfg_scale: float | None,
    sampler: str,
    method: str,
    steps: int | None,
    low: float,
    high: float,
) -> SampleConfig:
    """What the fields of the page say; an empty one, as the model's config says.

    Raises:
        ValueError: A field that cannot be.
    """
    default = pipe.config.sample
    require(bool(classes), "classes", classes, "choose at least one")
    require(num is not None and 0 < num <= MOST, "images", num, f"choose 1 to {MOST}; sample.py draws more")
    given = {"num_steps": steps, "method": method if sampler == "ode" else None}
    spec = {"name": sampler, **{key: value for key, value in given.items() if value is not None}}
    if sampler == assemble.describe_sampling(pipe.config)["sampler"]["name"]:
        spec = {**(default.sampler or {}), **spec}
    everywhere = (low, high) == (0, 1) and default.guidance_interval is None
    groups = -(-num // default.group_size)  # rounded up, and the groups as even as can be, since all are drawn whole
    return dataclasses.replace(
        default,
        sampler=spec,
        cfg_scale=default.cfg_scale if cfg_scale is None else float(cfg_scale),
        guidance_interval=None if everywhere else (low, high),
        seed=default.seed if seed is None else seed,
        group_size=-(-num // groups),
    )


def draw(
    pipe: Pipeline, sample: SampleConfig, classes: Sequence[int], num: int, report: Callable[[float], None]
) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Images 0 ... num - 1 of the seed, of these classes in turn, and their record.

    Args:
        pipe: What draws.
        sample: How.
        classes: Their numbers.
        num: Images.
        report: Is told at each evaluation of the network what share of the work is done, 0 ... 1.
    """
    drawer, size = pipe.drawer(sample), sample.group_size
    labels = [classes[i % len(classes)] for i in range(-(-num // size) * size)]
    images: list[np.ndarray] = []

    def watch(x_t: Tensor, t: Tensor, output: Tensor) -> None:
        done = len(images) + size * (1 - float(pipe.process.noise_level(t[0])))
        report(min(max(done / len(labels), 0.0), 1.0))

    for k in range(0, len(labels), size):
        latents = drawer.latents(labels[k : k + size], range(k, k + size), watch=watch)
        images += list(drawer.images(latents))
    labels = labels[:num]
    return images[:num], {**pipe.settings(sample), "labels": labels, "nfe": drawer.nfe, **pipe.facts()}


def command(
    checkpoint: str, loaded_with: Mapping[str, Any], sample: SampleConfig, classes: Sequence[int], num: int
) -> str:
    """The command of sample.py that draws the images of `draw`."""
    drawn = {"num": num, "labels": "balanced", "classes": list(classes), "seed": sample.seed}
    how = {name: getattr(sample, name) for name in ("cfg_scale", "guidance_interval", "sampler", "group_size")}
    return shlex.join(["python", "sample.py", checkpoint, *_words({**loaded_with, **drawn, **how, "out": "images"})])


def _words(options: Mapping[str, Any]) -> Iterator[str]:
    """Of a command line; what is None is left out."""
    for name, value in options.items():
        if isinstance(value, dict):
            yield from _words({f"{name}.{key}": v for key, v in value.items()})
        elif value is not None:
            yield f"--{name}"
            yield value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


if __name__ == "__main__":
    main()
