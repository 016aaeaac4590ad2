"""Document pools: segments, choices and losses, against the authors' training code and naive loops."""

import json
import subprocess
import sys
from itertools import groupby, product
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDENS
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AttentionInterface, AutoModelForCausalLM, StaticCache, modeling_flash_attention_utils
from transformers_emo import EmoConfig
from transformers_emo.configuration import LayerExperts
from transformers_emo.modeling_emo import (
    draw_pool_sizes,
    flatten_segments,
    lengths_from_segments,
    pool_mask,
    segments_from_eos,
    segments_from_lengths,
    segments_from_positions,
)
from transformers_emo.modeling_emo.document_pool import DocumentPools
from transformers_emo.modeling_emo.losses import document_pool_losses
from transformers_emo.modeling_emo.modeling_emo import EmoTopKRouter

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
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=0)
    counts = torch.bincount(index.flatten(), minlength=router.layer.num_experts)
    assert torch.equal(counts, tensors[f"{mode}.batch_size_per_expert"])

    total = (weights * tensors["fixed_random"].reshape(-1, top_k)).sum()
    if mode == "train":
        balance, z = document_pool_losses(
            [statistics], [router.layer], num_items_in_batch=meta["loss_div_factor"]
        )
        torch.testing.assert_close(balance, tensors["train.lb_loss_unscaled"], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(z, tensors["train.z_loss_unscaled"], atol=1e-6, rtol=1e-6)
        total = total + meta["router"]["lb_loss_weight"] * balance + meta["router"]["z_loss_weight"] * z
    else:
        assert statistics is None
    total.backward()
    torch.testing.assert_close(x.grad, tensors[f"{mode}.grad.x"], atol=1e-5, rtol=0)
    gradient = router.weight.grad.flatten()
    torch.testing.assert_close(gradient, tensors[f"{mode}.grad.router_weight"], atol=1e-5, rtol=0)


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
    torch.testing.assert_close(out.logits, golden["logits_full_vocab"], atol=1e-5, rtol=0)
    torch.testing.assert_close(out.ce_loss, golden["ce_loss"], atol=1e-5, rtol=0)
    torch.testing.assert_close(1e-5 * out.lm_z_loss, golden["lm_z_loss"], atol=1e-6, rtol=0)
    torch.testing.assert_close(out.aux_loss, golden["lb_loss_unscaled_per_layer"].mean(), atol=1e-5, rtol=0)
    z = golden["router_z_loss_unscaled_per_layer"].mean()
    torch.testing.assert_close(out.router_z_loss, z, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.loss, golden["objective_total"], atol=1e-5, rtol=0)

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
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=0, msg=name)
    for index, layer in enumerate(model.model.layers):
        gate, up = layer.mlp.experts.gate_up_proj.grad.chunk(2, dim=1)
        for w, gradient in (("w1", gate), ("w3", up), ("w2", layer.mlp.experts.down_proj.grad)):
            expected = golden[f"grad_norm_per_expert.blocks.{index}.feed_forward_moe.experts.mlp.{w}"]
            torch.testing.assert_close(gradient.flatten(1).norm(dim=1), expected, atol=1e-5, rtol=0)


