"""A web page on this machine that draws from a checkpoint: classes by name, settings, a gallery and its record.

    python app.py runs/demo                                      then open http://127.0.0.1:7860
    python app.py facebook/DiT-XL-2-256 --precision bf16 --port 8000

The checkpoint is what sample.py takes. The page shows the command of sample.py that draws the same images, bit for bit
on one kind of device. It needs gradio, `pip install -e .[app]`, and sends nothing to anybody; who reaches --host can
draw, one after the other, but pages of other sites cannot. Drawing stops when the page that asked for it is closed.
"""

import dataclasses
import html
import ipaddress
import json
import math
import os
import shlex
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple
from urllib.parse import urlsplit

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported
try:
    import gradio as gr
except ModuleNotFoundError as error:
    raise SystemExit("app.py: the page needs gradio; run `pip install -e .[app]`.") from error

import numpy as np
from gradio.context import LocalContext
from pydantic import Field
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from torch import Tensor

from sit_vca.sampler import ODE, ODE_METHODS
from vca import defaults_of
from vca_engine import assemble
from vca_engine.config.cli import parse, report_errors
from vca_engine.config.options import ModelOptions
from vca_engine.config.reading import Spec
from vca_engine.config.schema import NEED_GUIDANCE, SampleConfig, require
from vca_engine.precision import chosen_device
from vca_engine.sampling.classes import evenly_spaced_classes
from vca_engine.sampling.pipeline import Pipeline

MOST = 256  # images of one click
MOST_STEPS, MOST_CFG = 1000, 100.0
MOST_REQUEST_BYTES = 2**20  # of a request: the fields of the page are some hundred bytes, and a number for each class
GALLERY_STYLE = """#gallery .grid-container {grid-template-columns: repeat(auto-fill, minmax(%dpx, 1fr))}
#gallery img {image-rendering: %s}
#gallery .thumbnail-lg {display: flex; flex-direction: column; height: auto; aspect-ratio: auto}
#gallery .thumbnail-lg img {height: auto; aspect-ratio: 1}
#gallery .caption-label {position: static; max-width: 100%%; width: 100%%; border: 0}
#gallery .caption-label, #gallery .caption {white-space: normal; overflow-wrap: anywhere}"""


