"""Eight coroutines in one process, each with its own experts, on one model."""

# Run in a process of its own. Each coroutine uses the model in a way drawn at random, waits for the others in
# between, and compares its answers with those of its request alone. The last line that it prints is JSON.
CODE = '''
import asyncio, copy, gc, json, os, random, time, torch
from transformers.generation.streamers import BaseStreamer
from transformers_emo import EmoForCausalLM

choose = random.Random(SEED)
model = EmoForCausalLM.from_pretrained(TOY).eval()
subsets = [[sorted(choose.sample(range(31), 7 + i)) + [31] for _ in range(4)] for i in range(7)] + [None]
excluded = [[sorted(choose.sample(range(31), 3)) for _ in range(4)] for _ in range(8)]
prompts = [torch.tensor([[choose.randrange(5, 4000) for _ in range(12 + i)]]) for i in range(8)]
own = [EmoForCausalLM.from_pretrained(TOY, expert_subset=[[0, 1, 2, 3, 31]] * 4).eval() for _ in range(2)]
LENGTHS = dict(max_new_tokens=4, do_sample=False, pad_token_id=1)


class Streamed(BaseStreamer):
    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        pass


def masked(i):
    return {} if subsets[i] is None else {"expert_subset": subsets[i]}


async def forward(i, wait):
    """`use_experts` around several waits; nested for every other caller."""
    if subsets[i] is None:
        await wait()
        return model(prompts[i]).logits
    with model.use_experts(subsets[i]):
        await wait()
        if i % 2:
            with model.use_experts(subsets[i - 1]):
                await wait()
                model(prompts[i])
        logits = model(prompts[i]).logits
        await wait()
    return logits


async def exclude(i, wait):
    with model.use_experts(exclude_experts=excluded[i]):
        await wait()
        return model(prompts[i]).logits


async def generate(i, wait):
    await wait()
    return model.generate(prompts[i], **LENGTHS, **masked(i))


async def pools(i, wait):
    """Document pools, under a choice of experts for some."""
    await wait()
    return model.generate(prompts[i], **LENGTHS, document_pool=8 + i)


async def stream(i, wait):
    streamer = Streamed()
    await wait()
    tokens = model.generate(prompts[i], streamer=streamer, **LENGTHS, **masked(i))
    assert streamer.tokens == tokens.flatten().tolist()
    return tokens


async def in_thread(i, wait):
    """Generation on another thread, while others compute here."""
    return await asyncio.to_thread(model.generate, prompts[i], **LENGTHS, **masked(i))


async def token_by_token(i, wait):
    """A generator with a mask of its own, which others interrupt after each token."""
    ids, cache, found = prompts[i], None, []
    async def steps():
        nonlocal ids, cache
        for _ in range(4):
            if subsets[i] is None:
                answer = model(ids, past_key_values=cache, use_cache=True)
            else:
                with model.use_experts(subsets[i]):
                    await wait()
                    answer = model(ids, past_key_values=cache, use_cache=True)
            cache, ids = answer.past_key_values, answer.logits[:, -1:].argmax(-1)
            yield ids
    async for token in steps():
        found.append(token)
        await wait()
    return torch.cat(found, 1)


async def swap(i, wait):
    """`swap_experts` on a model that is this caller's own."""
    mine = own[i % 2]
    async with locks[i % 2]:
        mine.swap_experts(subsets[i] or [list(range(32))] * 4, progress=False)
        await wait()
        return mine(prompts[i]).logits


async def copied(i, wait):
    """A copy made while others have a choice open, which has none."""
    other = copy.deepcopy(model)
    await wait()
    return other(prompts[i]).logits


WAYS = [forward, forward, exclude, generate, pools, stream, in_thread, token_by_token, swap, copied]


async def at_once():
    pass


async def alone():
    return {(way, i): await way(i, at_once) for way in set(WAYS) for i in range(8)}


def same(found, right):
    return torch.allclose(found, right, atol=1e-4) if right.is_floating_point() else torch.equal(found, right)


wrong, ways, errors = {}, {}, {}

async def request(i, choose, expected):
    async def wait():
        for _ in range(choose.randrange(4)):
            await asyncio.sleep(0)

    for _ in range(4):
        way = choose.choice(WAYS)
        ways[way.__name__] = ways.get(way.__name__, 0) + 1
        try:
            found = await way(i, wait)
        except Exception as error:
            errors[f"{way.__name__}: {type(error).__name__}: {error}"[:160]] = 1
            wrong[way.__name__] = wrong.get(way.__name__, 0) + 1
            continue
        if not same(found, expected[way, i]):
            wrong[way.__name__] = wrong.get(way.__name__, 0) + 1
        await wait()


async def rounds():
    global locks
    locks = [asyncio.Lock(), asyncio.Lock()]
    expected = await alone()
    memory = []
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        await asyncio.gather(*(request(i, choose, expected) for i in range(8)))
        gc.collect()
        with open("/proc/self/statm") as stream:
            memory.append(int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    # What is left of a mask would be seen now.
    after = sum(not same(model(prompts[i]).logits, expected[copied, i]) for i in range(8))
    return memory, after

with torch.inference_mode():
    memory, after = asyncio.run(rounds())
quarter = max(1, len(memory) // 4)
settled = memory[quarter:] or memory
first, last = sorted(settled[:quarter]), sorted(settled[-quarter:])
print(json.dumps({
    "calls": sum(ways.values()),
    "ways": ways,
    "wrong": wrong,
    "errors": list(errors),
    "masked for good": after,
    "rounds": len(memory),
    "memory": max(memory),
    "grown": last[len(last) // 2] - first[len(first) // 2],
}))
'''