class TestSegments:
    def test_example_of_the_specification(self):
        ids = torch.tensor([[1, 2, 9, 3, 4, 9, 5, 6]])
        assert segments_from_eos(ids, 9, eos_opens=True).tolist() == [[0, 0, 1, 1, 1, 2, 2, 2]]
        assert segments_from_eos(ids, 9, eos_opens=False).tolist() == [[0, 0, 0, 1, 1, 1, 2, 2]]

    @pytest.mark.parametrize(
        ("ids", "opens"),
        [
            ([9, 1, 2], [0, 0, 0]),  # an EOS at position 0 opens nothing new
            ([1, 2, 9], [0, 0, 1]),  # a trailing one is a segment of one token
            ([1, 9, 9, 2], [0, 1, 2, 2]),  # so is the first of two
            ([9, 9], [0, 1]),
        ],
    )
    def test_edges(self, ids, opens):
        assert segments_from_eos(torch.tensor([ids]), [9], eos_opens=True).tolist() == [opens]

    @given(st.lists(st.integers(0, 3), min_size=1, max_size=20))
    def test_both_conventions_are_the_naive_ones(self, ids):
        opens, closes, current = [0], [0], [0, 0]
        for position in range(1, len(ids)):
            current[0] += ids[position] == 0
            current[1] += ids[position - 1] == 0
            opens.append(current[0])
            closes.append(current[1])
        tokens = torch.tensor([ids])
        assert segments_from_eos(tokens, 0, eos_opens=True).tolist() == [opens]
        assert segments_from_eos(tokens, 0, eos_opens=False).tolist() == [closes]

    @given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    def test_lengths_and_positions_agree(self, lengths):
        expected = [index for index, length in enumerate(lengths) for _ in range(length)]
        positions = torch.tensor([[p for length in lengths for p in range(length)]])
        assert segments_from_positions(positions).tolist() == [expected]
        cumulative = torch.tensor([0, *lengths]).cumsum(0)
        assert segments_from_lengths(cumulative, sum(lengths)).tolist() == [expected]

    def test_rows_never_share_a_document(self):
        segments = torch.tensor([[0, 0, 1], [1, 1, 2], [0, 0, 0]])
        assert flatten_segments(segments).tolist() == [0, 0, 1, 2, 2, 3, 4, 4, 4]

    @given(st.data(), st.integers(1, 3), st.integers(1, 8))
    def test_lengths_are_those_of_a_naive_loop(self, data, rows, columns):
        numbers = st.lists(st.integers(0, 2), min_size=columns, max_size=columns)
        segments = data.draw(st.lists(numbers, min_size=rows, max_size=rows))
        ends = st.tuples(st.integers(0, columns), st.integers(0, columns))
        mask = [
            [first <= c < last for c in range(columns)]
            for first, last in data.draw(st.tuples(*[ends] * rows))
        ]
        # a row ends a document, and so does a new number or the edge of padding
        tokens = [(row, segments[row][c], mask[row][c]) for row in range(rows) for c in range(columns)]
        expected = [len(list(run)) for _, run in groupby(tokens)]
        cumulative, longest = lengths_from_segments(torch.tensor(segments), torch.tensor(mask).long())
        assert cumulative.dtype == torch.int32 and cumulative[0] == 0
        assert cumulative.diff().tolist() == expected
        assert type(longest) is int and longest == max(expected)

    @given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    def test_lengths_and_segments_are_inverse(self, lengths):
        cumulative = torch.tensor([0, *lengths]).cumsum(0)
        back, longest = lengths_from_segments(segments_from_lengths(cumulative, sum(lengths)))
        assert back.tolist() == cumulative.tolist() and longest == max(lengths)

    @pytest.mark.parametrize(
        ("segments", "mask", "message"),
        [
            ([[0, 0, 0, 1]], [[1, 0, 1, 1]], "inside a document"),
            ([[0, 0, 0]], [[1, 1]], r"shape \(1, 2\), expected \(1, 3\)"),
        ],
    )
    def test_masks_that_lengths_cannot_say_are_refused(self, segments, mask, message):
        with pytest.raises(ValueError, match=message):
            lengths_from_segments(torch.tensor(segments), torch.tensor(mask))


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

    def test_pool_as_large_as_the_layer_restricts_nothing(self):
        mask = pool_mask(torch.randn(6, 5), torch.zeros(6, dtype=torch.long), torch.tensor([5]))
        assert mask.all()

    def test_sizes_are_uniform_reproducible_and_differ_between_ranks(self):
        def draw(rank):
            return draw_pool_sizes((1, 4000), 3, 6, rank=rank, generator=torch.Generator().manual_seed(1))

        for rank in (0, 1, 7):
            share = torch.bincount(draw(rank).flatten(), minlength=7)[3:] / 4000
            assert (share - 0.25).abs().max() < 0.04
        assert torch.equal(draw(1), draw(1))
        assert (draw(0) == draw(1)).float().mean() < 0.5

    @pytest.mark.parametrize(("smallest", "largest"), [(0, 3), (4, 3)])
    def test_impossible_sizes_are_refused(self, smallest, largest):
        with pytest.raises(ValueError, match="impossible"):
            draw_pool_sizes((1, 1), smallest, largest)


class TestModel:
    def test_pools_are_on_in_training_and_off_elsewhere(self, make_model):
        model = make_model(**POOLS)
        with torch.no_grad():
            plain = model(INPUT_IDS).logits
            pooled = model(INPUT_IDS, document_pool=True).logits
            assert not torch.equal(plain, pooled)
            assert torch.equal(model(INPUT_IDS, document_pool=5).logits, pooled)
            assert torch.equal(model(INPUT_IDS, document_pool=11).logits, plain)  # no restriction
            model.train()
            torch.manual_seed(0)
            trained = model(INPUT_IDS).logits
            torch.manual_seed(0)
            assert torch.equal(model(INPUT_IDS).logits, trained)  # reproducible from a seed
            assert not torch.equal(model(INPUT_IDS).logits, trained)  # and drawn anew
            assert torch.equal(model(INPUT_IDS, document_pool=False).logits, plain)

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
        torch.testing.assert_close(
            out.loss, out.ce_loss + 0.1 * out.aux_loss + 1e-3 * out.router_z_loss + 1e-5 * out.lm_z_loss
        )
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        _, checkpointed = gradients()
        for name, gradient in expected.items():
            torch.testing.assert_close(checkpointed[name], gradient, msg=name)

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
        torch.testing.assert_close(compiled(INPUT_IDS, document_pool=4).logits, expected)

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


