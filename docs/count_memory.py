"""Count what training takes on a GPU, without one: `python docs/count_memory.py` prints the table of recipes.md.

The bytes that go with a weight are known: 4 each for the weight, its gradient, two moments of AdamW and three averages,
and 2 for its copy in bf16. What the forward pass keeps for the backward pass is counted in networks of one and two
blocks, with one and two images, under bf16 autocast on the CPU; it is linear in both. A GPU's kernels may keep a little
more or less. The last columns say how many images then fit into nine tenths of the memory, at most the batch of 256:
without gradient checkpointing / with it.
"""

import itertools

import torch

from dit_vca import DiT
from vca import parse_size
from vca_engine.training.cost import multiply_adds
from vca_engine.training.dry_run import count_saved

GIB = 2**30
BYTES = 4 * (1 + 1 + 2 + 3) + 2  # of a weight and what goes with it
GPUS = (12, 24, 40, 80)  # GB of memory
BATCH = 256
MODELS = list(itertools.product(("S/2", "B/2", "L/2", "XL/2"), (256, 512)))


def main() -> None:
    """Print the table."""
    head = ["network", "pixels", "parameters", "GFLOPs", "weights and what goes with them", "an image", "checkpointed"]
    head += [f"{gpu} GB" for gpu in GPUS]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for size, pixels in MODELS:
        options = {"input_size": pixels // 8, **parse_size(size)}
        with torch.device("meta"):
            network = DiT(**options)
        parameters = sum(p.numel() for p in network.parameters())
        image = bytes_of_image(options)
        # Then of each block only its input is kept, and one block's own at a time.
        tokens = (options["input_size"] // options["patch_size"]) ** 2
        inputs = 4 * tokens * options["hidden_size"] * options["depth"]
        less = image / options["depth"] + inputs
        numbers = [size, str(pixels), f"{parameters / 1e6:.1f} M", f"{multiply_adds(network) / 1e9:.1f}"]
        numbers += [f"{BYTES * parameters / GIB:.1f} GiB", f"{image / 2**20:.0f} MiB", f"{less / 2**20:.0f} MiB"]
        for gpu in GPUS:
            free = 0.9 * gpu * 1e9 - BYTES * parameters
            fit = [max(0, min(BATCH, int(free / each))) for each in (image, less)]
            numbers.append(" / ".join(map(str, fit)) if fit[1] else "none")
        print(f"| {' | '.join(numbers)} |", flush=True)


def bytes_of_image(options: dict[str, int]) -> float:
    """Count the bytes that the forward pass of one image of a DiT keeps, from networks of one and two blocks."""
    of = {(depth, batch): kept({**options, "depth": depth}, batch) for depth in (1, 2) for batch in (1, 2)}
    one, two = of[1, 2] - of[1, 1], of[2, 2] - of[2, 1]  # of one image, with one and two blocks
    return one + (options["depth"] - 1) * (two - one)


def kept(options: dict[str, int], batch: int) -> int:
    """Count the bytes that a forward pass of `batch` images keeps for the backward pass."""
    network, side = DiT(**options), options["input_size"]
    x, t, y = torch.zeros(batch, 4, side, side), torch.zeros(batch), torch.zeros(batch, dtype=torch.long)
    with count_saved(network) as saved, torch.autocast("cpu", torch.bfloat16):
        network(x, t, y)
    return saved.num_bytes


if __name__ == "__main__":
    main()
