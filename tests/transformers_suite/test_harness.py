"""The harness itself: nothing that OLMoE passes is missing, and a rank that fails is heard."""

import pytest
import torch
import torch.distributed as dist

from transformers_suite.suite import CommonTests, DistributedTests, olmoe_passes
from transformers_suite.upstream.distributed_testing_utils import run_distributed


def test_every_test_that_olmoe_passes_still_exists():
    passes = olmoe_passes()
    assert len(passes) > 100
    missing = passes - set(dir(CommonTests)) - set(dir(DistributedTests))
    assert not missing, f"If this Transformers dropped these tests, run `baseline.py --write`: {missing}"


def test_ranks_talk_to_each_other():
    run_distributed(world_size=2)(_sum_over_ranks)(3)


def test_failure_of_one_rank_fails_the_call():
    # The other rank waits in a barrier that the failed one never enters: it must be ended, not waited for.
    with pytest.raises(RuntimeError, match="rank 1 is broken"):
        run_distributed(world_size=2)(_break_rank_1)()


def _sum_over_ranks(rank, expected):
    total = torch.tensor(rank + 1)
    dist.all_reduce(total)
    assert dist.get_world_size() == 2
    assert total.item() == expected


def _break_rank_1(rank):
    if rank == 1:
        raise ValueError("rank 1 is broken")
    dist.barrier()