@dataclass(frozen=True, kw_only=True)
class AppArguments(ModelOptions):
    """The model, and where the page is.

    Args:
        host: Address of the page; 0.0.0.0 lets other machines in.
        port: Its port.
        names: Names that the page is reached by, beside addresses and this machine's own names; say of a proxy.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65_535)] = 7860
    names: list[str] | None = None


class Fields(NamedTuple):
    """The fields of the page, in its order; a number that is empty is None.

    Attributes:
        classes: Numbers of classes, which take turns.
        num: Images.
        seed: Of the images.
        cfg_scale: Guidance.
        sampler: Its name.
        method: Of the sampler ode.
        steps: Steps that it takes; num_steps counts points of time where the sampler does, one more.
        low: Lowest noise level with guidance.
        high: Highest one.
    """

    classes: Sequence[int]
    num: int | None
    seed: int | None
    cfg_scale: float | None
    sampler: str
    method: str
    steps: int | None
    low: float
    high: float


@report_errors("app.py")
def main(argv: Sequence[str] | None = None) -> None:
    """Load the model and open the page."""
    texts = {"prog": "app.py", "description": __doc__}
    args = parse(AppArguments, argv, **texts, first="checkpoint", parts=assemble.parts(drawing=True))
    pipe = Pipeline.from_pretrained(args.checkpoint, **args.loading(), device=chosen_device(args.device))
    defaults = {f.name: f.default for f in dataclasses.fields(AppArguments)}
    loading = {**args.loading(), "device": args.device}
    given = {name: value for name, value in loading.items() if value != defaults[name]}
    page = build_page(pipe, given)
    host = f"[{args.host}]" if ":" in args.host and not args.host.startswith("[") else args.host  # IPv6, as in a URL
    try:
        page.launch(
            server_name=host,
            server_port=args.port,
            share=False,
            show_error=True,  # of what gradio says of a field; else the page says null
            app_kwargs={"middleware": [Middleware(OwnPagesOnly, names=[args.host, *(args.names or [])])]},
            ssr_mode=False,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            css=GALLERY_STYLE % ((96, "pixelated") if pipe.info.image_size <= 64 else (180, "auto")),
        )
    except OSError:
        raise OSError(
            f"no page can be opened at {args.host}, port {args.port}; choose another --port or --host."
        ) from None
    print(f"{pipe}\nopen http://{host}:{args.port}", flush=True)
    page.block_thread()


class OwnPagesOnly:
    """Refuses requests that are large, for a name that is not this machine's, or sent by a page of another site.

    A browser lets any site send requests to this page; and a site can give its own name this machine's address. An
    address cannot be made to lead elsewhere, so each is allowed.

    Args:
        app: What answers all other requests.
        names: Names that the page is reached by, beside this machine's own.
    """

    def __init__(self, app: ASGIApp, names: Sequence[str]) -> None:
        self.app = app
        self.names = {name.lower() for name in ("localhost", socket.gethostname(), socket.getfqdn(), *names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        refusal = self.refusal(scope["method"], Headers(scope=scope)) if scope["type"] == "http" else None
        await (PlainTextResponse(refusal[1], refusal[0]) if refusal else self.app)(scope, receive, send)

    def refusal(self, method: str, headers: Mapping[str, str]) -> tuple[int, str] | None:
        """Give the HTTP status and the sentence of a request that is refused; None for all others."""
        host = _name_in(f"//{headers.get('host', '')}")
        if not (_is_address(host) or host in self.names):
            return 400, f"This page is not reached by the name {host!r}; app.py --names [NAME] allows one."
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers["host"] and _name_in(origin) not in self.names:
            return 403, "Only pages of this server may send requests to it."
        length = headers.get("content-length", "0" if "transfer-encoding" not in headers else "")
        if method not in ("GET", "HEAD") and not (length.isdecimal() and int(length) <= MOST_REQUEST_BYTES):
            return 413, f"A request has at most {MOST_REQUEST_BYTES} bytes, and says how many."
        return None


def _name_in(url: str) -> str:
    """Give the name or address of the host in a URL; empty if there is none."""
    try:
        return (urlsplit(url).hostname or "").lower()
    except ValueError:
        return ""


def _is_address(host: str) -> bool:
    """Tell whether a host is named by its IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class ClientLeftError(Exception):
    """Nobody waits any longer for what is being drawn."""


