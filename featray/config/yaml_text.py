"""Parse YAML, which includes JSON, and refuse a key that is given twice: YAML would drop the first value."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml


class DuplicateKeyError(ValueError):
    """A mapping has a key twice.

    Attributes:
        problems: One sentence for each such key.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        yaml.YAMLError: The text is not YAML.
        DuplicateKeyError: A mapping has a key twice, at any level.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if problems := list(_find_duplicates(node, "", set())):
            raise DuplicateKeyError(problems)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _find_duplicates(node: yaml.Node, path: str, seen: set[int]) -> Iterator[str]:
    if id(node) in seen:  # an alias of a node that was checked before
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield from _find_duplicates(item, f"{path}.{number}", seen)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            key_path = f"{path}.{name}".removeprefix(".")
            if (key.tag, name) in lines:
                first = lines[key.tag, name]
                where = f"lines {first} and {line}" if first != line else f"line {line}, twice"
                yield f"{key_path}: this key is given twice ({where}); keep one, with all its values"
            lines[key.tag, name] = line
            yield from _find_duplicates(value, key_path, seen)
