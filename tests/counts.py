"""Count what can be counted of how simple the program is, each number beside the one to aim for.

    python tests/counts.py                     # a table, and below it what is over
    python tests/counts.py --trace             # and, by running them: a step of training, and loading a model
    python tests/counts.py --tree DIR --json

The program is every `*.py` of the root and of the packages there, but not tests and benchmarks. Read from the source:

lines              physical lines; beside it those that are not blank
duplicated names   functions, classes and constants at the top level of two or more modules, but `main` and `__x__`
raises             raise statements
long functions     over 60 lines, docstring included, decorators not; nested ones and methods count, too
many arguments     over 9, `self` and `cls` not counted
wide lines         over 120 characters; the list gives files
shapes             share of the public functions and methods, `forward` and `__call__` included, that have Tensor or
                   ndarray in an annotation (no dict, no Callable), whose docstring has a shape in parentheses, such as
                   `(B, C, H, W)`, `(N,)` or `()`. With `@override` and no docstring the parent's is what counts
longest class      lines
openings           docstrings of functions and classes that begin with What, Of, Whether or Where

By `--trace`, which needs all that training needs (on the CPU, some seconds):

step files         files of which a function runs, or goes on, from the end of the optimizer's third step to that of its
                   fourth, of six of `train.main` with configs/digits_sit.yaml; nothing is logged, drawn or saved then
loading            functions by name (no lambdas or comprehensions) in files of `LOADING` that are entered in
                   `Pipeline.from_pretrained` of that run, and of a .pt as published. A room is a folder, or a file in
                   the root
"""

import argparse
import ast
import contextlib
import importlib
import itertools
import json
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

NOT_COUNTED = ("tests", "benchmarks", "docs", "configs", "build", "dist")
LOADING = {  # names of files and folders that have to do with making a model out of a file
    *("checkpoint", "weights", "pipeline", "trained_model", "published", "build", "assemble"),
    *("infer", "architecture", "adapt", "interop", "diffusers"),
}
NETWORKS = ("vca", "dit_vca", "sit_vca")
OPENINGS = ("What", "Of", "Whether", "Where")
ELEMENT = r"(?:\.\.\.|\*?[1-9A-Za-z]\w*(?:[-+*/ ]{1,3}\w+)*)"
# (), (N,) or at least two elements, one of which is a number, a capital or three dots
SHAPE = re.compile(rf"(?<!\w)\((?:|{ELEMENT},|(?=[^()]*(?:\b[A-Z1-9]|\.\.\.)){ELEMENT}(?:,\s+{ELEMENT})+)\)")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def sources(tree: Path) -> list[Path]:
    """Find the files of the program."""
    packages = [f.parent for f in sorted(tree.glob("*/__init__.py")) if f.parent.name not in NOT_COUNTED]
    return sorted(tree.glob("*.py")) + [f for folder in packages for f in sorted(folder.rglob("*.py"))]


