"""One of two processes that train with `RoutingMonitor`; `test_routing_monitor.py` launches them."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import tiny_model
from training_runs import DRAWN, make_trainer
from transformers_emo.training import RoutingMonitor


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    changes = {"max_steps": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    trainer = make_trainer(tiny_model(**DRAWN), folder, **changes)
    trainer.add_callback(RoutingMonitor(trainer))
    trainer.train()
    logs = [log for log in trainer.state.log_history if "routing_balance" in log]
    torch.save(logs, folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
