"""Write the model cards of the eight released models, which stay on the Hub, from one table of facts.

    python examples/released_cards.py [OUT]

Sizes are counted by the network itself. All other numbers are the authors': their paper
(https://arxiv.org/abs/2605.06663), their repository (https://github.com/allenai/EMO) and their cards.
"""

import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from transformers_emo import EmoConfig, EmoForCausalLM

CARDS = Path(__file__).parents[1] / "model_cards"
PAPER = "[the paper](https://arxiv.org/abs/2605.06663)"
LAYERS, DENSE_WIDTH = 16, 8192
SUBSETS = (128, 64, 32, 16, 8)  # experts kept of each layer, shared one included, as in the paper

POOLS = "document pools of U(8, 128) routed experts, drawn for each layer and document"
STANDARD = "as a standard mixture of experts, without document pools"
RECIPE = (
    "AdamW (0.9, 0.95), weight decay 0.1 on all but the input embedding, learning rate 4e-3, 2,000 warm-up "
    "steps, cosine to 10 %, gradients clipped at 1.0, steps of 1,024 x 4,096 tokens, balance loss 0.1"
)
POOR = (
    "Do not expect a small subset of it to stay good: the paper finds that experts trained without document "
    "pools group by kinds of words and not by topics. "
)


@dataclass(frozen=True)
class Model:
    """What is particular to a released model.

    Args:
        name (`str`): of its repository under `allenai/`.
        experts (`int`): in each layer, shared one included; 0 for the dense model.
        pools (`tuple[str, ...]`): the stages of training with document pools.
        what (`str`): what it is, as the rest of a sentence.
        training (`str`): its stages.
        results (`str`): about its results.
        scores (`tuple[str, ...]`): MMLU / MMLU-Pro / GSM8K before fine-tuning, then after, for each of
            `SUBSETS`, as the paper gives them.
    """

    name: str
    experts: int
    pools: tuple[str, ...]
    what: str
    training: str
    results: str
    scores: tuple[str, ...] = ()

    @property
    def repo(self) -> str:
        """Its repository on the Hub."""
        return f"allenai/{self.name}"


