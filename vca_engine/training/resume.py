"""Resuming: the checkpoint that a run goes on from, and a check that it is the same run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vca_engine import assemble
from vca_engine.config.reading import from_dict
from vca_engine.config.schema import Config, to_dict
from vca_engine.records import differences, listed, read_json, write_json
from vca_engine.training.log import read_metrics
from vca_engine.weights import checkpoint

CONFIG_FILE = "config.yaml"
RESUMED_FROM_FILE = "resumed_from.json"  # in the folder of a run that goes on from another's checkpoint
MAY_CHANGE = {  # settings that a resumed run may change: no step depends on them, or by rounding only
    "run_dir",
    "sample",
    "fid",
    "eval",
    "data.images",  # moved data, a moved autoencoder or cache; said when it happens
    "codec.path",
    "latents",
    "cache",
    *(f"train.{key}" for key in ("num_workers", "timeout", "log_every", "tracker", "sample_every", "max_skipped")),
    *(f"train.{key}" for key in ("checkpoint_every", "keep_checkpoints", "keep_every", "snapshot_every")),
    *(f"train.{key}" for key in ("accumulate", "compile", "fused", "grad_checkpointing", "channels_last", "preload")),
}


def starting_point(config: Config, resume: str) -> Path | None:
    """Find the checkpoint to go on from, or None to begin.

    Args:
        config: Of the run.
        resume: `auto` takes the newest checkpoint in the run's folder, if there is one; `none` wants none to be there;
            a run or checkpoint is taken the first time, and afterwards the newest of the run that went on from it.

    Raises:
        FileNotFoundError: `resume` is a path where nothing is.
        ValueError: The run's folder is a file, or holds another run than `resume` says.
    """
    run_dir = Path(config.run_dir)
    if run_dir.is_file():
        raise ValueError(f"run_dir {config.run_dir!r} is a file; choose a folder.")
    own, other = checkpoint.steps(run_dir), read_resumed_from(run_dir)
    newest = own[-1] if own else None
    if resume == "auto":
        if not (newest or other):
            _check_no_checkpoint_is_lost(config)
        return newest or (_checkpoint_of(other, run_dir) if other else None)
    if resume == "none":
        if newest or other:
            what = f"checkpoints up to {newest.name}" if newest else f"a run that goes on from {other['checkpoint']}"
            raise ValueError(
                f"--resume is none, but run_dir {config.run_dir!r} holds {what}; choose another --run_dir, or leave "
                "--resume out to go on."
            )
        _check_no_checkpoint_is_lost(config)
        return None
    if newest is None:
        return checkpoint.find(resume)
    if other and other["given"] == str(Path(resume).resolve()):
        return newest
    if checkpoint.find(resume).resolve() == newest.resolve():
        return newest
    raise ValueError(
        f"--resume is {resume!r}, but run_dir {config.run_dir!r} holds other checkpoints, up to {newest.name}; choose "
        "another --run_dir to go on from there, or leave --resume out to go on with these."
    )


def read_resumed_from(run_dir: Path) -> dict[str, Any] | None:
    """Read what `write_resumed_from` wrote, if it did.

    Raises:
        ValueError: The file is damaged.
    """
    file = run_dir / RESUMED_FROM_FILE
    if not file.is_file():
        return None
    record = read_json(file)
    if not all(isinstance(record.get(key), str) for key in ("given", "checkpoint", "id")):
        raise ValueError(f"{str(file)!r} is damaged: it does not say where the run goes on from. Remove it.")
    return record


def write_resumed_from(run_dir: Path, resume: str, start: Path) -> None:
    """Write down that a run goes on from the checkpoint `start` of another, as --resume `resume` asked."""
    record = {"given": str(Path(resume).resolve()), "checkpoint": str(start.resolve())}
    record["id"] = checkpoint.read_record(start)["id"]
    write_json(run_dir / RESUMED_FROM_FILE, record)


def check_same_run(config: Config, start: Path, say: Callable[[str], None]) -> None:
    """Check that a run goes on with the settings that it began with, but for those in `MAY_CHANGE`.

    num_steps may change, too, but not under a schedule that depends on it. Settings that there were not when the run
    began count as their defaults.

    Args:
        config: Of the run.
        start: The checkpoint to go on from.
        say: Where notes go.

    Raises:
        ValueError: Others differ; says which.
    """
    record = checkpoint.read_record(start)
    known = from_dict(Config, record["config"], str(start / checkpoint.RECORD))
    old = to_dict(assemble.with_image_size(known, record["shape"].get("image_size")))
    may_change = MAY_CHANGE | ({"train.num_steps"} if config.train.schedule == "constant" else set())
    changed = differences(old, to_dict(config))
    for key in sorted(changed.keys() & {"data.images", "codec.path", "latents"}):
        say(f"note: {key} was {changed[key][0]!r} in this run, now {changed[key][1]!r}; it must hold the same.")
    changed = {k: v for k, v in changed.items() if k not in may_change and k.split(".")[0] not in may_change}
    if changed:
        why = " Under the cosine schedule every step depends on num_steps." if "train.num_steps" in changed else ""
        raise ValueError(
            f"{str(start)!r} holds another run, with {listed(changed, 'you gave')}; give its settings to go on with "
            f"it, or --init {start} and another --run_dir to start anew from its weights.{why}"
        )


def _check_no_checkpoint_is_lost(config: Config) -> None:
    """Check that a run without a checkpoint has not come so far that it had one, which then is elsewhere.

    Raises:
        ValueError: It has; to begin anew would overwrite its log.
    """
    file = Path(config.run_dir) / "metrics.jsonl"
    step = max((line["step"] for line in read_metrics(file)), default=0)
    if step > config.train.checkpoint_every:  # at that step itself it may have been killed before the checkpoint
        raise ValueError(
            f"run_dir {config.run_dir!r} has come to step {step:,}, but holds no checkpoint; put its folder "
            f"{checkpoint.CHECKPOINTS!r} back, say by mounting its disk. To begin anew, remove {str(file)!r} or choose "
            "another --run_dir."
        )


def _checkpoint_of(other: dict[str, Any], run_dir: Path) -> Path:
    """Find the checkpoint that a run began from which was stopped before its own first one."""
    start = checkpoint.find(other["checkpoint"])
    if checkpoint.read_record(start)["id"] != other["id"]:
        raise ValueError(f"{str(run_dir)!r} goes on from {other['checkpoint']!r}, which is another checkpoint now.")
    return start
