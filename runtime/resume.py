"""Which checkpoint a run goes on from, and whether it is the same run."""

from pathlib import Path

from runtime import checkpoint
from runtime.config import Config, differences, read_yaml, to_dict

CONFIG_FILE = "config.yaml"
MAY_CHANGE = {  # settings that a resumed run may change: no step depends on them, or by rounding only
    "run_dir",
    "sample",
    "fid",
    "data.images",  # moved data, a moved autoencoder or cache; said when it happens
    "codec.path",
    "latents",
    "cache",
    *(f"train.{key}" for key in ("num_workers", "timeout", "log_every", "tracker", "sample_every", "max_skipped")),
    *(f"train.{key}" for key in ("checkpoint_every", "keep_checkpoints", "keep_every", "snapshot_every")),
    *(f"train.{key}" for key in ("accumulate", "compile", "fused", "grad_checkpointing", "channels_last", "preload")),
}


def starting_point(config: Config, resume: str) -> Path | None:
    """The checkpoint to go on from, or None to begin.

    Args:
        config: Of the run.
        resume: `auto` takes the newest checkpoint in the run's folder, if there is one; `none` wants none to be there; a run
            or checkpoint is taken the first time, and afterwards the newest of the run that went on from it.

    Raises:
        FileNotFoundError: `resume` is a path where nothing is.
        ValueError: The run's folder is a file, or holds another run than `resume` says.
    """
    run_dir = Path(config.run_dir)
    if run_dir.is_file():
        raise ValueError(f"run_dir {config.run_dir!r} is a file; choose a folder.")
    own = checkpoint.steps(run_dir)
    newest = own[-1] if own else None
    if resume == "auto":
        return newest
    if resume == "none":
        if newest:
            raise ValueError(
                f"--resume is none, but run_dir {config.run_dir!r} holds checkpoints up to {newest.name}; choose another "
                "--run_dir, or leave --resume out to go on."
            )
        return None
    given = checkpoint.find(resume)
    if newest is None or newest.resolve() == given.resolve():
        return given
    if checkpoint.read_record(newest).get("resumed_from") == checkpoint.read_record(given)["id"]:
        return newest
    raise ValueError(
        f"--resume is {resume!r}, but run_dir {config.run_dir!r} holds other checkpoints, up to {newest.name}; choose "
        "another --run_dir to go on from there, or leave --resume out to go on with these."
    )


def check_same_run(config: Config, start: Path | None) -> None:
    """A run goes on with the settings that it began with, but for those in `MAY_CHANGE`.

    num_steps may change, too, but not under a schedule that depends on it.

    Raises:
        ValueError: Others differ; says which.
    """
    file = Path(config.run_dir) / CONFIG_FILE
    if start is not None:
        old = checkpoint.read_record(start)["config"]
    elif file.is_file():  # stopped before its first checkpoint
        old = read_yaml(file)
    else:
        return
    may_change = MAY_CHANGE | ({"train.num_steps"} if config.train.schedule == "constant" else set())
    changed = differences(old, to_dict(config))
    for key in sorted(changed.keys() & {"data.images", "codec.path", "latents"}):
        print(f"note: {key} was {changed[key][0]!r} in this run, now {changed[key][1]!r}; it must hold the same.")
    changed = {k: v for k, v in changed.items() if k not in may_change and k.split(".")[0] not in may_change}
    if changed:
        text = ", ".join(f"{key} {a!r} (you gave {b!r})" for key, (a, b) in changed.items())
        why = " Under the cosine schedule every step depends on num_steps." if "train.num_steps" in changed else ""
        where = f"run_dir {config.run_dir!r}" if start is None else repr(str(start))
        again = "" if start is None else f", or --init {start} and another --run_dir to start anew from its weights"
        raise ValueError(f"{where} holds another run, with {text}; give its settings to go on with it{again}.{why}")
