"""The choice of experts that `emo run` hands to the processes it starts, in an environment variable."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

VARIABLE = "EMO_RUN"


@dataclass(frozen=True)
class RunChoice:
    """The options of `emo run`, which hold for every EMO model that its processes load.

    Args:
        expert_subset (`str`, *optional*): the subset's file, or its name in the library of each model.
        exclude_experts (*optional*): ids by layer, or a subset's file or name; as in `from_pretrained`.
        document_pool (`int`, *optional*): routed experts in a document pool.
        mark (`str`): a file that a process creates when it has loaded a model with the choice.
        pid (`int`): the process that was started first. It warns at its end if `mark` does not exist.

    Example:

    ```python
    >>> from transformers_emo.subsets.loading.choice.run_choice import RunChoice
    >>> choice = RunChoice(expert_subset="python", document_pool=8)
    >>> str(choice)
    '--expert-subset python --document-pool 8'
    >>> RunChoice.read(choice.variables()) == choice
    True

    ```
    """

    expert_subset: str | None = None
    exclude_experts: dict[str, list[int]] | str | None = None
    document_pool: int | None = None
    mark: str = ""
    pid: int = 0

    def __str__(self) -> str:
        """The options of `emo run`."""
        exclude = self.exclude_experts
        if isinstance(exclude, dict):
            exclude = " --exclude ".join(f"{i}:{','.join(map(str, ids))}" for i, ids in exclude.items())
        options = {
            "expert-subset": self.expert_subset,
            "exclude": exclude,
            "document-pool": self.document_pool,
        }
        return " ".join(f"--{name} {value}" for name, value in options.items() if value is not None)

    def variables(self) -> dict[str, str]:
        """The environment variables that say the same."""
        return {VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def read(cls, environment: Mapping[str, str] | None = None) -> RunChoice | None:
        """The choice in the environment of this process by default; `None` if there is none.

        Args:
            environment (`Mapping[str, str]`, *optional*): variables.

        Raises:
            ValueError: if the variable is damaged.
        """
        text = (os.environ if environment is None else environment).get(VARIABLE)
        if not text:
            return None
        try:
            fields: dict[str, Any] = json.loads(text)
            return cls(**fields)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"The environment variable {VARIABLE} is {text!r:.80}, expected what `emo run` writes: unset "
                "it."
            ) from error