MODELS = (
    Model(
        "Emo_1b14b_1T",
        128,
        ("pretraining", "annealing"),
        "the main EMO model: experts group by topic, so that a subset chosen for a domain keeps most of the "
        "quality there",
        f"1T tokens with {POOLS}; then 50B tokens, also with pools, learning rate linear to 0",
        f"What {PAPER} reports by experts kept, chosen layer by layer for each task. `StdMoE_1b14b_1T` is "
        "the same without pools.",
        (
            "42.8 / 18.5 / 12.0 | 43.6 / 20.4 / 27.8",
            "42.5 / 18.2 / 11.0 | 43.3 / 20.0 / 27.1",
            "41.4 / 17.6 / 11.7 | 41.7 / 19.5 / 27.5",
            "39.9 / 16.6 / 12.2 | 40.1 / 17.5 / 28.3",
            "36.1 / 14.7 / 6.9 | 37.3 / 15.6 / 23.3",
        ),
    ),
    Model(
        "StdMoE_1b14b_1T",
        128,
        (),
        "the standard mixture of experts that `Emo_1b14b_1T` is compared with: the same network, trained "
        "without document pools",
        f"1T tokens {STANDARD}; then 50B tokens, also without, learning rate linear to 0",
        f"What {PAPER} reports by experts kept, chosen layer by layer for each task. `Emo_1b14b_1T` keeps "
        "39.9 of MMLU with 16 experts.",
        (
            "42.4 / 19.3 / 13.9 | 43.0 / 21.1 / 29.3",
            "39.4 / 16.8 / 4.9 | 40.5 / 18.9 / 26.3",
            "30.8 / 13.2 / 2.9 | 34.2 / 15.0 / 22.4",
            "24.6 / 9.9 / 2.4 | 26.8 / 10.6 / 16.4",
            "22.7 / 9.5 / 2.3 | 25.2 / 10.3 / 4.5",
        ),
    ),
    Model(
        "Emo_1b14b_130B",
        128,
        ("pretraining",),
        "EMO trained on fewer tokens, for the paper's ablations",
        f"130B tokens with {POOLS}; no annealing",
        f"Its numbers are in {PAPER}; the table in the card of `Emo_1b14b_1T` is not about this model.",
    ),
    Model(
        "StdMoE_1b14b_130B",
        128,
        (),
        "the standard mixture of experts that `Emo_1b14b_130B` is compared with",
        f"130B tokens {STANDARD}; no annealing",
        f"Its numbers are in {PAPER}; the table in the card of `StdMoE_1b14b_1T` is not about this model.",
    ),
    Model(
        "StdMoE_1b4b_130B",
        32,
        (),
        "a standard mixture of 32 experts, trained from scratch: the baseline of the same size for subsets "
        "of 32 experts of the 1b14b models",
        f"130B tokens {STANDARD}; no annealing",
        f'Its numbers are in {PAPER} ("Reg. MoE @ 32").',
    ),
    Model(
        "StdMoE_1b14b_1T_Preanneal",
        128,
        (),
        "`StdMoE_1b14b_1T` before its annealing, and what `StdMoE_1b14b_1T_EmoAnnealed` was annealed from",
        f"1T tokens {STANDARD}; not annealed",
        f"It is a starting point; {PAPER} compares what is annealed from it.",
    ),
    Model(
        "StdMoE_1b14b_1T_EmoAnnealed",
        128,
        ("annealing",),
        "a standard mixture of experts that became an EMO by annealing",
        f"1T tokens {STANDARD} (`StdMoE_1b14b_1T_Preanneal`); then 50B tokens with document pools, "
        "learning rate linear to 0",
        f"According to {PAPER}, which has the numbers, these 50B tokens give most of the modularity of an "
        "EMO.",
    ),
    Model(
        "Dense_1b_130B",
        0,
        (),
        "a dense model, without experts: the baseline of the same size for subsets of 8 experts",
        "130B tokens, learning rate 4e-3; no annealing",
        f'Its numbers are in {PAPER} ("Dense @ 8").',
    ),
)


def config(model: Model, kept: int | None = None) -> EmoConfig:
    """Its config, or that of a subset; with the rows that the vocabulary was padded to in training."""
    if not model.experts:
        dense = {"num_experts_per_layer": [0] * LAYERS, "dense_intermediate_size": DENSE_WIDTH}
        counts = {"num_experts": 0, "num_experts_per_tok": 0, "num_shared_experts": 0}
        return EmoConfig(vocab_size=100352, **dense, **counts)
    return EmoConfig(vocab_size=100352, num_experts=kept or model.experts)


def parameters(model: Model, kept: int | None = None) -> int:
    """Parameters of a model, or of a subset that keeps so many experts of each layer."""
    with torch.device("meta"):
        return EmoForCausalLM(config(model, kept)).num_parameters()


def active_parameters(model: Model) -> int:
    """Parameters that a token meets: its 8 experts, and the router's rows for all of them."""
    if not model.experts:
        return parameters(model)
    return parameters(model, 8) + LAYERS * (model.experts - 8) * config(model).hidden_size


def gigabytes(model: Model, kept: int) -> str:
    """Size in bfloat16, in 10^9 bytes, of three digits."""
    size = 2 * parameters(model, kept) / 1e9
    return f"{size:.1f}" if size >= 10 else f"{size:.2f}"


def card(model: Model) -> str:
    """The text of a model's README.md."""
    return "\n\n".join([_front_matter(model), *_sections(model)]) + "\n"


