"""Kill a training with SIGKILL at random moments, again and again, and compare what comes out with a run left in peace.

    python tests/kill_loop.py --kills 50

Each child is forked from a process that has imported everything, so that kills hit training, checkpoints, snapshots and
previews, not imports. It ends with exit code 1, and says where, if a restart fails, goes back, or ends elsewhere.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from vca_engine.weights import checkpoint

SETTINGS = (
    "--process.name flow --data.name digits --codec.name pixels --model.hidden_size 16 --model.depth 2 --model.num_heads 2 "
    "--sample.sampler.name ode --sample.sampler.method euler --sample.sampler.num_steps 3 --sample.per_class 1 "
    "--train.batch_size 8 --train.lr 1e-2 --train.log_every 7 --train.num_workers 0 --train.checkpoint_every 5 "
    "--train.keep_checkpoints 2 --train.keep_every 50 --train.sample_every 20 --train.snapshot_every 10 "
    "--train.max_grad_norm 0.5 --train.tracker tensorboard"
)


def start(run_dir: Path, num_steps: int, log: Path) -> int:
    """The process that trains."""
    pid = os.fork()
    if pid:
        return pid
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1), os.dup2(output, 2)
    code = 1
    try:
        train.main([*SETTINGS.split(), "--run_dir", str(run_dir), "--train.num_steps", str(num_steps)])
        code = 0
    finally:
        os._exit(code)


def outcome(run_dir: Path) -> dict[str, bytes | list]:
    """All that a run leaves and that no clock is in."""
    found: dict[str, bytes | list] = {
        str(f.relative_to(run_dir)): f.read_bytes()
        for pattern in ("checkpoints/*/*.safetensors", "snapshots/*/*.safetensors", "previews/*")
        for f in run_dir.glob(pattern)
    }
    lines = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [
        {k: v for k, v in line.items() if k not in ("images_per_second", "memory_gib")} for line in lines
    ]
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng, num_steps = random.Random(args.seed), 10 * args.kills
    with tempfile.TemporaryDirectory() as folder:
        whole, cut, log = (Path(folder, name) for name in ("whole", "cut", "log"))
        began = time.perf_counter()
        if os.waitpid(start(whole, num_steps, log), 0)[1]:
            sys.exit(f"the run left in peace failed:\n{log.read_text()[-3000:]}")
        peace = time.perf_counter() - began
        resumed, kills = [0], 0
        while True:
            pid = start(cut, num_steps, log)
            # Long enough for a checkpoint or two, as often as not.
            until = time.perf_counter() + rng.uniform(0, 4 * peace / args.kills + 1) if kills < args.kills else None
            while until is None or time.perf_counter() < until:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    break
                time.sleep(0.002)
            else:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                kills += 1
                found = checkpoint.steps(cut)
                resumed.append(checkpoint.read_record(found[-1])["step"] if found else 0)
                if resumed[-1] < resumed[-2]:
                    sys.exit(f"kill {kills}: the newest checkpoint was of step {resumed[-2]}, and is of {resumed[-1]}")
                continue
            if status:
                sys.exit(f"after {kills} kills the run failed:\n{log.read_text()[-3000:]}")
            if kills >= args.kills:
                break
            shutil.rmtree(cut)  # it came to its end before the last kill: once more
            resumed = [0]
        a, b = outcome(whole), outcome(cut)
        different = sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))
        if different:
            sys.exit(f"after {kills} kills these differ from the run left in peace: {different}")
        hidden = {f.relative_to(cut) for f in cut.rglob("*") if f.name.startswith(".")}
        left = sorted(map(str, hidden - {f.relative_to(whole) for f in whole.rglob("*")}))
        if left:
            sys.exit(f"left behind: {left}")
        steps = sorted({step for step in resumed if step})
        print(
            f"{kills} kills with SIGKILL, {num_steps} steps: {len(a)} files and {len(a['metrics'])} lines are those of the "
            f"run left in peace, byte for byte; it went on from the steps {steps}"
        )


if __name__ == "__main__":
    main()
