"""Reads one YAML file into plain mappings, strictly: what YAML would quietly drop is an error here."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import yaml

from disaggregated.errors import ConfigError


class _StrictLoader(yaml.SafeLoader):
    """A key that stands twice in one section is an error; YAML itself keeps the last one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is there twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, object]:
    """The file's one document; an empty file is an empty mapping. Raises ConfigError naming file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text") from error
    try:
        documents = [document for document in yaml.load_all(text, _StrictLoader) if document is not None]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path.name}{line}: {error.problem or error.context or 'is not YAML'}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path.name}: is not YAML: {str(error).splitlines()[0]}") from error
    if len(documents) > 1:
        raise ConfigError(f"{path.name}: has {len(documents)} YAML documents, and a file is one; split it at ---")
    if documents and not isinstance(documents[0], dict):
        raise ConfigError(f"{path.name}: must be a section of keys, is {type(documents[0]).__name__}")
    return cast(dict[str, object], documents[0]) if documents else {}
