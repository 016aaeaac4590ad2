"""Document pools: choices and losses, against the authors' training code and naive loops."""

import json
from itertools import product

import fresh_processes
import pytest
import torch
from conftest import GOLDENS, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tolerances import TRAINING, assert_other_numbers, assert_same_numbers
from transformers import AutoModelForCausalLM
from transformers_emo import EmoConfig
from transformers_emo.configuration import LayerExperts
from transformers_emo.modeling_emo import (
    flatten_segments,
    lengths_from_segments,
    pool_mask,
    segments_from_eos,
)
from transformers_emo.modeling_emo.losses import document_pool_losses
from transformers_emo.modeling_emo.modeling_emo import EmoTopKRouter
from transformers_emo.modeling_emo.pools.document_pool import DocumentPools

CASES = sorted(path.name for path in (GOLDENS / "C_training_router").iterdir())
INPUT_IDS = torch.tensor([[5, 17, 1, 2, 33, 8, 90], [44, 44, 3, 71, 1, 1, 28]])
POOLS = {"document_pool_min": 3, "document_pool_max": 11, "document_pool_eval": 5}


@pytest.fixture(params=product(CASES, ["eval", "train"]), ids="-".join)
def golden(request):
    case, mode = request.param
    folder = GOLDENS / "C_training_router" / case
    meta, tensors = json.loads((folder / "meta.json").read_text()), load_file(folder / "golden.safetensors")
    settings = meta["router"]
    layer = LayerExperts(settings["num_experts"], settings["num_shared_experts"], (), settings["top_k"])
    router = EmoTopKRouter(EmoConfig(hidden_size=settings["d_model"]), layer).train(mode == "train")
    router.weight = torch.nn.Parameter(tensors["router_weight"].view(layer.num_experts, -1).clone())
    segments = segments_from_eos(tensors["input_ids"], settings["eos_token_id"], eos_opens=True)
    segment_T = flatten_segments(segments)
    sizes = torch.tensor(sum(meta["train_pool_sizes_per_row_per_document"], []))
    if mode == "eval":
        sizes = torch.full_like(sizes, meta["eval_pool_size"])
    return meta, tensors, router, segments, DocumentPools(segment_T, sizes, None), mode


def test_router_is_the_authors(golden):
    meta, tensors, router, segments, pools, mode = golden
    assert torch.equal(segments, tensors["segment_id"])
    x = tensors["x"].clone().requires_grad_()
    num_routed, top_k = router.layer.num_routed, router.layer.top_k
    logits, weights, index, statistics = router(x.reshape(-1, x.shape[-1]), pools=pools)
    mask = pool_mask(logits[:, :num_routed], pools.segment_T, pools.size_N)
    assert torch.equal(~mask, tensors[f"{mode}.logits_mask"].reshape(-1, num_routed))
    assert torch.equal(index, tensors[f"{mode}.expert_indices"].reshape(-1, top_k))
    expected = tensors[f"{mode}.expert_weights"].reshape(-1, top_k)
    assert_same_numbers(weights, expected)
    counts = torch.bincount(index.flatten(), minlength=router.layer.num_experts)
    assert torch.equal(counts, tensors[f"{mode}.batch_size_per_expert"])

    total = (weights * tensors["fixed_random"].reshape(-1, top_k)).sum()
    if mode == "train":
        balance, z = document_pool_losses(
            [statistics], [router.layer], num_items_in_batch=meta["loss_div_factor"]
        )
        assert_same_numbers(balance, tensors["train.lb_loss_unscaled"])
        assert_same_numbers(z, tensors["train.z_loss_unscaled"])
        total = total + meta["router"]["lb_loss_weight"] * balance + meta["router"]["z_loss_weight"] * z
    else:
        assert statistics is None
    total.backward()
    assert_same_numbers(x.grad, tensors[f"{mode}.grad.x"])
    gradient = router.weight.grad.flatten()
    assert_same_numbers(gradient, tensors[f"{mode}.grad.router_weight"])


