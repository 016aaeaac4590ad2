"""How one layer is divided into experts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerExperts:
    """How one layer's feed-forward block is divided into experts.

    Routed experts have the indices `0 .. num_routed - 1`; the shared experts are the last `num_shared`
    indices.

    Args:
        num_experts (`int`): experts in the layer, shared ones included; 0 means one dense feed-forward
            network.
        num_shared (`int`): shared experts, taken by every token.
        always_active (`tuple[int, ...]`): ids that every token takes, with their softmax weight over *all*
            experts. If there are any, the router treats shared experts like routed ones, as the released code
            does.
        top_k (`int`): experts per token, shared or always-active ones included.

    Example:

    ```python
    >>> from transformers_emo.configuration import LayerExperts
    >>> LayerExperts(num_experts=128, num_shared=1, always_active=(), top_k=8).num_routed
    127

    ```
    """

    num_experts: int
    num_shared: int
    always_active: tuple[int, ...]
    top_k: int

    @property
    def is_dense(self) -> bool:
        """Whether the layer is one dense feed-forward network instead of experts."""
        return self.num_experts == 0

    @property
    def num_routed(self) -> int:
        """Number of routed experts, R = E - S."""
        return self.num_experts - self.num_shared

    @property
    def always_used(self) -> tuple[int, ...]:
        """`tuple[int, ...]`: the ids of the shared and the always-active experts, in ascending order.

        Every subset keeps them, and no call can exclude them. They are in the layer's own numbering; a dense
        layer has none.

        Example:

        ```python
        >>> from transformers_emo.configuration import LayerExperts
        >>> LayerExperts(num_experts=8, num_shared=2, always_active=(3, 1), top_k=5).always_used
        (1, 3, 6, 7)

        ```
        """
        if self.is_dense:
            return ()
        return tuple(sorted({*range(self.num_routed, self.num_experts), *self.always_active}))
