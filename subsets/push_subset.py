"""A subset put into a model's repository."""

from __future__ import annotations

import json
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard

from ..checkpoints.hub.names import is_repo_name
from ..checkpoints.hub.upload import make_place
from .library import library_file
from .validation import SubsetError

CARD = "README.md"
_TAGS = ("emo", "mixture-of-experts")


def push_subset(
    data: dict[str, Any],
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
        data (`dict[str, Any]`): the subset as JSON data, what `ExpertSubset.to_dict` gives.
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
    make_place(api, repo_id, "model", revision, private)
    files = {file: json.dumps(data) + "\n"}
    if not api.file_exists(repo_id, CARD, revision=revision):
        files[CARD] = _library_card(data.get("source"), repo_id, name)
    return api.create_commit(
        repo_id,
        [CommitOperationAdd(path, text.encode()) for path, text in files.items()],
        revision=revision,
        commit_message=commit_message or f"Add the expert subset {name}",
    )


def add_tags(data: Any, *more: str) -> None:
    """Add the tags of EMO to a card, each once.

    Args:
        data (`CardData`): the card's `data`; changed.
        more (`str`): further tags.

    Example:

    ```python
    >>> from huggingface_hub import ModelCard
    >>> from transformers_emo.subsets.push_subset import add_tags
    >>> card = ModelCard("---\\ntags: [mine]\\n---")
    >>> add_tags(card.data, "expert-subset")
    >>> card.data.tags
    ['mine', 'emo', 'mixture-of-experts', 'expert-subset']

    ```
    """
    data.tags = list(dict.fromkeys([*(data.tags or []), *_TAGS, *more]))


def _library_card(source: str | None, repo_id: str, name: str) -> str:
    card = ModelCard(f"""---
library_name: transformers
---

# {repo_id.split("/")[-1]}

Subsets of the experts of an [EMO](https://arxiv.org/abs/2605.06663) model, in `subsets/`.

```python
from huggingface_hub import hf_hub_download
from transformers_emo import EmoForCausalLM

subset = hf_hub_download("{repo_id}", "{library_file(name)}")
model = EmoForCausalLM.from_pretrained("{source or "<the model>"}", expert_subset=subset)
```
""")
    add_tags(card.data, "expert-subset")
    if source and is_repo_name(source) and source != repo_id:
        card.data["base_model"] = source
    return str(card)
