"""Run the programs as a user does and write down what comes out, before and after code is moved: nothing may differ.

    python tests/same_numbers.py record before.json                    all of this checkout; ten to fifteen minutes
    python tests/same_numbers.py record part.json --only fid pictures --tree ../other
    python tests/same_numbers.py compare before.json after.json        says what differs; exit code 1 if anything does

Record both on one machine with one set of packages, and not two at a time. All files stand in the folder same_numbers of
the system's temporary one, whose name is in some of them; it is removed at the end.

Each file is an item, NAME -> its SHA-256:
- .json, .jsonl, .yaml, .md: of the text, with TMP and TREE for the two folders, without what CHANGING, CHANGING_ROWS name.
- .png, .gif: of the pixels of all frames, and of what stands beside them (text, times), treated in the same way.
- .safetensors: of the bytes, but with the metadata in the header sorted: safetensors writes those in any order.
- All others (.npz, .npy, .pdf ...): of the bytes.
LEFT_OUT are not looked at: they hold times, process ids and the names of machines.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from PIL import Image, ImageSequence
from pytorch_fid import inception as blocks

LONG = 40_000  # characters
CHANGING = {"date", "seconds", "images_per_second", "memory_gib", "id", "revision", "checksum", "files"}
CHANGING_ROWS = ("| revision of the code |", "| checkpoint |")  # of a model card: a revision, an id
LEFT_OUT = ("events.out.tfevents*", ".lock", ".tracker-id")
TMP = Path(tempfile.gettempdir()).resolve() / "same_numbers"
RENAMED = {  # program -> file that is there where it is called so -> how; one that gets another name gets a line here
    "export": {"export.py": "export.py", "dit_vca/interop/__main__.py": "-m dit_vca.interop export"},
    "ema": {"runtime/ema.py": "-m runtime.ema"},
}
DEMOS = ("digits_sit", "digits_dit", "mnist_sit", "mnist_dit")
SMALL = (
    "--model.hidden_size 32 --model.depth 2 --model.num_heads 2 --train.batch_size 16 --train.warmup_steps 5 "
    "--train.checkpoint_every 20 --train.snapshot_every 20 --train.sample_every 20 --train.log_every 10 "
    "--train.num_workers 0 --sample.per_class 1 --sample.sampler.num_steps 4"
)
VAE = "--widths [8,16,16] --num_steps 400 --batch_size 32 --lr 5e-3 --kl_weight 1e-3"  # of the demo
METHODS = "euler,midpoint,heun2,heun3,rk4,explicit_adams,implicit_adams,adaptive_heun,fehlberg2,bosh3,dopri5,dopri8"


class Checkout:
    """Runs the programs of a tree, makes what they need when it is first asked for, and keeps what was found."""

    def __init__(self, tree: Path) -> None:
        self.tree, self.found = tree, {}

    def run(self, program: str, *words: str, processes: int = 1) -> str:
        """What a program prints. A word with spaces is several, as it would be on a command line."""
        if program in RENAMED:
            there = [call for file, call in RENAMED[program].items() if (self.tree / file).is_file()]
            program = (there or sys.exit(f"{self.tree} has none of {list(RENAMED[program])}; name it in RENAMED."))[0]
        call = program.split()
        if processes > 1:
            dashes = ["--"] * (call[0] != "-m")  # so that torchrun does not read the program's options
            call = f"-m torch.distributed.run --standalone --nproc_per_node {processes}".split() + dashes + call
            call += ["--"] * (program == "-m fid")
        command = [sys.executable, *call, *(part for word in words for part in word.split())]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        env["SOURCE_DATE_EPOCH"] = "0"  # the date in a PDF
        done = subprocess.run(command, cwd=self.tree, env=env, capture_output=True, text=True)
        if done.returncode:
            sys.exit(
                f"exit code {done.returncode} of {' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-5000:]}"
            )
        return done.stdout

    def keep(self, *paths: Path) -> None:
        """Note a file, all files of a folder, or what was written beside a file: FILE.json, FILE.npz.json, ..."""
        for path in paths:
            beside = [f for f in path.parent.iterdir() if f.is_file() and f.name.split(".")[0] == path.stem]
            files = path.rglob("*") if path.is_dir() else [path, *beside]
            for file in sorted(f for f in files if f.is_file() and not any(f.match(name) for name in LEFT_OUT)):
                self.note(str(file.relative_to(TMP)), read(file))

    def note(self, name: str, content: Any) -> None:
        """Note the content of an item: bytes, or lines and JSON values, which are kept where they are short."""
        if isinstance(content, bytes):
            self.found[name] = {"sha256": hashlib.sha256(content).hexdigest()}
            return
        text = json.dumps(content).replace(str(TMP), "TMP").replace(str(self.tree), "TREE")
        item = self.found[name] = {"sha256": hashlib.sha256(text.encode()).hexdigest()}
        if len(text) < LONG:
            item["content"] = json.loads(text)

    def train(self, name: str, config: str, more: str = "", steps: int = 40, processes: int = 1) -> Path:
        """A run, trained if it is not there."""
        folder, options = TMP / name, f"--run_dir {TMP / name} --train.num_steps {steps} {SMALL} {more}"
        if not (folder / f"checkpoints/step-{steps:08d}").is_dir():
            self.run("train.py", f"--config configs/{config}.yaml", options, processes=processes)
        return folder

    def demo(self, name: str, kind: str = "", **options: Any) -> Path:
        """A run of a demo's config, with the autoencoder and the latents that it needs."""
        vae, latents = TMP / "autoencoder", TMP / "latents"
        more = f"--codec.path {vae} --latents {latents} " if name.startswith("mnist") else ""
        if more and not latents.is_dir():
            if (self.tree / "train_vae.py").is_file():
                self.run("train_vae.py", f"--data.name mnist {VAE} --out {vae}")
            else:
                self.run("-m demo.autoencoder", f"--config configs/{name}.yaml {more}")
            self.run("cache_latents.py", f"--config configs/{name}.yaml {more}")
        return self.train(name + kind, name, more + options.pop("more", ""), **options)

    def images(self) -> tuple[Path, Path, Path]:
        """Two folders of images of three classes, 25 each, PNG and JPEG of several sizes; and of both a .zip."""
        a, b, both, rng = TMP / "a", TMP / "b", TMP / "both.zip", np.random.default_rng(0)
        if not a.is_dir():
            with zipfile.ZipFile(both, "w") as archive:
                for i in range(50):
                    height, width = (32, 32) if i < 25 else 24 + rng.integers(20, size=2)
                    pixels = rng.integers(256, size=(4, 4, 3)).astype(np.uint8)
                    file = (a, b)[i // 25] / f"class {i % 3}" / f"{i:02}.{('png', 'jpg')[i % 2]}"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).resize((int(width), int(height)), Image.Resampling.BICUBIC).save(file)
                    archive.writestr(zipfile.ZipInfo(str(file.relative_to(file.parents[1]))), file.read_bytes())
        return a, b, both

    def vae(self) -> Path:
        """A random autoencoder that divides the side by 2."""
        if not (TMP / "vae").is_dir():
            torch.manual_seed(0)
            sizes = {"block_out_channels": (4, 8), "norm_num_groups": 2, "mid_block_add_attention": False}
            down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
            AutoencoderKL(down_block_types=down, up_block_types=up, **sizes).save_pretrained(TMP / "vae")
        return TMP / "vae"

    def own(self, name: str, more: str = "", latents: str = "own_latents") -> Path:
        """A run on images in a .zip, with the random autoencoder; of the process and attention that `name` says."""
        data = f"--data.images {self.images()[2]} --data.image_size 16 --codec.path {self.vae()} "
        data += f"--latents {TMP / latents} --cache.shard_size 16 {more}"
        if not (TMP / latents).is_dir():
            self.run("cache_latents.py", f"--config configs/{name}.yaml {data}")
        return self.train(f"own_{name}", name, data, steps=20)

    def classifier(self) -> Path:
        """The classifier of the digits."""
        file = TMP / "classifier.safetensors"
        if not file.exists():
            self.run("-m demo.classifier", f"--data.name digits --out {file}")
            file.write_bytes(in_order(file.read_bytes()))  # records have its SHA-256
        return file

    def inception(self) -> Path:
        """Random weights of the FID's Inception, under which no signal dies."""
        file = TMP / "inception.pth"
        if not file.exists():
            torch.manual_seed(0)
            with patch.object(blocks, "load_state_dict_from_url"), patch.object(torch.nn.Module, "load_state_dict"):
                net = blocks.fid_inception_v3()  # without its download
            for module in net.modules():
                if isinstance(module, torch.nn.Conv2d):
                    torch.nn.init.normal_(module.weight, std=(2 / module.weight[0].numel()) ** 0.5)
                elif isinstance(module, torch.nn.BatchNorm2d):
                    module.momentum = None  # a plain average
            with torch.no_grad():
                net.train()(torch.rand(16, 3, 75, 75) * 2 - 1)  # statistics that fit the weights
            torch.save(net.state_dict(), file)
        return file


def read(file: Path) -> Any:
    """The content of a file as far as it has to be the same."""
    if file.suffix in (".json", ".jsonl"):
        lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
        return [unchanging(line) for line in lines]
    if file.suffix in (".yaml", ".md"):
        return [line for line in file.read_text().splitlines() if not line.startswith(CHANGING_ROWS)]
    if file.suffix in (".png", ".gif"):
        with Image.open(file) as image:
            frames = [(frame.size, frame.convert("RGBA").tobytes()) for frame in ImageSequence.Iterator(image)]
            beside = {key: unchanging(value) for key, value in image.info.items()}
        pixels = [f"{size} {hashlib.sha256(content).hexdigest()}" for size, content in frames]
        return {"frames": pixels, "beside": beside}
    return in_order(file.read_bytes()) if file.suffix == ".safetensors" else file.read_bytes()


def in_order(content: bytes) -> bytes:
    """A safetensors file with the metadata in its header sorted."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    text = json.dumps({**header, "__metadata__": dict(sorted(header.get("__metadata__", {}).items()))}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[start:]


def unchanging(value: Any) -> Any:
    """JSON text or values without those of CHANGING; what is none of JSON as text."""
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except ValueError:
            return value
        return unchanging(found) if isinstance(found, dict | list) else value
    if isinstance(value, dict):
        return {key: unchanging(each) for key, each in value.items() if key not in CHANGING}
    if isinstance(value, list | tuple):
        return [unchanging(each) for each in value]
    return value if value is None or isinstance(value, bool | int | float) else repr(value)


def train(c: Checkout) -> None:
    """40 steps of each demo: at once, in two processes, 20 and 20; one whose distance is measured; one by --resume."""
    for name in DEMOS:
        c.keep(c.demo(name), c.demo(name, "_two", processes=2))
        c.demo(name, "_on", steps=20, more="--train.schedule constant")
        c.keep(c.demo(name, "_on", more="--train.schedule constant"))
    c.keep(*(TMP / "autoencoder" / name for name in ("config.json", "diffusion_pytorch_model.safetensors")))
    c.keep(TMP / "latents")
    half = TMP / "digits_sit/checkpoints/step-00000020"
    c.keep(c.demo("digits_sit", "_branch", more=f"--resume {half}"))
    fid = f"--fid.reference {c.images()[0]} --fid.extractor classifier --fid.weights {c.classifier()} --fid.every 20 "
    c.keep(c.demo("digits_dit", "_fid", more=fid + "--fid.num 32 --train.accumulate 2 --train.keep_checkpoints 1"))


def sample(c: Checkout) -> None:
    """64 images by each sampler, plain and guided, and in other forms."""
    sys.path.insert(0, str(c.tree))
    import dit_vca
    import sit_vca

    def draw(run: Path, name: str, words: str, processes: int = 1) -> None:
        c.run("sample.py", f"{run} --num 64 --out {TMP / name} {words}", processes=processes)
        c.keep(TMP / name)

    guided = "--cfg_scale 2 --guided_channels 3 --guidance_interval [0.1,0.8] --labels balanced"
    for kind, samplers in (("dit", dit_vca.SAMPLERS), ("sit", sit_vca.SAMPLERS)):
        pixels, latents = c.demo(f"digits_{kind}"), c.demo(f"mnist_{kind}")
        few = {name: f"--sampler.name {name} --sampler.num_steps 5" for name in samplers}
        for name, sampler in few.items():
            draw(pixels, f"{kind}_{name}.npz", sampler)
            draw(latents, f"{kind}_{name}_guided.npz", f"{sampler} {guided}")
        first = next(iter(few.values()))
        half = f"{latents}/checkpoints/step-00000020"
        draw(latents, f"{kind}_guide.npz", f"{first} --cfg_scale 2 --guide {half} --guide_weights ema-0.1")
        draw(pixels, f"{kind}_folder", f"{first} --cfg_scale 2 --negative_class 3 --classes [1,2] --weights ema-0.05")
    draw(pixels, "two.npy", "--sampler.name sde --sampler.method heun --sampler.last_step tweedie", processes=2)
    measured = f"--fid {c.images()[0]} --fid_extractor classifier --fid_weights {c.classifier()}"
    draw(pixels, "measured.json", measured)


def cache(c: Checkout) -> None:
    """Latents of 50 images in a .zip, in a folder, by two processes, and one draw of each; and the picture of --check."""
    c.own("dit_s2_mhsa")
    data = f"--config configs/dit_s2_mhsa.yaml --data.image_size 16 --codec.path {c.vae()} --cache.shard_size 16"
    unpacked = TMP / "unpacked"
    with zipfile.ZipFile(c.images()[2]) as archive:
        archive.extractall(unpacked)
    for name, words, processes in (("folder", "", 1), ("two", "", 2), ("drawn", "--cache.moments false", 1)):
        options = f"{data} --data.images {unpacked} --latents {TMP}/latents_{name} {words}"
        c.run("cache_latents.py", options, processes=processes)
    c.run("cache_latents.py", f"{data} --data.images {unpacked} --latents {TMP}/latents_folder --check")
    c.keep(TMP / "own_latents", *(TMP / f"latents_{name}" for name in ("folder", "two", "drawn")))


def fid(c: Checkout) -> None:
    """Distances of two folders by each network and protocol, the statistics, and the score of a demo."""
    a, b, both = c.images()
    eval_, sizes = f"eval {a} --ref {b} --quiet --groups 2", "--mixed-sizes"
    small = f"--extractor classifier --weights {c.classifier()} {sizes}"
    c.run(
        "-m fid",
        f"{eval_} {small} --json {TMP}/classifier.json --save-stats {TMP}/classifier.npz --metrics fd,is,pr,dc,kid,mind",
    )
    c.run("-m fid", f"stats {both} {small} --out {TMP}/reference.npz --crop 32 --keep-images 10")
    c.run("-m fid", f"compare {TMP}/classifier.npz {TMP}/reference.npz --json {TMP}/compared.json")
    c.keep(TMP / "classifier.json", TMP / "reference.npz", TMP / "compared.json")
    for preset in ("adm", "pytorch-fid", "clean"):
        out, network = TMP / f"{preset}.json", f"--weights {c.inception()} --preset {preset} {sizes}"
        c.run("-m fid", f"{eval_} {network} --metrics fid,sfid,is,pr,dc,kid,mind --json {out} --save-stats {out}.npz")
        c.keep(out)
    c.run("-m fid", f"{eval_} --weights {c.inception()} {sizes} --json {TMP}/processes.json", processes=2)
    c.note("selfcheck", c.run("-m fid", f"selfcheck --weights {c.inception()}").splitlines())
    run = c.demo("digits_sit")
    c.run("sample.py", f"{run} --num 64 --labels balanced --out {TMP}/score.npz")
    c.run("-m demo.score", f"--checkpoint {run} --samples {TMP}/score.npz --classifier {c.classifier()}")
    c.keep(TMP / "processes.json", run / "score.json")


def others(c: Checkout) -> None:
    """Images of published files, of folders of diffusers and of save_pretrained; a run's export, and its average."""
    sys.path.insert(0, str(c.tree))
    import dit_vca
    import sit_vca

    def draw(path: Path, words: str = "") -> None:
        c.run(
            "sample.py", f"{path} --num 16 --cfg_scale 1.5 --sampler.num_steps 4 --out {TMP}/of_{path.stem}.npz {words}"
        )
        c.keep(TMP / f"of_{path.stem}.npz")

    published, vae = TMP / "published", f"--vae {c.vae()}"
    published.mkdir()
    sizes = {"input_size": 4, "patch_size": 4, "hidden_size": 384, "depth": 12, "num_heads": 6, "attention": "mhsa"}
    torch.manual_seed(0)
    for kind, network in (("DiT", dit_vca.DiT(**sizes)), ("SiT", sit_vca.SiT(learn_sigma=True, **sizes))):
        with torch.no_grad():  # a new one gives zeros
            state = {key: p + 0.02 * torch.randn_like(p) for key, p in network.state_dict().items()}
        args = argparse.Namespace(model=f"{kind}-S/4", path_type="Linear", prediction="velocity", loss_weight=None)
        torch.save({"ema": state, "model": network.state_dict(), "args": args}, published / f"{kind}.pt")
        draw(published / f"{kind}.pt", vae)
        network.load_state_dict(state)
        network.save_pretrained(published / f"saved_{kind}")
    draw(published / "saved_DiT", f"{vae} --process.name diffusion")
    theirs = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8, out_channels=8, norm_eps=1e-6
    )
    for block in theirs.transformer_blocks:  # as in converted weights
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    DiTPipeline(theirs, AutoencoderKL.from_pretrained(c.vae()), DDIMScheduler()).save_pretrained(
        published / "diffusers"
    )
    draw(published / "diffusers")
    run = c.own("dit_s2_mhsa")
    c.keep(run, c.own("sit_s2_vca", f"--init {run}"))
    c.run("export", f"{run} {published}/exported")
    draw(published / "exported")
    c.run("ema", f"reconstruct {run} --std 0.07 --out {published}/reconstructed")
    c.keep(published / "exported", published / "reconstructed")


