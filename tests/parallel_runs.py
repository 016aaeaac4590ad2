"""What ranks make of one model together, for `modeling_emo/test_parallel.py`: `torchrun` calls this file.

All of it is one launch for a number of ranks, since starting Python takes longer. Each rank writes what came
of it to `rank<number>.pt`.
"""

import datetime
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import context_parallel
from transformers.distributed import DistributedConfig
from transformers_emo import EmoForCausalLM
from transformers_emo.checkpoints import local_files
from transformers_emo.modeling_emo import step_seed

EXCHANGES = "ep_size" in DistributedConfig.__dataclass_fields__  # versions that exchange tokens
SUBSET = [[0, 3, 4, 7, 9, 15]] * 3
IDS = torch.randint(2, 96, (2, 24), generator=torch.Generator().manual_seed(0))
IDS[:, 8] = IDS[0, 17] = 1


def ways(ranks: int) -> dict[str, dict[str, Any]]:
    """How so many ranks can share a model with this version of Transformers."""
    if not EXCHANGES:
        if ranks > 2:
            return {}
        expert = {"tp_size": 2, "enable_expert_parallel": True}
        return {"tp": {"tp_size": 2}, "fsdp": {"fsdp_size": 2}, "ep": expert}
    if ranks == 4:
        return {
            "tp and fsdp": {"tp_size": 2, "fsdp_size": 2},
            "tp, ep and fsdp": {"tp_size": 2, "fsdp_size": 2, "ep_size": 2},
            "ep over all": {"tp_size": 2, "fsdp_size": 2, "ep_size": 4},
        }
    return {
        "tp": {"tp_size": 2},
        "fsdp": {"fsdp_size": 2},
        "ep and tp": {"ep_size": 2, "tp_size": 2},
        "ep and fsdp": {"ep_size": 2, "fsdp_size": 2},
    }


class CountedReads:
    """How many bytes of weights this process reads from files, their headers left out."""

    def __enter__(self) -> "CountedReads":
        self.bytes = 0
        self._preadv = os.preadv
        local_files.os.preadv = self._read
        return self

    def __exit__(self, *_: object) -> None:
        local_files.os.preadv = self._preadv

    def _read(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        data_start = 8 + int.from_bytes(os.pread(descriptor, 8, 0), "little")
        got = self._preadv(descriptor, buffers, offset)
        self.bytes += got if offset >= data_start else 0
        return got


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def held(model) -> int:
    """The bytes of the parameters that are here."""
    return sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in model.parameters())


def load(folder: Path, **settings):
    subset = settings.pop("expert_subset", None)
    config = DistributedConfig(**settings) if settings else None
    chosen = {} if subset is None else {"expert_subset": subset}
    return EmoForCausalLM.from_pretrained(folder / "model", distributed_config=config, **chosen)


def train(model) -> dict[str, Any]:
    """What a step of training comes to, with pools drawn for the tenth step of a run."""
    model.train()
    model.model.pool_seed = step_seed(0, 10)
    output = model(IDS, labels=IDS)
    output.loss.backward()
    names = ("loss", "ce_loss", "aux_loss", "router_z_loss", "lm_z_loss", "document_pool_size")
    weights = {name: whole(parameter.grad).clone() for name, parameter in model.named_parameters()}
    return {"losses": {name: getattr(output, name).item() for name in names}, "gradients": weights}


def error_of(call: Callable) -> str:
    """What a call raises, in this rank."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def pipeline(folder: Path) -> dict[str, Any]:
    model = load(folder, pp_size=2)
    with torch.no_grad():
        logits = model(IDS).logits
    generate = {"max_new_tokens": 4, "do_sample": False}
    refused = {
        "document_pool": lambda: model(IDS, document_pool=8),
        "labels": lambda: model(IDS, labels=IDS),
        "prompt_pool": lambda: model.generate(IDS, document_pool=8, **generate),
        "save": lambda: model.save_pretrained(folder / "pipeline"),
    }
    return {
        "logits": logits,
        "generated": model.generate(IDS, **generate),
        "errors": {name: error_of(call) for name, call in refused.items()},
    }


def split_sequences(folder: Path) -> list[str]:
    """What a model says where the ranks have a part of each sequence."""
    model, mesh = load(folder).train(), init_device_mesh("cpu", (2,))
    errors = []
    for arguments in ({"training_step": True}, {"attention_within_documents": True}):
        ids = IDS.clone()
        with context_parallel(mesh, buffers=[ids], buffer_seq_dims=[1]):
            errors.append(error_of(lambda ids=ids, arguments=arguments: model(ids, **arguments)))
    return errors


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    ranks = dist.get_world_size()
    results: dict[str, Any] = {}
    for way, settings in ways(ranks).items():
        for subset in (None, SUBSET):
            if subset and settings.get("ep_size", 1) > 2:
                continue  # its experts do not go round
            with CountedReads() as reads:
                model = load(folder, expert_subset=subset, **settings)
            result = {"read": reads.bytes, "held": held(model)} | train(model)
            results[way, subset is not None] = result
        if settings.get("fsdp_size", 1) > 1 or EXCHANGES:
            model.save_pretrained(folder / f"saved {way}", distributed_checkpoint=True)
    if ranks == 2:
        results["pipeline"] = pipeline(folder)
        results["split sequences"] = split_sequences(folder)
        experts = next(settings for way, settings in ways(2).items() if way.startswith("ep"))
        odd = [[0, 3, 4, 7, 15]] * 3
        results["odd"] = error_of(lambda: load(folder, expert_subset=odd, **experts))
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
