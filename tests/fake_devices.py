"""A process in which there are accelerators: tensors with a device and a size, without values. Prints JSON.

PyTorch's fake tensors keep to the rules of devices as real ones do (operations on tensors of two devices
fail). They need a device that PyTorch knows how to switch to, which without a GPU is one that Python may
define. It is defined for good: hence a process. PyTorch believes that there is one of the kind, and computes
gradients on the first only.
"""

import json
from contextlib import nullcontext

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from device_scenarios import POOLS, SCENARIOS, SUBSET, new_ids, new_model, place
from host_waits import host_waits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration
from transformers_emo import EmoForCausalLM

DEVICE = "stand_in"
FIRST, SECOND = f"{DEVICE}:0", f"{DEVICE}:1"


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device=None):
        return torch.zeros(1)

    def set_rng_state(self, state, device=None):
        pass


def split_model(first: str, second: str, **changes) -> EmoForCausalLM:
    """A model with its last layer and its head on a second device, as `device_map` puts it."""
    model = new_model(first, "grouped_mm", **changes)
    base, head = model.model, model.lm_head
    for module in (base.layers[-1], base.norm, head):
        place(module, second)
    for module, device in ((base.embed_tokens, first), (base.rotary_emb, first), (base.norm, second)):
        add_hook_to_module(module, AlignDevicesHook(device, io_same_device=False))
    for layer in base.layers:
        add_hook_to_module(
            layer, AlignDevicesHook(next(layer.parameters()).device, skip_keys=["past_key_values"])
        )
    add_hook_to_module(head, AlignDevicesHook(second))
    add_hook_to_module(model, AlignDevicesHook(first, io_same_device=True, skip_keys=["past_key_values"]))
    return model


def train_split() -> None:
    model, ids = split_model(FIRST, SECOND, **POOLS).train(), new_ids(FIRST)
    with torch.no_grad(), host_waits(DEVICE):
        for items in (None, 20, torch.tensor(20, device=FIRST)):
            step = model(ids, labels=ids, attention_within_documents=True, num_items_in_batch=items)
            plain = model(ids, labels=ids, document_pool=False, output_router_logits=True)
            other = model(ids, labels=ids, shift_labels=ids)
            assert {output.loss.device for output in (step, plain, other)} == {ids.device}


def generate_split(**kwargs) -> None:
    model = split_model(FIRST, SECOND)
    model.generation_config.pad_token_id = 0
    ids = new_ids(FIRST)
    subset = kwargs.pop("expert_subset", None)
    kwargs |= {"attention_mask": torch.ones_like(ids)}
    masked = nullcontext() if subset is None else model.use_experts(subset)
    with torch.no_grad(), host_waits(DEVICE, steps=3), masked:
        assert model(ids, attention_mask=kwargs["attention_mask"]).logits.device == ids.device
        model.generate(ids, max_new_tokens=3, do_sample=False, **kwargs)


SPLIT = {
    "training": train_split,
    "generation": generate_split,
    "generation under a mask": lambda: generate_split(expert_subset=SUBSET),
    "generation within pools": lambda: generate_split(document_pool=4),
    "generation within pools under a mask": lambda: generate_split(document_pool=4, expert_subset=SUBSET),
}


def main() -> None:
    backend_registration._setup_privateuseone_for_python_backend(DEVICE, backend_module=_Module())
    found: dict[str, object] = {}
    # PyTorch would move the numbers that generation and static caches are made with to the device itself.
    for name, scenario in SCENARIOS.items():
        if "generate" in name or "static" in name:
            continue
        with FakeTensorMode(allow_non_fake_inputs=True):
            waits = scenario(DEVICE, "grouped_mm")
        found[name] = [waits.in_layers, waits.ours, waits.made_on_cpu]
    for name, run in SPLIT.items():
        with FakeTensorMode(allow_non_fake_inputs=True):
            run()
        found[f"split {name}"] = "right"
    print(json.dumps(found))


if __name__ == "__main__":
    main()