def _sections(model: Model) -> Iterator[str]:
    yield f"# {model.name}"
    yield _text(
        f"{model.what[0].upper()}{model.what[1:]}. Of EMO (https://arxiv.org/abs/2605.06663) by the Allen "
        "Institute for AI. This card says how `transformers-emo` uses it; the weights, the licence and the "
        f"authors' own card are at https://huggingface.co/{model.repo}."
    )
    yield _architecture(model)
    yield "## Training"
    details = [f"attention {'inside' if 'pretraining' in model.pools else 'across'} documents"]
    if model.experts:
        details.append(RECIPE)
    if "pretraining" in model.pools:
        details.append("router z-loss 0.001, z-loss of the logits 1e-5")
    yield _text(
        f"As the authors report: {model.training}. In pretraining: {', '.join(details)}. The data of "
        "pretraining is the mix of OLMoE (`allenai/OLMoE-mix-0924` on the authors' cards)."
    )
    yield "## Results"
    yield _text(model.results)
    if model.scores:
        rows = [f"| {kept} | {score} |" for kept, score in zip(SUBSETS, model.scores, strict=True)]
        head = "| experts kept of 128 | MMLU / MMLU-Pro / GSM8K | after fine-tuning on the task |"
        yield "\n".join([head, "|---|---|---|", *rows])
    yield from _loading(model) if model.experts else _loading_dense(model)
    yield "## From a training checkpoint"
    yield _text(
        "A step folder of the authors' training library (`config.json` and `model_and_optim/`) becomes a "
        "folder for `from_pretrained`, tensor by tensor and without unpickling; `--tokenizer DIR` adds the "
        "files of a tokenizer, and `--verify` compares logits, for which the model is loaded in float32:"
    )
    yield f"```bash\nemo convert olmo-core-to-hf STEP {model.name} --dtype bfloat16 --verify\n```"
    yield "## Limits"
    yield "\n".join(_limits(model))


def _front_matter(model: Model) -> str:
    tags = ["emo", "mixture-of-experts", "expert-subset"] if model.experts else ["emo", "dense"]
    values = {
        "library_name": "transformers",
        "base_model": model.repo,
        "language": "en",
        "pipeline_tag": "text-generation",
        "tags": [*tags, "arxiv:2605.06663"],
    }
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _architecture(model: Model) -> str:
    total, active = parameters(model), active_parameters(model)
    if model.experts:
        size = f"{total:,} parameters, of which {active:,} are active for a token"
        feed_forward = (
            f"{model.experts} SwiGLU experts of width 1,024 a layer ({model.experts - 1} routed and 1 "
            "shared), 8 of them active for a token, the shared one always"
        )
    else:
        size, feed_forward = f"{total:,} parameters", "SwiGLU of width 8,192"
    return "## Architecture\n\n" + _text(
        f"{size} (with the vocabulary padded to 100,352 rows, as trained): hidden size 2,048, {LAYERS} "
        f"layers, 16 heads, {feed_forward}; RMSNorm before attention and feed-forward, no QK-norm, no "
        "biases; RoPE with theta 500,000; context 4,096; 100,278 tokens, untied head."
    )