def definitions(node: ast.AST, public: bool = True, owner: str = "") -> Iterator[tuple[Any, str, bool]]:
    """Yield each function and class under a node, with its dotted name, and whether it is public."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*FUNCTIONS, ast.ClassDef)):
            name = f"{owner}{child.name}"
            seen = public and (not child.name.startswith("_") or child.name == "__call__")
            yield child, name, seen
            yield from definitions(child, seen and isinstance(child, ast.ClassDef), f"{name}.")
        else:
            yield from definitions(child, public, owner)


def top_level_names(module: ast.Module) -> Iterator[str]:
    """Yield what a module defines."""
    for node in module.body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))


def arguments(function: Any) -> list[ast.arg]:
    """List the arguments of a function, but `self` and `cls`."""
    a = function.args
    every = [*a.posonlyargs, *a.args, *([a.vararg] if a.vararg else []), *a.kwonlyargs, *([a.kwarg] if a.kwarg else [])]
    return [x for i, x in enumerate(every) if i or x.arg not in ("self", "cls")]


def has_tensor(annotation: ast.AST | None) -> bool:
    """Say whether Tensor or ndarray is in an annotation, outside of a dict or Callable."""
    if isinstance(annotation, ast.Subscript):
        if re.search(r"(dict|Mapping|Callable)$", ast.unparse(annotation.value)):
            return False
    elif isinstance(annotation, ast.Name | ast.Attribute | ast.Constant):
        return bool(re.search(r"\b(Tensor|ndarray)\b", ast.unparse(annotation)))
    return annotation is not None and any(has_tensor(child) for child in ast.iter_child_nodes(annotation))


def count(tree: Path) -> dict[str, dict[str, Any]]:
    """Read all counts from the source: name -> value, aim and list."""
    over: dict[str, list[str]] = defaultdict(list)
    defined_in, classes, lines, filled, raises, with_tensor = defaultdict(set), [], 0, 0, 0, 0
    for file in sources(tree):
        name, text = file.relative_to(tree).as_posix(), file.read_text(encoding="utf-8")
        module, rows = ast.parse(text), text.splitlines()
        lines, filled = lines + len(rows), filled + sum(bool(row.strip()) for row in rows)
        raises += sum(isinstance(node, ast.Raise) for node in ast.walk(module))
        for defined in top_level_names(module):
            if defined != "main" and not re.fullmatch("__.*__", defined):
                defined_in[defined].add(name)
        if wide := sum(len(row) > 120 for row in rows):
            over["wide"] += [f"{name}: {wide}"] * wide
        for node, title, public in definitions(module):
            docstring, where = ast.get_docstring(node), f"{name}:{node.lineno} {title}"
            if (docstring or "").split(" ")[0] in OPENINGS:
                over["openings"].append(f"{where}: {docstring.splitlines()[0]}")
            if isinstance(node, ast.ClassDef):
                classes.append((node.end_lineno - node.lineno + 1, where))
                continue
            length, taken = node.end_lineno - node.lineno + 1, arguments(node)
            if length > 60:
                over["long"].append(f"{where}: {length}")
            if len(taken) > 9:
                over["arguments"].append(f"{where}: {len(taken)}")
            inherited = docstring is None and any("override" in ast.unparse(d) for d in node.decorator_list)
            if public and not inherited and any(map(has_tensor, [node.returns, *(a.annotation for a in taken)])):
                with_tensor += 1
                if not SHAPE.search(docstring or ""):
                    over["shapes"].append(where)
    twice = [f"{k}: {', '.join(sorted(files))}" for k, files in sorted(defined_in.items()) if len(files) > 1]
    share = 100 * (1 - len(over["shapes"]) / max(1, with_tensor))
    longest, title = max(classes, default=(0, "none"))
    return {
        "lines": {"value": lines, "aim": 12_000, "note": f"{filled} not blank, {len(sources(tree))} files"},
        "duplicated names": {"value": len(twice), "aim": 0, "list": twice},
        "raises": {"value": raises, "aim": None},
        "long functions": {"value": len(over["long"]), "aim": 0, "list": over["long"]},
        "many arguments": {"value": len(over["arguments"]), "aim": 0, "list": over["arguments"]},
        "wide lines": {"value": len(over["wide"]), "aim": 0, "list": sorted(set(over["wide"]))},
        "shapes, %": {"value": round(share, 1), "aim": 95, "note": f"of {with_tensor}", "list": over["shapes"]},
        "longest class": {"value": longest, "aim": 200, "note": title},
        "openings": {"value": len(over["openings"]), "aim": 0, "list": over["openings"]},
    }


class Trace(contextlib.AbstractContextManager):
    """The files of a program that run, and the functions that are entered, between `__enter__` and `__exit__`."""

    def __init__(self, tree: Path) -> None:
        self.names = {str(file): file.relative_to(tree).as_posix() for file in sources(tree)}
        self.files, self.functions = set(), set()

    def __enter__(self) -> "Trace":
        sys.setprofile(self.see)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)

    def see(self, frame: FrameType, event: str, argument: object) -> None:
        """Note an event; a loop that only calls others is seen as their caller."""
        code = frame.f_code
        if event in ("call", "c_call"):
            for running in (frame, frame.f_back) if frame.f_back else (frame,):
                if (
                    file := running.f_code.co_filename
                ) in self.names and running.f_code.co_flags & 1:  # no module, class
                    self.files.add(self.names[file])
        if (
            event == "call"
            and code.co_filename in self.names
            and code.co_flags & 1
            and not code.co_name.startswith("<")
        ):
            self.functions.add(f"{self.names[code.co_filename]} {code.co_qualname}")


def trace_step(tree: Path, run_dir: Path) -> dict[str, Any]:
    """Train six steps, and list the files that run in the fourth."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    trace, steps = Trace(tree), itertools.count(1)
    actions = {3: trace.__enter__, 4: trace.__exit__}
    handle = register_optimizer_step_post_hook(lambda *_: actions.get(next(steps), bool)() and None)
    settings = "--train.num_steps 6 --train.batch_size 8 --train.tracker none --sample.sampler.num_steps 2"
    config = ["--config", str(tree / "configs" / "digits_sit.yaml"), "--run_dir", str(run_dir)]
    importlib.import_module("train").main([*config, *settings.split()])
    handle.remove()
    assert trace.files, f"no file of {tree} ran"
    note = f"{sum(f.split('/')[0] not in NETWORKS for f in trace.files)} outside of {', '.join(NETWORKS)}"
    return {"value": len(trace.files), "aim": 9, "note": note, "list": sorted(trace.files)}


