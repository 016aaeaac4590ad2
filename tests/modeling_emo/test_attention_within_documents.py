"""Attention that is kept within documents, with every kind of attention."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from tolerances import STORED, TRAINING, assert_other_numbers, assert_same_numbers
from transformers import AttentionInterface, StaticCache, modeling_flash_attention_utils
from transformers_emo.modeling_emo import (
    lengths_from_segments,
    segments_from_eos,
)

INPUT_IDS = torch.tensor([[5, 17, 1, 2, 33, 8, 90], [44, 44, 3, 71, 1, 1, 28]])
POOLS = {"document_pool_min": 3, "document_pool_max": 11, "document_pool_eval": 5}


class TestAttentionWithinDocuments:
    """A packed row gives the logits of each document alone."""

    DOCUMENTS = ([5, 17, 1], [33, 8, 90, 44, 1], [3, 71])  # an EOS (1) closes its document

    @pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
    def test_packed_logits_are_those_of_each_document_alone(self, make_model, attention):
        model = make_model(hidden_size=64)
        model.set_attn_implementation(attention)
        packed = torch.tensor([sum(self.DOCUMENTS, [])])
        # Flex attention is compiled by a slow test: here it would be so for every shape.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            # Positions go on from document to document, but rotary embeddings only know distances.
            logits = model(packed, attention_within_documents=True, use_cache=False).logits[0]
            for document, part in zip(self.DOCUMENTS, logits.split([3, 5, 2]), strict=True):
                alone = model(torch.tensor([document])).logits[0]
                assert_same_numbers(part, alone)
            plain = model(packed, use_cache=False).logits[0]
        assert_other_numbers(plain[-1], logits[-1])

    def test_it_is_a_switch_of_its_own_and_on_in_training(self, make_model):
        model = make_model(attention_within_documents=True)
        packed = torch.tensor([sum(self.DOCUMENTS, [])])
        with torch.no_grad():
            plain, within = model(packed).logits, model(packed, attention_within_documents=True).logits
            assert_other_numbers(plain, within)
            step = {"labels": packed}
            assert torch.equal(model.train()(packed, **step).logits, within)
            assert torch.equal(model(packed, attention_within_documents=False, **step).logits, plain)
            assert torch.equal(model(packed).logits, plain)  # without labels it is no step of training

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
        assert_same_numbers(logits, alone)

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
            assert_same_numbers(logits[row, first:last], part[0])
            (part[0] * weight[row, first:last]).sum().backward()
        for (name, parameter), (_, expected) in zip(
            model.named_parameters(), alone.named_parameters(), strict=True
        ):
            assert_same_numbers(parameter.grad, expected.grad, terms=TRAINING, name=name)
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
        assert_same_numbers(flash[real], expected[real])

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
            assert_same_numbers(model(self.IDS[3:], **kwargs).logits, flash)
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
        assert_same_numbers(logits[2:], alone)

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
            assert_same_numbers(compiled, expected, terms=STORED)
            lengths, longest = lengths_from_segments(self.MASK.cumsum(1) // 3)
            kwargs |= {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths}
            kwargs |= {"max_length_q": longest, "max_length_k": longest, "attention_mask": None}
            expected = model(self.IDS, **kwargs).logits
            torch.compiler.reset()
            compiled = torch.compile(model, fullgraph=True, backend="eager")(self.IDS, **kwargs).logits
            assert_same_numbers(compiled, expected, terms=STORED)

    def test_a_static_cache_is_refused(self, make):
        model = make()
        cache = StaticCache(model.config, max_cache_len=16)
        with pytest.raises(ValueError, match="static cache"):
            model(self.IDS, past_key_values=cache, attention_within_documents=True)
