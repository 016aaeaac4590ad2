"""PEFT's `LoraConfig` with the experts of its model. Only this module cannot be imported without PEFT."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..imports.transformers_versions import private_names

with private_names("peft"):
    from peft import LoraConfig

from ..subsets import ExpertSubset
from ..subsets.library import RECORD
from ..subsets.loading.adapter_record import RECORD_KEY
from ..subsets.publishing.cards import complete_adapter_card


@dataclass
class SubsetLoraConfig(LoraConfig):
    """A `LoraConfig` that writes `expert_subset.json` wherever it is saved.

    PEFT, `Trainer` and TRL all save an adapter through its config, so each of them saves the file too. It
    stands beside `adapter_config.json`. That names the experts too, under `auto_mapping`, by which PEFT's own
    loading is refused on other experts; otherwise it stays as PEFT alone would write it.

    Args:
        expert_subset (`dict`): the experts of the model, as `ExpertSubset.to_dict` gives them.

    Example:

    ```python
    >>> from transformers_emo.training.peft_config import SubsetLoraConfig
    >>> config = SubsetLoraConfig(r=4, expert_subset={"experts": [[0, 2, 31]]})
    >>> config.save_pretrained(tmp_path)
    >>> sorted(path.name for path in tmp_path.iterdir())
    ['adapter_config.json', 'expert_subset.json']

    ```
    """

    expert_subset: dict[str, Any] | None = field(
        default=None, metadata={"help": "The experts of the model that the adapter is trained on."}
    )

    def to_dict(self) -> dict[str, Any]:
        """`dict[str, Any]`: what PEFT writes. The subset is left out: plain PEFT would warn of it."""
        data = super().to_dict()
        data.pop("expert_subset")
        if self.task_type is None and set(data["auto_mapping"] or ()) == {RECORD_KEY}:
            data["auto_mapping"] = None
        return data

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Write `adapter_config.json` and `expert_subset.json`, and complete the model card in the folder.

        Arguments are as for every PEFT config.
        """
        # Once it is on a model, it names the experts that this holds.
        record = (self.auto_mapping or {}).get(RECORD_KEY, self.expert_subset)
        mapping = kwargs.pop("auto_mapping_dict", None)
        # Without a task PEFT takes the model's class from the mapping, and wants nothing or all of it there.
        if record is not None and (mapping is not None or self.task_type is not None):
            mapping = {**(mapping or {}), RECORD_KEY: record}
        super().save_pretrained(save_directory, auto_mapping_dict=mapping, **kwargs)
        if record is not None:
            subset = ExpertSubset.from_dict(record)
            subset.save(Path(save_directory) / RECORD)
            complete_adapter_card(save_directory, subset)