def test_training_step_is_the_authors():
    folder = GOLDENS / "D_train_step"
    golden = load_file(folder / "train_step.safetensors")
    step = json.loads((folder / "meta.json").read_text())["train_step"]
    model = AutoModelForCausalLM.from_pretrained(folder / "expected_hf").train()
    # The training checkpoint has rows of padding in its vocabulary, and they have a part in the softmax.
    padding = load_file(folder / "padded_rows.safetensors")
    model.resize_token_embeddings(len(golden["grad.embeddings.weight"]))
    with torch.no_grad():
        model.model.embed_tokens.weight[-len(padding["embeddings"]) :] = padding["embeddings"]
        model.lm_head.weight[-len(padding["lm_head"]) :] = padding["lm_head"]
    # Their labels are shifted already.
    labels = torch.cat([torch.full((2, 1), -100), golden["labels"][:, :-1]], dim=1)
    out = model(
        golden["input_ids"],
        labels=labels,
        document_pool_sizes=torch.tensor(step["pool_sizes_per_layer_rowmajor_docs"]),
        num_items_in_batch=int(golden["loss_div_factor"]),
    )
    assert_same_numbers(out.logits, golden["logits_full_vocab"])
    assert_same_numbers(out.ce_loss, golden["ce_loss"])
    assert_same_numbers(1e-5 * out.lm_z_loss, golden["lm_z_loss"])
    assert_same_numbers(out.aux_loss, golden["lb_loss_unscaled_per_layer"].mean())
    z = golden["router_z_loss_unscaled_per_layer"].mean()
    assert_same_numbers(out.router_z_loss, z)
    assert_same_numbers(out.loss, golden["objective_total"])

    out.loss.backward()
    hub_names = {
        "embeddings": "model.embed_tokens",
        "lm_head.norm": "model.norm",
        "attention.w_q": "self_attn.q_proj",
        "attention.w_out": "self_attn.o_proj",
        "attention_norm": "pre_attention_layernorm",
        "feed_forward_norm": "pre_feedforward_layernorm",
        "feed_forward_moe.router": "mlp.gate",
        "blocks": "model.layers",
    }
    gradients = {name: tensor for name, tensor in golden.items() if name.startswith("grad.")}
    assert len(gradients) == 11
    for name, expected in gradients.items():
        name = name.removeprefix("grad.")
        for old, new in hub_names.items():
            name = name.replace(old, new)
        gradient = model.get_parameter(name).grad.reshape(expected.shape)
        assert_same_numbers(gradient, expected, terms=TRAINING, name=name)
    for index, layer in enumerate(model.model.layers):
        gate, up = layer.mlp.experts.gate_up_proj.grad.chunk(2, dim=1)
        for w, gradient in (("w1", gate), ("w3", up), ("w2", layer.mlp.experts.down_proj.grad)):
            expected = golden[f"grad_norm_per_expert.blocks.{index}.feed_forward_moe.experts.mlp.{w}"]
            assert_same_numbers(gradient.flatten(1).norm(dim=1), expected)


class TestPools:
    @settings(deadline=None, max_examples=50)
    @given(st.integers(0, 10**6), st.integers(1, 4), st.integers(2, 9))
    def test_choice_is_the_naive_one(self, seed, num_segments, num_routed):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(20, num_routed, generator=generator)
        segment = torch.randint(0, num_segments, (20,), generator=generator)
        sizes = torch.randint(1, num_routed + 3, (num_segments,), generator=generator)
        real = torch.rand(20, generator=generator) > 0.2
        mask = pool_mask(logits, segment, sizes, real)
        for document in range(num_segments):
            total = logits[(segment == document) & real].softmax(-1).sum(0)
            ranked = sorted(range(num_routed), key=lambda e, total=total: (-total[e], e))
            expected = [e in ranked[: sizes[document]] for e in range(num_routed)]
            assert all(row == expected for row in mask[segment == document].tolist())

    def test_the_order_of_the_tokens_does_not_matter(self):
        """An accelerator adds them in another order each time; two experts here have exactly the same sum."""
        torch.manual_seed(0)
        logits = 4 * torch.randn(999, 2)
        logits = torch.cat([logits.flatten(), logits.flip(1).flatten()]).view(-1, 2)  # each token mirrored
        segments, sizes = torch.zeros(len(logits), dtype=torch.long), torch.tensor([1])
        for _ in range(20):
            order = torch.randperm(len(logits))
            assert pool_mask(logits[order], segments, sizes)[0].tolist() == [True, False]

    def test_the_likelier_of_two_experts_is_chosen_however_close(self):
        logits_TR = torch.zeros(64, 2)
        logits_TR[:32, 0] = 1e-5
        for chosen, logits in ((0, logits_TR), (1, logits_TR.flip(1))):
            mask_TR = pool_mask(logits, torch.zeros(64, dtype=torch.int64), torch.tensor([1]))
            assert mask_TR[:, chosen].all() and not mask_TR[:, 1 - chosen].any()

    def test_pool_as_large_as_the_layer_restricts_nothing(self):
        mask = pool_mask(torch.randn(6, 5), torch.zeros(6, dtype=torch.long), torch.tensor([5]))
        assert mask.all()


