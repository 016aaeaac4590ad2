"""`emo_sorted` against the loop over experts: outputs and every gradient."""

import pytest
import torch
from transformers_emo import EmoConfig, EmoForCausalLM
from transformers_emo.modeling_emo.modeling_emo import EmoExperts

EXPERTS, TOP_K, HIDDEN, WIDTH = 6, 3, 12, 8


def make_experts(dtype=torch.float32, **changes) -> EmoExperts:
    config = EmoConfig(hidden_size=HIDDEN, intermediate_size=WIDTH, **changes)
    torch.manual_seed(0)
    experts = EmoExperts(config, EXPERTS).to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    return experts


def run(experts, implementation, hidden, index, weights) -> dict[str, torch.Tensor]:
    """The output and all gradients of one call."""
    experts.config._experts_implementation = implementation
    experts.zero_grad()
    hidden, weights = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    output = experts(hidden, index, weights)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    gradients = {name: p.grad for name, p in experts.named_parameters() if p.grad is not None}
    return {"output": output, "hidden": hidden.grad, "weights": weights.grad} | gradients


def make_inputs(tokens: int, index=None, dtype=torch.float32):
    torch.manual_seed(1)
    if index is None:
        index = torch.rand(tokens, EXPERTS).argsort(dim=1)[:, :TOP_K]
    return torch.randn(tokens, HIDDEN, dtype=dtype), index, torch.rand(tokens, TOP_K, dtype=dtype)


def assert_same(experts, hidden, index, weights, **tolerance):
    expected = run(experts, "eager", hidden, index, weights)
    found = run(experts, "emo_sorted", hidden, index, weights)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name, **tolerance)


@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_numbers_are_those_of_the_loop(tokens):
    assert_same(make_experts(), *make_inputs(tokens), atol=1e-5, rtol=1e-5)


def test_experts_that_no_token_takes_have_no_gradient():
    index = torch.tensor([[1, 4, 2]] * 7)
    experts = make_experts()
    assert_same(experts, *make_inputs(7, index), atol=1e-5, rtol=1e-5)
    assert not experts.down_proj.grad[[0, 3, 5]].any() and not experts.gate_up_proj.grad[[0, 3, 5]].any()


def test_a_token_may_take_an_expert_twice():
    assert_same(make_experts(), *make_inputs(2, torch.tensor([[1, 1, 2], [0, 5, 5]])), atol=1e-5, rtol=1e-5)


def test_picks_of_other_ranks_add_nothing():
    index = torch.tensor([[6, 1, 6], [2, 6, 0]])
    assert_same(make_experts(), *make_inputs(2, index), atol=1e-5, rtol=1e-5)


def test_tokens_whose_experts_are_all_elsewhere_come_out_as_nothing():
    experts = make_experts()
    found = run(experts, "emo_sorted", *make_inputs(2, torch.full((2, 3), 6)))
    assert not any(value.any() for value in found.values())


def test_bfloat16_is_as_near_as_its_precision():
    experts = make_experts(torch.bfloat16)
    assert_same(experts, *make_inputs(20, dtype=torch.bfloat16), atol=0.25, rtol=0.1)


def test_gradients_are_those_of_the_function():
    experts = make_experts(torch.float64)
    experts.config._experts_implementation = "emo_sorted"
    hidden, index, weights = make_inputs(5, dtype=torch.float64)
    hidden.requires_grad_()
    weights.requires_grad_()
    parameters = list(experts.parameters())

    def function(hidden, weights, *_):
        return experts(hidden, index, weights)

    assert torch.autograd.gradcheck(function, (hidden, weights, *parameters))


@pytest.mark.parametrize("frozen", [["gate_up_proj"], ["down_proj"], ["gate_up_proj", "down_proj"]])
def test_what_is_frozen_has_no_gradient(frozen):
    experts = make_experts()
    for name in frozen:
        getattr(experts, name).requires_grad_(False)
    assert_same(experts, *make_inputs(9), atol=1e-5, rtol=1e-5)


def test_it_follows_autocast():
    experts = make_experts()
    inputs = make_inputs(30)
    expected = run(experts, "eager", *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(experts, "emo_sorted", *inputs)
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], value, atol=0.3, rtol=0.1, msg=name)
    assert not torch.equal(found["output"], expected["output"])


def test_other_activations_are_computed_too():
    assert_same(make_experts(hidden_act="gelu"), *make_inputs(9), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_a_model_trains_the_same(make_model, reentrant):
    model = make_model(document_pool_min=5, document_pool_max=5).train()
    ids = torch.randint(2, 96, (2, 30))
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    gradients = []
    for implementation in ("eager", "emo_sorted"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_a_compiled_model_is_one_graph_still(make_model):
    model = make_model()
    model.set_experts_implementation("emo_sorted")
    ids = torch.randint(2, 96, (1, 8))
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)(ids).logits
        torch.testing.assert_close(compiled, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_lora_on_the_stacked_experts_trains_the_same(make_model):
    peft = pytest.importorskip("peft")
    ids = torch.randint(2, 96, (2, 20))
    gradients = []
    for implementation in ("eager", "emo_sorted"):
        model = make_model()
        model.set_experts_implementation(implementation)
        names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        torch.manual_seed(0)
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_parameters=names, init_lora_weights=False)
        )
        adapted(ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in adapted.named_parameters() if p.requires_grad})
    assert gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_a_saved_model_does_not_ask_for_it(make_model, tmp_path):
    model = make_model()
    model.set_experts_implementation("emo_sorted")
    model.save_pretrained(tmp_path)
    assert "emo_sorted" not in (tmp_path / "config.json").read_text()
    assert isinstance(EmoForCausalLM.from_pretrained(tmp_path), EmoForCausalLM)
