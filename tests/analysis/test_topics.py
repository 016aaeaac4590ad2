"""Topics in the routers, and experts chosen from a prompt."""

import pytest
import torch
from tolerances import ROUTER_LOGIT, assert_same_scores, same_number
from transformers_emo import select_experts
from transformers_emo.analysis import document_losses, mean_routing, plot_topics, prompt_pools, topic_cosine


@pytest.fixture
def documents():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 96, (length,), generator=generator) for length in (9, 4, 12)]


def naive_routing(model, documents, routed):
    """Mean probabilities, one token after the other."""
    total, tokens = 0, 0
    for ids in documents:
        logits = model(ids[None], output_router_logits=True).router_logits
        for token in range(len(ids)):
            total = total + torch.cat([layer[token, :routed].double().softmax(-1) for layer in logits])
            tokens += 1
    return (total / tokens).detach()


@pytest.mark.parametrize("batch_tokens", [1, 2048])
def test_routing_is_the_mean_over_tokens(make_model, documents, batch_tokens):
    model = make_model()
    routing_P = mean_routing(model, documents, batch_tokens=batch_tokens)
    assert routing_P.shape == (3 * 11,)
    assert_same_scores([routing_P.tolist()], [naive_routing(model, documents, 11).tolist()])


def test_dense_layers_are_left_out(make_model, documents):
    model = make_model(num_experts_per_layer=[12, 0, 8], dense_intermediate_size=40)
    routing_P = mean_routing(model, documents)
    assert routing_P.shape == (11 + 7,) and float(routing_P.sum()) == same_number(2, terms=11 + 7)


def test_cosine_of_domains(make_model, documents, tmp_path):
    model = make_model()
    domains = {"a": documents[:1], "b": documents[1:2], "c": documents[2:]}
    topics = topic_cosine(model, domains, progress=False)
    routing = [naive_routing(model, one, 11) for one in domains.values()]
    pairs = []
    for i in range(3):
        for j in range(3):
            cosine = float(routing[i] @ routing[j] / routing[i].norm() / routing[j].norm())
            assert float(topics.cosine_MM[i, j]) == same_number(cosine, scale=ROUTER_LOGIT)
            pairs += [cosine] if i != j else []
    assert topics.mean == same_number(sum(pairs) / 6, scale=ROUTER_LOGIT)
    plot_topics({"one": topics, "two": topics}, tmp_path / "topics.png")
    assert (tmp_path / "topics.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="at least 2"):
        topic_cosine(model, {"a": documents}, progress=False)


def test_experts_are_chosen_from_each_prompt(make_model, documents):
    model = make_model()
    pools = prompt_pools(
        model, documents, num_experts=[6, 4], prompt_lengths=[3, 5], num_following=4, progress=False
    )
    expected = [(p, k) for p in (3, 5) for k in (12, 6, 4)]
    assert [(pool.prompt_length, pool.num_experts) for pool in pools] == expected
    long = [documents[0], documents[2]]  # the other has no 9 tokens
    for pool in pools:
        n = pool.prompt_length
        assert pool.losses.tokens_N.tolist() == [4, 4]
        for ids, loss in zip(long, pool.losses.loss_N.tolist(), strict=True):
            subset = None
            if pool.method != "full":
                subset = select_experts(model, input_ids=[ids[None, :n]], num_experts=pool.num_experts)
            alone = document_losses(model, [ids[: n + 4]], expert_subset=subset, after=n)
            assert loss == same_number(float(alone.loss_N))


def test_prompts_need_documents_that_are_long_enough(make_model, documents):
    with pytest.raises(ValueError, match="None of the 3 documents has 320 tokens"):
        prompt_pools(make_model(), documents, num_experts=[6], progress=False)
