"""Many requests at once to a server whose requests choose their experts: none may be wrong, none lost.

Each request is asked alone first; asked together, it must get the same answer. Against any server of an EMO:

    python tests/engines/load_test.py http://127.0.0.1:8000 --requests 64 --subsets c coq go sql
"""

import argparse
import json
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

PROMPTS = (
    "def main(",
    "Theorem plus_comm : forall",
    "SELECT * FROM",
    "Once upon a time",
    "import os\n",
    "func (s *",
)


def ask(url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """The status and the answer of a request to `/v1/completions`."""
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def bodies(model: str, number: int, choices: list[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """Requests that take the choices in turn, each with several prompts and lengths."""
    return [
        {
            "model": model,
            "prompt": PROMPTS[index // len(choices) % len(PROMPTS)],
            "max_tokens": tokens - index % 5,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "vllm_xargs": choices[index % len(choices)],
        }
        for index in range(number)
    ]


def text_ids(answer: dict[str, Any]) -> list[int]:
    """The ids of the tokens of an answer."""
    return answer["choices"][0]["token_ids"]


def load(url: str, requests: list[dict[str, Any]], at_once: int = 64) -> dict[str, Any]:
    """Ask each alone, then all at once.

    Args:
        url (`str`): the server's.
        requests (`list[dict]`): from `bodies`.
        at_once (`int`): how many are under way at a time.

    Returns:
        `dict`: how many were `asked`, `lost` (no answer, or an error), `wrong` (another answer than alone),
        and how many different answers there were.
    """
    alone = [ask(url, body) for body in requests]
    with ThreadPoolExecutor(at_once) as threads:
        together = list(threads.map(lambda body: ask(url, body), requests))
    lost = sum(status != 200 for status, _ in together + alone)
    pairs = [(a, b) for (s, a), (t, b) in zip(alone, together, strict=True) if s == t == 200]
    wrong = sum(text_ids(a) != text_ids(b) for a, b in pairs)
    answers = {
        (body["prompt"], tuple(text_ids(a)[:8])) for body, (a, _) in zip(requests, pairs, strict=False)
    }
    return {"asked": len(requests), "lost": lost, "wrong": wrong, "answers": len(answers)}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--model", help="the model's name, that of the server by default")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--subsets", nargs="+", required=True)
    options = parser.parse_args()
    with urllib.request.urlopen(f"{options.url}/v1/models", timeout=60) as answer:
        model = options.model or json.load(answer)["data"][0]["id"]
    choices = [{"expert_subset": name} for name in options.subsets]
    result = load(options.url, bodies(model, options.requests, choices, options.tokens))
    print(json.dumps(result))
    sys.exit(bool(result["lost"] or result["wrong"]))


if __name__ == "__main__":
    main()
