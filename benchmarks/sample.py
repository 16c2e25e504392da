"""Drawing beside the bare network: what a sampler, guidance, decoding and a file of images cost.

    python -m benchmarks.sample                                                      # one busy CPU core: 11 minutes
    python -m benchmarks.sample --device cuda --out benchmarks/results/sample_gpu.json
    python -m benchmarks.sample --device cuda --size XL/2 --group_size 64 --parts drawing,switches --out ...

- drawing: of each sampler, evaluations of the network an image, images/s, these over what as many bare forward passes
  would give, and the share of the time that the network's forward passes have, measured within `ImageSampler.latents`.
- switches: images/s with `compile` of the blocks and with bf16, and seconds of the first group.
- guidance: images/s with none, as one batch of 2 B, as two passes of B, and in an interval.
- decoding: images/s at 256 pixels of an autoencoder like Stable Diffusion's, by groups and one by one.
- memory: peak of processes that draw 1,000 and 50,000 images of 32 x 32 pixels into .npz, .npy, and an evaluator.
- writing: bytes/s of .npz at 256 pixels beside a plain file, and its share of the time of a process that draws.

Contenders take turns, after a warm-up; numbers are medians. Weights are random, and adaptive steps those of such weights. On
a CPU, which has one thread, networks and autoencoder are small: the sizes are in the JSON. What does not touch the disk is
timed there by the seconds of the process, for others use it, too. Files lie in TMPDIR.
"""

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

import fid
from benchmarks.report import aim, child_command, peak_kib, run_parts, take_turns, use_device, wall
from vca_engine import assemble
from vca_engine.config.reading import from_dict
from vca_engine.config.schema import Config, SampleConfig
from vca_engine.files import write_text
from vca_engine.images.codecs import VAECodec
from vca_engine.images.labels import DataInfo
from vca_engine.sampling.image_sampler import ImageSampler
from vca_engine.sampling.pipeline import Pipeline
from vca_engine.sampling.sample_record import SAMPLES_RECORD
from vca_engine.sampling.writers import ArrayWriter

TINY = {"hidden_size": 96, "depth": 4, "num_heads": 3}  # the demo's network
SAMPLERS = {  # ode counts points: one more than steps
    "ddpm, 250": ("diffusion", {"name": "ddpm", "num_steps": 250}),
    "ddim, 50": ("diffusion", {"name": "ddim", "num_steps": 50}),
    "dpm-solver, 20": ("diffusion", {"name": "dpm-solver", "num_steps": 20}),
    "dpm-solver, sde, 20": ("diffusion", {"name": "dpm-solver", "num_steps": 20, "sde": True}),
    "unipc, 20": ("diffusion", {"name": "unipc", "num_steps": 20}),
    "sde, 250": ("flow", {"name": "sde", "num_steps": 250}),
    "ode, dopri5": ("flow", {"name": "ode", "method": "dopri5"}),
    "ode, heun, 25": ("flow", {"name": "ode", "method": "heun", "num_steps": 26}),
    "ode, euler, 50": ("flow", {"name": "ode", "method": "euler", "num_steps": 51}),
}
NUMBERS = (1_000, 50_000)  # images of the memory
SIDE = 256  # of what is decoded and written


