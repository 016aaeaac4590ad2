"""What a memory for experts has done."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertMemoryReport:
    """What a model with `expert_memory` has done since it was loaded, or since `reset_counts`.

    Args:
        budget (`int`): bytes for experts, as the caller gave them.
        slots (`int`): experts that there is room for, those that every token uses not counted.
        expert_bytes (`int`): bytes of one expert in memory.
        always_used_bytes (`int`): bytes of the experts that every token uses, which are beside the budget.
        resident (`list[list[int]]`): for each layer the experts in memory, in the numbering of the model.
        hits (`int`): how often a layer found an expert in memory that its tokens took.
        misses (`int`): how often it had to be read.
        bytes_read (`int`): bytes of experts read.
        tokens (`int`): tokens that went through the model.
        pool_moves (`int`): experts that came into document pools which follow the text.
        moves_bytes_read (`int`): of `bytes_read`, those of experts that came into a pool so.

    Example: see `ExpertMemory`.
    """

    budget: int
    slots: int
    expert_bytes: int
    always_used_bytes: int
    resident: list[list[int]]
    hits: int
    misses: int
    bytes_read: int
    tokens: int
    pool_moves: int = 0
    moves_bytes_read: int = 0

    @property
    def hit_rate(self) -> float:
        """`float`: the share of the experts taken that were in memory; 1 if none was taken."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else 1.0

    @property
    def bytes_per_token(self) -> float:
        """`float`: bytes of experts read for each token."""
        return self.bytes_read / self.tokens if self.tokens else 0.0

    def __str__(self) -> str:
        held = [len(ids) for ids in self.resident if ids]
        layers = f"{min(held)} to {max(held)} a layer" if held else "none"
        moves = (
            f"; {self.pool_moves} experts came into pools, {self.moves_bytes_read / 1e6:.1f} MB read for them"
            if self.pool_moves
            else ""
        )
        return (
            f"expert memory: {sum(held)} experts in memory ({layers}), room for {self.slots} beside those "
            f"that every token uses; {self.hit_rate:.1%} of the experts taken were there, "
            f"{self.bytes_per_token / 1e6:.1f} MB read a token ({self.bytes_read / 1e9:.2f} GB for "
            f"{self.tokens} tokens){moves}"
        )
