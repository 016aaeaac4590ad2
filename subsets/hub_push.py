"""Pushing to the Hub: subsets by name, whole folders, and what their cards say."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, DatasetCard, DatasetCardData, HfApi, ModelCard

from ..configuration import LEGACY_MODEL_TYPE, EmoConfig
from .adapter_record import RECORD
from .checkpoint import Checkpoint
from .expert_subset import ExpertSubset, SubsetError
from .hub_files import is_repo_name
from .library import library_file
from .model_experts import root_experts, size_range
from .model_folder import existing_folder

_CARD = "README.md"
_TAGS = ("emo", "mixture-of-experts")
# Partial files, caches, `.env`; and the state of a `Trainer`: larger than the model, and its arguments, a
# pickle, may hold the user's token.
_NOT_PUSHED = [".*", "*/.*"] + [
    f"{folder}{name}"
    for folder in ("", "*/")
    for name in (
        "checkpoint-*/*",
        "optimizer.pt",
        "optimizer.bin",
        "scheduler.pt",
        "scaler.pt",
        "rng_state*.pth",
        "training_args.bin",
    )
]
_GENERATED = "This model card has been automatically generated"  # by Transformers


def push_subset(
    subset: ExpertSubset,
    repo_id: str,
    name: str,
    *,
    token: str | bool | None = None,
    revision: str | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """Put a subset into a model's repository, as `subsets/<name>.json`.

    Args:
        subset (`ExpertSubset`): the subset.
        repo_id (`str`): the repository, `user/name`; made if need be.
        name (`str`): what to load it by: letters, digits, `.`, `-`, `+` and `_`.
        token (`str` or `bool`, *optional*): as everywhere in huggingface_hub.
        revision (`str`, *optional*): the branch; made if need be.
        private (`bool`, *optional*): make the repository private, if it is made.
        commit_message (`str`, *optional*): the commit's title.

    Returns:
        `CommitInfo`: the commit.

    Raises:
        SubsetError: if the name cannot be one.

    Example: see `ExpertSubset.push_to_hub`.
    """
    file = library_file(name)
    if file is None:
        raise SubsetError(
            f"{name!r} cannot be a subset's name: expected letters, digits, '.', '-', '+' and '_', the first "
            "of them a letter, a digit or '_'."
        )
    api = HfApi(token=token)
    _make_place(api, repo_id, "model", revision, private)
    files = {file: json.dumps(subset.to_dict()) + "\n"}
    if not api.file_exists(repo_id, _CARD, revision=revision):
        files[_CARD] = _library_card(subset, repo_id, name)
    return api.create_commit(
        repo_id,
        [CommitOperationAdd(path, text.encode()) for path, text in files.items()],
        revision=revision,
        commit_message=commit_message or f"Add the expert subset {name}",
    )


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    token: str | bool | None = None,
    revision: str | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """Put a folder on the Hub: a model, an adapter, or documents as `<domain>.jsonl`, which become a dataset.

    What a call that was interrupted has sent is not sent again. A repository without a card gets one. Files
    whose names begin with a dot stay behind, and so does the state of a `Trainer`: its `checkpoint-*`
    folders, optimiser, schedule, random state and arguments.

    Args:
        folder (`str` or `os.PathLike`): the folder.
        repo_id (`str`): the repository, `user/name`; made if need be.
        token (`str` or `bool`, *optional*): as everywhere in huggingface_hub.
        revision (`str`, *optional*): the branch; made if need be.
        private (`bool`, *optional*): make the repository private, if it is made.
        commit_message (`str`, *optional*): the commit's title.

    Returns:
        `CommitInfo`: the commit.

    Raises:
        FileNotFoundError: if there is no such folder.
        CheckpointError: if weights of a model are missing, cut short or damaged; before anything is sent.
        ValueError: if the folder is none of these, its model is no EMO, or one of the documents' files is
            called `default.jsonl` or has `*`, `?`, `[` or `]` in its name.

    Example:

    ```python
    >>> from transformers_emo.subsets import push_folder
    >>> push_folder("model_cards/toy-emo", "me/toy-emo", token="hf_...")  # doctest: +SKIP
    >>> try:
    ...     push_folder(tmp_path, "me/nothing")
    ... except ValueError as error:
    ...     print(str(error).endswith("expected a model, an adapter or documents in .jsonl files."))
    True

    ```
    """
    folder = existing_folder(folder)
    documents = sorted(path.name for path in folder.glob("*.jsonl") if not path.name.startswith("."))
    repo_type = "model"
    if (folder / "adapter_config.json").is_file():
        card = _adapter_card(folder, repo_id)
    elif (folder / "config.json").is_file():
        Checkpoint.from_folder(folder).source.close()
        kind = EmoConfig.get_config_dict(folder)[0].get("model_type")
        if kind not in (EmoConfig.model_type, LEGACY_MODEL_TYPE):
            raise ValueError(f"The model in {folder} is of type {kind!r}, expected 'emo': use `hf upload`.")
        card = _model_card(EmoConfig.from_pretrained(folder), repo_id)
    elif "default.jsonl" in documents:
        raise ValueError(
            f"A domain of {folder} is called 'default', the name by which `load_dataset` gives all of them: "
            "rename default.jsonl."
        )
    elif patterns := [name for name in documents if set(name) & set("*?[]")]:
        raise ValueError(
            f"{patterns[0]!r} in {folder} would be a pattern on the Hub and not the name of a file, and its "
            "documents would be missing from the dataset: rename it."
        )
    elif documents:
        repo_type, card = "dataset", _documents_card(documents, repo_id)
    else:
        raise ValueError(
            f"There is nothing to push in {folder}: expected a model, an adapter or documents in .jsonl "
            "files."
        )
    api = HfApi(token=token)
    where: dict[str, Any] = {"repo_id": repo_id, "repo_type": repo_type, "revision": revision}
    _make_place(api, repo_id, repo_type, revision, private)
    commit = api.upload_folder(
        folder_path=folder, ignore_patterns=_NOT_PUSHED, commit_message=commit_message, **where
    )
    if (folder / _CARD).is_file() or api.file_exists(repo_id, _CARD, repo_type=repo_type, revision=revision):
        return commit
    return api.upload_file(
        path_or_fileobj=card.encode(), path_in_repo=_CARD, commit_message="Add a card", **where
    )


def complete_card(path: str | os.PathLike, config: EmoConfig, repo_id: str) -> None:
    """Complete a model card: what kind of model this is, and of which one it is a part.

    What the card says already stays; only the text that Transformers generates is replaced.

    Args:
        path (`str` or `os.PathLike`): the card, `README.md`; nothing happens if there is none.
        config (`EmoConfig`): the model's config.
        repo_id (`str`): the repository that the card is for.

    Example:

    ```python
    >>> from huggingface_hub import ModelCard
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.subsets.hub_push import complete_card
    >>> ModelCard("---\\nlicense: mit\\n---\\n# Mine").save(tmp_path / "README.md")
    >>> complete_card(tmp_path / "README.md", EmoConfig(), "me/emo")
    >>> ModelCard.load(tmp_path / "README.md").data.tags
    ['emo', 'mixture-of-experts']

    ```
    """
    path = Path(path)
    if not path.is_file():
        return
    card = ModelCard.load(path)
    data: Any = card.data
    _add_tags(data, *(["expert-subset"] if config.retained_experts else []))
    data.library_name = data.library_name or "transformers"
    data.pipeline_tag = data.pipeline_tag or "text-generation"
    base = _base_model(config, repo_id)
    if base is not None and not data.base_model:
        data.base_model = base
    if _GENERATED in card.text:
        card.text = _text(config, repo_id, base)
    card.save(path)


def complete_adapter_card(folder: str | os.PathLike, subset: ExpertSubset) -> None:
    """Complete the card that PEFT writes beside an adapter: which experts it belongs to.

    Args:
        folder (`str` or `os.PathLike`): the adapter's; nothing happens if there is no card.
        subset (`ExpertSubset`): the experts it was trained on.

    Example:

    ```python
    >>> from huggingface_hub import ModelCard
    >>> from transformers_emo import ExpertSubset
    >>> from transformers_emo.subsets.hub_push import complete_adapter_card
    >>> ModelCard("---\\nlicense: mit\\n---\\n# Mine").save(tmp_path / "README.md")
    >>> complete_adapter_card(tmp_path, ExpertSubset([[0, 3]], root_experts_per_layer=[8]))
    >>> "2 of the 8 experts" in ModelCard.load(tmp_path / "README.md").text
    True

    ```
    """
    path = Path(folder, _CARD)
    if not path.is_file():
        return
    card = ModelCard.load(path)
    whole = all(
        ids is None or len(ids) == size
        for ids, size in zip(subset.experts, subset.root_experts_per_layer or [], strict=False)
    )
    _add_tags(card.data, *([] if whole else ["expert-subset"]))
    text = _adapter_text(subset)
    if text not in card.text:
        card.text = f"{card.text.rstrip()}\n\n{text}"
    card.save(path)


def _make_place(api: HfApi, repo_id: str, repo_type: str, revision: str | None, private: bool | None) -> None:
    """The repository and the branch, where they are not there. A pull request's is made by opening one."""
    api.create_repo(repo_id, private=private, repo_type=repo_type, exist_ok=True)
    if revision is not None and not revision.startswith("refs/pr/"):
        api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)


