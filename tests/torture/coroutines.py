"""Eight coroutines in one process, each with its own experts, on one model."""

# Run in a process of its own. Each coroutine computes, waits for the others in between, and compares its
# answers with those of its request alone. The last line that it prints is JSON.
CODE = """
import asyncio, json, os, random, time, torch
from transformers_emo import EmoForCausalLM

model = EmoForCausalLM.from_pretrained(TOY)
choose = random.Random(SEED)
subsets = [[sorted(choose.sample(range(31), 7 + i)) + [31] for _ in range(4)] for i in range(7)] + [None]
prompts = [torch.tensor([[choose.randrange(5, 4000) for _ in range(12 + i)]]) for i in range(8)]

def alone(i):
    with torch.inference_mode():
        if subsets[i] is None:
            logits = model(prompts[i]).logits
        else:
            with model.use_experts(subsets[i]):
                logits = model(prompts[i]).logits
        choice = {} if subsets[i] is None else {"expert_subset": subsets[i]}
        tokens = model.generate(prompts[i], max_new_tokens=4, do_sample=False, **choice)
    return logits, tokens

expected = [alone(i) for i in range(8)]
calls = wrong = 0

async def request(i, choose):
    global calls, wrong
    for what in range(3):
        if subsets[i] is None:
            await asyncio.sleep(0)
            logits = model(prompts[i]).logits
        else:
            with model.use_experts(subsets[i]):
                for _ in range(choose.randrange(3)):
                    await asyncio.sleep(0)
                logits = model(prompts[i]).logits
                await asyncio.sleep(0)
        calls += 1
        wrong += not torch.allclose(logits, expected[i][0], atol=1e-4)
        await asyncio.sleep(0)
    choice = {} if subsets[i] is None else {"expert_subset": subsets[i]}
    tokens = model.generate(prompts[i], max_new_tokens=4, do_sample=False, **choice)
    calls += 1
    wrong += not torch.equal(tokens, expected[i][1])

async def rounds():
    memory = []
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        await asyncio.gather(*(request(i, choose) for i in range(8)))
        with open("/proc/self/statm") as stream:
            memory.append(int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    return memory

with torch.inference_mode():
    memory = asyncio.run(rounds())
after = sum(not torch.allclose(model(prompts[i]).logits, expected[i][0], atol=1e-4) for i in (7,))
settled = memory[len(memory) // 4:] or memory
print(json.dumps({
    "calls": calls, "wrong": wrong, "masked for good": after, "rounds": len(memory),
    "grown": max(settled[-max(1, len(settled) // 4):]) - max(settled[:max(1, len(settled) // 4)]),
}))
"""
