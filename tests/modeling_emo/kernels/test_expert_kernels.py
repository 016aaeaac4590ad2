"""`emo` and `emo_sorted` against the loop over experts: outputs and every gradient."""

import pytest
import torch
from tolerances import TRAINING, assert_other_numbers, assert_same_numbers
from transformers.integrations import moe
from transformers_emo import EmoConfig, EmoForCausalLM
from transformers_emo.modeling_emo.kernels import expert_kernels, gradient_memory
from transformers_emo.modeling_emo.kernels.native_library import find_kernels
from transformers_emo.modeling_emo.modeling_emo import EmoExperts

EXPERTS, TOP_K, HIDDEN, WIDTH = 6, 3, 12, 8


def make_experts(dtype=torch.float32, *, hidden=HIDDEN, width=WIDTH, **changes) -> EmoExperts:
    config = EmoConfig(hidden_size=hidden, intermediate_size=width, **changes)
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


def make_inputs(tokens: int, index=None, dtype=torch.float32, hidden=HIDDEN):
    torch.manual_seed(1)
    if index is None:
        index = torch.rand(tokens, EXPERTS).argsort(dim=1)[:, :TOP_K]
    return torch.randn(tokens, hidden, dtype=dtype), index, torch.rand(tokens, TOP_K, dtype=dtype)


OURS = ("emo", "emo_sorted")
needs_kernels = pytest.mark.skipif(find_kernels() is None, reason="no compiled kernels")


def roundings(dtype: torch.dtype, tokens: int, hidden: int = HIDDEN, width: int = WIDTH) -> int:
    """The lengths of the sums behind an output or a gradient: what `assert_same_numbers` calls `terms`."""
    if dtype.itemsize == 2:  # stored: gate, up, SiLU, their product, down, each pick added; and so back
        return 2 * (5 + TOP_K)
    return 2 * (hidden + width + TOP_K) + tokens


def assert_same(experts, hidden, index, weights):
    terms = roundings(hidden.dtype, *hidden.shape, experts.down_proj.shape[-1])
    expected = run(experts, "eager", hidden, index, weights)
    for implementation in OURS:
        found = run(experts, implementation, hidden, index, weights)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_same_numbers(found[name], value, terms=terms, name=f"{implementation} {name}")


