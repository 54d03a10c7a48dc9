"""After a call that failed anywhere, the next answer is right, nothing is left on the models, and nothing leaks."""

import gc

import pytest
import tiny
import torch
from running import KINDS, inputs_of, nudge, outcomes, state_of
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation import BaseStreamer

import nudging_hf

ERRORS = [RuntimeError("broken"), KeyboardInterrupt(), torch.OutOfMemoryError("out of memory")]
CACHES = [{}, {"cache_implementation": "static"}, {"use_cache": False}]
SETTINGS = {"max_new_tokens": 10, "num_nudging_tokens": 4, "nudge_threshold": 0.6}


class Fault:
    """Raises an error when it is called for the n-th time, as whatever a caller or a model may give.

    It is a hook of a layer, a logits processor, a stopping criterion, a streamer, and a `prefix_allowed_tokens_fn`.
    """

    def __init__(self, error: BaseException, after: int):
        self.error, self.left = error, after

    def strike(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error

    def hook(self, *_):
        self.strike()

    def processor(self):
        return type("Faulty", (LogitsProcessor,), {"__call__": lambda _, ids, scores: self.strike() or scores})()

    def criterion(self):
        def call(_, ids, scores, **kwargs):
            self.strike()
            return torch.zeros(len(ids), dtype=torch.bool)

        return type("Faulty", (StoppingCriteria,), {"__call__": call})()

    def streamer(self, at_end: bool):
        methods = {"put": lambda *_: None if at_end else self.strike(), "end": lambda *_: self.strike()}
        return type("Faulty", (BaseStreamer,), methods)()

    def allowed(self, row, ids):
        self.strike()
        return list(range(3, 300))


def call_with_fault(pair, given, where: str, fault: Fault, **settings) -> None:
    """One call in which the fault strikes."""
    arguments = {
        "processor": lambda: {"logits_processor": [fault.processor()]},
        "criterion": lambda: {"stopping_criteria": [fault.criterion()]},
        "streamer": lambda: {"streamer": fault.streamer(at_end=False)},
        "end of the streamer": lambda: {"streamer": fault.streamer(at_end=True)},
        "allowed tokens": lambda: {"prefix_allowed_tokens_fn": fault.allowed},
    }.get(where, dict)()
    hooked = {"base": pair.base, "nudging model": pair.nudging_model}.get(where)
    # The last layer fails, so the first one has written to the cache already.
    hooks = [] if hooked is None else [hooked.model.layers[-1].register_forward_pre_hook(fault.hook)]
    try:
        nudging_hf.generate(pair.base, **inputs_of(pair, *given), **SETTINGS, **settings, **arguments)
    finally:
        for hook in hooks:
            hook.remove()


WHERE = ["base", "nudging model", "processor", "criterion", "streamer", "end of the streamer", "allowed tokens"]
FEW = ["end of the streamer", "allowed tokens"]  # They are called once or twice.


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("kind", KINDS)
def test_after_a_fault_the_next_answer_is_right_and_nothing_is_left_on_the_models(kind, where):
    pair = tiny.pair("llama", 3, kind)
    given = tiny.prompts(pair, 1, 3)
    before = state_of(pair)
    first = WHERE.index(where) + KINDS.index(kind)
    for i, error in enumerate(ERRORS):
        cache = CACHES[(first + i) % len(CACHES)]
        expected = outcomes(nudge(pair, *given, **SETTINGS, **cache))
        with pytest.raises(type(error)) as caught:
            call_with_fault(pair, given, where, Fault(error, after=0 if where in FEW else i), **cache)
        assert caught.value is error
        assert state_of(pair) == before
        assert outcomes(nudge(pair, *given, **SETTINGS, **cache)) == expected


def test_three_hundred_calls_of_all_kinds_leak_nothing():
    """A third of them fails. What is kept for reuse exists after the first hundred."""
    pairs = [tiny.pair("llama", 3, kind) for kind in KINDS]
    given = [tiny.prompts(pair, 1, 3) for pair in pairs]
    plain = [{}, {"cache_implementation": "static"}, {"stop_strings": ["e"]}, {"no_repeat_ngram_size": 2}]

    def call(number: int) -> None:
        pair, asked = pairs[number % 2], given[number % 2]
        if number % 3 == 0:
            error = type(ERRORS[number // 3 % len(ERRORS)])
            with pytest.raises(error):
                call_with_fault(pair, asked, WHERE[number // 6 % len(WHERE)], Fault(error("fault"), 0))
        else:
            torch.manual_seed(number % 2)
            settings = plain[number // 6 % len(plain)]
            nudge(pair, *asked, **{**SETTINGS, "max_new_tokens": 3}, do_sample=number % 3 == 1, **settings)

    def counted() -> tuple[int, int]:
        gc.collect()
        objects = gc.get_objects()
        return len(objects), sum(issubclass(type(each), torch.Tensor) for each in objects)

    for number in range(100):
        call(number)
    objects, tensors = counted()
    for number in range(100, 300):
        call(number)
    more_objects, more_tensors = counted()
    assert more_tensors <= tensors
    assert more_objects - objects < 400  # Fewer than two for each call. A row alone has more.
