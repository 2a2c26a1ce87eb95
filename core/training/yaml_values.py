"""YAML by the rules that people expect.

`1e-3` is a number; `no`, dates, 12:30 and 010 are words; a key given twice is an error. PyYAML alone takes these for a
string, false, a date, 750 and 8, and of a key given twice the last.
"""

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from core.training.errors import UserError


class _Loader(yaml.SafeLoader):
    """SafeLoader with the rules above."""

    yaml_implicit_resolvers: ClassVar = {
        first: [
            (tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float", ":int", ":timestamp"))
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for at, key in enumerate(keys):
            if key in keys[:at]:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"), "-+0123456789"
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    "-+0123456789.",
)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what either set of rules reads as something else than the word that it is."""

    yaml_implicit_resolvers: ClassVar = {
        first: [
            *yaml.SafeDumper.yaml_implicit_resolvers.get(first, ()),
            *_Loader.yaml_implicit_resolvers.get(first, ()),
        ]
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
    }


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; a syntax error is told with line and column."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise UserError(f"{path}{at}: {error.problem or error.context}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a YAML text file ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be a mapping of keys such as 'app: timeseries', got {type(values).__name__}")
    return values


def parse_yaml(text: str) -> Any:
    """The value that a piece of YAML stands for; raises yaml.YAMLError."""
    return yaml.load(text, _Loader)


def parse_list(text: str) -> list[tuple[str, Any]]:
    """The values of a list without its brackets, each as it is written and as what it stands for.

    Raises:
        yaml.YAMLError: it is none.
    """
    whole = f"[{text}]"
    node = yaml.compose(whole, _Loader)
    if not isinstance(node, yaml.SequenceNode) or node.end_mark.index != len(whole):
        raise yaml.YAMLError(f"not a list: {text!r}")
    written = [whole[item.start_mark.index : item.end_mark.index].strip() for item in node.value]
    return list(zip(written, parse_yaml(whole)))


def write_yaml(values: Any, **style: Any) -> str:
    """Plain values as YAML that `read_yaml` and `parse_yaml` read back to the same; style as in `yaml.dump`."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, **style)