class TestModel:
    def test_pools_are_on_in_steps_of_training_and_off_elsewhere(self, make_model):
        model = make_model(**POOLS)
        with torch.no_grad():
            plain = model(INPUT_IDS).logits
            pooled = model(INPUT_IDS, document_pool=True).logits
            assert_other_numbers(plain, pooled)
            assert torch.equal(model(INPUT_IDS, document_pool=5).logits, pooled)
            assert torch.equal(model(INPUT_IDS, document_pool=11).logits, plain)  # no restriction
            model.train()
            torch.manual_seed(0)
            step = {"labels": INPUT_IDS}
            trained = model(INPUT_IDS, **step).logits
            torch.manual_seed(0)
            assert torch.equal(model(INPUT_IDS, **step).logits, trained)  # reproducible from a seed
            assert_other_numbers(model(INPUT_IDS, **step).logits, trained)  # and drawn anew
            assert torch.equal(model(INPUT_IDS, document_pool=False, **step).logits, plain)
            assert torch.equal(model(INPUT_IDS).logits, plain)  # without labels it is no step of training

    def test_tokens_of_a_document_use_no_expert_outside_its_pool(self, make_model):
        model = make_model()
        seen = {}
        for index, layer in enumerate(model.model.layers):
            layer.mlp.gate.register_forward_hook(lambda m, a, output, i=index: seen.update({i: output[2]}))
        model(INPUT_IDS, document_pool=4)
        segments = flatten_segments(segments_from_eos(INPUT_IDS, 1, eos_opens=True))
        for picks in seen.values():
            for document in segments.unique():
                assert len(set(picks[segments == document][:, :3].flatten().tolist())) <= 4

    def test_documents_given_in_every_way_route_alike(self, make_model):
        model = make_model()
        segments = torch.tensor([[0, 0, 0, 1, 1, 2, 2]])
        positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1]])
        ids = INPUT_IDS[:1]
        expected = model(ids, document_pool=4, document_ids=segments, position_ids=positions).logits
        same = {
            "document_ids": {"document_ids": segments * 10 + 3},
            "seq_idx": {"seq_idx": segments.int()},
            "cu_seq_lens": {"cu_seq_lens_q": torch.tensor([0, 3, 5, 7], dtype=torch.int32)},
        }
        for name, kwargs in same.items():
            logits = model(ids, document_pool=4, position_ids=positions, **kwargs).logits
            assert torch.equal(logits, expected), name
        model.config.document_boundaries = "position_ids"
        assert torch.equal(model(ids, document_pool=4, position_ids=positions).logits, expected)

    def test_lengths_may_go_through_several_rows(self, make_model):
        model, documents = make_model(), torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 1, 1, 1]])
        lengths, _ = lengths_from_segments(documents)
        expected = model(INPUT_IDS, document_pool=4, document_ids=documents).logits
        assert torch.equal(model(INPUT_IDS, document_pool=4, cu_seq_lens_q=lengths).logits, expected)

    def test_padding_has_no_say(self, make_model):
        model = make_model()
        mask = torch.ones_like(INPUT_IDS)
        mask[1, 5:] = 0
        logits = []
        for filler in (7, 50):
            ids = INPUT_IDS.clone()
            ids[1, 5:] = filler
            logits.append(model(ids, attention_mask=mask, document_pool=4).logits[mask.bool()])
        assert torch.equal(logits[0], logits[1])

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_gradient_checkpointing_sees_the_same_pools(self, make_model, use_reentrant):
        model = make_model(**POOLS).train()

        def gradients():
            model.zero_grad()
            torch.manual_seed(3)
            out = model(INPUT_IDS, labels=INPUT_IDS)
            out.loss.backward()
            return out, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

        out, expected = gradients()
        assert out.aux_loss > 0 and out.router_z_loss > 0 and out.lm_z_loss > 0
        assert_same_numbers(
            out.loss, out.ce_loss + 0.1 * out.aux_loss + 1e-3 * out.router_z_loss + 1e-5 * out.lm_z_loss
        )
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        _, checkpointed = gradients()
        for name, gradient in expected.items():
            assert_same_numbers(checkpointed[name], gradient, terms=TRAINING, name=name)

    def test_shared_rows_of_the_router_get_no_gradient_from_the_losses(self, make_model):
        model = make_model(**POOLS).train()
        out = model(INPUT_IDS, labels=INPUT_IDS)
        out.loss.backward()
        for layer in model.model.layers:
            assert layer.mlp.gate.weight.grad[-1].abs().sum() == 0
            assert layer.mlp.gate.weight.grad[:-1].abs().sum() > 0

    def test_compiles_as_one_graph(self, make_model):
        model = make_model()
        expected = model(INPUT_IDS, document_pool=4).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert_same_numbers(compiled(INPUT_IDS, document_pool=4).logits, expected)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"document_pool_min": 2, "document_pool_max": 8}, "fewer than the 3 routed experts"),
            ({"document_pool_min": 8}, "give both or neither"),
            ({"document_pool_min": 8, "document_pool_max": 4}, "larger than"),
            ({"document_pool_eval": 1}, "fewer than the 3"),
        ],
    )
    def test_pools_that_cannot_be_are_refused(self, make_model, changes, message):
        with pytest.raises(Exception, match=message):
            make_model(**changes)

    def test_calls_that_cannot_be_are_refused(self, make_model):
        model = make_model()
        with pytest.raises(ValueError, match="smaller than the 3 routed experts"):
            model(INPUT_IDS, document_pool=2)
        with pytest.raises(ValueError, match="needs `config.document_pool_eval`"):
            model(INPUT_IDS, document_pool=True)
        with pytest.raises(ValueError, match="give `document_ids`"):
            model(inputs_embeds=model.model.embed_tokens(INPUT_IDS), document_pool=4)
        with pytest.raises(ValueError, match="needs `config.document_pool_min` and `document_pool_max`"):
            make_model().train()(INPUT_IDS, document_pool=True)
        cache = model(INPUT_IDS, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="behind tokens in a cache"):
            model(INPUT_IDS, past_key_values=cache, document_pool=4)

    def test_generating_in_training_mode_is_without_pools(self, make_model):
        # As sampling for reinforcement learning does: a pool would need the whole document.
        model = make_model(**POOLS, attention_within_documents=True)
        kwargs = {"max_new_tokens": 3, "do_sample": False}
        expected = model.generate(INPUT_IDS, **kwargs)
        assert torch.equal(model.train().generate(INPUT_IDS, **kwargs), expected)

    def test_settings_survive_a_round_trip(self, make_model, tmp_path):
        make_model(**POOLS, balance_loss_coef=0.2).save_pretrained(tmp_path)
        config = AutoModelForCausalLM.from_pretrained(tmp_path).config
        assert {name: getattr(config, name) for name in POOLS} == POOLS
        assert config.balance_loss_coef == 0.2