def _add_tags(data: Any, *more: str) -> None:
    data.tags = list(dict.fromkeys([*(data.tags or []), *_TAGS, *more]))


def _model_card(config: EmoConfig, repo_id: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, _CARD)
        path.write_text(f"---\n{{}}\n---\n{_GENERATED}", encoding="utf-8")
        complete_card(path, config, repo_id)
        return path.read_text(encoding="utf-8")


def _adapter_card(folder: Path, repo_id: str) -> str:
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    card = ModelCard(f"---\nlibrary_name: peft\n---\n\n# {repo_id.split('/')[-1]}\n")
    base = str(settings.get("base_model_name_or_path") or "")
    if is_repo_name(base):
        card.data["base_model"] = base
    with tempfile.TemporaryDirectory() as copy:
        card.save(Path(copy, _CARD))
        if (folder / RECORD).is_file():
            complete_adapter_card(copy, ExpertSubset.load(folder / RECORD))
        return Path(copy, _CARD).read_text(encoding="utf-8")


def _adapter_text(subset: ExpertSubset) -> str:
    of = max(subset.root_experts_per_layer or [0])
    kept = size_range(len(ids) for ids in subset.experts if ids is not None)
    kept += f" of the {of} experts" if of else " experts"
    return f"""## Experts

Trained on {kept} of each layer of an [EMO](https://arxiv.org/abs/2605.06663) model: those that
`{RECORD}` names. On a model that holds them, and on no other:

```python
from transformers_emo.training import load_adapter

model = load_adapter(model, "<this repository>")
```
"""


