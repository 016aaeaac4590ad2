"""What must hold on a GPU, against the authors' numbers and the CPU's.

float32 with PyTorch's own settings (no TF32). The sums of another device have another order: errors of 1e-4
are rounding through the layers of a small model, errors of a wrong expert are a thousand times that.
"""

import copy
import json

import pytest
import torch
from conftest import GOLDENS, TOY, tiny_model
from device import forget_peak, is_cuda, no_waits, peak_bytes_on
from processes import peak_megabytes
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, StaticCache
from transformers_emo import EmoConfig, EmoForCausalLM

pytestmark = pytest.mark.gpu
ROUNDING = {"atol": 1e-4, "rtol": 1e-4}
# Rows of whole 16 bytes, as a GPU's grouped products want them.
SIZES = {"hidden_size": 64, "intermediate_size": 32, "document_pool_min": 3, "document_pool_max": 11}
EXPERTS = ("grouped_mm", "batched_mm", "eager", "emo")
SUBSET = [[0, 3, 5, 7, 11]] * 3
PROMPTS = torch.tensor([[5, 17, 60, 2, 33, 8, 90], [44, 44, 3, 71, 12, 9, 28]])
GOLDEN = GOLDENS / "A_hf_forward" / "base"


def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float().cpu()


def golden_batch(device: str, padding: str) -> tuple[dict, dict]:
    inputs, outputs = load_file(GOLDEN / "inputs.safetensors"), load_file(GOLDEN / "outputs.safetensors")
    batch = {name: inputs[f"{padding}.{name}"].to(device) for name in ("input_ids", "attention_mask")}
    expected = {name.partition(".")[2]: value for name, value in outputs.items() if name.startswith(padding)}
    return batch | {"labels": inputs[f"{padding}.labels"].to(device)}, expected


@pytest.mark.parametrize("padding", ["nopad", "leftpad"])
@pytest.mark.parametrize("experts", EXPERTS)
class TestGoldens:
    def test_in_float32(self, device, experts, padding):
        model = AutoModelForCausalLM.from_pretrained(
            GOLDEN / "checkpoint", device_map=device, dtype="float32", experts_implementation=experts
        )
        batch, expected = golden_batch(device, padding)
        with torch.no_grad():
            out = model(**batch, output_router_logits=True)
        real = batch["attention_mask"].bool().cpu()
        torch.testing.assert_close(on_cpu(out.logits)[real], expected["logits"][real], **ROUNDING)
        for name, loss in (("loss", out.loss), ("ce_loss", out.ce_loss), ("lb_loss", out.aux_loss)):
            torch.testing.assert_close(on_cpu(loss), expected[name], **ROUNDING)

    def test_in_bfloat16(self, device, experts, padding):
        """Seven bits behind the point, through a few layers: a few percent of the logits' size."""
        model = AutoModelForCausalLM.from_pretrained(
            GOLDEN / "checkpoint", device_map=device, dtype="bfloat16", experts_implementation=experts
        )
        batch, expected = golden_batch(device, padding)
        with torch.no_grad():
            out = model(**batch, output_router_logits=True)
        real = batch["attention_mask"].bool().cpu()
        error = (on_cpu(out.logits) - expected["logits"])[real]
        assert error.norm() < 0.05 * expected["logits"][real].norm()
        assert abs(out.loss.item() - expected["loss"]) < 0.05


@pytest.mark.parametrize("padding", ["nopad", "leftpad"])
def test_greedy_ids_are_the_authors(device, padding):
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "checkpoint", device_map=device, dtype="float32")
    batch, expected = golden_batch(device, padding)
    batch.pop("labels")
    if padding == "nopad":
        length = int(load_file(GOLDEN / "inputs.safetensors")["generate.prompt_len_nopad"])
        batch = {name: tensor[:, :length] for name, tensor in batch.items()}
    ids = model.generate(**batch, do_sample=False, max_new_tokens=20)
    assert torch.equal(ids.cpu(), expected["generate_ids"])