def build_page(pipe: Pipeline, loaded_with: Mapping[str, Any] | None = None) -> gr.Blocks:
    """Make the page, with the defaults of the model's config.

    Args:
        pipe: What draws.
        loaded_with: The options of sample.py that load the same model from `pipe.source["path"]`.
    """
    default, names = pipe.config.sample, pipe.class_names
    sampler = assemble.describe_sampling(pipe.config)["sampler"]
    samplers = assemble.process_kind(pipe.config).samplers
    specs = {name: {"name": name, **defaults_of(entry)} for name, entry in samplers.items()}
    specs[sampler["name"]] = sampler
    steps_of = {name: spec["num_steps"] - points_beyond_steps(pipe, spec) for name, spec in specs.items()}
    choices = [(name if name == str(k) else f"{name} ({k})", k) for k, name in enumerate(names)]
    first = pipe.label_ids(default.classes or []) or evenly_spaced_classes(range(len(names)))

    def clicked(progress: gr.Progress = gr.Progress(), *values: Any) -> tuple:  # noqa: B008
        return answer(pipe, loaded_with or {}, Fields(*values), while_somebody_waits(page, progress))

    def chosen(name: str) -> tuple:
        return steps_of[name], gr.update(visible=name == "ode")

    with gr.Blocks(title="Visual-Contrast Attention", fill_width=True, delete_cache=(3600, 3600)) as page:
        gr.HTML(f"<p>{html.escape(str(pipe))}</p>")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                classes = gr.Dropdown(choices, value=first, multiselect=True, label="Classes", elem_id="classes")
                with gr.Row():
                    few = min(default.group_size, MOST)
                    label = f"Images, up to {MOST}"
                    num = gr.Number(few, precision=0, label=label, min_width=90, elem_id="num")
                    seed = gr.Number(default.seed, precision=0, label="Seed", min_width=90, elem_id="seed")
                    label = f"Cfg scale, up to {MOST_CFG:g}"
                    cfg = gr.Number(default.cfg_scale, step=0.5, label=label, min_width=90, elem_id="cfg")
                with gr.Row():
                    name = gr.Dropdown(list(samplers), value=sampler["name"], label="Sampler", min_width=90)
                    ode = sampler if sampler["name"] == "ode" else defaults_of(ODE)
                    methods = {"value": ode["method"], "visible": ode is sampler}
                    method = gr.Dropdown(list(ODE_METHODS), label="Method", min_width=90, **methods)
                    label = f"Steps, up to {MOST_STEPS}"
                    steps = gr.Number(
                        steps_of[sampler["name"]], precision=0, label=label, min_width=90, elem_id="steps"
                    )
                interval = default.guidance_interval
                low, high = interval or (0.0, 1.0)
                with gr.Accordion("Guidance interval: 0 is data, 1 is noise", open=interval is not None):
                    low = gr.Slider(0, 1, low, step=0.01, label="From noise level")
                    high = gr.Slider(0, 1, high, step=0.01, label="To noise level")
                button = gr.Button("Draw", variant="primary", elem_id="draw")
            with gr.Column(scale=5):
                gallery = gr.Gallery(show_label=False, format="png", object_fit="contain", elem_id="gallery")
                label = "The command that draws the same images"
                again = gr.Textbox(label=label, lines=2, buttons=["copy"], elem_id="command")
                record = gr.Code(label="Record", language="json", lines=12, max_lines=12, elem_id="record")
        name.input(chosen, name, [steps, method], api_visibility="private")
        fields = Fields(classes, num, seed, cfg, name, method, steps, low, high)
        button.click(clicked, list(fields), [gallery, again, record], show_progress_on=gallery, api_name="draw")
    return page


def answer(
    pipe: Pipeline, loaded_with: Mapping[str, Any], fields: Fields, report: Callable[[float], None]
) -> tuple[list[tuple[np.ndarray, str]] | None, str, str]:
    """Draw what a click asks for: images (H, W, 3) with their classes' names, the command, and the record.

    Raises:
        gr.Error: It cannot be drawn; says why.
    """
    try:
        sampling = settings(pipe, fields)
        images, record = draw(pipe, sampling, fields.classes, fields.num, report)
    except ClientLeftError:
        return None, "", ""
    except Exception as error:  # also of torch, such as a GPU without memory: the page has to say something
        sentence = html.escape(str(error) or type(error).__name__, quote=False)
        raise gr.Error(sentence, print_exception=not isinstance(error, ValueError | OSError)) from error
    captions = [pipe.class_names[k] for k in record["labels"]]
    again = command(pipe.source["path"], loaded_with, sampling, fields.classes, fields.num)
    return list(zip(images, captions, strict=True)), again, json.dumps(record, indent=2)


def while_somebody_waits(page: gr.Blocks, report: Callable[[float], None]) -> Callable[[float], None]:
    """Make a `report` for `draw` that ends it by a `ClientLeftError` when the client of this click is gone."""
    event = page._queue.event_ids_to_events.get(LocalContext.event_id.get(None))

    def reported(share: float) -> None:
        if event is not None and not event.alive:
            raise ClientLeftError
        report(share)

    return reported


def points_beyond_steps(pipe: Pipeline, sampler: Spec) -> int:
    """Count by how much the num_steps of a sampler, which may be points of time, exceeds the steps that it takes."""
    sampling = dataclasses.replace(pipe.config.sample, sampler=sampler)
    made = assemble.sampler(dataclasses.replace(pipe.config, sample=sampling), pipe.process)
    if not hasattr(made, "steps_taken"):
        return 0
    return 1 if made.steps_taken is None else made.num_steps - made.steps_taken


