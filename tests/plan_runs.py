"""What real ranks hold and send, for `planning/test_plan.py`: `torchrun` calls this file.

Each rank writes what it counted to `plan<number>.json`, for every way of sharing that `parallel_runs` knows.
"""

import datetime
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from parallel_runs import held, load, ways
from torch.utils._python_dispatch import TorchDispatchMode

TOKENS = 24


def group_of(arguments) -> dist.ProcessGroup:
    """The process group among an operation's arguments, by itself or by its name."""
    for argument in reversed(arguments):
        if isinstance(argument, str) and argument not in ("sum", "avg", "max", "min"):
            return dist.distributed_c10d._resolve_process_group(argument)
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
            return dist.ProcessGroup.unbox(argument)
    raise AssertionError(f"no group in {arguments}")


class SentBytes(TorchDispatchMode):
    """Counts the bytes that this rank sends to others, as rings and exchanges send them."""

    def __enter__(self):
        self.bytes = 0.0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name.startswith(("_c10d_functional::", "c10d::")):
            self._count(name.split("::")[1], args)
        return func(*args, **kwargs or {})

    def _count(self, name, args) -> None:
        if name.startswith(("wait", "barrier", "_wrap")):
            return
        ranks = group_of(args).size()
        share = (ranks - 1) / ranks
        tensors = args[0] if isinstance(args[0], list | tuple) else [args[0]]
        size = sum(tensor.nbytes for tensor in tensors)
        if name in ("all_reduce", "all_reduce_", "allreduce_"):
            self.bytes += 2 * share * size
        elif name in ("all_gather_into_tensor", "all_gather_into_tensor_out"):
            self.bytes += (ranks - 1) * size
        elif name == "_allgather_base_":
            self.bytes += share * size  # the first argument is what is gathered
        elif name in ("reduce_scatter_tensor",):
            self.bytes += share * size
        elif name == "_reduce_scatter_base_":
            self.bytes += share * args[1].nbytes
        elif name in ("all_to_all_single", "alltoall_base_"):
            source = args[0] if name == "all_to_all_single" else args[1]
            self.bytes += share * source.nbytes if source.is_floating_point() else 0
        else:
            raise AssertionError(f"{name} is not counted")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    ids = torch.randint(2, 96, (1, TOKENS), generator=torch.Generator().manual_seed(dist.get_rank()))
    results = {}
    for way, settings in ways(dist.get_world_size()).items():
        model = load(folder, **settings)
        # Ranks of tensor parallelism have one batch, those of FSDP one each.
        shared = ids if settings.get("tp_size", 1) == 1 else torch.arange(2, 2 + TOKENS)[None]
        holds = held(model)  # FSDP keeps the head gathered from the first forward on
        with SentBytes() as sent, torch.no_grad():
            model.eval()(shared)
        results[way] = {"held": holds, "sent": sent.bytes}
    (folder / f"plan{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