class TestAttentionWithinDocuments:
    """A packed row gives the logits of each document alone."""

    DOCUMENTS = ([5, 17, 1], [33, 8, 90, 44, 1], [3, 71])  # an EOS (1) closes its document

    @pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
    def test_packed_logits_are_those_of_each_document_alone(self, make_model, attention):
        model = make_model(hidden_size=64)
        model.set_attn_implementation(attention)
        packed = torch.tensor([sum(self.DOCUMENTS, [])])
        with torch.no_grad():
            # Positions go on from document to document, but rotary embeddings only know distances.
            logits = model(packed, attention_within_documents=True, use_cache=False).logits[0]
            for document, part in zip(self.DOCUMENTS, logits.split([3, 5, 2]), strict=True):
                alone = model(torch.tensor([document])).logits[0]
                torch.testing.assert_close(part, alone, atol=1e-4, rtol=1e-4)
            plain = model(packed, use_cache=False).logits[0]
        assert not torch.allclose(plain[-1], logits[-1], atol=1e-3)

    def test_it_is_a_switch_of_its_own_and_on_in_training(self, make_model):
        model = make_model(attention_within_documents=True)
        packed = torch.tensor([sum(self.DOCUMENTS, [])])
        with torch.no_grad():
            plain, within = model(packed).logits, model(packed, attention_within_documents=True).logits
            assert not torch.allclose(plain, within, atol=1e-3)
            assert torch.equal(model.train()(packed).logits, within)
            assert torch.equal(model(packed, attention_within_documents=False).logits, plain)

    def test_segments_of_routing_given_by_hand_make_the_same_attention(self, make_model):
        model = make_model()
        packed = torch.tensor([[5, 17, 1, 1, 8, 90, 1, 3, 71, 1]])  # with a doubled and a trailing EOS
        given = segments_from_eos(packed, 1, eos_opens=True)
        with torch.no_grad():
            logits = model(packed, attention_within_documents=True).logits
            assert torch.equal(
                model(packed, attention_within_documents=True, document_ids=given).logits, logits
            )

    def test_tokens_in_a_cache_are_refused(self, make_model):
        model = make_model()
        cache = model(INPUT_IDS, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="behind tokens in a cache"):
            model(INPUT_IDS, past_key_values=cache, attention_within_documents=True)

    def test_padding_and_given_documents_compose(self, make_model):
        model = make_model()
        packed = torch.tensor([[0, 0, 5, 17, 33, 8, 90]])
        mask = (packed != 0).long()
        documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
        kwargs = {"attention_mask": mask, "document_ids": documents, "attention_within_documents": True}
        with torch.no_grad():
            logits = model(packed, **kwargs).logits[0, 4:]
            alone = model(torch.tensor([[33, 8, 90]])).logits[0]
        torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)

    def test_position_ids_may_be_one_row_for_all(self, make_model):
        model = make_model(document_boundaries="position_ids")
        positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
        kwargs = {"attention_within_documents": True}
        with torch.no_grad():
            expected = model(INPUT_IDS, position_ids=positions.expand(2, -1), **kwargs).logits
            assert torch.equal(model(INPUT_IDS, position_ids=positions, **kwargs).logits, expected)

    def test_an_attention_that_takes_no_mask_is_refused(self, make_model):
        AttentionInterface.register("maskless", lambda *args, **kwargs: None)
        model = make_model(attn_implementation="maskless")
        with pytest.raises(ValueError, match="'maskless' takes no mask"):
            model(INPUT_IDS, attention_within_documents=True)


