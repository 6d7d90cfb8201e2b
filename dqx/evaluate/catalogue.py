"""From a task's name to the YAML files that describe it, read without lm-eval, whose import takes a second.

lm-eval's own files are used wherever they work; `lm_eval_tasks/` holds the rest. Only the folders that a task needs
are read, because reading all of lm-eval's takes eight seconds.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from dqx.common.environment import package_version

OWN_FOLDER = Path(__file__).parent / "lm_eval_tasks"
LM_EVAL_FOLDER = Path(str(find_spec("lm_eval").origin)).parent / "tasks"  # type: ignore[union-attr]

#: Folders of lm-eval's that hold the study's tasks; any other task is searched for.
FOLDERS = {name: name for name in ("winogrande", "piqa", "hellaswag", "gsm8k")}
FOLDERS |= {"arc_easy": "arc", "arc_challenge": "arc", "mmlu": "mmlu/default"}

#: Harness tasks whose prompt is another one for chat models.
CHAT_VERSIONS = {"dqx_humaneval": "dqx_humaneval_chat", "dqx_mbpp": "dqx_mbpp_chat"}

#: Tasks of lm-eval's that cannot run here (beginning of their names), and ours in their place.
REPLACED = {"humaneval": "dqx_humaneval", "mbpp": "dqx_mbpp", "minerva_math": "dqx_math"}

#: `dataset_path` values that name a file format and not a dataset.
FORMATS = ("json", "parquet", "csv", "text", "arrow")


class UnknownTaskError(ValueError):
    """A harness task that neither dqx nor lm-eval has."""


@dataclass(frozen=True)
class Leaf:
    """One lm-eval task: its name, the YAML it comes from, and its fields before functions are resolved."""

    name: str
    path: Path
    raw: Mapping[str, Any]

    @property
    def own(self) -> bool:
        return self.path.parent == OWN_FOLDER

    @property
    def dataset(self) -> str | None:
        """Hub id of the dataset; None for documents that come with dqx or from files."""
        path = self.raw.get("dataset_path")
        return None if self.raw.get("custom_dataset") or path in FORMATS else path


@dataclass(frozen=True)
class Entry:
    """A name: of a task or a group with its file, or of a tag with the tasks that have it."""

    path: Path | None = None
    content: Mapping[str, Any] = field(default_factory=dict)
    tagged: list[str] = field(default_factory=list)


class FunctionName(str):
    """A function as a task file names it (`!function`); nothing has been imported yet."""


class _Loader(yaml.SafeLoader if not hasattr(yaml, "CSafeLoader") else yaml.CSafeLoader):  # type: ignore[misc]
    pass


_Loader.add_constructor("!function", lambda loader, node: FunctionName(loader.construct_scalar(node)))


def read(path: Path) -> dict[str, Any]:
    """A task file, over those that it includes. Raises what files and YAML raise."""
    content = yaml.load(path.read_bytes(), _Loader)
    included = content.pop("include", [])
    merged: dict[str, Any] = {}
    for name in [included] if isinstance(included, str) else included:
        merged |= {key: value for key, value in read(path.parent / name).items() if key != "task_list"}
    return merged | content


@functools.cache
def _index(*folders: Path) -> Mapping[str, Entry]:
    """The names in our folder and in others, in which the first file counts, and the last folder."""
    index: dict[str, Entry] = {}
    for folder in (OWN_FOLDER, *folders):
        there: dict[str, Entry] = {}
        for path in sorted(folder.glob("**/*.yaml")):
            with contextlib.suppress(Exception):  # files of lm-eval's that are no tasks, or cannot be read
                content = read(path)
                name = content["group" if "group" in content and "class" not in content else "task"]
                if name in there:
                    continue
                there[name] = Entry(path, content)
                tags = content.get("tag") or [] if "group" not in content else []
                for tag in [tags] if isinstance(tags, str) else tags:
                    there.setdefault(tag, Entry()).tagged.append(name)
        index |= there
    return index


def leaves(harness: str, *, chat: bool = False) -> list[Leaf]:
    """The lm-eval tasks that a name stands for: one, or all members of a group or tag.

    Raises UnknownTaskError.
    """
    if chat:
        harness = CHAT_VERSIONS.get(harness, harness)
    if harness in _index():
        return list(_members(harness, _index()))
    folders = _folders(harness)
    if folders and harness in _index(*folders):
        with contextlib.suppress(UnknownTaskError):
            return list(_members(harness, _index(*folders)))
        return list(_members(harness, _index(LM_EVAL_FOLDER)))  # a group with members from elsewhere
    close = difflib.get_close_matches(harness, familiar_names(), 3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise UnknownTaskError(f"{harness!r} is no task of lm-eval {package_version('lm_eval')} nor of dqx{hint}")


def _folders(name: str) -> list[Path]:
    """lm-eval's folders with YAML files in which a line gives `name` to a task, group, tag or member."""
    if name in FOLDERS:
        return [LM_EVAL_FOLDER / FOLDERS[name]]
    quoted = re.escape(name.encode())
    line = re.compile(rb"(?m)^\s*(?:-|[\"']?(?:task|group|tag)[\"']?\s*:)\s*[\"']?" + quoted + rb"[\"']?\s*$")
    return sorted({path.parent for path in LM_EVAL_FOLDER.rglob("*.yaml") if line.search(path.read_bytes())})


def familiar_names() -> list[str]:
    """Names to suggest: the study's and dqx's own tasks, and the names of lm-eval's task folders."""
    folders = [path.name for path in LM_EVAL_FOLDER.iterdir() if path.is_dir() and not path.name.startswith("_")]
    return sorted({*FOLDERS, *_index(), *folders})


def _members(name: str, index: Mapping[str, Entry]) -> Iterator[Leaf]:
    entry = index[name]
    if entry.path is None:  # a tag
        for member in sorted(entry.tagged):
            yield from _members(member, index)
    elif "group" in entry.content:
        members = entry.content["task"]
        for member in [members] if isinstance(members, str) else members:
            if not isinstance(member, str) or member not in index:
                raise UnknownTaskError(
                    f"the lm-eval group {name!r} defines members in place, which dqx cannot redirect"
                )
            yield from _members(member, index)
    else:
        yield Leaf(name, entry.path, entry.content)


def configuration(leaf: Leaf) -> dict[str, Any]:
    """The task's fields with its functions. Raises whatever the import of the modules that hold them raises."""
    config = dict(leaf.raw)
    if not leaf.own and _names_functions(config):
        from lm_eval.tasks._yaml_loader import load_yaml  # finds modules beside its files; a second

        config = load_yaml(leaf.path)
    return {key: _with_functions(value) for key, value in config.items() if key not in ("tag", "group", "task_list")}


def _names_functions(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, FunctionName) or any(_names_functions(each) for each in inner)


def _with_functions(value: Any) -> Any:
    """A copy in which functions stand in place of their names."""
    if isinstance(value, FunctionName):
        module, _, name = value.rpartition(".")
        return getattr(import_module(module), name)
    if isinstance(value, dict):
        return {key: _with_functions(each) for key, each in value.items()}
    return [_with_functions(each) for each in value] if isinstance(value, list) else value