def main() -> None:
    """Runs the parts that were asked for and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--size", nargs="+", help="B/2 and XL/2; on a CPU tiny, the demo's network on 16 x 16 latents")
    parser.add_argument("--attention", default="vca")
    parser.add_argument("--group_size", type=int, default=16, help="images drawn together")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", default="drawing,switches,guidance,decoding,memory,writing")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sample_cpu.json"))
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    use_device(args, 5)
    if args.child:
        print(json.dumps(measured(args.child)))
        return
    args.size = args.size or (["tiny"] if args.cpu else ["B/2", "XL/2"])
    parts = {name: globals()[name] for name in ("drawing", "switches", "guidance", "decoding", "memory", "writing")}
    run_parts(parser, parts, args, ("torch", "diffusers", "torchdiffeq", "numpy"))


def pipeline_of(args: argparse.Namespace, process: str, size: str, **more: Any) -> Pipeline:
    """A pipeline with random weights for random latents; `size` "tiny" is that of the demo.

    Args:
        args: Of the command line.
        process: diffusion or flow.
        size: SIZE/PATCH, or tiny.
        more: side and channels of the latents, and what of the network is not as `size` says.
    """
    tiny = size == "tiny"
    side, channels = more.pop("side", 16 if tiny else 32), more.pop("channels", 4)
    model = {"size": "S/2" if tiny else size, **(TINY if tiny else {}), "attention": {"name": args.attention}, **more}
    data = {"name": "folder", "images": "none", "image_size": side}
    values = {
        "run_dir": "none",
        "process": {"name": process},
        "data": data,
        "codec": {"name": "pixels"},
        "model": model,
    }
    config = from_dict(Config, values, "benchmarks/sample.py")
    shape = DataInfo(side, channels, [str(k) for k in range(1000)])
    codec = assemble.codec(config, channels)
    torch.manual_seed(0)
    network = assemble.network(config, shape, codec).to(args.device).eval().requires_grad_(False)
    for p in network.parameters():  # as it begins, its output is 0
        nn.init.normal_(p, std=0.02)
    origin = {"path": "none", "kind": "random", "part": "ema"}
    return Pipeline(config, shape, network, assemble.process(config), codec, origin, Path())


def about(args: argparse.Namespace, pipe: Pipeline) -> dict[str, Any]:
    """How large it is."""
    network = pipe.network
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "latents": [network.in_channels, *network.input_size],
        "tokens": network.pos_embed.shape[1],
        "group": args.group_size,
    }


def group_of(image_sampler: ImageSampler, size: int) -> Callable[[], Tensor]:
    """Draws one group of latents, always the same."""
    return partial(image_sampler.latents, [k % 1000 for k in range(size)], range(size))


def rates(seconds: dict[str, list[float]], group: int, first: str) -> dict[str, Any]:
    """Images/s, and over those of the same turn of the job `first`."""
    over = {name: [*np.quantile(np.divide(seconds[first], one), [0.25, 0.5, 0.75])] for name, one in seconds.items()}
    speed = {name: group / np.median(one) for name, one in seconds.items()}
    return {"images per second": speed, f"over {first}, quartiles": over, "seconds": seconds}


# Drawing


class Stopwatch:
    """A network's forward pass that knows its time: of a GPU by its own clock, so that nothing waits for it."""

    def __init__(self, forward: Callable, device: str) -> None:
        self.forward, self.device, self.marks = forward, device, []

    def __call__(self, *given: Tensor) -> Tensor:
        """The output."""
        start = self._mark()
        output = self.forward(*given)
        self.marks.append((start, self._mark()))
        return output

    def seconds(self) -> float:
        """Of all passes; a GPU has finished them."""
        return sum(a.elapsed_time(b) / 1000 if self.device == "cuda" else b - a for a, b in self.marks)

    def _mark(self) -> Any:
        if self.device == "cpu":
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def drawing(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Each sampler beside bare forward passes."""
    found, aims, least = {}, [], 0.9 if args.cpu else 0.95
    for size in args.size:
        pipes = {name: pipeline_of(args, name, size) for name in ("diffusion", "flow")}
        image_samplers = {
            name: pipes[p].image_sampler(SampleConfig(sampler=spec)) for name, (p, spec) in SAMPLERS.items()
        }
        turns: dict[str, list[tuple]] = {name: [] for name in SAMPLERS}
        for image_sampler in image_samplers.values():
            bare_pass(args, image_sampler) if args.cpu else a_group(args, image_sampler)  # the warm-up
        for _, (name, image_sampler) in itertools.product(range(args.repeats), image_samplers.items()):
            before, one, after = (
                bare_pass(args, image_sampler),
                a_group(args, image_sampler),
                bare_pass(args, image_sampler),
            )
            turns[name].append((*one, (before + after) / 2))
        found[size] = about(args, pipes["flow"])
        for name, image_sampler in image_samplers.items():
            total, inside, bare = np.array(turns[name]).T  # (repeats,) each
            found[size][name] = {
                "evaluations": image_sampler.nfe,
                "images per second": float(args.group_size / np.median(total)),
                "over bare passes, quartiles": [*np.quantile(bare * image_sampler.nfe / total, [0.25, 0.5, 0.75])],
                "the network's share, quartiles": [*np.quantile(inside / total, [0.25, 0.5, 0.75])],
                "milliseconds outside, a pass": float(np.median(total - inside) / image_sampler.nfe * 1000),
                "seconds": {"all": [*total], "network": [*inside], "bare pass": [*bare]},
            }
        share = {name: found[size][name]["the network's share, quartiles"][1].item() for name in SAMPLERS}
        worst = min(share, key=share.get)
        aims.append(
            aim(f"the network's share of drawing, {size}, least of all samplers ({worst})", share[worst], least)
        )
    return {**found, "aims": aims}


def a_group(args: argparse.Namespace, image_sampler: ImageSampler) -> tuple[float, float]:
    """Seconds of one group, and of the network in it."""
    watch = Stopwatch(image_sampler.network.forward, args.device)
    with patch.object(image_sampler.network, "forward", watch):
        start = args.now()
        group_of(image_sampler, args.group_size)()
        return args.now() - start, watch.seconds()


@torch.no_grad()
def bare_pass(args: argparse.Namespace, image_sampler: ImageSampler, times: int = 5) -> float:
    """Seconds of a forward pass of a group, without all that is around it."""
    network = image_sampler.network
    x = torch.randn(args.group_size, network.in_channels, *network.input_size, device=args.device)
    t, y = torch.zeros(2, args.group_size, dtype=torch.long, device=args.device)
    start = args.now()
    for _ in range(times):
        network(x, t, y)
    return (args.now() - start) / times


# Switches and guidance


def switches(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Images/s with compile and bf16; few steps, for a CPU emulates bf16."""
    found, spec = {}, {"name": "ode", "method": "euler", "num_steps": 5 if args.cpu else 51}
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)  # what another run compiled is not used
    for size in args.size:
        jobs, first, failed = {}, {}, {}
        for name in ("plain", "compile", "bf16", "compile, bf16"):
            pipe = pipeline_of(args, "flow", size)
            pipe.precision = "bf16" if "bf16" in name else "no"
            for block in pipe.network.blocks if "compile" in name else ():
                block.compile()
            job, start = group_of(pipe.image_sampler(SampleConfig(sampler=spec)), args.group_size), wall()
            try:
                job()
            except RuntimeError as error:  # there is no compiler, for one
                failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                continue
            jobs[name], first[name] = job, wall() - start
        seconds, _ = take_turns(jobs, args.repeats, 1, args.now)
        sizes = {**about(args, pipe), "steps": spec["num_steps"] - 1}
        found[size] = {**sizes, **rates(seconds, args.group_size, "plain"), "seconds of the first": first, **failed}
    return {**found, "aims": []}


