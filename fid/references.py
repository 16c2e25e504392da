"""Reference files: statistics of real images as the tools of the field write them; no code in them is run."""

import io
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fid.frechet import check_moments
from fid.images import Images
from fid.moments import Statistics
from fid.pickles import unpickle
from vca_engine.files import sha256_of, written_aside

REFERENCE_FORMAT = 1  # of the file
MOST_BYTES = 2**30  # of what is read as statistics: a covariance of 11,000 dimensions in float64
KEYS = {"features": (("mu", "sigma"), ("ref_mu", "ref_sigma")), "spatial": (("mu_s", "sigma_s"),)}


@dataclass(frozen=True, eq=False)
class Reference:
    """A reference to compare samples with: statistics of outputs of an extractor, and maybe images.

    All statistics from outside come in as one, those of samples, too, and are checked here.

    Args:
        source: The file, or what it was made of.
        kind: `fid` (ours), `adm`, `npz` (pytorch-fid's and its kin), `edm2` or `torch-fidelity`.
        statistics: Output -> its mean and covariance: `features`, `spatial`.
        num_images: Images behind the statistics; None where a file does not say.
        images: Some of the real images, for metrics that need them; they are read only then.
        extractor: Name of the network, with the fingerprint of its weights; None where a file does not say.
        preset: The protocol; None likewise.
        crop: Side of the centre crop that its images went through, in pixels; None for none, or likewise.

    Raises:
        ValueError: Statistics that `check_moments` refuses or without any variance, fewer than 2 images, or a crop
            below 1 pixel.
    """

    source: str
    kind: str
    statistics: dict[str, Statistics]
    num_images: int | None = None
    images: Images | None = None
    extractor: str | None = None
    preset: str | None = None
    crop: int | None = None

    def __post_init__(self) -> None:
        statistics = {}
        for output, given in self.statistics.items():
            where = f"'{self.source}'" if output == "features" else f"'{self.source}' ({output})"
            num = _whole(given.num, f"{where} has the num_images", 2)
            statistics[output] = Statistics(*check_moments(given.mean, given.cov, where), num)
            if not statistics[output].cov.any():
                raise ValueError(f"{where} has a covariance of zeros: its images are all alike, or it is damaged.")
        num_images = _whole(self.num_images, f"'{self.source}' has the num_images", 2)
        crop = _whole(self.crop, f"'{self.source}' has the crop", 1)
        for name, value in (("statistics", statistics), ("num_images", num_images), ("crop", crop)):
            object.__setattr__(self, name, value)  # the class is frozen

    @cached_property
    def sha256(self) -> str | None:
        """Hash of the file, in hexadecimal digits; None if it was not read from one."""
        if not Path(self.source).is_file():
            return None
        return sha256_of(self.source)


def describe(reference: Reference | Images | None) -> dict[str, Any] | None:
    """Describe a reference for the record of a result."""
    if reference is None:
        return None
    if isinstance(reference, Images):
        return {"path": reference.source, "sha256": None, "kind": reference.kind, "num_images": reference.num}
    found = {"path": reference.source, "sha256": reference.sha256, "kind": reference.kind}
    return {**found, "num_images": reference.num_images, "protocol": reference.preset, "crop": reference.crop}


def holds_statistics(path: str | Path) -> bool:
    """Tell by its content whether `path` is a file of statistics; if not, it can only be images."""
    path = Path(path)
    if path.suffix.lower() in (".pkl", ".pt"):
        return path.is_file()
    if path.suffix.lower() != ".npz" or not path.is_file():
        return False
    names = set(_names(path))
    return not names.isdisjoint({"mu", "sigma", "ref_mu", "ref_sigma", "reps", "feats"})


