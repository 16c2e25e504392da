"""Files of settings in YAML 1.2: read as words that stay words; written so that every version reads the same."""

import io
import re
from collections.abc import Mapping
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode

from vca_engine.files import content_of, expanded, nearest_there

TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NULLS = ("", "~", "null", "Null", "NULL")  # of YAML 1.2
PLAIN_TAGS = {
    f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "timestamp", "seq", "map", "value")
}
MOST_VALUES = 100_000  # of a YAML file, whose aliases can make a million of ten lines


class Plain(str):
    """A word without quotes in a YAML file: text, unless the setting is a number, a truth value or may be null."""

    __slots__ = ()


def read_yaml(path: str) -> dict[str, Any]:
    """Read the settings in a YAML 1.2 file, as `Plain` words and text in quotes.

    Raises:
        ValueError: It cannot be read, or is no mapping of settings; says where.
    """
    try:
        return parse_yaml(content_of(expanded(path)).decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is not text in UTF-8 ({error.reason})"
        close = nearest_there(expanded(path)) if isinstance(error, FileNotFoundError) else ""
        raise ValueError(f"{path} cannot be read: {reason}{close}.") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a YAML file of settings: {error}.") from None


def parse_yaml(text: str) -> dict[str, Any]:
    """Read a mapping written in YAML 1.2, as `Plain` words and text in quotes; nothing in it is made an object.

    Raises:
        ValueError: It is none.
    """
    num_values = 0

    def value(node: Node) -> Any:
        nonlocal num_values
        num_values += 1
        line = f"line {node.start_mark.line + 1}"
        if num_values > MOST_VALUES:
            raise ValueError(f"{line}: it has more than {MOST_VALUES:,} values")
        if node.tag not in PLAIN_TAGS:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise ValueError(f"{line}: {tag!r} is a tag or a merge; write values out")
        if isinstance(node, ScalarNode):
            return str(node.value) if node.style else Plain(node.value)
        if not isinstance(node, MappingNode):
            return [value(each) for each in node.value]
        found: dict[str, Any] = {}
        for key, each in node.value:
            name, line = value(key), f"line {key.start_mark.line + 1}"
            if not isinstance(name, str):
                raise ValueError(f"{line}: a key is a word, not a list or a mapping")
            if name in found:
                raise ValueError(f"{line}: {str(name)!r} stands twice")
            found[str(name)] = value(each)
        return found

    try:
        root = YAML(typ="safe", pure=True).compose(text)
        found = {} if root is None else value(root)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{where}{getattr(error, 'problem', None) or 'it has characters that YAML has not'}") from None
    except RecursionError:
        raise ValueError("it holds itself, or is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"it is {'a list' if isinstance(found, list) else 'a word'}, not lines of KEY: VALUE")
    return found


def write_yaml(values: Mapping[str, Any]) -> str:
    """Write JSON values as YAML, with quotes around text that YAML 1.1 or 1.2 may take for something else."""
    yaml, file = YAML(typ="safe", pure=True), io.StringIO()
    yaml.default_flow_style, yaml.width, yaml.sort_base_mapping_type_on_output = False, 10_000, False

    def text(representer: Any, word: str) -> ScalarNode:
        taken = word.lower() in (*TRUTH, *NULLS, "y", "n", ".nan", ".inf")
        simple = not taken and re.fullmatch(r"[A-Za-z_./][\w./ -]*", word)
        style = None if simple else "'" if word.isprintable() else '"'
        return representer.represent_scalar("tag:yaml.org,2002:str", word, style=style)

    def number(representer: Any, value: float) -> ScalarNode:
        word = re.sub(r"^(-?\d+)e", r"\1.0e", repr(value))  # in YAML 1.1, 1e-05 is a word
        return representer.represent_scalar("tag:yaml.org,2002:float", word)

    yaml.representer.add_representer(str, text)
    yaml.representer.add_representer(float, number)
    yaml.dump(dict(values), file)
    return file.getvalue()
