"""What a model does, from one device's point of view: run on `meta` and on an accelerator that is not there.

Each scenario makes its tensors on the device given and returns what `host_waits` found.
"""

from collections.abc import Callable

import torch
from conftest import TINY
from host_waits import Waits, host_waits
from transformers import StaticCache
from transformers_emo import EmoConfig, EmoForCausalLM
from transformers_emo.modeling_emo import EmoForSequenceClassification, EmoForTokenClassification

# Sizes as `grouped_mm` wants them on a GPU: rows of whole 16 bytes, in bfloat16 too.
SIZES = TINY | {"intermediate_size": 32, "document_pool_eval": 4}
POOLS = {"document_pool_min": 3, "document_pool_max": 11}
SUBSET = [[0, 1, 2, 5, 11]] * SIZES["num_hidden_layers"]
BATCH, LENGTH = 2, 12


def new_model(device: str, experts: str, cls: type = EmoForCausalLM, **changes):
    """A model in bfloat16 without values."""
    with torch.device("meta"):
        model = cls(EmoConfig(**SIZES | changes))
    model.set_experts_implementation(experts)
    place(model, device)
    return model.eval()


def place(module: torch.nn.Module, device: str) -> None:
    """Put empty tensors of a device where a module's are, weights in bfloat16 (fake ones cannot be moved)."""
    for part in module.modules():
        for name, tensor in part._parameters.items():
            if tensor is not None:
                new = torch.empty(tensor.shape, dtype=torch.bfloat16, device=device)
                part._parameters[name] = torch.nn.Parameter(new)
        for name, tensor in part._buffers.items():
            part._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def new_ids(device: str, length: int = LENGTH) -> torch.Tensor:
    """Token ids; their values do not matter."""
    return torch.zeros(BATCH, length, dtype=torch.int64, device=device)


def forward(device: str, experts: str) -> Waits:
    model, ids = new_model(device, experts), new_ids(device)
    with torch.no_grad(), host_waits(device) as waits:
        assert model(ids).logits.device == ids.device
    return waits


def forward_with_padding(device: str, experts: str) -> Waits:
    model, ids = new_model(device, experts), new_ids(device)
    with torch.no_grad(), host_waits(device) as waits:
        model(ids, attention_mask=torch.ones_like(ids))
    return waits


def forward_with_always_active_experts(device: str, experts: str) -> Waits:
    settings = {"num_shared_experts": 0, "always_active_experts": [1, 2], "document_pool_eval": None}
    model, ids = new_model(device, experts, **settings), new_ids(device)
    with host_waits(device) as waits:
        model(ids, labels=ids, output_router_logits=True).loss.backward()
    return waits


def forward_with_layers_of_different_sizes(device: str, experts: str) -> Waits:
    sizes = {"num_experts_per_layer": [12, 0, 8], "dense_intermediate_size": 64}
    model = new_model(device, experts, num_shared_experts=2, **sizes)
    with torch.no_grad(), host_waits(device) as waits:
        model(inputs_embeds=model.get_input_embeddings()(new_ids(device)))
    return waits


def forward_under_a_mask(device: str, experts: str) -> Waits:
    model, ids = new_model(device, experts), new_ids(device)
    with torch.no_grad(), host_waits(device) as waits, model.use_experts(SUBSET):
        model(ids)
        model(ids)
    return waits


def forward_of_a_subset(device: str, experts: str) -> Waits:
    model = new_model(device, experts, num_experts_per_layer=[5, 4, 7], retained_experts=None)
    with torch.no_grad(), host_waits(device) as waits:
        model(new_ids(device), document_pool=4)
    return waits


def balance_loss(device: str, experts: str) -> Waits:
    model, ids = new_model(device, experts), new_ids(device)
    with host_waits(device) as waits:
        model(ids, labels=ids, output_router_logits=True, num_items_in_batch=20).loss.backward()
    return waits


def training_step(device: str, experts: str) -> Waits:
    model, ids = new_model(device, experts, eos_token_id=[1, 2], **POOLS).train(), new_ids(device)
    with host_waits(device) as waits:
        output = model(ids, labels=ids, attention_within_documents=True)
        (output.loss + output.router_z_loss + output.document_pool_size).backward()
    assert all(parameter.grad.device == ids.device for parameter in model.parameters())
    return waits


def training_step_with_checkpointing(device: str, experts: str) -> Waits:
    model, ids = new_model(device, experts, **POOLS).train(), new_ids(device)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with host_waits(device) as waits:
        model(ids, labels=ids, document_ids=new_ids(device), num_items_in_batch=20).loss.backward()
    return waits


def classification(device: str, experts: str) -> Waits:
    ids, waits = new_ids(device), Waits(device)
    for cls in (EmoForSequenceClassification, EmoForTokenClassification):
        model = new_model(device, experts, cls=cls)
        with host_waits(device) as waits_of_one:
            labels = ids if cls is EmoForTokenClassification else ids[:, 0]
            model(ids, labels=labels).loss.backward()
        for name in ("ours", "theirs", "in_layers", "made_on_cpu"):
            getattr(waits, name).update(getattr(waits_of_one, name))
    return waits


def steps_with_a_static_cache(device: str, experts: str) -> Waits:
    model = new_model(device, experts)
    with torch.no_grad():
        with host_waits(device):
            cache = StaticCache(config=model.config, max_cache_len=LENGTH + 4)
            model(new_ids(device), past_key_values=cache, use_cache=True)
        with host_waits(device) as waits:  # a step behind the prompt
            model(new_ids(device, 1), past_key_values=cache, use_cache=True)
    return waits


def generate(device: str, experts: str, **kwargs) -> Waits:
    model, ids = new_model(device, experts), new_ids(device)
    model.generation_config.pad_token_id = 0
    with host_waits(device, steps=4) as waits:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, **kwargs)
    return waits


def generate_with_a_static_cache(device: str, experts: str) -> Waits:
    return generate(device, experts, cache_implementation="static", disable_compile=True)


def generate_within_pools_of_the_prompt(device: str, experts: str) -> Waits:
    return generate(device, experts, document_pool=4)


def generate_within_pools_of_a_subset(device: str, experts: str) -> Waits:
    return generate(device, experts, document_pool=4, expert_subset=SUBSET)


def generate_without_some_experts(device: str, experts: str) -> Waits:
    return generate(device, experts, exclude_experts={0: [1, 2]})


SCENARIOS: dict[str, Callable[[str, str], Waits]] = {
    scenario.__name__: scenario
    for scenario in (
        forward,
        forward_with_padding,
        forward_with_always_active_experts,
        forward_with_layers_of_different_sizes,
        forward_under_a_mask,
        forward_of_a_subset,
        balance_loss,
        training_step,
        training_step_with_checkpointing,
        classification,
        steps_with_a_static_cache,
        generate,
        generate_with_a_static_cache,
        generate_within_pools_of_the_prompt,
        generate_within_pools_of_a_subset,
        generate_without_some_experts,
    )
}