def _library_card(subset: ExpertSubset, repo_id: str, name: str) -> str:
    card = ModelCard(f"""---
library_name: transformers
---

# {repo_id.split("/")[-1]}

Subsets of the experts of an [EMO](https://arxiv.org/abs/2605.06663) model, in `subsets/`.

```python
from huggingface_hub import hf_hub_download
from transformers_emo import EmoForCausalLM

subset = hf_hub_download("{repo_id}", "{library_file(name)}")
model = EmoForCausalLM.from_pretrained("{subset.source or "<the model>"}", expert_subset=subset)
```
""")
    _add_tags(card.data, "expert-subset")
    if subset.source and is_repo_name(subset.source) and subset.source != repo_id:
        card.data["base_model"] = subset.source
    return str(card)


def _documents_card(documents: list[str], repo_id: str) -> str:
    """A card by which `load_dataset(repo_id)` gives all documents, and with a domain's name those of it."""
    configs: list[dict[str, Any]] = [{"config_name": "default", "data_files": documents, "default": True}]
    configs += [{"config_name": name.removesuffix(".jsonl"), "data_files": name} for name in documents]
    data = DatasetCardData(task_categories=["text-generation"], tags=["emo"], configs=configs)
    return str(DatasetCard(f"---\n{data.to_yaml()}\n---\n\n# {repo_id.split('/')[-1]}\n"))


def _base_model(config: EmoConfig, repo_id: str) -> str | None:
    """The repository that the model was loaded from, if it was another one."""
    name = config.name_or_path or ""
    return name if is_repo_name(name) and name != repo_id else None


def _text(config: EmoConfig, repo_id: str, base: str | None) -> str:
    kept = size_range(layer.num_experts for layer in config.layer_experts if not layer.is_dense)
    if config.retained_experts:
        of = max(root_experts(config))
        kept += f" of the {of} experts of each layer of {base or 'its full model'}"
    else:
        kept += " experts in each layer"
    return f"""
# {repo_id.split("/")[-1]}

An [EMO](https://arxiv.org/abs/2605.06663) model: a mixture of experts whose experts group by topic.
It has {kept}; {config.num_experts_per_tok} are active for a token.

```python
import transformers_emo  # from the package transformers-emo
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{repo_id}")
```
"""
