"""The weights of a DiT or SiT among all that a training script has saved, whatever it has wrapped them in.

A script saves a state dict under a name of its own (`model`, `state_dict`, `ema_model`, `params_ema`, ...), and what it
has wrapped the network in stands in the keys: before all of them (`model.`, `net.`), or between their parts
(`module`, of torch.compile `_orig_mod`, of FSDP `_fsdp_wrapped_module`).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
# A key that each DiT and SiT has and nothing else: the published one, and that of diffusers.
MARKS = ("blocks.0.adaLN_modulation.1.weight", "transformer_blocks.0.norm1.linear.weight")
# Beside the network, for training only: the counter of torch's AveragedModel, the heads of representation alignment.
NOT_OF_THE_NETWORK = re.compile(r"n_averaged$|projectors\.")
AVERAGED = re.compile(r"(?<![a-z])(ema|averaged?|avg|swa|shadow)(?![a-z])")
MOST_NAMES = 5  # in a message


class Candidate(NamedTuple):
    """The weights of one network.

    Attributes:
        place: Names that lead to them, e.g. `ema.` or `state_dict.net.`.
        tensors: Key -> tensor, the keys without what the network was wrapped in.
    """

    place: str
    tensors: dict[str, Tensor]

    @property
    def rank(self) -> tuple[int, int]:
        """Number of tensors of its blocks, and of names that lead to it and say that it is averaged."""
        size = sum(key.startswith(("blocks.", "transformer_blocks.")) for key in self.tensors)
        return size, len(AVERAGED.findall(self.place.lower()))

    def __str__(self) -> str:
        """Name its place in the file."""
        return self.place.rstrip(".") or "the file itself"


def find_networks(content: Any, marks: Sequence[str] = MARKS) -> list[Candidate]:
    """Find the weights of each network in what a file holds: the largest first, of equal ones the averaged.

    Args:
        content: Nested mappings and lists, or a state dict.
        marks: Keys of which each network has one.
    """
    found = [candidate for place, state in _state_dicts(content) for candidate in _candidates(place, state, marks)]
    return sorted(found, key=lambda candidate: candidate.rank, reverse=True)


def describe_keys(content: Any) -> str:
    """List some of the names of tensors in what a file holds, or else of what it holds; "" if it is no mapping."""
    keys = [f"{place}{key}" for place, state in _state_dicts(content) for key in state]
    if not keys and isinstance(content, Mapping):
        keys = list(map(str, content))
    more = f" and {len(keys) - MOST_NAMES:,} more" if len(keys) > MOST_NAMES else ""
    return ", ".join(keys[:MOST_NAMES]) + more


def has_nameless_average(content: Any) -> bool:
    """Say whether averaged weights are there as a list of tensors, which do not say what they are of."""
    return any(
        isinstance(value, list | tuple) and len(value) > 1 and isinstance(value[0], Tensor) and AVERAGED.search(place)
        for place, value in _nested(content)
    )


def _nested(content: Any) -> Iterator[tuple[str, Any]]:
    """Yield mappings and lists in the order of the file, each once, with the names that lead to them."""
    waiting, seen = [("", content)], set()
    while waiting:
        place, value = waiting.pop()
        if id(value) in seen or not isinstance(value, Mapping | list | tuple):
            continue
        seen.add(id(value))
        yield place, value
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        # An optimizer keeps tensors of the same names, which are no weights.
        inner = [(f"{place}{key}.", each) for key, each in items if not str(key).lower().startswith("opt")]
        waiting += reversed(inner)


def _state_dicts(content: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the tensors of each mapping that has some, without wrappers in their keys."""
    for place, value in _nested(content):
        if isinstance(value, Mapping):
            tensors = {key: t for key, t in value.items() if isinstance(key, str) and isinstance(t, Tensor)}
            if tensors:
                yield place, {_unwrapped(key): tensor for key, tensor in tensors.items()}


def _unwrapped(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def _candidates(place: str, state: Mapping[str, Tensor], marks: Sequence[str]) -> Iterator[Candidate]:
    """Yield the networks in one state dict; a key belongs to the longest prefix of a network that it begins with."""
    prefixes = {p for p in (_prefix(key, marks) for key in state) if p is not None}
    prefixes = sorted(prefixes, key=len, reverse=True)
    parts: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in prefixes}
    for key, tensor in state.items():
        prefix = next((p for p in prefixes if key.startswith(p)), None)
        if prefix is not None and not NOT_OF_THE_NETWORK.match(key, len(prefix)):
            parts[prefix][key.removeprefix(prefix)] = tensor
    yield from (Candidate(place + prefix, tensors) for prefix, tensors in parts.items())


def _prefix(key: str, marks: Sequence[str]) -> str | None:
    """Give what stands before the mark of a network, "" or with a dot at its end; None where the key is no mark."""
    for mark in marks:
        prefix = key.removesuffix(mark)
        if prefix != key and (not prefix or prefix.endswith(".")):
            return prefix
    return None
