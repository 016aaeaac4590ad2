"""Stand-in for upstream's helpers that run a function on several ranks: processes on this CPU, over gloo."""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

# A server process imports these once and every rank is forked from it, so that a rank is up in a tenth of a
# second, not in six.
_PRELOAD = [
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "transformers_emo",
    "transformers_suite.upstream.test_fsdp_mixin",
]
# Every rank is one core's worth of work, and the parent's accelerators are not its own.
_RANK_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
_TIMEOUT_S = 300


def run_distributed(world_size: int) -> Callable:
    """Wrap a function so that a call runs it on `world_size` ranks, as `function(rank, *args, **kwargs)`.

    Args:
        world_size (`int`): number of ranks.

    Returns:
        `Callable`: takes the function, which must be importable by name, and returns the wrapped one. A call
        returns when all ranks are done, and raises if one of them did.
    """

    def wrap(function: Callable) -> Callable:
        def call(*args, **kwargs) -> None:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    _start_rank_processes(_run_rank, (world_size, folder, function, args, kwargs), world_size)
                except (ProcessExitedException, ProcessRaisedException) as error:
                    # The rank noticed first need not be the one that failed first: show what all of them say.
                    failures = [path.read_text() for path in sorted(Path(folder).glob("failure_of_rank_*"))]
                    raise RuntimeError("\n".join(failures) or str(error)) from error

        return call

    return wrap


def _run_rank(rank: int, world_size: int, folder: str, function: Callable, args: tuple, kwargs: dict) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    _set_rank_device(rank)
    store = dist.FileStore(str(Path(folder) / "store"), world_size)
    dist.init_process_group(_get_distributed_backend(), store=store, rank=rank, world_size=world_size)
    try:
        function(rank, *args, **kwargs)
    except Exception:
        # Written while the others are still connected: they fail later, for want of this rank.
        Path(folder, f"failure_of_rank_{rank}").write_text(f"Rank {rank}: {traceback.format_exc()}")
        raise
    dist.destroy_process_group()


def _start_rank_processes(function: Callable, args: tuple = (), nprocs: int = 1) -> None:
    """Run `function(rank, *args)` in `nprocs` processes until all are done; raises if one failed or hangs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with patch.dict(os.environ, _RANK_ENVIRONMENT):
        ranks = start_processes(function, args=args, nprocs=nprocs, join=False, start_method="forkserver")
    deadline = time.monotonic() + _TIMEOUT_S
    # `join` ends the other ranks when one fails, and raises what that one did.
    while not ranks.join(timeout=1):
        if time.monotonic() > deadline:
            for process in ranks.processes:
                process.kill()
            raise TimeoutError(f"{nprocs} ranks did not finish within {_TIMEOUT_S} s.")


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_distributed_backend() -> str:
    return "gloo"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    """Keep the rank to one core; on a CPU there is no device to choose."""
    torch.set_num_threads(1)
