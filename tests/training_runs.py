"""Small training runs: in the process of a test, and by two ranks that `test_distributed.py` launches.

All runs of the ranks are one launch, since starting Python takes longer than they do. `torchrun` calls this
file, each rank writes what came of them to `rank<number>.pt`.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conftest import tiny_model
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments
from transformers.distributed import DistributedConfig
from transformers_emo import EmoForCausalLM
from transformers_emo.tokenization import pack_dataset
from transformers_emo.training import DocumentCollator, EmoTrainer, lora_config, train_only

# Every pool has five experts.
FIXED = {"document_pool_min": 5, "document_pool_max": 5}
DRAWN = {"document_pool_min": 3, "document_pool_max": 11}


def make_windows(number: int, length: int = 24) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 96, (number, length), generator=generator)
    ids[:, length // 3] = 1
    return [{"input_ids": row.tolist()} for row in ids]


def make_documents(number: int) -> list[list[int]]:
    """Documents of 3 to 40 tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 41, (number,), generator=generator).tolist()
    return [torch.randint(2, 96, (length,), generator=generator).tolist() for length in lengths]


def make_arguments(folder, **changes) -> TrainingArguments:
    settings = {
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "remove_unused_columns": False,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return TrainingArguments(str(folder), **settings | changes)


def make_trainer(model, folder, windows=None, trainer=EmoTrainer, **changes) -> Trainer:
    options = {name: changes.pop(name) for name in ("exact_balance", "eval_dataset") if name in changes}
    windows = make_windows(8) if windows is None else windows
    arguments = make_arguments(folder, **changes)
    return trainer(model, arguments, DocumentCollator(model.config), windows, **options)


# Runs that must come to the same on two ranks with a window each as in one process with both. Gradients are
# clipped, so that a wrong norm shows. Pools are drawn: the same ones, however the windows are shared out.
SAME = {
    "plain": {"trainer": Trainer},
    "plain, accumulated": {"trainer": Trainer, "gradient_accumulation_steps": 2},
    "one": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "exact": {"gradient_accumulation_steps": 2, "exact_balance": True},
    "own mean": {"gradient_accumulation_steps": 2, "average_tokens_across_devices": False},
    "checkpointing": {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    "plain, unequal": {"trainer": Trainer, "windows": "unequal"},
    "unequal": {"gradient_accumulation_steps": 2, "windows": "unequal"},
    "exact, unequal": {"gradient_accumulation_steps": 2, "exact_balance": True, "windows": "unequal"},
    "routed": {"what": "routed", "weight_decay": 0.5, "gradient_accumulation_steps": 2},
}
# Those that sharded ranks run: `TrainingArguments(fsdp=True)`, and Transformers' own `DistributedConfig`.
SHARDED = {"fsdp": ["one", "exact, unequal", "checkpointing", "routed"]}
SHARDED["loaded sharded"] = ["plain", *SHARDED["fsdp"]]


def run_same(name: str, folder: Path, *, ranks: int, model=None, **changes) -> dict[str, Any]:
    """One of the runs above; `model` instead of a new one, and changed settings for the ways to shard."""
    settings = SAME[name] | changes
    what = settings.pop("what", "all")
    windows = make_windows(8)
    if settings.pop("windows", None) == "unequal":
        windows = [{"input_ids": document} for document in make_documents(8)]
    model = same_model() if model is None else model
    train_only(model, what)
    batch = {"per_device_train_batch_size": 2 // ranks, "max_steps": 2, "max_grad_norm": 0.5}
    sgd = {"optim": "sgd", "learning_rate": 0.1, "ddp_find_unused_parameters": False}
    return finish(make_trainer(model, folder, windows, **batch | sgd | settings))


def same_model() -> EmoForCausalLM:
    return tiny_model(**DRAWN, balance_loss_coef=1.0)


def finish(trainer: Trainer, resume_from: Path | None = None) -> dict[str, Any]:
    """Train, and say what came of it; every rank must call it."""
    batches: list[dict[str, torch.Tensor]] = []
    pool_sizes: list[float] = []

    def record(_, args, kwargs, output) -> None:
        if torch.is_grad_enabled():
            batches.append({name: value for name, value in kwargs.items() if torch.is_tensor(value)})
            pool_sizes.append(output.document_pool_size.item())

    base = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    handle = base.register_forward_hook(record, with_kwargs=True)
    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    handle.remove()
    return {
        "logs": trainer.state.log_history[:-1],
        "weights": whole_weights(trainer.model),
        "batches": batches,
        "pool_sizes": pool_sizes,
        "wrapper": type(trainer.model_wrapped).__name__,
        "num_local": sum(local(parameter).numel() for parameter in trainer.model.parameters()),
    }


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_weights(model) -> dict[str, torch.Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def run_resumed(folder: Path, windows, **changes) -> dict[str, Any]:
    """The same run with drawn pools, uninterrupted and resumed by another model after three of five steps."""
    changes = {"max_steps": 5, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1} | changes
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tiny_model(**DRAWN), folder / "whole", windows(), **changes, **saving)
    resumed = make_trainer(tiny_model(seed=9, **DRAWN), folder / "resumed", windows(), **changes)
    return {"whole": finish(whole), "resumed": finish(resumed, folder / "whole" / "checkpoint-3")}


def run_adapter(folder: Path, *, ranks: int) -> dict[str, Any]:
    """LoRA of attention, experts and router, saved."""
    from peft import get_peft_model

    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
    model = same_model()
    config = lora_config(model, r=2, target_modules=["q_proj"], target_parameters=targets)
    changes = {"ddp_find_unused_parameters": False, "max_steps": 2, "gradient_accumulation_steps": 2}
    changes |= {"per_device_train_batch_size": 2 // ranks, "optim": "sgd", "learning_rate": 1.0}
    trainer = make_trainer(get_peft_model(model, config), folder, **changes)
    result = finish(trainer)
    trainer.save_model(str(folder / "adapter"))
    return result


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    make_arguments(folder)  # this makes the process group, which the models sharded on loading need
    results: dict[str, Any] = {}

    for name in SAME:
        results[name] = run_same(name, folder, ranks=2)
    # Ranks with means of their own are not one process, but known, too.
    results["own mean, unequal"] = run_same(
        "exact, unequal", folder, ranks=2, average_tokens_across_devices=False
    )

    documents = Dataset.from_dict({"input_ids": make_documents(60)})
    packing = {"eos_token_id": 1, "window": 24}
    packed = pack_dataset(documents, **packing)
    for exact in (False, True):
        results["resumed", exact] = run_resumed(folder / f"{exact}", lambda: packed, exact_balance=exact)
    results["resumed", "stream"] = run_resumed(
        folder / "stream",
        lambda: pack_dataset(documents.to_iterable_dataset(), **packing),
        exact_balance=True,
    )

    results["adapter"] = run_adapter(folder, ranks=2)

    if dist.get_rank() == 0:
        same_model().save_pretrained(folder / "start")
    dist.barrier()
    for name in SHARDED["loaded sharded"]:
        model = EmoForCausalLM.from_pretrained(
            folder / "start", distributed_config=DistributedConfig(fsdp_size=2)
        )
        results["loaded sharded", name] = run_same(name, folder, ranks=2, model=model)
    model.save_pretrained(folder / "loaded sharded", is_main_process=dist.get_rank() == 0)
    results["loaded sharded"] = whole_weights(model)

    # From here on accelerate shards in this process.
    for name in SHARDED["fsdp"]:
        results["fsdp", name] = run_same(name, folder, ranks=2, fsdp=True)
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        fsdp = {"fsdp": True, "fsdp_config": {"state_dict_type": kind}}
        results["resumed", kind] = run_resumed(folder / kind, lambda: packed, exact_balance=True, **fsdp)
    trainer = make_trainer(same_model(), folder / "fsdp", max_steps=1, fsdp=True)
    results["fsdp"] = finish(trainer)
    trainer.save_model()

    torch.save(results, folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