class TestFlashAttentionWithinDocuments:
    """Transformers' own flash attention, over a kernel written in plain PyTorch."""

    # Padding (0) on the left, on both sides, on the right, nowhere; EOS (1) in the last place and doubled.
    IDS = torch.tensor(
        [
            [0, 0, 5, 17, 1, 33, 8, 1],
            [0, 3, 71, 1, 1, 44, 0, 0],
            [9, 12, 1, 0, 0, 0, 0, 0],
            [9, 5, 1, 2, 33, 8, 90, 27],
        ]
    )
    MASK = (IDS != 0).long()
    # row, first, last + 1
    DOCUMENTS = ((0, 2, 5), (0, 5, 8), (1, 1, 4), (1, 4, 5), (1, 5, 6), (2, 0, 3), (3, 0, 3), (3, 3, 8))
    RUNS = [0, 2, 5, 8, 9, 12, 13, 14, 16, 19, 24, 27, 32]  # with those of padding

    @pytest.fixture
    def calls(self, monkeypatch):
        """Stand in for the flash-attn 3 package; the boundaries that its kernel is called with."""
        calls = []

        def kernel(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False
        ):
            if not torch.compiler.is_compiling():
                lengths = cu_seqlens_q.diff()
                assert (
                    cu_seqlens_q is cu_seqlens_k and cu_seqlens_q.dtype == torch.int32 and lengths.min() > 0
                )
                assert cu_seqlens_q[0] == 0 and cu_seqlens_q[-1] == len(q) == len(k) == len(v)
                assert type(max_seqlen_q) is int and max_seqlen_q == max_seqlen_k == lengths.max()
                calls.append(cu_seqlens_q)
            document_T = torch.searchsorted(cu_seqlens_q[1:], torch.arange(len(q)), right=True)
            mask_TT = document_T[:, None] == document_T
            q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, v))  # (T, heads, head size)
            output = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask_TT.tril() if causal else mask_TT, scale=softmax_scale, enable_gqa=True
            )
            return output.transpose(0, 1)

        package = ModuleType("flash_attn_interface")
        package.flash_attn_varlen_func = kernel
        package.flash_attn_func = package.flash_attn_with_kvcache = None
        monkeypatch.setitem(sys.modules, package.__name__, package)
        monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
        return calls

    @pytest.fixture
    def make(self, make_model, calls):
        def make(**changes):
            model = make_model(num_key_value_heads=2, **changes)
            # `set_attn_implementation` would ask for a GPU.
            model.config._attn_implementation = "flash_attention_3"
            return model

        return make

    def test_packed_logits_and_gradients_are_those_of_each_document_alone(self, make, make_model, calls):
        model, alone = make(), make_model(num_key_value_heads=2)
        weight = torch.randn(*self.IDS.shape, 96, generator=torch.Generator().manual_seed(0))
        logits = model(self.IDS, attention_mask=self.MASK, attention_within_documents=True).logits
        (logits * weight)[self.MASK.bool()].sum().backward()
        for row, first, last in self.DOCUMENTS:
            part = alone(
                self.IDS[row : row + 1, first:last], position_ids=torch.arange(first, last)[None]
            ).logits
            torch.testing.assert_close(logits[row, first:last], part[0], atol=1e-5, rtol=1e-5)
            (part[0] * weight[row, first:last]).sum().backward()
        for (name, parameter), (_, expected) in zip(
            model.named_parameters(), alone.named_parameters(), strict=True
        ):
            torch.testing.assert_close(parameter.grad, expected.grad, atol=1e-4, rtol=1e-4, msg=name)
        assert [call.tolist() for call in calls] == [self.RUNS] * 3

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_it_computes_what_a_mask_does(self, make, attention):
        model, given = make(), self.MASK.cumsum(1) // 3
        kwargs = {"attention_mask": self.MASK, "document_ids": given, "attention_within_documents": True}
        with torch.no_grad():
            flash = model(self.IDS, **kwargs).logits
            model.set_attn_implementation(attention)
            expected = model(self.IDS, **kwargs).logits
        real = self.MASK.bool()
        torch.testing.assert_close(flash[real], expected[real], atol=1e-5, rtol=1e-5)

    def test_rows_without_padding_need_no_mask(self, make, calls):
        make().train()(self.IDS[3:], attention_within_documents=True, use_cache=True)
        assert calls[0].tolist() == [0, 3, 8]

    def test_positions_that_start_again_part_documents_too(self, make, calls):
        positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
        kwargs = {"attention_within_documents": True, "position_ids": positions, "use_cache": False}
        model = make()
        with torch.no_grad():
            flash = model(self.IDS[3:], **kwargs).logits
            model.set_attn_implementation("sdpa")
            torch.testing.assert_close(model(self.IDS[3:], **kwargs).logits, flash, atol=1e-5, rtol=1e-5)
        assert calls[0].tolist() == [0, 3, 5, 8]

    @pytest.mark.parametrize("within", [False, True])
    def test_lengths_of_the_caller_are_left_as_they_are(self, make, make_model, calls, within):
        lengths = torch.tensor([0, 2, 8], dtype=torch.int32)  # other documents than the EOS makes
        kwargs = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 6, "max_length_k": 6}
        with torch.no_grad():
            logits = make()(self.IDS[3:], attention_within_documents=within, **kwargs).logits[0]
            alone = make_model(num_key_value_heads=2)(self.IDS[3:, 2:]).logits[0]
        assert all(call is lengths for call in calls)
        # Positions differ by two, but rotary embeddings only know distances.
        torch.testing.assert_close(logits[2:], alone, atol=1e-5, rtol=1e-5)

    def test_lengths_of_the_caller_hold_beside_a_mask(self, make, calls):
        # Given both, Transformers would follow the mask alone.
        lengths = torch.tensor([0, 2, 8], dtype=torch.int32)
        kwargs = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 6, "max_length_k": 6}
        mask = torch.tensor([[1] * 7 + [0]])
        make()(self.IDS[3:], attention_mask=mask, attention_within_documents=True, **kwargs)
        assert calls[0].tolist() == [0, 2, 7, 8]

    def test_gradient_checkpointing_attends_alike(self, make, calls):
        model = make().train()
        model.gradient_checkpointing_enable()
        model(
            self.IDS, labels=self.IDS, attention_mask=self.MASK, attention_within_documents=True
        ).loss.backward()
        assert [call.tolist() for call in calls] == [self.RUNS] * 6

    def test_compiles_and_in_one_graph_with_lengths_of_the_caller(self, make):
        model = make().bfloat16()  # of float32 Transformers logs that it casts, which no graph can hold
        kwargs = {"attention_mask": self.MASK, "attention_within_documents": True, "use_cache": False}
        with torch.no_grad():
            expected = model(self.IDS, **kwargs).logits
            compiled = torch.compile(model, backend="eager")(self.IDS, **kwargs).logits
            torch.testing.assert_close(compiled, expected)
            lengths, longest = lengths_from_segments(self.MASK.cumsum(1) // 3)
            kwargs |= {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths}
            kwargs |= {"max_length_q": longest, "max_length_k": longest, "attention_mask": None}
            expected = model(self.IDS, **kwargs).logits
            torch.compiler.reset()
            compiled = torch.compile(model, fullgraph=True, backend="eager")(self.IDS, **kwargs).logits
            torch.testing.assert_close(compiled, expected)

    def test_a_static_cache_is_refused(self, make):
        model = make()
        cache = StaticCache(model.config, max_cache_len=16)
        with pytest.raises(ValueError, match="static cache"):
            model(self.IDS, past_key_values=cache, attention_within_documents=True)


_TWO_RANKS = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers_emo import EmoForCausalLM

folder, mode = sys.argv[1:]
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
model = EmoForCausalLM.from_pretrained(folder).train()
data = torch.load(f"{folder}/data.pt")
ids, sizes = data["ids"][2 * rank : 2 * rank + 2], data["sizes"][rank]
kwargs = {"num_items_in_batch": data["items"]} if mode == "items" else {}
wrapped = DistributedDataParallel(model, find_unused_parameters=True)
out = wrapped(ids, labels=ids, document_pool_sizes=sizes, **kwargs)
# With a number of items losses are shares of a sum, which the Trainer multiplies by the number of ranks.
scale = dist.get_world_size() if mode == "items" else 1
(out.loss * scale).backward()
aux = out.aux_loss.detach().clone() * scale
dist.all_reduce(aux)
if rank == 0:
    result = {"aux": aux / dist.get_world_size(), "grads": {n: p.grad for n, p in model.named_parameters()}}
    torch.save(result, f"{folder}/result.pt")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("mode", ["mean", "items"])
def test_two_ranks_give_the_balance_and_gradients_of_the_joined_batch(make_model, tmp_path, mode):
    torch.manual_seed(0)
    model = make_model(**POOLS).train()
    ids = torch.randint(2, 96, (4, 12))
    ids[:, 5] = 1  # two documents a row
    sizes = torch.randint(3, 12, (3, 8))
    items = 4 * 11 if mode == "items" else None
    out = model(ids, labels=ids, document_pool_sizes=sizes, num_items_in_batch=items)
    out.loss.backward()

    model.save_pretrained(tmp_path)
    data = {"ids": ids, "sizes": [sizes[:, :4], sizes[:, 4:]], "items": items}
    torch.save(data, tmp_path / "data.pt")
    script = tmp_path / "two_ranks.py"
    script.write_text(_TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*command, str(script), str(tmp_path), mode], check=True, capture_output=True, timeout=120)
    result = torch.load(tmp_path / "result.pt")
    torch.testing.assert_close(result["aux"], out.aux_loss.detach(), atol=1e-6, rtol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(result["grads"][name], parameter.grad, atol=1e-6, rtol=1e-4, msg=name)