def _loading(model: Model) -> Iterator[str]:
    yield "## Load it"
    yield f"""```python
import transformers_emo  # EMO joins the Transformers auto-classes
from transformers import AutoModelForCausalLM, AutoTokenizer

repo = "{model.repo}"
tokenizer = AutoTokenizer.from_pretrained(repo)
model = AutoModelForCausalLM.from_pretrained(repo, dtype="bfloat16")
inputs = tokenizer("Language modeling is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```"""
    yield "## Load a subset of its experts"
    yield _text(
        ("" if model.pools else POOR)
        + "Choose experts from a prompt of the domain with its demonstrations and "
        "answers (one is enough, the paper finds; about five without demonstrations). Then only they are "
        "loaded, and the result is an ordinary, smaller model:"
    )
    yield f"""```python
from transformers import AutoModelForCausalLM
from transformers_emo import select_experts

repo = "{model.repo}"
subset = select_experts(repo, texts=["Question: What is 17 * 3?\\nAnswer: 17 * 3 = 51"], num_experts=16)
subset.save("math.json")
model = AutoModelForCausalLM.from_pretrained(repo, expert_subset="math.json", dtype="bfloat16")
model.save_pretrained("{model.name}-math")  # loads without the subset
```"""
    sizes = [kept for kept in SUBSETS if kept <= model.experts]
    smaller = " ".join(map(str, sizes[-1:0:-1]))
    yield 'Several sizes at once, from a file with a JSON object a line (`{"text": ...}`):'
    yield f"```bash\nemo select {model.repo} math-{{}}.json --data math.jsonl --experts {smaller}\n```"
    rows = [f"| {kept} | {parameters(model, kept):,} | {gigabytes(model, kept)} GB |" for kept in sizes]
    head = f"| experts kept of {model.experts} | parameters | weights in bfloat16 |"
    yield "\n".join([head, "|---|---|---|", *rows])
    yield _text(
        "The repository's files are float32, twice these bytes. From a local folder only the bytes of the "
        "chosen experts are read; from the Hub, whole files are downloaded so far."
    )
    yield _text(
        "Older uploads say `flex_olmo_noqknorm_prenorm` and `FlexOlmoNoQKNormPrenormForCausalLM` where "
        "newer ones say `emo` and `EmoForCausalLM`; the tensors are the same, and both load."
    )


def _loading_dense(model: Model) -> Iterator[str]:
    yield "## Load it"
    yield _text(
        "There are no experts to choose, so `select_experts` and `expert_subset` have nothing to do. On "
        "the Hub it is no `emo` model: the authors' repository publishes it as `olmo2_noqknorm_prenorm` "
        "(`Olmo2NoQKNormPrenormForCausalLM`), a type that neither Transformers nor this package registers. "
        "The network and the names of its tensors are those of an EMO whose layers are all dense; say so, "
        "and it loads as one:"
    )
    yield f"""```python
from transformers_emo import EmoConfig, EmoForCausalLM, EmoTokenizer

repo = "{model.repo}"
config = EmoConfig.from_pretrained(
    repo,
    num_experts=0,
    num_experts_per_tok=0,
    num_shared_experts=0,
    num_experts_per_layer=[0] * {LAYERS},
    dense_intermediate_size={DENSE_WIDTH},
)
model = EmoForCausalLM.from_pretrained(repo, config=config, dtype="bfloat16")
tokenizer = EmoTokenizer.from_pretrained(repo)
inputs = tokenizer("Language modeling is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
model.save_pretrained("{model.name}-emo")  # loads with the auto-classes
```"""
    yield f"Its weights are {gigabytes(model, 0)} GB in bfloat16."


def _limits(model: Model) -> Iterator[str]:
    yield (
        "- Nothing here was measured on these weights: sizes are counted, results are the authors', and "
        "the package is\n  tested against the authors' code on small models."
    )
    yield "- A base model with 4,096 tokens of context; the authors report no tuning to follow instructions."
    if model.experts:
        whole = gigabytes(model, model.experts)
        yield f"- All of it takes {whole} GB in bfloat16, whatever a token uses of it."
        yield (
            "- Its config says `output_router_logits: true`; read with this package it holds in training "
            "mode only, and\n  generation computes no balance loss."
        )
    else:
        yield "- Loading it as above is tested on a narrow stand-in for the files on the Hub."
    if model.pools:
        yield (
            "- A subset is good at what it was chosen for; what it does elsewhere is for you to measure "
            "(`emo retention`).\n- Its document pools are a matter of training; inference uses none unless "
            "asked."
        )


def _text(paragraph: str) -> str:
    return textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else CARDS
    for model in MODELS:
        (folder / model.name).mkdir(parents=True, exist_ok=True)
        (folder / model.name / "README.md").write_text(card(model), encoding="utf-8")