def pictures(c: Checkout) -> None:
    """Grids, ways, sweeps, likelihoods, maps, curves."""
    folder = TMP / "pictures"
    for kind in ("dit", "sit"):
        run, cfg = c.demo(f"mnist_{kind}"), "--cfg_scale 2"
        c.run("sample.py", f"{run} {cfg} --out {folder}/{kind}_grid.png --per_class 2 --classes [1,8]")
        c.run("sample.py", f"{run} {cfg} --out {folder}/{kind}_way.png --trajectory --classes [3] --columns 4")
        c.run("sample.py", f"{run} --out {folder}/{kind}_between.gif --interpolate --columns 4")
        c.run("sample.py", f"{run} --out {folder}/{kind}_sweep.png --sweep cfg=1,2")
        c.run(
            "visualise.py",
            f"{run} --maps --out {folder}/{kind}_maps --classes [3] --heads [0,1] --query [1,2] --times [0.7,0.3]",
        )
    flow = c.demo("digits_sit")
    c.run("sample.py", f"{flow} --out {folder}/methods.png --sweep sampler.method={METHODS} --classes [4,5]")
    for run in (flow, c.demo("mnist_sit")):
        c.run(
            "sample.py", f"{run} --out {folder}/{run.name}_likelihood.json --likelihood --num 20 --sampler.method heun"
        )
    c.keep(folder)


