"""Pushing to the Hub: subsets by name, and what a model's card says."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard

from ..configuration import EmoConfig
from .expert_subset import ExpertSubset, SubsetError
from .library import library_file
from .model_experts import root_experts

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
        revision (`str`, *optional*): the branch.
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
    api.create_repo(repo_id, private=private, exist_ok=True)
    return api.upload_file(
        path_or_fileobj=(json.dumps(subset.to_dict()) + "\n").encode(),
        path_in_repo=file,
        repo_id=repo_id,
        revision=revision,
        commit_message=commit_message or f"Add the expert subset {name}",
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
    tags = ["emo", "mixture-of-experts"] + (["expert-subset"] if config.retained_experts else [])
    data.tags = [*(data.tags or []), *(tag for tag in tags if tag not in (data.tags or []))]
    data.library_name = data.library_name or "transformers"
    data.pipeline_tag = data.pipeline_tag or "text-generation"
    base = _base_model(config, repo_id)
    if base is not None and not data.base_model:
        data.base_model = base
    if _GENERATED in card.text:
        card.text = _text(config, repo_id, base)
    card.save(path)


def _base_model(config: EmoConfig, repo_id: str) -> str | None:
    """The repository that the model was loaded from, if it was another one."""
    name = config.name_or_path or ""
    is_repo = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not os.path.exists(name)
    return name if is_repo and name != repo_id else None


def _text(config: EmoConfig, repo_id: str, base: str | None) -> str:
    layers = [layer for layer in config.layer_experts if not layer.is_dense]
    sizes = sorted({layer.num_experts for layer in layers})
    kept = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else f"{sizes[0] if sizes else 0}"
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
import transformers_emo  # pip install transformers-emo
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{repo_id}")
```
"""