@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_numbers_are_those_of_the_loop(tokens):
    assert_same(make_experts(), *make_inputs(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_that_fit_tiles_are_the_same(dtype):
    """Where the machine has AMX it computes these, in both directions."""
    experts = make_experts(dtype, hidden=64, width=96)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for tokens in (3, 150):
        assert_same(experts, *make_inputs(tokens, dtype=dtype, hidden=64))


def test_experts_that_no_token_takes_have_no_gradient():
    index = torch.tensor([[1, 4, 2]] * 7)
    experts = make_experts()
    assert_same(experts, *make_inputs(7, index))
    assert not experts.down_proj.grad[[0, 3, 5]].any() and not experts.gate_up_proj.grad[[0, 3, 5]].any()


def test_a_token_may_take_an_expert_twice():
    assert_same(make_experts(), *make_inputs(2, torch.tensor([[1, 1, 2], [0, 5, 5]])))


def test_picks_of_other_ranks_add_nothing():
    index = torch.tensor([[6, 1, 6], [2, 6, 0]])
    assert_same(make_experts(), *make_inputs(2, index))


def test_tokens_whose_experts_are_all_on_other_ranks_give_zeros():
    experts = make_experts()
    for implementation in OURS:
        found = run(experts, implementation, *make_inputs(2, torch.full((2, 3), 6)))
        assert not any(value.any() for value in found.values())


def test_without_tokens_the_output_is_empty():
    experts = make_experts()
    for implementation in OURS:
        found = run(experts, implementation, *make_inputs(0))
        assert found["output"].shape == (0, HIDDEN)
        assert not found["gate_up_proj"].any() and not found["down_proj"].any()


def test_all_tokens_may_take_the_same_experts():
    assert_same(make_experts(), *make_inputs(70, torch.tensor([[5, 0, 3]] * 70)))


@needs_kernels
@pytest.mark.parametrize(
    "changes",
    [
        {"hidden": (9, 16)},
        {"index": (4, TOP_K)},
        {"weights": (9, 1)},
        {"gate_up_proj": (1, 2 * WIDTH, HIDDEN)},
        {"gate_up_proj": (EXPERTS, 2, HIDDEN)},
        {"down_proj": (2, HIDDEN, WIDTH)},
        {"hidden": (3, 3, HIDDEN)},
    ],
    ids=str,
)
def test_inputs_that_do_not_fit_are_refused(changes):
    """Compiled code would read past their ends."""
    experts = make_experts(_experts_implementation="emo")
    inputs = dict(zip(("hidden", "index", "weights"), make_inputs(9), strict=True))
    for name, shape in changes.items():
        if name in inputs:
            inputs[name] = torch.zeros(shape, dtype=inputs[name].dtype)
        else:
            setattr(experts, name, torch.nn.Parameter(torch.zeros(shape)))
    with torch.no_grad(), pytest.raises(ValueError, match=r"do not fit each other.*down \(E, D, F\)"):
        experts(*inputs.values())


@needs_kernels
def test_weights_on_the_meta_device_are_refused():
    """Their address is null."""
    experts = make_experts(_experts_implementation="emo").to("meta")
    with torch.no_grad(), pytest.raises(ValueError, match="gate_up .* on meta"):
        experts(*make_inputs(9))


@pytest.mark.parametrize("sizes", [{}, {"hidden": 64, "width": 96}], ids=["vectors", "tiles"])
def test_a_huge_negative_gate_is_shut(sizes):
    """SiLU of it is zero, and so is its slope."""
    experts = make_experts(**sizes)
    hidden, index, weights = make_inputs(9, hidden=sizes.get("hidden", HIDDEN))
    with torch.no_grad():
        gate, up = experts.gate_up_proj.chunk(2, dim=1)
        gate.fill_(-1e36)
        up.fill_(1e3)
    found = run(experts, "emo", hidden.abs() + 0.1, index, weights)
    for name, value in found.items():
        assert not value.any(), name


@pytest.mark.skipif(not gradient_memory._HAS_ADVICE, reason="no memory is kept here")
def test_no_memory_is_kept_for_each_number_of_tokens(monkeypatch):
    monkeypatch.setattr(gradient_memory, "_free", {})
    monkeypatch.setattr(gradient_memory, "_LEAST_BYTES", 1)
    monkeypatch.setattr(gradient_memory, "_PAGE", 4096)
    experts = make_experts(hidden=64, width=96)
    for tokens in (100, 200, 300):
        run(experts, "emo", *make_inputs(tokens, hidden=64))
        experts.zero_grad()
    assert 0 < sum(map(len, gradient_memory._free.values())) <= 2  # of the two weights


def test_very_many_rows_are_the_same():
    index = torch.rand(800, EXPERTS).argsort(dim=1)[:, :TOP_K]
    assert index.numel() >= expert_kernels._MANY_ROWS * EXPERTS
    assert_same(make_experts(), *make_inputs(800, index))


@needs_kernels
def test_compiled_gradients_run_where_they_are_faster():
    kernels, index = find_kernels(), torch.zeros(2, 1, dtype=torch.int64)

    def chosen(hidden, width):
        weights = torch.zeros(EXPERTS, 2 * width, hidden), torch.zeros(EXPERTS, hidden, width)
        return expert_kernels._kernels_for(torch.zeros(2, hidden), *weights, index, backward=True)

    assert chosen(64, 96) is (kernels if kernels.has_tiles or kernels.has_panels else None)
    assert chosen(64, 8) is None  # a size that the kernels refuse


def test_inputs_and_weights_need_not_be_contiguous():
    experts = make_experts()
    hidden, index, weights = make_inputs(9)
    hidden, index, weights = (tensor.T.contiguous().T for tensor in (hidden, index, weights))
    assert not hidden.is_contiguous()
    assert_same(experts, hidden, index, weights)
    for name, parameter in list(experts.named_parameters()):
        turned = parameter.detach().transpose(1, 2).contiguous().transpose(1, 2)
        setattr(experts, name, torch.nn.Parameter(turned))
    assert not experts.down_proj.is_contiguous()
    assert_same(experts, hidden, index, weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_its_precision(dtype):
    experts = make_experts(dtype)
    assert_same(experts, *make_inputs(20, dtype=dtype))


def test_gradients_are_those_of_the_function():
    experts = make_experts(torch.float64)
    experts.config._experts_implementation = "emo"
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
    assert_same(experts, *make_inputs(9))


def test_it_follows_autocast():
    experts = make_experts()
    inputs = make_inputs(30)
    expected = run(experts, "eager", *inputs)
    for implementation in OURS:
        with torch.autocast("cpu", torch.bfloat16):
            found = run(experts, implementation, *inputs)
        for name, value in expected.items():
            assert found[name].dtype == torch.float32
            assert_same_numbers(
                found[name], value, dtype=torch.bfloat16, terms=roundings(torch.bfloat16, 30), name=name
            )
        assert_other_numbers(found["output"], expected["output"], terms=roundings(torch.float32, 30))


def test_other_activations_are_computed_too():
    assert_same(make_experts(hidden_act="gelu"), *make_inputs(9))


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_a_model_trains_the_same(make_model, reentrant):
    model = make_model(document_pool_min=5, document_pool_max=5).train()
    ids = torch.randint(2, 96, (2, 30))
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    gradients = []
    for implementation in ("eager", *OURS):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for found in gradients[1:]:
        for name, gradient in gradients[0].items():
            assert_same_numbers(found[name], gradient, terms=TRAINING, name=name)


def test_compiled_code_has_one_operator_for_all_experts():
    experts = make_experts()
    experts.config._experts_implementation = "emo"
    hidden, index, weights = make_inputs(5)
    found = []

    def look(module, inputs):
        found.extend(node.target for node in module.graph.nodes)
        return module

    with torch.no_grad():
        torch.compile(experts, backend=look, fullgraph=True)(hidden, index, weights)
    assert torch.ops.transformers_emo.experts in found or torch.ops.transformers_emo.experts.default in found


def test_a_compiled_model_is_one_graph_still(make_model):
    model = make_model()
    ids = torch.randint(2, 96, (1, 8))
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)(ids).logits
        assert_same_numbers(compiled, model(ids).logits)


@pytest.mark.parametrize("implementation", OURS)
def test_compiled_experts_have_the_same_gradients(implementation):
    torch._dynamo.reset()
    experts, inputs = make_experts(), make_inputs(9)
    expected = run(experts, implementation, *inputs)
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    hidden, weights = inputs[0].clone().requires_grad_(), inputs[2].clone().requires_grad_()
    experts.zero_grad()
    output = compiled(hidden, inputs[1], weights)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    found = {"output": output, "hidden": hidden.grad, "weights": weights.grad}
    for name, value in (found | {name: p.grad for name, p in experts.named_parameters()}).items():
        assert_same_numbers(value, expected[name], terms=roundings(value.dtype, 9), name=name)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("save", [True, False])
def test_the_operator_keeps_the_rules_of_operators(native, save):
    experts, (hidden, index, weights) = make_experts(), make_inputs(9)
    tensors = (hidden.requires_grad_(save), experts.gate_up_proj, experts.down_proj, weights)
    if not save:
        tensors = tuple(tensor.detach() for tensor in tensors)
    torch.library.opcheck(expert_kernels._experts, (*tensors, index, native, save))


def route(tokens: int, experts: int, top_k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random expert ids, some of other ranks, and weights."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, experts + 1, generator=generator).argsort(dim=1)[:, :top_k]
    return index.contiguous(), torch.rand(tokens, top_k, generator=generator)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_the_same_bits_for_any_number_of_threads(dtype):
    torch.manual_seed(0)
    gate_up = torch.randn(5, 128, 96, dtype=dtype)
    down = torch.randn(5, 96, 64, dtype=dtype)
    hidden, (index, weights) = torch.randn(200, 96, dtype=dtype), route(200, 5, 3, 0)
    threads, kernels, found = torch.get_num_threads(), find_kernels(), []
    try:
        for number in (1, 2, 3, 1):
            torch.set_num_threads(number)
            found.append(kernels.experts(hidden, gate_up, down, weights, index)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(output, found[0]) for output in found)


def test_lora_on_the_stacked_experts_trains_the_same(make_model):
    peft = pytest.importorskip("peft")
    ids = torch.randint(2, 96, (2, 20))
    gradients = []
    for implementation in ("eager", *OURS):
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
    for found in gradients[1:]:
        for name, gradient in gradients[0].items():
            assert_same_numbers(found[name], gradient, terms=TRAINING, name=name)


@pytest.mark.parametrize("implementation", [None, *OURS])
def test_a_saved_model_does_not_ask_for_it(make_model, tmp_path, implementation):
    model = make_model()
    if implementation is not None:
        model.set_experts_implementation(implementation)
    model.save_pretrained(tmp_path)
    assert "experts_implementation" not in (tmp_path / "config.json").read_text()
    assert isinstance(EmoForCausalLM.from_pretrained(tmp_path), EmoForCausalLM)


class TestWhoRunsTheExperts:
    def test_nobody_chose(self, make_checkpoint):
        model = EmoForCausalLM.from_pretrained(make_checkpoint())
        assert model.config._experts_implementation == "emo"

    @pytest.mark.parametrize("name", ["eager", "grouped_mm", "batched_mm", "emo_sorted"])
    def test_somebody_chose(self, make_checkpoint, name):
        model = EmoForCausalLM.from_pretrained(make_checkpoint(), experts_implementation=name)
        assert model.config._experts_implementation == name

    def test_on_other_devices_transformers_decides(self, make_model, monkeypatch):
        called = []
        monkeypatch.setattr(moe, "grouped_mm_experts_forward", lambda *args: called.append(args) or args[1])
        model = make_model().to("meta")
        experts = model.model.layers[0].mlp.experts
        experts(torch.empty(2, 32, device="meta"), torch.empty(2, 4, dtype=torch.int64, device="meta"), None)
        assert called
        with model._optimize_model_for_decode():
            assert model.config._experts_implementation == "batched_mm"
        assert model.config._experts_implementation == "emo"

    def test_an_exported_graph_has_no_operator_of_ours(self):
        experts, (hidden, index, weights) = make_experts(), make_inputs(4)
        experts.config._experts_implementation = "emo"
        program = torch.export.export(experts, (hidden, index, weights))
        assert "transformers_emo" not in str(program.graph)
