"""`use_experts` belongs to who opened it: no other task, thread, generator, copy or process sees it."""

import asyncio
import contextlib
import copy
import multiprocessing
import pickle
import threading

import pytest
import torch
from transformers_emo.modeling_emo.expert_switching import masks_here

INPUT_IDS = torch.tensor([[3, 17, 5, 42, 9, 30], [8, 8, 21, 2, 60, 11]])
FIRST, SECOND = [[0, 3, 11]] * 3, [[0, 5, 7, 11]] * 3


@pytest.fixture
def model(make_model):
    return make_model().eval()


@pytest.fixture
def logits(model):
    """The logits of the whole model and of both subsets, each computed alone."""
    found = {"all": model(INPUT_IDS).logits}
    for name, subset in (("first", FIRST), ("second", SECOND)):
        with model.use_experts(subset):
            found[name] = model(INPUT_IDS).logits
    assert not torch.equal(found["first"], found["second"])
    return found


@pytest.fixture
def unmasked(model, logits):
    """See at the end that nothing is left."""
    yield
    assert torch.equal(model(INPUT_IDS).logits, logits["all"])
    assert model.base_model.compiled_masks == [None] * 3


@pytest.mark.usefixtures("unmasked")
class TestCallers:
    def test_tasks_at_once_compute_with_their_own_experts(self, model, logits):
        async def ask(subset, name):
            with model.use_experts(subset) if subset else contextlib.nullcontext():
                for _ in range(3):
                    await asyncio.sleep(0)
                    assert torch.equal(model(INPUT_IDS).logits, logits[name])

        async def all_at_once():
            asks = [(FIRST, "first"), (SECOND, "second"), (None, "all"), (FIRST, "first")]
            await asyncio.gather(*(ask(*one) for one in asks))

        asyncio.run(all_at_once())

    def test_tasks_and_threads_that_are_started_inside_take_the_choice_along(self, model, logits):
        async def ask():
            return model(INPUT_IDS).logits

        async def start():
            with model.use_experts(FIRST):
                task = asyncio.create_task(ask())
                in_thread = await asyncio.to_thread(lambda: model(INPUT_IDS).logits)
                assert torch.equal(in_thread, logits["first"])
                assert torch.equal(await task, logits["first"])
                late = asyncio.create_task(asyncio.sleep(0.01))
            await late
            assert torch.equal(await asyncio.create_task(ask()), logits["all"])

        asyncio.run(start())

    def test_generators_of_one_thread_compute_with_their_own_experts(self, model, logits):
        def stream(subset):
            with model.use_experts(subset):
                while True:
                    yield model(INPUT_IDS).logits

        first, second = stream(FIRST), stream(SECOND)
        for _ in range(2):
            assert torch.equal(next(first), logits["first"])
            assert torch.equal(next(second), logits["second"])
            assert torch.equal(model(INPUT_IDS).logits, logits["all"])
        first.close()  # in the order in which they were opened
        assert torch.equal(next(second), logits["second"])
        second.close()

    def test_async_generators_of_one_task_compute_with_their_own_experts(self, model, logits):
        async def stream(subset):
            with model.use_experts(subset):
                while True:
                    await asyncio.sleep(0)
                    yield model(INPUT_IDS).logits

        async def take():
            first, second = stream(FIRST), stream(SECOND)
            for _ in range(2):
                assert torch.equal(await anext(first), logits["first"])
                assert torch.equal(await anext(second), logits["second"])
                assert torch.equal(model(INPUT_IDS).logits, logits["all"])
            await first.aclose()
            await second.aclose()

        asyncio.run(take())

    def test_coroutines_driven_by_hand_compute_with_their_own_experts(self, model, logits):
        class Pause:
            def __await__(self):
                yield

        async def ask(subset, name):
            with model.use_experts(subset):
                for _ in range(2):
                    await Pause()
                    assert torch.equal(model(INPUT_IDS).logits, logits[name])

        asks = [ask(FIRST, "first"), ask(SECOND, "second")]
        for one in [*asks, *asks]:
            one.send(None)
            assert torch.equal(model(INPUT_IDS).logits, logits["all"])
        for one in asks:
            with pytest.raises(StopIteration):
                one.send(None)

    def test_a_generator_that_ends_on_another_thread_blocks_nobody(self, model, logits):
        def stream():
            with model.use_experts(FIRST):
                yield model(INPUT_IDS).logits

        generator = stream()
        next(generator)
        thread = threading.Thread(target=generator.close)
        thread.start()
        thread.join()
        with model.use_experts(SECOND):
            assert torch.equal(model(INPUT_IDS).logits, logits["second"])

    def test_another_thread_is_not_masked(self, model, logits):
        found = []
        with model.use_experts(FIRST):
            thread = threading.Thread(target=lambda: found.append(model(INPUT_IDS).logits))
            thread.start()
            thread.join()
        assert torch.equal(found[0], logits["all"])

    def test_a_context_manager_of_ones_own_holds_for_who_enters_it(self, model, logits):
        @contextlib.contextmanager
        def on_first():
            with model.use_experts(FIRST):
                yield

        with on_first():
            assert torch.equal(model(INPUT_IDS).logits, logits["first"])
        with contextlib.ExitStack() as stack:
            stack.enter_context(on_first())
            stack.enter_context(model.use_experts(SECOND))
            assert torch.equal(model(INPUT_IDS).logits, logits["second"])

        def stream():
            with on_first():
                yield model(INPUT_IDS).logits

        generator = stream()
        assert torch.equal(next(generator), logits["first"])
        assert torch.equal(model(INPUT_IDS).logits, logits["all"])
        generator.close()

    def test_a_generation_beside_it_is_that_of_all_experts(self, model):
        def generate(**kwargs):
            return model.generate(INPUT_IDS, max_new_tokens=5, do_sample=False, **kwargs)

        alone = generate()

        def stream():
            with model.use_experts(FIRST):
                yield

        generator = stream()
        next(generator)
        assert torch.equal(generate(), alone)
        generator.close()

    def test_copies_are_not_masked(self, model, logits):
        with model.use_experts(FIRST):
            copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
            for one in copies:
                assert torch.equal(one(INPUT_IDS).logits, logits["all"])
                assert one.base_model.compiled_masks == [None] * 3

    def test_swaps_are_refused_while_another_caller_has_a_choice(self, model):
        def stream():
            with model.use_experts(FIRST):
                yield

        generator = stream()
        next(generator)
        with pytest.raises(ValueError, match="of this caller or another: leave it, then swap"):
            model.swap_experts(SECOND)
        generator.close()

    def test_gradient_checkpointing_computes_again_with_the_same_experts(self, model):
        def gradient(checkpointing):
            model.zero_grad()
            model.train()
            if checkpointing:
                model.gradient_checkpointing_enable()
            with model.use_experts(FIRST):
                loss = model(INPUT_IDS, labels=INPUT_IDS, document_pool=False).loss
            loss.backward()  # after the block
            model.gradient_checkpointing_disable()
            model.eval()
            return [p.grad.clone() for p in model.parameters() if p.grad is not None]

        for one, other in zip(gradient(False), gradient(True), strict=True):
            assert torch.equal(one, other)