def configs(c: Checkout) -> None:
    """What each config and its defaults come to."""
    for file in sorted((c.tree / "configs").glob("*.yaml")):
        c.note(f"print_config {file.name}", c.run("train.py", f"--config {file} --print_config").splitlines())


PARTS = {part.__name__: part for part in (train, sample, cache, fid, others, pictures, configs)}


def record(out: Path, names: list[str], tree: Path) -> None:
    """Run the parts and write what they found, after each of them."""
    try:
        TMP.mkdir()
    except FileExistsError:
        sys.exit(f"{TMP} is there: another recording is running, or was killed; then remove it.")
    try:
        checkout = Checkout(tree)
        for name in names:
            began, before = time.perf_counter(), len(checkout.found)
            PARTS[name](checkout)
            seconds, num = time.perf_counter() - began, len(checkout.found) - before
            print(f"{name}: {num} items in {seconds:.0f} s", flush=True)
            out.write_text(json.dumps(checkout.found, indent=1))
    finally:
        shutil.rmtree(TMP)


def compare(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Print what differs; exit with 1 if anything does."""
    different = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    for name in different:
        if name not in before or name not in after:
            print(f"{name}: only {'after' if name in after else 'before'}")
            continue
        a, b = (dict(leaves(each[name].get("content"))) for each in (before, after))
        print(f"{name}: {'' if a != b else 'other bytes, or another order of keys'}")
        for key in [key for key in {**a, **b} if a.get(key, "nothing") != b.get(key, "nothing")]:
            print(f"    {key}: {a.get(key, 'nothing')!r} -> {b.get(key, 'nothing')!r}")
    print(f"{len(before)} items before, {len(after)} after; {len(different)} differ")
    sys.exit(bool(different))


def leaves(value: Any, key: str = "") -> list[tuple[str, Any]]:
    """The values of nested dicts and lists, each with its way there."""
    if not isinstance(value, dict | list) or not value:
        return [(key, value)]
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return [leaf for name, each in pairs for leaf in leaves(each, f"{key}/{name}")]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("record", help="run everything and write down what comes out")
    command.add_argument("out", type=Path)
    command.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME", help=", ".join(PARTS))
    command.add_argument("--tree", type=Path, default=Path(__file__).parents[1], help="the checkout to run")
    command = commands.add_parser("compare", help="what differs between two records")
    command.add_argument("before", type=Path)
    command.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.command == "record":
        record(args.out, args.only, args.tree.resolve())
    else:
        compare(json.loads(args.before.read_text()), json.loads(args.after.read_text()))


if __name__ == "__main__":
    main()
