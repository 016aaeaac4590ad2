"""The one way by which the network calls the installed package, and is whole without it.

Code saved beside a model has the network alone: there nothing is hooked in.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

# Also in code saved beside a model, where it is all that tells of the package.
NEEDS_PACKAGE = (
    "`expert_subset` needs the package transformers-emo, which this code was saved by: install it, as with "
    "`pip install .` in its checkout, and load the model without `trust_remote_code`."
)


class PackageHooks(Protocol):
    """What the installed package adds to the network; `subsets.loading.model_hooks` has it all.

    The network does not import the package: it also runs as code saved beside a model. Each function is
    documented where it is written.
    """

    def from_pretrained(
        self, load: Callable, cls: type, path: Any, *args, expert_subset: Any, exclude_experts: Any, **kwargs
    ) -> Any:
        """Load a model, all of it or a subset of its experts."""
        ...

    def load_weights(
        self,
        load: Callable,
        model: Any,
        state_dict: Any,
        checkpoint_files: Any,
        load_config: Any,
        *args,
        **kwargs,
    ) -> Any:
        """Read experts straight into the stacked parameters."""
        ...

    def check_before_building(self, config: Any) -> None:
        """Check that the weights are as large as the config says."""
        ...

    def check_adapter_config(self, adapter_config: Any, config: Any) -> None:
        """Check that an adapter is for the experts of the model."""
        ...

    def check_adapters(self, adapter_configs: Any, config: Any) -> None:
        """Check that adapters that PEFT has put on are for the experts of the model."""
        ...

    def load_checked_adapter(self, load: Callable, config: Any, adapter: Any, *args, **kwargs) -> Any:
        """Load an adapter that belongs to the experts of the model."""
        ...

    def kept_experts(
        self,
        expert_subset: Any,
        config: Any,
        exclude_experts: Any = None,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> list[list[int] | None]:
        """Find the experts that a mask keeps."""
        ...

    def swap_experts(
        self,
        model: Any,
        expert_subset: Any,
        exclude_experts: Any,
        source: Any,
        progress: bool,
        check_weights: bool,
        hub_kwargs: Any,
    ) -> None:
        """Exchange the experts of a model."""
        ...

    def share_backbone(
        self,
        model: Any,
        expert_subset: Any,
        exclude_experts: Any,
        source: Any,
        progress: bool,
        check_weights: bool,
        hub_kwargs: Any,
    ) -> Any:
        """Make a second model on the same backbone."""
        ...

    def copy_tokenizer(self, model: Any, folder: Any) -> None:
        """Copy the tokenizer to where a part of a model is saved."""
        ...

    def tokenizer_to_push(
        self, model: Any, folder: Any, repo_id: str, known_files: Any, *, revision: Any, token: Any
    ) -> Any:
        """Have the tokenizer pushed with a part of a model."""
        ...

    def complete_card(self, path: Any, config: Any, repo_id: str) -> None:
        """Complete a model card."""
        ...

    def rms_norm(self, hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor | None:
        """Compute the norm by compiled code, or `None` to leave it to PyTorch; so do the next two."""
        ...

    def rotate(self, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor | None:
        """Apply rotary position embeddings."""
        ...

    def few_rows_linear(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Multiply few rows by a weight."""
        ...

    def decode_layer(
        self,
        layer: Any,
        experts_forward: Any,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        expert_mask: torch.Tensor | None,
    ) -> Any | None:
        """Begin a layer's forward for one token of each sequence, or `None` to run its parts one by one."""
        ...


class Package:
    """The hook by which the installed package completes the network.

    Attributes:
        hooks (`PackageHooks`, *optional*): set when the network is imported as part of the package. `None` in
            code saved beside a model.

    Example:

    ```python
    >>> from transformers_emo.modeling_emo.package_hooks import package
    >>> package.needed().kept_experts.__module__
    'transformers_emo.subsets.loading.masking'

    ```
    """

    hooks: PackageHooks | None = None

    def needed(self) -> PackageHooks:
        """The hooks, or `ImportError` if the package is not there."""
        if self.hooks is None:
            raise ImportError(NEEDS_PACKAGE)
        return self.hooks


package = Package()