def guidance(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Images/s of ways to guide."""
    found, spec = {}, {"name": "ode", "method": "euler", "num_steps": 21}
    for size in args.size:
        pipe = pipeline_of(args, "flow", size)
        guided, part = SampleConfig(sampler=spec, cfg_scale=4.0), (0.2, 0.7)
        image_samplers = {
            "a batch of 2 B": pipe.image_sampler(guided),
            "two passes of B": pipe.image_sampler(guided, guide=pipe, negative=0),  # as with another network as guide
            f"in the interval {part}": pipe.image_sampler(
                SampleConfig(sampler=spec, cfg_scale=4.0, guidance_interval=part)
            ),
            "none": pipe.image_sampler(SampleConfig(sampler=spec)),
        }
        seconds, _ = take_turns(
            {name: group_of(d, args.group_size) for name, d in image_samplers.items()}, args.repeats, 1, args.now
        )
        nfe = {name: d.nfe for name, d in image_samplers.items()}
        found[size] = {**about(args, pipe), "evaluations": nfe, **rates(seconds, args.group_size, "a batch of 2 B")}
    return {**found, "aims": []}


# Decoding


def decoding(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Images/s of the codec, of groups and one by one."""
    widths = (16, 32, 64, 64) if args.cpu else (128, 256, 512, 512)  # these are those of Stable Diffusion's
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=min(32, widths[0]),
        sample_size=SIDE,
    ).save_pretrained(folder)
    codec = VAECodec(3, path=str(folder)).to(args.device)
    latents = torch.randn(args.group_size, 4, SIDE // 8, SIDE // 8, device=args.device)
    jobs = {
        "one by one": lambda: [codec.decode(z) for z in latents.split(1)],
        f"a group of {args.group_size}": lambda: codec.decode(latents),
    }
    seconds, _ = take_turns(jobs, args.repeats, 1, args.now)
    parameters = sum(p.numel() for part in (codec.vae.decoder, codec.vae.post_quant_conv) for p in part.parameters())
    sizes = {"widths": widths, "parameters of the decoder": parameters, "side": SIDE}
    return {**sizes, **rates(seconds, args.group_size, "one by one"), "aims": []}


# Memory and writing: sample.py in processes of their own


def memory(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Peak memory of few and of many images."""
    side, size = 32, {"patch_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2}
    pipeline_of(args, "flow", "tiny", side=side, channels=3, **size).save_pretrained(folder / "model")
    torch.manual_seed(0)
    fid.Classifier(10, side).eval().save(folder / "judge.safetensors")
    np.savez(folder / "real.npz", np.random.default_rng(0).integers(0, 256, (1000, side, side, 3), dtype=np.uint8))
    judge = [
        "--fid",
        folder / "real.npz",
        "--fid_extractor",
        "classifier",
        "--fid_weights",
        folder / "judge.safetensors",
    ]
    found, aims = {"model": {**size, "side": side}, "bytes of all images": [n * side * side * 3 for n in NUMBERS]}, []
    for form, more in {"npz": [], "npy": [], "json": [*judge, "--fid_metrics", "[fd,is]"]}.items():
        steps = ["--sampler.name", "ode", "--sampler.method", "euler", "--sampler.num_steps", 2, "--group_size", 250]
        done = []
        for num in NUMBERS:
            out = folder / f"{num}.{form}"
            done.append(child(args, folder / "model", "--num", num, "--out", out, *steps, *more))
            out.unlink()
        ratio = done[1]["peak MiB"] / done[0]["peak MiB"]
        found[form] = {key: [one[key] for one in done] for key in ("peak MiB", "seconds of drawing")} | {"ratio": ratio}
        aims.append(aim(f"peak memory at {NUMBERS[1]:,} images over that at {NUMBERS[0]:,}, {form}", ratio, most=1.1))
    return {**found, "aims": aims}


def child(args: argparse.Namespace, *command: Any) -> dict[str, float]:
    """What `measured` gives of a command of sample.py."""
    command = child_command("sample", "--device", args.device, "--child", *command, "--device", args.device)
    quiet = os.environ | {"TQDM_DISABLE": "1"}
    output = subprocess.run(command, stdout=subprocess.PIPE, env=quiet, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def measured(command: list[str]) -> dict[str, float]:
    """Runs sample.py in this process: MiB at its peak, seconds of `draw_many` and of the writer within."""
    import sample  # the program, not this file: what is imported is not called __main__

    seconds: dict[str, float] = {}
    with timed(sample, "draw_many", seconds), timed(ArrayWriter, "write", seconds):
        sample.main(command)
    peak = {"peak MiB": peak_kib() / 1024}
    return peak | {"seconds of drawing": seconds["draw_many"], "seconds of the sink": seconds.get("write", 0.0)}


@contextmanager
def timed(owner: Any, name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Adds the time of a function to `seconds`."""
    function = getattr(owner, name)

    def call(*given: Any) -> Any:
        start = time.perf_counter()
        result = function(*given)
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
        return result

    with patch.object(owner, name, call):
        yield


def writing(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Bytes/s of an .npz beside a plain file on the disk, and the share of the writer."""
    num, batch = 512, 64
    images, form = np.random.default_rng(0).integers(0, 256, (batch, SIDE, SIDE, 3), dtype=np.uint8), "a.npz"
    split: dict[str, list[dict[str, float]]] = {"parts": []}

    def ours() -> None:
        array, seconds = ArrayWriter(folder / form, num, SIDE), {}
        write_text(array.partial / SAMPLES_RECORD, "{}")
        with contextlib.ExitStack() as stack:
            for owner, name in ((array, "allocate"), (array, "write"), (os, "fsync"), (array, "finish")):
                stack.enter_context(timed(owner, name, seconds))
            array.allocate()
            for k in range(0, num, batch):
                array.write(range(k, k + batch), images, range(batch))
            array.finish([k % batch for k in range(num)])
        split["parts"].append(seconds)
        (folder / form).unlink()

    def plain() -> None:
        with open(folder / "plain", "wb") as file:
            for _ in range(0, num, batch):
                file.write(images)
            file.flush()
            os.fsync(file.fileno())
        (folder / "plain").unlink()

    seconds, median = take_turns({"plain": plain, "npz": ours}, args.repeats, 1, time.perf_counter)
    parts = {name: float(np.median([one[name] for one in split["parts"][1:]])) for name in split["parts"][0]}
    pipe = pipeline_of(args, "flow", "tiny", side=SIDE, channels=3, patch_size=32)  # 64 tokens
    pipe.save_pretrained(folder / "model")
    euler = ["--sampler.name", "ode", "--sampler.method", "euler", "--sampler.num_steps", 11]
    done = child(
        args, folder / "model", "--num", 128, "--out", folder / "b.npz", *euler, "--group_size", args.group_size
    )
    return {
        "sizes": {"images": num, "batch": batch, "side": SIDE},
        "MB per second": {name: images.nbytes * num / batch / value / 1e6 for name, value in median.items()},
        "plain over npz, quartiles": [*np.quantile(np.divide(seconds["plain"], seconds["npz"]), [0.25, 0.5, 0.75])],
        "seconds of its parts": parts,
        "seconds": seconds,
        "drawn": {**about(args, pipe), "images": 128, "steps": 10, **done},
        "share of the sink": done["seconds of the sink"] / done["seconds of drawing"],
        "aims": [],
    }


if __name__ == "__main__":
    main()