def test_training_step_is_the_authors(device):
    folder = GOLDENS / "D_train_step"
    golden = load_file(folder / "train_step.safetensors", device=device)
    step = json.loads((folder / "meta.json").read_text())["train_step"]
    model = AutoModelForCausalLM.from_pretrained(folder / "expected_hf", device_map=device).train()
    padding = load_file(folder / "padded_rows.safetensors", device=device)
    model.resize_token_embeddings(len(golden["grad.embeddings.weight"]))
    with torch.no_grad():
        model.model.embed_tokens.weight[-len(padding["embeddings"]) :] = padding["embeddings"]
        model.lm_head.weight[-len(padding["lm_head"]) :] = padding["lm_head"]
    shifted = torch.full((2, 1), -100, device=device)
    out = model(
        golden["input_ids"],
        labels=torch.cat([shifted, golden["labels"][:, :-1]], dim=1),
        document_pool_sizes=torch.tensor(step["pool_sizes_per_layer_rowmajor_docs"], device=device),
        num_items_in_batch=int(golden["loss_div_factor"]),
    )
    torch.testing.assert_close(out.loss, golden["objective_total"], **ROUNDING)
    out.loss.backward()
    gradient = model.model.embed_tokens.weight.grad
    torch.testing.assert_close(gradient, golden["grad.embeddings.weight"], **ROUNDING)


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_with_pools_is_the_cpus(device, experts, checkpointing):
    found = []
    sizes = torch.tensor([[3, 7, 11, 5], [4, 9, 3, 11], [11, 3, 6, 8]])
    ids = torch.tensor([[5, 17, 1, 2, 33, 8, 90], [44, 44, 3, 71, 1, 12, 28]])
    for place in ("cpu", device):
        model = tiny_model(**SIZES).train().to(place)
        model.set_experts_implementation(experts)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        tokens = ids.to(place)
        out = model(
            tokens, labels=tokens, document_pool_sizes=sizes.to(place), attention_within_documents=True
        )
        out.loss.backward()
        losses = {name: on_cpu(out[name]) for name in ("loss", "aux_loss", "router_z_loss", "lm_z_loss")}
        found.append(losses | {name: on_cpu(weight.grad) for name, weight in model.named_parameters()})
    torch.testing.assert_close(found[1], found[0], **ROUNDING)


def test_pool_sizes_may_be_drawn_by_a_generator_of_either_device(device):
    model, ids = tiny_model(**SIZES).train().to(device), PROMPTS.to(device)
    for place in ("cpu", device):
        model.model.pool_generator = torch.Generator(place).manual_seed(0)
        losses = [model(ids, labels=ids).loss.item()]
        model.model.pool_generator.manual_seed(0)
        assert model(ids, labels=ids).loss.item() == pytest.approx(losses[0], rel=1e-5)


def test_a_subset_is_read_straight_into_the_devices_memory(device, tmp_path):
    """Never the whole of it in the host's memory, nor twice in the device's."""
    sizes = {"hidden_size": 1024, "intermediate_size": 512, "num_experts": 64}
    if not is_cuda(device):
        sizes = {"hidden_size": 64, "intermediate_size": 32, "num_experts": 24}
    torch.manual_seed(0)
    small = {"vocab_size": 512, "pad_token_id": 0, "eos_token_id": 1, "num_attention_heads": 8}
    config = EmoConfig(num_hidden_layers=3, num_experts_per_tok=4, **small | sizes)
    EmoForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    kept = list(range(16)) + [config.num_experts - 1]
    loaded = []

    def load() -> None:
        loaded.append(
            EmoForCausalLM.from_pretrained(
                tmp_path, expert_subset=[kept] * 3, device_map=device, dtype="bfloat16"
            )
        )

    forget_peak(device)
    host_megabytes = peak_megabytes(load)
    (model,) = loaded
    size = sum(weight.nbytes for weight in model.parameters())
    assert {weight.device.type for weight in model.parameters()} == {torch.device(device).type}
    whole = EmoForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    experts = whole.model.layers[0].mlp.experts.down_proj[kept]
    assert torch.equal(model.model.layers[0].mlp.experts.down_proj.cpu(), experts)
    peak = peak_bytes_on(device)
    if peak is not None:
        assert peak <= 1.05 * size
        assert host_megabytes <= 0.5 * size / 1e6 + 300  # the libraries that a first copy loads


@pytest.mark.parametrize("experts", EXPERTS)
def test_a_mask_is_the_subset(device, tmp_path, experts):
    tiny_model(**SIZES).save_pretrained(tmp_path)
    settings = {"dtype": "float32", "experts_implementation": experts}
    part = EmoForCausalLM.from_pretrained(tmp_path, expert_subset=SUBSET, device_map=device, **settings)
    whole = EmoForCausalLM.from_pretrained(tmp_path, **settings)
    ids = PROMPTS.to(device)
    with torch.no_grad(), whole.use_experts(SUBSET):
        whole.to(device)  # masks come along
        torch.testing.assert_close(whole(ids).logits, part(ids).logits, **ROUNDING)
        assert all(mask.device.type == torch.device(device).type for mask in whole.model.expert_masks)
    assert torch.equal(
        whole.generate(ids, expert_subset=SUBSET, max_new_tokens=8, do_sample=False),
        part.generate(ids, max_new_tokens=8, do_sample=False),
    )


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    "how", [{"document_pool": 5}, {"document_pool": 4, "expert_subset": SUBSET}], ids=str
)
def test_pools_of_a_prompt_are_the_cpus(device, how, cache):
    ids = []
    for place in ("cpu", device):
        model = tiny_model(**SIZES).to(place)
        settings = {"cache_implementation": cache} if cache == "static" else {}
        out = model.generate(
            PROMPTS.to(place), max_new_tokens=8, do_sample=False, disable_compile=True, **how, **settings
        )
        ids.append(out.cpu())
    assert torch.equal(*ids)


