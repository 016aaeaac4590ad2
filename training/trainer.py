"""`EmoTrainer`: `Trainer` with the optimiser groups of the paper, balance over whole steps, and a report.

Shape suffixes: R routed experts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer

from ..checkpoints.writing.durable_files import sync_folder, sync_tree
from ..imports.transformers_versions import private_names
from ..modeling_emo import BalanceCounts, EmoForCausalLM, EmoPreTrainedModel, step_seed
from ..subsets.loading.adapter_record import check_adapter_config
from ..tokenization import PackedStream
from .fine_tuning import KeepFrozenRows
from .stream_share import POSITION, PositionCollator, StreamShare

with private_names("trainer"):
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

_SHARE = "stream_share_{}.json"  # in a checkpoint, where each process stands in its share of a stream
_LOSSES = {
    "ce_loss": "ce_loss",
    "aux_loss": "balance_loss",
    "router_z_loss": "router_z_loss",
    "lm_z_loss": "lm_z_loss",
}


@contextmanager
def accumulate_balance(
    model: nn.Module, batches: Iterable[Mapping[str, Any]] | None = None
) -> Iterator[None]:
    """Balance the experts over all micro-batches of one optimiser step, in a loop without `EmoTrainer`.

    While the context is open, the balance loss of a forward also counts the picks of the forwards before it.
    With `batches`, the picks of the whole step are counted before the first one. The gradients are then
    exactly those of all micro-batches in one. This costs one more forward for each, without gradient. Without
    document pools the context changes nothing.

    Args:
        model (`nn.Module`): an `EmoForCausalLM`, also inside DDP's, FSDP's or PEFT's wrappers.
        batches (`Iterable[Mapping]`, *optional*): all micro-batches of the step, on the model's device, in
            the order in which they will be trained on. The random state is put back after counting, so that
            training draws the same pools.

    Raises:
        ValueError: if there is no `EmoForCausalLM` in the model.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo import EmoForCausalLM
    >>> from transformers_emo.training import accumulate_balance
    >>> model = EmoForCausalLM.from_pretrained(
    ...     "model_cards/toy-emo", document_pool_min=3, document_pool_max=31
    ... ).train()
    >>> with accumulate_balance(model):  # one step of the optimiser
    ...     for ids in torch.randint(2, 4096, (2, 1, 16)):
    ...         (model(ids, labels=ids).loss / 2).backward()

    ```
    """
    causal = _causal_lm(model)
    outer = causal.balance_counts
    causal.balance_counts = BalanceCounts(None if batches is None else _count_picks(model, batches))
    try:
        yield
    finally:
        causal.balance_counts = outer


class EmoTrainer(Trainer):
    """`Trainer`, as EMO was trained.

    - Weight decay is for everything but the input embedding (`Trainer` leaves out norms and biases instead).
    - The sizes of pools are drawn from the seed, the step and the document (`step_seed`): the number of
      processes changes nothing, and neither does how a step is cut into micro-batches.
    - Of a stream (`PackedStream`) each process reads and encodes its own documents, without end: give
      `max_steps`. Checkpoints say where each stands, and resuming encodes nothing again (`StreamShare`).
    - The balance loss counts over all micro-batches of an optimiser step, as `accumulate_balance`.
    - The logs report `ce_loss`, `balance_loss`, `router_z_loss`, `lm_z_loss` (without their coefficients,
      means over the steps since the last report), `pool_size` (mean number of routed experts in a pool) and
      `experts_used` (routed experts that any token took since the last report, mean over the layers).
    - A finished run that is resumed trains no further (`Trainer` with `max_steps` takes one more step).
    - Rows that `train_only` froze stay as they are, whatever the optimiser (`KeepFrozenRows`).
    - A checkpoint is on the disk before its `trainer_state.json`, which makes it a whole one, and before an
      older checkpoint is deleted: a power cut leaves one to resume from.
    - `TrainingArguments(fsdp=True)` shards parameters, gradients and the optimiser (FSDP2) on CPUs too, where
      accelerate alone falls back to DDP without a word.

    All else, such as checkpoints and distributed training, is as in `Trainer`. Every parameter has a gradient
    under DDP, so `ddp_find_unused_parameters=False` saves time. Models that Transformers sharded on loading
    (`DistributedConfig(fsdp_size=...)`) train too, but `Trainer` cannot resume their training.

    Args:
        args, kwargs: as for `Trainer`.
        exact_balance (`bool`, defaults to `False`): count the picks of all micro-batches of a step before
            it. Accumulated gradients are then exactly those of one large batch. This costs one more forward
            for each micro-batch.

    Raises:
        ValueError: if there is no `EmoForCausalLM` in the model (classifiers train with `Trainer`), or with
            `label_smoothing_factor`, which makes `Trainer` drop what the model adds to the cross entropy;
            on training, if sequences are split among processes and the config has pools or attention within
            documents.
        SubsetError: if the model has an adapter whose config `lora_config` made for other experts.

    Example:

    ```python
    >>> from transformers import TrainingArguments
    >>> from transformers_emo import EmoForCausalLM
    >>> from transformers_emo.training import DocumentCollator, EmoTrainer
    >>> model = EmoForCausalLM.from_pretrained(
    ...     "model_cards/toy-emo", document_pool_min=3, document_pool_max=31
    ... )
    >>> arguments = TrainingArguments(
    ...     str(tmp_path), max_steps=1, logging_steps=1, remove_unused_columns=False, report_to=[],
    ...     disable_tqdm=True, use_cpu=True,
    ... )
    >>> windows = [{"input_ids": [5, 6, 7, 0, 8, 9]}] * 8
    >>> trainer = EmoTrainer(model, arguments, DocumentCollator(model.config), windows)
    >>> _ = trainer.train()  # doctest: +ELLIPSIS
    {'loss': ...}
    >>> 3 <= trainer.state.log_history[0]["pool_size"] <= 31
    True

    ```
    """

    def __init__(self, *args, exact_balance: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        config = _causal_lm(self.model).config  # type: ignore[arg-type]
        for adapter_config in (getattr(self.model, "peft_config", None) or {}).values():
            check_adapter_config(adapter_config, config)
        if self.label_smoother is not None:
            raise ValueError(
                f"`label_smoothing_factor` is {self.args.label_smoothing_factor}, and `Trainer` would leave "
                "the balance loss and the z-losses out: set it to 0."
            )
        self.exact_balance = exact_balance
        self._share: StreamShare | None = None
        self._step_counts: BalanceCounts | None = None
        self._uncounted: list[Any] = []  # the step's micro-batches, until their picks are counted
        self._begin_report()
        if isinstance(self.model, EmoPreTrainedModel):
            self.add_callback(KeepFrozenRows())

    def train(self, *args, **kwargs):
        """Train; see `Trainer.train`."""
        self._begin_report()  # drop what an earlier run did not report
        self._refuse_split_sequences()
        try:
            return super().train(*args, **kwargs)
        finally:
            _causal_lm(self.model).model.pool_seed = None  # type: ignore[arg-type]

    def _refuse_split_sequences(self) -> None:
        config = _causal_lm(self.model).config  # type: ignore[arg-type]
        parts = self.get_cp_size() * self.get_sp_size()
        for name in ("document_pool_min", "attention_within_documents"):
            if parts > 1 and getattr(config, name):
                raise ValueError(
                    f"{parts} processes split sequences, and `config.{name}` wants whole documents: "
                    "train without it, or shard parameters instead (`fsdp`)."
                )

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator, and have it shard on CPUs too; see `Trainer`."""
        super().create_accelerator_and_postprocess()
        with private_names("sharding on CPUs"):
            from accelerate import PartialState  # optional
            from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

        state, settings = self.accelerator.state, self.args.fsdp_plugin_args
        if settings is None or state.distributed_type != DistributedType.MULTI_CPU:
            return
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**settings)
        if state.mixed_precision != "no":
            state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        self.is_fsdp_enabled = True

    def get_train_dataloader(self) -> DataLoader:
        """The batches of this process; see `Trainer`. Of a stream it reads its own share."""
        if not isinstance(self.train_dataset, PackedStream):
            return super().get_train_dataloader()
        alike = self.get_tp_size() * self.get_cp_size() * self.get_sp_size()  # processes with the same data
        share = StreamShare(
            self.train_dataset,
            rank=self.args.process_index // alike,
            ranks=max(self.args.world_size // alike, 1),
            workers=self.args.dataloader_num_workers,
        )
        workers = share.workers
        settings: dict[str, Any] = (
            {"prefetch_factor": self.args.dataloader_prefetch_factor} if workers else {}
        )
        loader = DataLoader(
            share,
            batch_size=self._train_batch_size,
            collate_fn=PositionCollator(self.data_collator),
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=bool(workers) and self.args.dataloader_persistent_workers,
            **settings,
        )
        self._share = share
        with private_names("shares of a stream"):
            from accelerate.data_loader import prepare_data_loader  # optional
        # The share is of this process already: accelerate is not to divide it again.
        return prepare_data_loader(
            loader, self.accelerator.device, 1, 0, put_on_device=True, dispatch_batches=False
        )

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._share is not None and (state := self._share.state_dict()) is not None:
            path = os.path.join(output_dir, _SHARE.format(self.args.process_index))
            with open(path, "w", encoding="utf-8") as file:
                json.dump(state, file)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        path = os.path.join(checkpoint or "", _SHARE.format(self.args.process_index))
        if (
            checkpoint is None
            or self._share is None
            or self.args.ignore_data_skip
            or not os.path.isfile(path)
        ):
            return  # without it, `Trainer` reads the windows before once more
        with open(path, encoding="utf-8") as file:
            state = json.load(file)
        batches = self.state.global_step * self.args.gradient_accumulation_steps
        self._share.load_state_dict(state, windows=batches * self._train_batch_size)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """`list[str]`: the parameters that weight decay is for, all but the input embedding."""
        embedding = {id(parameter) for parameter in model.get_input_embeddings().parameters()}  # type: ignore[operator]
        return [name for name, parameter in model.named_parameters() if id(parameter) not in embedding]

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of the next optimiser step; a new count of picks begins with them."""
        if self.state.global_step >= self.state.max_steps:
            # A finished run was resumed. `Trainer` looks at the number of steps only after one more step.
            self.control.should_training_stop = True
            return [], None
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if (share := self._share) is not None:
            for batch in batches:
                position = batch.pop(POSITION)
                share.positions[position.worker] = position
        model = _causal_lm(self.model).model  # type: ignore[arg-type]
        if model.pool_generator is None:  # else the caller wants other sizes
            model.pool_seed = step_seed(self.args.seed, self.state.global_step, device)
        self._step_counts = BalanceCounts()
        # They are counted later: on resuming, the random state that draws pools is restored after this call.
        self._uncounted = batches if self.exact_balance and len(batches) > 1 else []
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a micro-batch; see `Trainer.compute_loss`."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._uncounted:
            prepared = (self._prepare_inputs(batch) for batch in self._uncounted)
            self._step_counts = BalanceCounts(_count_picks(model, prepared))
            self._uncounted = []
        causal = _causal_lm(model)
        causal.balance_counts = self._step_counts
        try:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        finally:
            causal.balance_counts = None
        self._report(outputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _save_checkpoint(self, model, trial):
        state: Any = self.state

        def save_synchronised(json_path: str) -> None:
            sync_tree(os.path.dirname(json_path))
            type(state).save_to_json(state, json_path)

        limit, self.args.save_total_limit = self.args.save_total_limit, None
        state.save_to_json = save_synchronised
        try:
            super()._save_checkpoint(model, trial)
        finally:
            del state.save_to_json
            self.args.save_total_limit = limit
        run = self._get_output_dir(trial=trial)
        sync_tree(os.path.join(run, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"))
        sync_folder(run)
        self.accelerator.wait_for_everyone()  # each process has synchronised what it wrote
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=run,
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and in training add what the routers did; see `Trainer.log`."""
        if "loss" in logs and self._steps:
            logs |= self._take_report()
        super().log(logs, start_time)

    def _begin_report(self) -> None:
        # All three are since the last report. The first counts the steps of the optimiser.
        self._steps = 0.0
        self._sums: dict[str, Any] = {}
        self._picks: list[Any] = []  # one (R,) a layer

    def _report(self, outputs: Mapping[str, Any], num_items_in_batch: torch.Tensor | int | None) -> None:
        """Note what one micro-batch adds to the report, without waiting for the device."""
        fraction = 1 / self.current_gradient_accumulation_steps
        scale = fraction
        if num_items_in_batch is not None:  # losses are then shares of a sum, as `Trainer.compute_loss` says
            scale = self.accelerator.num_processes // self.get_tp_size()
            scale = scale if self.args.average_tokens_across_devices else 1
        self._steps += fraction
        for name, reported in _LOSSES.items():
            if (value := outputs.get(name)) is not None:
                self._sums[reported] = self._sums.get(reported, 0) + scale * value.detach()
        if (size := outputs.get("document_pool_size")) is not None:
            self._sums["pool_size"] = self._sums.get("pool_size", 0) + fraction * size
        if (counts := outputs.get("expert_counts")) is not None:
            before = self._picks or [0] * len(counts)
            self._picks = [a + b for a, b in zip(before, counts, strict=True)]

    def _take_report(self) -> dict[str, float]:
        report = {}
        if self._sums:
            values = torch.stack([torch.as_tensor(value).float() for value in self._sums.values()])
            values = self.accelerator.reduce(values / self._steps, reduction="mean")
            report = dict(zip(self._sums, values.tolist(), strict=True))
        if self._picks:
            picked = self.accelerator.reduce(torch.cat(self._picks), reduction="sum") > 0
            report["experts_used"] = picked.sum().item() / len(self._picks)
        self._begin_report()
        return report


def _causal_lm(model: nn.Module) -> EmoForCausalLM:
    for module in model.modules():
        if isinstance(module, EmoForCausalLM):
            return module
    raise ValueError(
        f"Expected an `EmoForCausalLM`, maybe wrapped, got a {type(model).__name__}: load one with "
        "`EmoForCausalLM.from_pretrained`, or train this model with `Trainer`."
    )


def _count_picks(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> torch.Tensor | None:
    """The picks of all batches, as `sum_counts` gives them; `None` without pools."""
    causal = _causal_lm(model)
    experts = next((layer for layer in causal.config.layer_experts if not layer.is_dense), None)
    generator = causal.model.pool_generator
    state = None if generator is None else generator.get_state()
    devices = [causal.device] if causal.device.type not in ("cpu", "meta") else []
    counted = None
    with torch.no_grad(), torch.random.fork_rng(devices, device_type=causal.device.type):
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            step = {"training_step": causal.training, "use_cache": False, "logits_to_keep": 1}
            counts = model(**inputs | step).expert_counts
            if counts is None or experts is None:
                break
            num_tokens = counts[0].sum() // (experts.top_k - experts.num_shared)
            picks = torch.cat([*counts, num_tokens[None]])
            counted = picks if counted is None else counted + picks
    if generator is not None and state is not None:
        generator.set_state(state)
    if counted is not None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(counted)
    return counted