def settings(pipe: Pipeline, fields: Fields) -> SampleConfig:
    """Turn the fields of the page into settings; an empty one is as the model's config says.

    Raises:
        ValueError: A field that cannot be.
    """
    default, num = pipe.config.sample, fields.num
    require(bool(fields.classes), "classes", fields.classes, "choose at least one")
    require(num is not None and 0 < num <= MOST, "images", num, f"choose 1 to {MOST}; sample.py draws more")
    few = fields.steps is None or 1 <= fields.steps <= MOST_STEPS
    require(few, "steps", fields.steps, f"choose 1 to {MOST_STEPS}; sample.py takes more")
    scale = fields.cfg_scale
    finite = scale is None or (math.isfinite(scale) and abs(scale) <= MOST_CFG)
    require(finite, "cfg scale", scale, f"choose -{MOST_CFG:g} to {MOST_CFG:g}; 1 is no guidance")
    spec = {"name": fields.sampler, **({"method": fields.method} if fields.sampler == "ode" else {})}
    if fields.sampler == assemble.describe_sampling(pipe.config)["sampler"]["name"]:
        spec = {**(default.sampler or {}), **spec}
    if fields.steps is not None:
        spec["num_steps"] = fields.steps + points_beyond_steps(pipe, spec)
    interval = (fields.low, fields.high)
    everywhere = interval == (0, 1) and default.guidance_interval is None
    groups = -(-num // default.group_size)  # rounded up, and the groups as even as can be, since all are drawn whole
    return default.changed(
        sampler=spec,
        cfg_scale=None if fields.cfg_scale is None else float(fields.cfg_scale),
        guidance_interval=None if everywhere else interval,
        seed=fields.seed,
        group_size=-(-num // groups),
    )


def draw(
    pipe: Pipeline, sampling: SampleConfig, classes: Sequence[int], num: int, report: Callable[[float], None]
) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Draw images 0 ... num - 1 of the seed, of these classes in turn.

    Args:
        pipe: The model.
        sampling: How it draws.
        classes: Numbers of classes.
        num: Images.
        report: Is told at each evaluation of the network what share of the work is done, 0 ... 1.

    Returns:
        Images (H, W, 3) uint8, and their record.
    """
    image_sampler, size = pipe.image_sampler(sampling), sampling.group_size
    labels = [classes[i % len(classes)] for i in range(-(-num // size) * size)]
    images: list[np.ndarray] = []

    def watch(x_t: Tensor, t: Tensor, output: Tensor) -> None:
        done = len(images) + size * (1 - float(pipe.process.noise_level(t[0])))
        report(min(max(done / len(labels), 0.0), 1.0))

    for k in range(0, len(labels), size):
        latents = image_sampler.latents(labels[k : k + size], range(k, k + size), watch=watch)  # (size, C, h, w)
        images += list(image_sampler.images(latents))
    labels = labels[:num]
    return images[:num], {**pipe.settings(sampling), "labels": labels, "nfe": image_sampler.nfe, **pipe.facts()}


def command(
    checkpoint: str, loaded_with: Mapping[str, Any], sampling: SampleConfig, classes: Sequence[int], num: int
) -> str:
    """Write the command of sample.py that draws the images of `draw`."""
    without = ("classes", "per_class", *(NEED_GUIDANCE if sampling.cfg_scale == 1.0 else ()))
    how = {f.name: getattr(sampling, f.name) for f in dataclasses.fields(sampling) if f.name not in without}
    drawn = {"num": num, "labels": "balanced", "classes": list(classes), **how, "out": "images"}
    return shlex.join(["python", "sample.py", checkpoint, *_words({**loaded_with, **drawn})])


def _words(options: Mapping[str, Any]) -> Iterator[str]:
    """Give the words of a command line; what is None is left out."""
    for name, value in options.items():
        if isinstance(value, dict):
            yield from _words({f"{name}.{key}": v for key, v in value.items()})
        elif value is not None:
            yield f"--{name}"
            yield value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


if __name__ == "__main__":
    main()