def test_experts_are_swapped_in_place(device, tmp_path):
    tiny_model(**SIZES).save_pretrained(tmp_path)
    other = [[1, 3, 8, 9, 11]] * 3
    model = EmoForCausalLM.from_pretrained(tmp_path, expert_subset=SUBSET, device_map=device)
    model.swap_experts(other, progress=False)
    twin = model.share_backbone(SUBSET, progress=False)
    for found, subset in ((model, other), (twin, SUBSET)):
        anew = EmoForCausalLM.from_pretrained(tmp_path, expert_subset=subset, device_map=device)
        for name, weight in anew.named_parameters():
            assert torch.equal(found.get_parameter(name), weight)
            assert found.get_parameter(name).device == weight.device


@pytest.mark.parametrize("pools", [None, 4])
def test_a_compiled_step_is_the_plain_one(device, pools):
    """In one graph, and on a GPU as a CUDA graph."""
    torch._dynamo.reset()
    model = tiny_model(**SIZES).bfloat16().to(device)
    model.set_experts_implementation("batched_mm")  # what Transformers decodes with
    settings = {"do_sample": False, "cache_implementation": "static", "max_new_tokens": 6}
    ids = PROMPTS.to(device)
    plain = model.generate(ids, document_pool=pools, disable_compile=True, **settings)
    if is_cuda(device):  # Transformers compiles there by itself
        compiled = model.generate(ids, document_pool=pools, **settings)
        assert (plain == compiled).float().mean() > 0.9  # bfloat16 rounds otherwise in fused kernels
    torch._dynamo.utils.counters.clear()
    cache = StaticCache(config=model.config, max_cache_len=32)
    step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
        positions = torch.full((len(ids), 1), ids.shape[1], device=device)
        token = ids[:, -1:].clone()
        inputs = {"position_ids": positions, "use_cache": True}
        expected = model(token, past_key_values=copy.deepcopy(cache), **inputs).logits
        found = step(token, past_key_values=cache, **inputs).logits
    error = on_cpu(found) - on_cpu(expected)
    assert error.norm() < 0.05 * on_cpu(expected).norm()
    if is_cuda(device):
        assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
def test_the_host_waits_for_nothing(device, experts):
    """In bfloat16: float32 has no grouped products on a GPU, and goes through PyTorch's way around."""
    model = tiny_model(**SIZES).bfloat16().to(device)
    model.set_experts_implementation(experts)
    ids, cache = PROMPTS.to(device), StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        for _ in range(2):  # what is made with the first is there then
            model(ids)
        model(ids, past_key_values=cache, use_cache=True)
        with no_waits(device):
            model(ids)
            model(ids[:, :1], past_key_values=cache, use_cache=True)
    model.train()
    for context in (torch.enable_grad, lambda: no_waits(device)):
        with context():
            model(ids, labels=ids, attention_within_documents=True).loss.backward()


def test_an_adapter_trains_as_on_the_cpu(device):
    peft = pytest.importorskip("peft")
    found = []
    for place in ("cpu", device):
        model = tiny_model(**SIZES)
        torch.manual_seed(0)
        settings = peft.LoraConfig(
            target_modules=["q_proj", "v_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            init_lora_weights=False,
        )
        model = peft.get_peft_model(model, settings).to(place)
        ids = PROMPTS.to(place)
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({name: on_cpu(w.grad) for name, w in model.named_parameters() if w.grad is not None})
    assert found[0]
    torch.testing.assert_close(found[1], found[0], **ROUNDING)


def test_layers_may_lie_on_several_gpus(device):
    # With one GPU there is nothing to split over; `test_devices.py` splits over two fake devices.
    if not is_cuda(device) or torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model = EmoForCausalLM.from_pretrained(TOY, device_map="balanced", dtype="float32")
    ids = PROMPTS.to("cuda:0")
    expected = EmoForCausalLM.from_pretrained(TOY, dtype="float32").generate(
        PROMPTS, document_pool=8, max_new_tokens=5, do_sample=False
    )
    found = model.generate(ids, document_pool=8, max_new_tokens=5, do_sample=False)
    assert torch.equal(found.cpu(), expected)
    model(ids, labels=ids, document_pool=8, output_router_logits=True).loss.backward()
