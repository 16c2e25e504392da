"""Weights of a trained Inception-v3 for `fid_differences.py --weights`, where the FID's own are not at hand.

    npm pack nsfwjs@4.3.0
    python -m benchmarks.trained_inception nsfwjs-4.3.0.tgz trained.pth

It is Keras's Inception-v3, trained further for another task by the npm package nsfwjs (MIT), in 8-bit weights: the FID's
architecture with trained filters, and another network than the FID's. Its classifier is random.
"""

import argparse
import base64
import re
import tarfile

import numpy as np
import torch
from torch import Tensor

from fid.networks.inception import inception_network

FOLDER = "package/dist/models/inception_v3/"
NUMBER = r"(-?[\d.e-]+)"
ENTRY = rf'name:"([^"]+)",shape:\[([\d,]+)\],dtype:"float32",quantization:{{min:{NUMBER},scale:{NUMBER},dtype:"uint8"}}'


def main() -> None:
    """Reads the package and writes the state dict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package")
    parser.add_argument("out")
    args = parser.parse_args()
    weights = read(args.package)
    torch.manual_seed(0)
    network = inception_network()
    state = network.state_dict()
    layers = [key.removesuffix(".conv.weight") for key in state if key.endswith(".conv.weight")]
    for i, layer in enumerate(layers, 1):  # both number their layers in the order of the graph
        state[f"{layer}.conv.weight"] = weights[f"conv2d_{i}/kernel"].permute(3, 2, 0, 1)
        for ours, theirs in (("bias", "beta"), ("running_mean", "moving_mean"), ("running_var", "moving_variance")):
            state[f"{layer}.bn.{ours}"] = weights[f"batch_normalization_{i}/{theirs}"]
    # It was trained on x / 255 = 128 / 255 ((x - 128) / 128 + 1): the first convolution takes that up.
    first = state[f"{layers[0]}.conv.weight"] * 128 / 255
    state[f"{layers[0]}.conv.weight"] = first
    state[f"{layers[0]}.bn.running_mean"] -= first.sum(dim=(1, 2, 3))
    network.load_state_dict(state)
    torch.save(network.state_dict(), args.out)
    print(f"wrote {args.out}: {len(layers)} layers")


def read(package: str) -> dict[str, Tensor]:
    """Name -> weights, of the package's files of JavaScript."""
    with tarfile.open(package) as archive:
        files = {m.name: archive.extractfile(m).read().decode() for m in archive if m.name.startswith(FOLDER)}
    shards = [files[f"{FOLDER}group1-shard{k}of6.min.js"] for k in range(1, 7)]
    content = b"".join(base64.b64decode(max(re.findall(r'"([A-Za-z0-9+/=]+)"', text), key=len)) for text in shards)
    found, start = {}, 0
    for name, shape, least, scale in re.findall(ENTRY, files[f"{FOLDER}model.min.js"]):
        shape = [int(side) for side in shape.split(",")]
        values = np.frombuffer(content, np.uint8, int(np.prod(shape)), start)
        start += values.size
        found[name] = torch.from_numpy((values * float(scale) + float(least)).astype(np.float32)).reshape(shape)
    if start != len(content):
        raise ValueError(f"'{package}' holds {len(content)} bytes of weights, but names {start}; take nsfwjs 4.3.0.")
    return found


if __name__ == "__main__":
    main()