def save_published(folder: Path) -> tuple[Path, Path]:
    """Write a small DiT in the form of the published ones, and an autoencoder; return their paths."""
    import torch
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (4, 8), "latent_channels": 4, "norm_num_groups": 2}
    AutoencoderKL(**blocks, **sizes, mid_block_add_attention=False).save_pretrained(folder / "vae")
    size = {"input_size": 4, "patch_size": 4, "hidden_size": 384, "depth": 12, "num_heads": 6}
    network = importlib.import_module("dit_vca").DiT(**size, attention="mhsa")
    torch.nn.init.normal_(network.final_layer.linear.weight)  # all zero, it would say that it is untrained
    torch.save(network.state_dict(), folder / "DiT.pt")
    return folder / "DiT.pt", folder / "vae"


def trace_loading(tree: Path, path: Path, **options: str) -> dict[str, Any]:
    """Load a model, and list the functions that a call passes on the way."""
    file = next(f for f in sources(tree) if re.search(r"^class Pipeline\b", f.read_text(encoding="utf-8"), re.M))
    pipeline = importlib.import_module(".".join(file.relative_to(tree).with_suffix("").parts)).Pipeline
    with Trace(tree) as trace:
        pipeline.from_pretrained(path, device="cpu", **options)
    found = sorted(f for f in trace.functions if LOADING & {*Path(f.split()[0]).with_suffix("").parts})
    files = {f.split()[0] for f in found}
    rooms = {str(Path(f).parent) if "/" in f else f for f in files}
    everywhere = f"in {len(rooms)} rooms (aim 3), {len(files)} files; {len(trace.functions)} with all other files"
    return {"value": len(found), "aim": 8, "note": everywhere, "list": found}


def traces(tree: Path) -> dict[str, dict[str, Any]]:
    """Count what only a run shows: name -> value, aim and list."""
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(tree))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        step = trace_step(tree, Path(folder, "run"))
        published, vae = save_published(Path(folder))
        return {
            "step files": step,
            "loading: a run": trace_loading(tree, Path(folder, "run")),
            "loading: published": trace_loading(tree, published, vae=str(vae)),
        }


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[1], help="the checkout to count")
    parser.add_argument("--trace", action="store_true", help="count, too, what only a run shows")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    tree = args.tree.resolve()
    rows = count(tree) | (traces(tree) if args.trace else {})
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    for name, row in rows.items():
        aim = "" if row["aim"] is None else f"{'>=' if '%' in name else '<='} {row['aim']}"
        print(f"{name:<20}{row['value']:>8}  {aim:<9} {row.get('note', '')}".rstrip())
    for name, row in rows.items():
        if row.get("list"):
            print("\n".join([f"\n{name}", *(f"  {line}" for line in row["list"])]))


if __name__ == "__main__":
    main()
