"""What commands take of a machine, and whether it has that."""

from __future__ import annotations

from dataclasses import dataclass

from .byte_text import bytes_text
from .machine import PROCESS_BYTES, Machine
from .model_sizes import ModelSizes, Size

_CONTEXT = 4096  # tokens of one text: what their keys and values take is counted with a model that is loaded
_ADAMW = 4  # weights, gradients and two moments, all in one dtype
_SAVED = 3  # a checkpoint of training: weights and two moments


@dataclass(frozen=True)
class Need:
    """What one command takes.

    Args:
        command (`str`): the command, or the call in Python.
        memory (`int`): bytes of memory, the process itself included.
        disk (`int`): bytes of disk: what it writes and, of a repository, what it downloads.
        fits (`bool`): whether the machine has both now.
        problem (`str`, *optional*): what it lacks, or why the command refuses this model.

    Example: see `model_info`.
    """

    command: str
    memory: int
    disk: int
    fits: bool
    problem: str | None = None


def needs_of(sizes: ModelSizes, whole: Size, part: int, machine: Machine, *, is_remote: bool) -> list[Need]:
    """What the commands of this package take for a model.

    Memory is what the weights take, the keys and values of one text of 4,096 tokens (or the model's context),
    and the process. Activations are not in it. A loaded model may be on a GPU: then the GPU's memory counts.

    Args:
        sizes (`ModelSizes`): the model.
        whole (`Size`): all of it.
        part (`int`): experts a layer of the subset in the examples; 0 for a model without experts.
        machine (`Machine`): what there is.
        is_remote (`bool`): the model is in a repository of the Hub.

    Example: see `model_info`.
    """
    packed, has_experts = sizes.packing is not None, part > 0
    small = sizes.of(part) if has_experts else whole
    cache = sizes.cache_bytes * min(_CONTEXT, sizes.config.max_position_embeddings)
    fetched = whole.read_bytes if is_remote else 0
    fetched_part = small.read_bytes if is_remote else 0
    found: list[Need] = []

    def add(command: str, memory: int, disk: int, refusal: str | None = None, gpu: bool = False) -> None:
        memory += PROCESS_BYTES
        room = max([machine.free_memory, *(machine.gpus if gpu else [])])
        free = min(machine.free_disk, machine.free_cache) if is_remote else machine.free_disk
        problem = refusal
        if problem is None and memory > room:
            problem = f"lacks {bytes_text(memory - room)} of memory"
        elif problem is None and disk > free:
            problem = f"lacks {bytes_text(disk - free)} of disk"
        found.append(Need(command, memory, disk, problem is None, problem))

    add("from_pretrained(MODEL)", whole.memory_bytes + cache, fetched, gpu=True)
    for bits in sizes.bits[1:]:
        try:
            size = sizes.of(None, bits)
        except ValueError:  # the model's widths do not go in groups
            continue
        command = f"from_pretrained(MODEL, quantization_config=PackedConfig({bits}))"
        add(command, size.memory_bytes + cache, fetched, gpu=True)
    needs_plain = "takes unquantised weights only" if packed else None
    trains = "in few bits only adapters train" if packed else None
    if has_experts:
        command = f"from_pretrained(MODEL, expert_subset=...), {part} experts"
        add(command, small.memory_bytes + cache, fetched_part, gpu=True)
        if not packed:
            always = max(len(layer.always_used) for layer in sizes.config.layer_experts)
            budget = sizes.budget(part - always)
            beside = sizes.backbone_bytes + sizes.always_used_bytes
            # Of a repository what is not there yet is fetched and kept, in the end all of it.
            command = f"from_pretrained(MODEL, expert_memory={budget})"
            add(command, beside + budget + cache, fetched, gpu=True)
        add(f"emo select MODEL --experts {part}", sizes.layer_bytes, fetched, needs_plain)
        add(f"emo extract MODEL, {part} experts", 0, small.file_bytes + fetched_part)
    add("emo write-back, emo convert, emo export", 0, whole.file_bytes + fetched, needs_plain)
    add("emo shard MODEL", 0, whole.file_bytes + fetched, needs_plain)
    add("emo retention MODEL", whole.memory_bytes, fetched, gpu=True)
    for number, size, loaded in [(part, small, fetched_part)] * has_experts + [(0, whole, fetched)]:
        command = f"emo train, {number or 'all'} experts, every weight by AdamW"
        add(command, _ADAMW * size.memory_bytes, _SAVED * size.file_bytes + loaded, trains, gpu=True)
    return found
