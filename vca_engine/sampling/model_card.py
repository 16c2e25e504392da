"""The README.md of a folder of weights, as the Hugging Face hub reads it: what they are, and how to use them.

No task of the hub is class-conditional generation, so a card names none (`pipeline_tag`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

GENERATOR, RECOGNISER = ("image-generation", "class-conditional"), ("image-classification",)  # tags


def model_card(
    title: str,
    usage: str,
    facts: Mapping[str, Any],
    *,
    notes: Sequence[str] = (),
    library: str = "vca-diffusion",
    license: str | None = None,
    tags: Sequence[str] = GENERATOR,
) -> str:
    """Write a model card in Markdown.

    Args:
        title: Of the page.
        usage: Lines of Python that draw an image, or name its class.
        facts: What is in the table, in its order, `facts_of(...)` say, with measured numbers where there are any;
            None is left out.
        notes: What a user has to know, a sentence or two each.
        library: Name of the package that loads it.
        license: Of the weights, as the hub calls it, e.g. mit. Not given means that the card names none: that of this
            code is not one of the weights.
        tags: What it is, to be found by: `GENERATOR` or `RECOGNISER`, and more.
    """
    data = ModelCardData(license=license, library_name=library, tags=[*tags])
    rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in facts.items() if value is not None]
    text = "\n".join(
        [
            *("---", data.to_yaml(), "---", "", f"# {title}", ""),
            *("```python", usage.strip("\n"), "```", ""),
            *(line for note in notes for line in (f"* {note}",)),
            *([""] if notes else []),
            *("| | |", "|---|---|", *rows, ""),
        ]
    )
    return text.encode(errors="replace").decode()  # the name of a folder need not be text


def facts_of(record: Mapping[str, Any], weights: str) -> dict[str, Any]:
    """Collect what a checkpoint's record says of its weights, for `model_card`; no folder of the machine is named.

    Args:
        record: `checkpoint.read_record(folder)`.
        weights: Which of the checkpoint's: `ema`, `model`, ...
    """
    config, shape, codec = record["config"], record["shape"], record.get("codec", {})
    data, model, names = config["data"], config["model"], shape["class_names"]
    of = f"{record['step']:,} of {config['train']['num_steps']:,}, batch size {config['train']['batch_size']}"
    known = f", kind {codec['kind']}, SHA-256 of the weights {codec['weights'][:16]}" if "weights" in codec else ""
    images = f", {record['num_images']:,} images" if "num_images" in record else ""
    sizes = [model.get("name") or model["size"], *(f"{k} {model[k]}" for k in _SIZES if model.get(k) is not None)]
    return {
        "weights": weights,
        "training steps": of,
        "process": _spec(config["process"]),
        "size": ", ".join(sizes),
        "attention": _spec(model["attention"]),
        "images": f"{shape['image_size']}x{shape['image_size']}, {shape['channels']} channels",
        "classes": f"{len(names)}: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}",
        "autoencoder": _spec(config["codec"]) + known,
        "training data": _spec(data) + images,
        "versions": ", ".join(f"{k} {v}" for k, v in record.get("versions", {}).items() if v) or None,
        "revision of the code": record.get("revision"),
        "checkpoint": record["id"],
    }


_SIZES = ("patch_size", "hidden_size", "depth", "num_heads")


def _spec(spec: Mapping[str, Any]) -> str:
    """Write {name: vae, path: /home/me/vae} as `vae (path: vae)`: a folder of this machine by its last name only."""
    options = {k: Path(v).name if isinstance(v, str) and _is_local(v) else v for k, v in spec.items() if k != "name"}
    return spec["name"] + (f" ({', '.join(f'{k}: {v}' for k, v in options.items())})" if options else "")


def _is_local(value: str) -> bool:
    return value.startswith((".", "/", "~")) or value.count("/") > 1 or Path(value).exists()


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())
