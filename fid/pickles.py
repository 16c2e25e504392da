"""Arrays of numbers out of a pickle, read without running any code that it names."""

import io
import pickle
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np


def unpickle(content: bytes, path: Path) -> dict[str, Any]:
    """Read the dict in a pickle, with its arrays, and run nothing; `path` is where it comes from, for errors.

    Raises:
        ValueError: It is no pickle, names anything but arrays, or holds something else than a dict.
    """
    try:
        found = _take_arrays(_Arrays(io.BytesIO(content)).load())
    except pickle.UnpicklingError as error:
        raise ValueError(f"'{path}' is not a file of statistics, and nothing in it was run: {error}.") from error
    except Exception as error:  # what is no pickle, or was made to do harm, may raise anything
        raise ValueError(f"'{path}' is not a file of statistics, and nothing in it was run.") from error
    if not isinstance(found, dict):
        raise ValueError(f"'{path}' holds a {type(found).__name__}; statistics are a dict with mu and sigma.")
    return found


def _take_arrays(value: Any, depth: int = 2) -> Any:
    """Take arrays out of a dict, and of the dicts in it; one that is nested deeper may be endless."""
    if isinstance(value, dict) and depth:
        return {key: _take_arrays(part, depth - 1) for key, part in value.items()}
    return value.value if isinstance(value, _ArrayState) else value


class _ArrayState:
    """The description of an array in a pickle; `np.frombuffer` makes the array of it, never the pickle."""

    def __init__(self) -> None:
        self.value: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran_order, content = state
        self.value = _to_array(content, dtype, shape, "F" if fortran_order else "C")


class _TypeState:
    """The description of a type of numbers in a pickle."""

    def __init__(self, code: str, *_: Any) -> None:
        if not re.fullmatch(r"[<>|=]?[biuf][1-8]", code):
            raise pickle.UnpicklingError(f"it has an array of {code!r}, which are not numbers")
        self.code = code.lstrip("<>|=")

    def __setstate__(self, state: tuple) -> None:
        if any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("it has an array of records")
        self.code = f"{state[1]}{self.code}"


def _to_array(content: Any, dtype: _TypeState, shape: tuple, order: str = "C") -> np.ndarray:
    if not isinstance(dtype, _TypeState):
        raise pickle.UnpicklingError("it has an array without a type")
    return np.frombuffer(bytes(content), np.dtype(dtype.code)).reshape(shape, order=order)


class _Arrays(pickle._Unpickler):  # in Python: the one in C takes 64 GB for a damaged number of a memo
    """Numbers, texts, and arrays of numbers only.

    A pickle may name any function of Python to be called, and even numpy's own may be called so that they follow an
    address in the file. Here each name stands for something that can do neither.
    """

    _STAND_INS: ClassVar = {
        "ndarray": object,
        "_reconstruct": lambda *_: _ArrayState(),
        "dtype": _TypeState,
        "scalar": lambda dtype, content: _to_array(content, dtype, (1,))[0],
        "_frombuffer": lambda content, dtype, shape, order: _to_array(content, dtype, shape, order),
        "encode": lambda text, encoding: text.encode("latin1"),
        "OrderedDict": dict,
        "EasyDict": dict,
    }
    _MODULES = re.compile(r"numpy|numpy\._?core\.(multiarray|numeric)|_codecs|collections|dnnlib\.util")

    def find_class(self, module: str, name: str) -> Any:
        """Find the stand-in for one of the few names that an array needs."""
        if not self._MODULES.fullmatch(module) or name not in self._STAND_INS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not an array")
        return self._STAND_INS[name]
