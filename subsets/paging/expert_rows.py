"""Where the experts of a layer are in files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ...checkpoints.errors import CheckpointError
from ...checkpoints.lazy_tensor import LazyTensor
from ...quantization.packed_config import PackedConfig
from ...quantization.packed_files import LazyPacked


class ExpertRows:
    """Where the experts of one layer are: a lazy tensor for each parameter, with a row for each expert.

    Args:
        stacks (`Mapping[str, LazyTensor | LazyPacked]`): `gate_up_proj` and `down_proj` of all experts, or of
            some.
        find (`Callable`, *optional*): gives for rows the parameters of each, if the stacks have only some.

    Example:

    ```python
    >>> from transformers_emo.checkpoints import Checkpoint
    >>> from transformers_emo.subsets.paging.expert_rows import ExpertRows
    >>> checkpoint = Checkpoint.from_folder("model_cards/toy-emo")
    >>> names = ["model.layers.0.mlp.experts.3.down_proj.weight"]
    >>> rows = ExpertRows({"down_proj": checkpoint.lazy(names, shape=(1, 128, 64))})
    >>> rows.tensors([0])[0]["down_proj"].shape
    (128, 64)

    ```
    """

    def __init__(
        self,
        stacks: Mapping[str, LazyTensor | LazyPacked],
        find: Callable[[Sequence[int]], Mapping[int, Mapping[str, LazyTensor | LazyPacked]]] | None = None,
    ):
        self.shapes = {name: stack.shape[1:] for name, stack in stacks.items()}
        self._stacks = dict(stacks)
        self._find = find or self._take
        self._known: dict[int, Mapping[str, LazyTensor | LazyPacked]] = {}

    @property
    def packing(self) -> dict[str, PackedConfig | None]:
        """`dict[str, PackedConfig | None]`: how each parameter is packed; `None` if it is not."""
        stacks = self._stacks.items()
        return {name: stack.packing if isinstance(stack, LazyPacked) else None for name, stack in stacks}

    def _take(self, rows: Sequence[int]) -> dict[int, dict[str, LazyTensor | LazyPacked]]:
        return {row: {name: stack.cut(row) for name, stack in self._stacks.items()} for row in rows}

    def tensors(self, experts: Sequence[int]) -> list[Mapping[str, LazyTensor | LazyPacked]]:
        """The parameters of experts, each a matrix, or a stack of one.

        Args:
            experts (`Sequence[int]`): their rows.
        """
        unknown = [expert for expert in experts if expert not in self._known]
        if unknown:
            self._known |= self._find(unknown)
        return [self._known[expert] for expert in experts]

    def check(self, shapes: Mapping[str, tuple[int, ...]], label: str) -> None:
        """Check that the experts have the shapes of the network's.

        Args:
            shapes (`Mapping[str, tuple[int, ...]]`): by parameter, without the number of experts.
            label (`str`): what they are called in the message.

        Raises:
            CheckpointError: if they have not.
        """
        for name, shape in shapes.items():
            if self.shapes[name] != shape:
                raise CheckpointError(
                    f"{name} of {label} has experts of shape {self.shapes[name]}, expected {shape}: "
                    "config.json and the weights differ. Download both again."
                )