@pytest.fixture
def on_first(model):
    with model.use_experts(FIRST):
        yield


@pytest.mark.usefixtures("on_first")
def test_a_fixture_of_pytest_holds_for_its_test(model, make_model):
    with model.use_experts(FIRST):
        expected = model(INPUT_IDS).logits
    assert torch.equal(model(INPUT_IDS).logits, expected)


def _tell(model, pipe):
    pipe.send((masks_here(model.base_model), model.base_model.compiled_masks))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_a_forked_process_is_not_masked(model):
    """It runs no forward: threads of OpenMP do not survive a fork."""
    ours, theirs = multiprocessing.Pipe()
    with model.use_experts(FIRST):
        process = multiprocessing.get_context("fork").Process(target=_tell, args=(model, theirs))
        process.start()
        assert ours.poll(60) and ours.recv() == (None, [None] * 3)
        process.join()
        assert masks_here(model.base_model) is not None
    assert process.exitcode == 0


@pytest.fixture
def fresh_compiler():
    """Code that PyTorch once could not compile it does not try again, for any model of the process."""
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
class TestCompiled:
    def test_a_mask_is_one_graph_and_none_is_left(self, model, logits):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for name, subset in (("first", FIRST), ("second", SECOND), ("first", FIRST)):
            with model.use_experts(subset):
                torch.testing.assert_close(compiled(INPUT_IDS).logits, logits[name])
            torch.testing.assert_close(compiled(INPUT_IDS).logits, logits["all"])

    def test_several_callers_are_never_mixed(self, model, logits):
        def stream():
            with model.use_experts(FIRST):
                yield

        generator = stream()
        next(generator)
        with model.use_experts(SECOND):
            with pytest.raises(Exception, match="Several callers have a `use_experts` open"):
                torch.compile(model, backend="eager", fullgraph=True)(INPUT_IDS)
            # Not compiled as one graph, it runs as it is.
            with_breaks = torch.compile(model, backend="eager")(INPUT_IDS)
        torch.testing.assert_close(with_breaks.logits, logits["second"])
        generator.close()