_TWO_RANKS = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers_emo import EmoForCausalLM

folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
data = torch.load(f"{folder}/data.pt")
ids, sizes = data["ids"][2 * rank : 2 * rank + 2], data["sizes"][rank]
results = {}
for mode, kwargs in (("mean", {}), ("items", {"num_items_in_batch": data["items"]})):
    model = EmoForCausalLM.from_pretrained(folder).train()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    out = wrapped(ids, labels=ids, document_pool_sizes=sizes, **kwargs)
    # With a number of items losses are shares of a sum, which the Trainer multiplies by the number of ranks.
    scale = 2 if kwargs else 1
    (out.loss * scale).backward()
    aux = out.aux_loss.detach().clone() * scale
    dist.all_reduce(aux)
    results[mode] = {"aux": aux / 2, "grads": {n: p.grad for n, p in model.named_parameters()}}
if rank == 0:
    torch.save(results, f"{folder}/results.pt")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """A model, a batch, sizes of pools, and what two ranks make of them in both ways to average."""
    folder = tmp_path_factory.mktemp("ranks")
    model = tiny_model(**POOLS).train()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 96, (4, 12), generator=generator)
    ids[:, 5] = 1  # two documents a row
    sizes = torch.randint(3, 12, (3, 8), generator=generator)
    model.save_pretrained(folder)
    torch.save({"ids": ids, "sizes": [sizes[:, :4], sizes[:, 4:]], "items": 4 * 11}, folder / "data.pt")
    ranks = [fresh_processes.start(_TWO_RANKS, str(folder), str(rank)) for rank in range(2)]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=300)
            assert rank.returncode == 0, errors
    finally:
        for rank in ranks:
            rank.kill()
    return model, ids, sizes, torch.load(folder / "results.pt")


@pytest.mark.parametrize("mode", ["mean", "items"])
def test_two_ranks_give_the_balance_and_gradients_of_the_joined_batch(two_ranks, mode):
    model, ids, sizes, results = two_ranks
    result, items = results[mode], 4 * 11 if mode == "items" else None
    model.zero_grad()
    out = model(ids, labels=ids, document_pool_sizes=sizes, num_items_in_batch=items)
    out.loss.backward()
    assert_same_numbers(result["aux"], out.aux_loss.detach())
    for name, parameter in model.named_parameters():
        assert_same_numbers(result["grads"][name], parameter.grad, terms=TRAINING, name=name)
