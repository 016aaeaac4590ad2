"""Model cards, adapter cards and dataset cards."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData, ModelCard

from ...checkpoints.hub.names import is_repo_name
from ...configuration import EmoConfig
from ..expert_subset import ExpertSubset
from ..library import RECORD
from ..numbering import root_experts, size_range
from ..push_subset import CARD, add_tags

_GENERATED = "This model card has been automatically generated"  # by Transformers


def complete_card(path: str | os.PathLike, config: EmoConfig, repo_id: str) -> None:
    """Complete a model card: the kind of the model, and the model that it is a part of.

    The text of the card stays, unless Transformers generated it.

    Args:
        path (`str` or `os.PathLike`): the card, `README.md`; nothing happens if there is none.
        config (`EmoConfig`): the model's config.
        repo_id (`str`): the repository that the card is for.

    Example:

    ```python
    >>> from huggingface_hub import ModelCard
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.subsets.publishing.cards import complete_card
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
    add_tags(data, *(["expert-subset"] if config.retained_experts else []))
    data.library_name = data.library_name or "transformers"
    data.pipeline_tag = data.pipeline_tag or "text-generation"
    base = _base_model(config, repo_id)
    if base is not None and not data.base_model:
        data.base_model = base
    if _GENERATED in card.text:
        card.text = _text(config, repo_id, base)
    card.save(path)


def complete_adapter_card(folder: str | os.PathLike, subset: ExpertSubset) -> None:
    """Complete the card that PEFT writes beside an adapter: the experts that it belongs to.

    Args:
        folder (`str` or `os.PathLike`): the adapter's; nothing happens if there is no card.
        subset (`ExpertSubset`): the experts it was trained on.

    Example:

    ```python
    >>> from huggingface_hub import ModelCard
    >>> from transformers_emo import ExpertSubset
    >>> from transformers_emo.subsets.publishing.cards import complete_adapter_card
    >>> ModelCard("---\\nlicense: mit\\n---\\n# Mine").save(tmp_path / "README.md")
    >>> complete_adapter_card(tmp_path, ExpertSubset([[0, 3]], root_experts_per_layer=[8]))
    >>> "2 of the 8 experts" in ModelCard.load(tmp_path / "README.md").text
    True

    ```
    """
    path = Path(folder, CARD)
    if not path.is_file():
        return
    card = ModelCard.load(path)
    whole = all(
        ids is None or len(ids) == size
        for ids, size in zip(subset.experts, subset.root_experts_per_layer or [], strict=False)
    )
    add_tags(card.data, *([] if whole else ["expert-subset"]))
    text = _adapter_text(subset)
    if text not in card.text:
        card.text = f"{card.text.rstrip()}\n\n{text}"
    card.save(path)


def model_card(config: EmoConfig, repo_id: str) -> str:
    """The card of a model that has none.

    Args:
        config (`EmoConfig`): the model's config.
        repo_id (`str`): the repository that the card is for.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.subsets.publishing.cards import model_card
    >>> "It has 128 experts in each layer" in model_card(EmoConfig(), "me/emo")
    True

    ```
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, CARD)
        path.write_text(f"---\n{{}}\n---\n{_GENERATED}", encoding="utf-8")
        complete_card(path, config, repo_id)
        return path.read_text(encoding="utf-8")


def adapter_card(folder: Path, repo_id: str) -> str:
    """The card of an adapter that has none.

    Args:
        folder (`Path`): the adapter's folder.
        repo_id (`str`): the repository that the card is for.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from transformers_emo.subsets.publishing.cards import adapter_card
    >>> _ = Path(tmp_path, "adapter_config.json").write_text("{}")
    >>> "library_name: peft" in adapter_card(Path(tmp_path), "me/adapter")
    True

    ```
    """
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    card = ModelCard(f"---\nlibrary_name: peft\n---\n\n# {repo_id.split('/')[-1]}\n")
    base = str(settings.get("base_model_name_or_path") or "")
    if is_repo_name(base):
        card.data["base_model"] = base
    with tempfile.TemporaryDirectory() as copy:
        card.save(Path(copy, CARD))
        if (folder / RECORD).is_file():
            complete_adapter_card(copy, ExpertSubset.load(folder / RECORD))
        return Path(copy, CARD).read_text(encoding="utf-8")


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


def documents_card(documents: list[str], repo_id: str) -> str:
    """A dataset's card: `load_dataset(repo_id)` gives all documents, and with a domain's name those of it.

    Args:
        documents (`list[str]`): the files, each named `<domain>.jsonl`.
        repo_id (`str`): the repository that the card is for.

    Example:

    ```python
    >>> from transformers_emo.subsets.publishing.cards import documents_card
    >>> "config_name: math" in documents_card(["math.jsonl"], "me/domains")
    True

    ```
    """
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
