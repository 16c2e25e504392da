"""Export the DiT of a run as a folder for diffusers' own pipeline.

    python export.py runs/dit_b2_mhsa exported                   DiTPipeline.from_pretrained("exported")
    python export.py runs/dit_b2_mhsa exported --weights ema-0.1

The run has to be a diffusion with attention mhsa, in the latents of an AutoencoderKL.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vca_engine.config.cli import report_errors
from vca_engine.files import expanded, folder_written_aside, require_free, typed_path
from vca_engine.sampling.model_card import GENERATOR, facts_of, model_card
from vca_engine.sampling.pipeline import Pipeline
from vca_engine.weights import checkpoint
from vca_engine.weights.diffusers import (
    NULL_ROW,
    TABLE,
    diffusers_config,
    scheduler_config,
    to_diffusers,
    with_null_row,
)

if TYPE_CHECKING:
    from diffusers import DiTPipeline

INSTEAD = "Pipeline.save_pretrained saves any model of this program"
USAGE = """
import torch
from diffusers import DiTPipeline

pipe = DiTPipeline.from_pretrained({folder!r})
for block in pipe.transformer.transformer_blocks:  # set the time frequencies of the training, see below
    block.norm1.emb.time_proj.downscale_freq_shift = 0
print(pipe.labels)
generator = torch.Generator().manual_seed(0)
image = pipe([0], guidance_scale={scale}, num_inference_steps=50, generator=generator).images[0]
"""
FREQUENCIES = (
    "diffusers divides the exponents of the time frequencies by 127, but this model was trained with 128; the loop "
    "over the blocks corrects this. Without it the network gets other times than those of its training."
)
FILLED = (
    "The model has {num} classes. `DiTPipeline` guides with row {row} of the label table, so rows {num} to {row} are "
    "copies of the row of the null class: labels from {num} on draw unconditional images."
)
UNGUIDED = (
    "`DiTPipeline` guides with row {row} of the label table, which is not the null class of this model ({num} "
    "classes), so guidance is not possible with it: set `guidance_scale=1.0`, since its default is 4."
)


def export(
    run: Path, out: Path, weights: str = "ema", vae: str | None = None, *, license: str | None = None
) -> list[str]:
    """Write a folder for `DiTPipeline.from_pretrained`: transformer, vae, scheduler, model_index.json, README.md.

    Args:
        run: A run's folder (its newest checkpoint is taken), one of its checkpoints, or a folder that
            `Pipeline.save_pretrained` wrote.
        out: Folder to write; it must be empty or not exist.
        weights: The weights to take: ema, ema-0.05 and the like, or model.
        vae: The autoencoder, if it is no longer where it was in training.
        license: Licence that you give the weights, as the hub calls it; by default the model card names none.

    Returns:
        Notes for the user, which the model card has, too.

    Raises:
        FileNotFoundError: There is no such run, or its autoencoder is no longer there.
        ValueError: `out` is not empty, or diffusers' pipeline cannot draw with the run; says why.
    """
    import diffusers  # slow to import, as all of it: see docs/architecture.md, start-up

    require_free(out)
    folder = checkpoint.find(run)
    ours = Pipeline.from_pretrained(folder, weights=weights, vae=vae, device="cpu")
    model, theirs = ours.network, pipeline_of_diffusers(ours)
    guided = model.null_class is not None and model.null_class <= NULL_ROW
    notes = [FREQUENCIES]
    if not guided:
        notes.append(UNGUIDED.format(num=model.num_classes, row=NULL_ROW))
    elif model.null_class < NULL_ROW:
        notes.append(FILLED.format(num=model.num_classes, row=NULL_ROW))
    usage = USAGE.format(folder=out.name, scale=4.0 if guided else 1.0)
    facts = {**facts_of(checkpoint.read_record(folder), weights), "written by": f"diffusers {diffusers.__version__}"}
    options = {"notes": notes, "library": "diffusers", "license": license, "tags": [*GENERATOR, "dit"]}
    card = model_card(out.absolute().name, usage, facts, **options)
    with folder_written_aside(out) as temporary:
        theirs.save_pretrained(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return notes


def pipeline_of_diffusers(ours: Pipeline) -> "DiTPipeline":
    """Make a pipeline of diffusers from a pipeline of this program.

    Raises:
        ValueError: diffusers' pipeline cannot draw with it; says why.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    process, codec, model = ours.config.process["name"], ours.codec, ours.network
    if process != "diffusion":
        raise ValueError(f"the process is {process!r}, and diffusers draws from a diffusion; {INSTEAD}.")
    if ours.config.codec["name"] != "vae":
        raise ValueError(
            f"the codec is {ours.config.codec['name']!r}, and DiTPipeline needs an autoencoder; {INSTEAD}."
        )
    if not isinstance(codec.vae, AutoencoderKL):
        raise ValueError(
            f"the autoencoder is an {type(codec.vae).__name__}, and DiTPipeline needs an AutoencoderKL; {INSTEAD}."
        )
    if codec.shift.any() or (codec.scale != codec.vae.config.scaling_factor).any():
        raise ValueError(
            f"the autoencoder shifts its latents or scales each channel by itself, and DiTPipeline knows only "
            f"scaling_factor; {INSTEAD}."
        )
    try:
        options = diffusers_config(model)
    except ValueError as error:
        raise ValueError(f"{str(error).rstrip('.')}; {INSTEAD}.") from None
    tensors = model.state_dict()
    if model.null_class is not None and model.null_class < NULL_ROW:
        tensors[TABLE] = with_null_row(tensors[TABLE])
        options["num_embeds_ada_norm"] = NULL_ROW
    transformer = DiTTransformer2DModel(**options)
    transformer.load_state_dict(to_diffusers(tensors))
    codec.vae.register_to_config(_name_or_path=Path(ours.config.codec["path"]).name)  # and not where it is here
    names = dict(enumerate(ours.class_names))
    theirs = DiTPipeline(transformer, codec.vae, DDIMScheduler(**scheduler_config(ours.process)), id2label=names)
    theirs.register_to_config(id2label=names)  # diffusers keeps it in model_index.json, and does not write it itself
    return theirs


@report_errors("export.py")
def main(argv: Sequence[str] | None = None) -> None:
    """Export the run that the command line names."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("export.py", description=__doc__, formatter_class=form)
    parser.add_argument(
        "run", type=typed_path, help="the run's folder (its newest checkpoint is taken), or one of its checkpoints"
    )
    parser.add_argument("out", type=typed_path, help="folder to write")
    parser.add_argument("--weights", default="ema", help="ema (the default), ema-0.05 and the like, or model")
    parser.add_argument("--vae", type=expanded, help="the autoencoder, if it is no longer where it was in training")
    parser.add_argument("--license", help="licence of the weights, e.g. mit; by default the model card names none")
    args = parser.parse_args(argv)
    for note in export(args.run, args.out, args.weights, args.vae, license=args.license):
        print(f"note: {note}")
    print(f"wrote {args.out}: draw with DiTPipeline.from_pretrained({str(args.out)!r}), as its README.md shows")


if __name__ == "__main__":
    main()