def load_ref(path: str | Path, label: str = "FID") -> Reference:
    """Read a file of statistics.

    Args:
        path: .npz of ours, ADM, pytorch-fid, EDM, MAR or MeanFlow; .pkl of EDM2; .pt of torch-fidelity.
        label: `FD-DINOv2` takes that part of an EDM2 file, which holds several; anything else takes Inception's.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds something else, or statistics that cannot be right; says what.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"the statistics '{path}' do not exist.")
    if not path.is_file():
        raise ValueError(f"'{path}' is no file of statistics, but a {'folder' if path.is_dir() else 'FIFO or device'}.")
    read = {".pkl": _read_pickle, ".pt": _read_pt}.get(path.suffix.lower(), _read_npz)
    arrays, kind = read(path, label)
    num = arrays.get("num_images")
    statistics = {
        output: Statistics(arrays[mean], arrays[cov], num)
        for output, choices in KEYS.items()
        for mean, cov in choices
        if mean in arrays and cov in arrays
    }
    if "features" not in statistics:
        found = sorted(map(str, arrays))
        if {"reps", "feats"} & set(found):
            raise ValueError(f"'{path}' holds features, not statistics; this needs their mean and covariance.")
        hint = " It holds images: run `python -m fid stats` on it first." if "arr_0" in found else ""
        raise ValueError(f"'{path}' has no mu and sigma, but {found}.{hint}")
    images = Images(path) if "arr_0" in arrays else None
    extractor, preset = (_text(arrays.get(key), f"'{path}' has the {key}") for key in ("extractor", "protocol"))
    preset = preset or ("adm" if kind == "adm" else None)
    return Reference(str(path), kind, statistics, num, images, extractor, preset, arrays.get("crop"))


def open_reference(ref: Any, label: str = "FID", **choices: bool) -> Reference | Images | None:
    """Open what `ref` names; images are counted, but not read yet. `choices` are those of `Images`."""
    if ref is None or isinstance(ref, Reference | Images):
        return ref
    if isinstance(ref, Tensor | np.ndarray):
        return Images(ref)
    if not Path(ref).exists():
        raise FileNotFoundError(f"the reference '{ref}' does not exist.")
    return load_ref(ref, label) if holds_statistics(ref) else Images(ref, **choices)


def check_protocol(
    reference: Reference,
    dims: dict[str, int],
    preset: str | None,
    extractor: str | None,
    force: bool = False,
    samples: str = "the extractor gives",
) -> list[str]:
    """Check that a reference was made as samples are: by the same network, of images prepared in the same way.

    Args:
        reference: Statistics.
        dims: Output of the samples' network -> its width.
        preset: Protocol of the samples; None where nobody says.
        extractor: Name of their network, likewise.
        force: Warn of a difference in place of refusing it.
        samples: What has these `dims`, for a message.

    Returns:
        Warnings.

    Raises:
        ValueError: They differ.
    """
    for output in reference.statistics.keys() & dims.keys():
        given, of = reference.statistics[output].dim, "" if output == "features" else f" in {output}"
        if given != dims[output]:
            guess = {1024: " (DINOv2?)", 2048: " (Inception?)"}.get(given, "")
            raise ValueError(f"reference is {given}-d{guess}{of}, {samples} {dims[output]}-d.")
    found = None
    if reference.preset and preset and reference.preset != preset:
        found = (
            f"reference was made with preset '{reference.preset}', samples with '{preset}'; FID would mix two resizes."
        )
    elif reference.extractor and extractor and reference.extractor != extractor:
        found = f"reference was made with {reference.extractor}, samples with {extractor}"
        same = reference.extractor.rpartition("-")[0] == extractor.rpartition("-")[0]
        found += ": the same network with other weights." if same else "."
    if found and not force:
        raise ValueError(f"{found} Choose the same, or pass --force.")
    if not found and reference.preset is None and reference.extractor is None:
        found = (
            f"'{reference.source}' does not say by which protocol it was made; it is taken to be that of the samples."
        )
    return [found] if found else []


def save_reference(path: str | Path, reference: Reference, images: np.ndarray | None = None) -> None:
    """Write an .npz with the keys of ADM's files, which other tools read, and ours: whole or not at all.

    Args:
        path: The file.
        reference: Statistics, and what is known of them.
        images: (K, H, W, 3) uint8, real images for metrics that need them.

    Raises:
        OSError: It cannot be written.
    """
    record = {"num_images": reference.num_images, "extractor": reference.extractor, "protocol": reference.preset}
    record |= {"crop": reference.crop, "version": REFERENCE_FORMAT, "arr_0": images}
    for output, ((mean, cov), *_) in KEYS.items():
        if output in reference.statistics:
            record |= {mean: reference.statistics[output].mean, cov: reference.statistics[output].cov}
    with written_aside(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **{key: value for key, value in record.items() if value is not None})


def _whole(value: Any, start: str, least: int) -> int | None:
    """Take `value` as an integer; None stays None. A file may keep it as an array of one number."""
    if value is None:
        return None
    array = np.asarray(value)
    number = array.item() if array.size == 1 else f"of shape {array.shape}"
    if array.size != 1 or array.dtype.kind not in "iuf" or number != number // 1 or number < least:  # NaN != NaN
        raise ValueError(f"{start} {number}; it must be a whole number from {least}.")
    return int(number)


def _text(value: Any, start: str) -> str | None:
    """Take `value` as a name; None stays None. An .npz keeps it as an array of one text."""
    if value is None:
        return None
    text = np.asarray(value)
    if text.size != 1 or text.dtype.kind != "U" or not text.item().isprintable() or len(text.item()) > 100:
        raise ValueError(f"{start} {str(value)[:40]!r}; it must be a name.")
    return text.item()


def _read_npz(path: Path, label: str) -> tuple[dict[str, Any], str]:
    names = _names(path)
    wanted = {
        "num_images",
        "extractor",
        "protocol",
        "crop",
        *(key for pairs in KEYS.values() for pair in pairs for key in pair),
    }
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = {name: _array(archive, member, name in wanted) for name, member in names.items()}
    except Exception as error:  # a damaged file raises almost anything
        raise ValueError(f"'{path}' cannot be read: {error or type(error).__name__}.") from error
    kind = "fid" if "protocol" in arrays or "extractor" in arrays else "adm" if "mu_s" in arrays else "npz"
    return arrays, kind


def _array(archive: zipfile.ZipFile, member: str, wanted: bool) -> np.ndarray | None:
    """Read a member to its end, where its checksum is compared, and take it as an array; of others check the name."""
    if not wanted:
        archive.open(member).close()
        return None
    return np.lib.format.read_array(io.BytesIO(_content(archive, member)), allow_pickle=False)


def _content(archive: zipfile.ZipFile, member: str) -> bytes:
    if (size := archive.getinfo(member).file_size) > MOST_BYTES:
        raise ValueError(f"its {member!r} takes {size / 1e9:.1f} GB, more than any statistics")
    return archive.read(member)


def _names(path: Path) -> dict[str, str]:
    """List the arrays of an .npz: name -> name of the file in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy"): name for name in archive.namelist()}
    except Exception as error:  # a damaged file raises almost anything
        raise ValueError(f"'{path}' is not an .npz file, or is cut short.") from error


def _read_pickle(path: Path, label: str) -> tuple[dict[str, Any], str]:
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"'{path}' takes {size / 1e9:.1f} GB, more than any statistics.")
    found = unpickle(path.read_bytes(), path)
    part = "fd_dinov2" if label == "FD-DINOv2" else "fid"
    if part not in found and "mu" in found:
        return found, "edm2"
    if not isinstance(found.get(part), dict):
        raise ValueError(f"'{path}' has no {part!r} with mu and sigma, but {sorted(map(str, found))}.")
    return {**found[part], "num_images": found.get("num_images")}, "edm2"


def _read_pt(path: Path, label: str) -> tuple[dict[str, Any], str]:
    try:
        with zipfile.ZipFile(path) as archive:  # as torch.save writes
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            content = _content(archive, name)
    except Exception as error:  # a damaged file raises almost anything
        raise ValueError(f"'{path}' is not a PyTorch file of statistics, or is cut short.") from error
    return unpickle(content, path), "torch-fidelity"
