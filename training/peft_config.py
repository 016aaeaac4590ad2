"""PEFT's `LoraConfig` with the experts of its model. Only this module cannot be imported without PEFT."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..modeling_emo.transformers_versions import private_names

with private_names("peft"):
    from peft import LoraConfig

from ..subsets import ExpertSubset
from ..subsets.library import RECORD
from ..subsets.publishing.cards import complete_adapter_card


@dataclass
class SubsetLoraConfig(LoraConfig):
    """A `LoraConfig` that writes `expert_subset.json` wherever it is saved.

    PEFT, `Trainer` and TRL all save an adapter through its config, so each of them saves the file too. It
    stands beside `adapter_config.json`, which stays as PEFT alone would write it.

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
        return data

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Write `adapter_config.json` and `expert_subset.json`, and complete the model card in the folder.

        Arguments are as for every PEFT config.
        """
        super().save_pretrained(save_directory, **kwargs)
        if self.expert_subset is not None:
            subset = ExpertSubset.from_dict(self.expert_subset)
            subset.save(Path(save_directory) / RECORD)
            complete_adapter_card(save_directory, subset)
