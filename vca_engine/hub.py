"""Folders that are on this machine, or are downloaded by a name from the Hugging Face hub: one rule for all of them."""

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from vca_engine.files import nearest_there


def find_or_download(path: str | Path, needed: Sequence[str]) -> Path:
    """Find `path` on this machine: a local path as it is; a model of the hub, owner/name, is downloaded first.

    It is on the hub if there is neither such a path nor a folder of the owner's name, so that a mistyped local path is
    not looked for there. A model that has been downloaded is found again without a network.

    Args:
        path: A file, a folder, or a name on the hub.
        needed: Patterns of the files of a model that are downloaded.

    Raises:
        FileNotFoundError: There is no such path, and the hub has no such model or cannot be reached; says why, and the
            nearest path.
    """
    local = Path(path)
    if str(path) and local.exists():
        return local
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path)) or local.parent.exists():
        raise FileNotFoundError(f"there is no such file or folder{nearest_there(path)}")
    try:
        return Path(snapshot_download(str(path), allow_patterns=list(needed)))
    except RepositoryNotFoundError:
        reason = "the Hugging Face hub has no model of that name, or none that you may see; check the name"
    except LocalEntryNotFoundError as error:
        why = _in_one_line(error.__cause__ or error)
        reason = f"the Hugging Face hub cannot be reached, so check the network, or the name: {why}"
    except (OSError, ValueError) as error:
        reason = f"the Hugging Face hub cannot give it now; check the name, or the network: {_in_one_line(error)}"
    raise FileNotFoundError(f"there is no such file or folder, and {reason}")


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
