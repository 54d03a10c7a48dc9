"""Nudging inside vLLM: every request gets the answer of its single run in process. `make test-engines` runs it.

The engine runs in this process, on a CPU, with few cache blocks and a small token budget, so that requests are
preempted and prompts are read in chunks. `NUDGING_VLLM_RUNNER=v2` takes the second model runner, which needs Triton or
its interpreter.
"""

import gc
import os
import random

import pytest

RUNNER = os.environ.get("NUDGING_VLLM_RUNNER", "v1")
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_USE_V2_MODEL_RUNNER=str(int(RUNNER == "v2")),
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)
vllm = pytest.importorskip("vllm")

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from vllm import LLM, SamplingParams, TokensPrompt  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402

import nudging_hf  # noqa: E402
from nudging_hf.integrations.vllm.launch import vllm_command  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")
THRESHOLDS = [0.4, 0.8, 0.98]
MOST = 120
# The interpreter runs every kernel in Python.
NUMBER = 50 if RUNNER == "v1" else 8


class Served:
    """A base in vLLM and in process, nudged by the same model."""

    def __init__(self, models, nudging: str, texts: list[str]):
        import json

        self.base, self.nudging_model = (
            AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float32) for name in ("base", nudging)
        )
        self.tokenizer, self.nudging_tokenizer = (
            AutoTokenizer.from_pretrained(models / name) for name in ("base", nudging)
        )
        self.prompts = [self.tokenizer(text)["input_ids"] for text in texts]
        options = {"model": str(models / nudging)}
        arguments = vllm_command("", options, on_cpu=RUNNER == "v1").arguments
        self.llm = LLM(
            str(models / "base"),
            dtype="float32",
            enforce_eager=True,
            max_model_len=512,
            max_num_seqs=16,
            max_num_batched_tokens=96,
            num_gpu_blocks_override=8,
            enable_prefix_caching=True,
            async_scheduling=False,
            disable_log_stats=True,
            worker_cls="nudging_hf.integrations.vllm.worker.NudgingCPUWorker",
            speculative_config=json.loads(arguments[arguments.index("--speculative-config") + 1]),
            additional_config={"nudging": options},
        )
        engine = self.llm.llm_engine.engine_core.engine_core
        self.worker = engine.model_executor.driver_worker.worker
        self.scheduler = engine.scheduler
        self.answers: dict = {}

    def single(self, prompt: list[int], **settings) -> list[int]:
        """The answer of a single run in process."""
        key = (tuple(prompt), repr(sorted(settings.items())))
        if key not in self.answers:
            settings = {"max_new_tokens": MOST, **settings}
            torch.manual_seed(settings.pop("seed", 0))
            ids = nudging_hf.generate(
                self.base,
                torch.tensor([prompt]),
                nudging_model=self.nudging_model,
                tokenizer=self.tokenizer,
                nudging_tokenizer=self.nudging_tokenizer,
                **settings,
            )
            self.answers[key] = ids[0, len(prompt) :].tolist()
        return self.answers[key]

    def batch(self, prompts: list[list[int]], **settings) -> list[list[int]]:
        """The answers of a batch in process, which are those of single runs, and come sooner."""
        width, pad = max(map(len, prompts)), self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        output = nudging_hf.generate(
            self.base,
            ids,
            attention_mask=mask,
            nudging_model=self.nudging_model,
            tokenizer=self.tokenizer,
            nudging_tokenizer=self.nudging_tokenizer,
            max_new_tokens=MOST,
            return_dict_in_generate=True,
            **settings,
        )
        lengths = (~output.base_top1_probs.isnan()).sum(dim=1).tolist()
        return [row[:n] for row, n in zip(output.sequences[:, width:].tolist(), lengths, strict=True)]

    def ask(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
        """vLLM's answers, all asked at once."""
        given = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        outputs = self.llm.generate(given, params, use_tqdm=False)
        assert not self.left_over()
        return [list(output.outputs[0].token_ids) for output in outputs]

    def left_over(self) -> list:
        """What the nudging model still holds after a step that has no requests."""
        nudger = self.worker.connection.nudger
        for name in list(nudger.request_ids):  # They are dropped when the next step begins.
            nudger.forget(name)
        return [*nudger.request_ids, *nudger.decoder.rows, *nudger.decoder.nudging._cached_ids]


def greedy(threshold: float = 0.4, **more) -> SamplingParams:
    more = {"max_tokens": MOST, "extra_args": {"nudge_threshold": threshold}, **more}
    return SamplingParams(temperature=0, **more)


@pytest.fixture(scope="module", params=["nudging", "nudging-shared"])
def served(request, models, questions):
    served = Served(models, request.param, questions[:NUMBER])
    yield served
    del served.llm
    gc.collect()
    cleanup_dist_env_and_memory()


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_answers_are_those_in_process(served, threshold):
    expected = served.batch(served.prompts, nudge_threshold=threshold)
    assert served.ask(served.prompts, [greedy(threshold)] * len(served.prompts)) == expected
    for prompt, ids in list(zip(served.prompts, expected, strict=True))[: NUMBER // 5]:
        assert served.ask([prompt], [greedy(threshold)]) == [ids]


def test_requests_of_all_kinds_run_together(served):
    """Greedy and sampled, cut in mid-word, penalties, bans, stop tokens, and the plain base."""
    draw = random.Random(0)
    prompts, params, expected = [], [], []
    for number in range(NUMBER):
        prompt, threshold = draw.choice(served.prompts), draw.choice(THRESHOLDS)
        most = draw.choice([draw.randint(1, 60), MOST])
        kind = draw.choice(["greedy", "sampled", "penalty", "ban", "allowed", "stop", "fewest", "plain", "gate"])
        own = greedy(threshold, max_tokens=most)
        settings = {"nudge_threshold": threshold, "max_new_tokens": most}
        if kind == "sampled":
            # The interpreter lacks what vLLM's kernel for top-k and top-p needs, which plain requests run.
            warpers = {"temperature": 0.8, **({"top_p": 0.9, "top_k": 40} if RUNNER == "v1" else {"top_k": 0})}
            own = SamplingParams(**warpers, seed=number, max_tokens=most)
            own.extra_args = {"nudge_threshold": threshold}
            settings |= {"do_sample": True, **warpers, "seed": number}
        elif kind == "penalty":
            own.repetition_penalty = settings["repetition_penalty"] = 1.2
        elif kind == "ban":
            own.bad_words = [" the", " that"]
            own.update_from_tokenizer(served.llm.get_tokenizer())
            settings["bad_words_ids"] = own.bad_words_token_ids
        elif kind == "allowed":
            own.allowed_token_ids = list(range(0, served.base.config.vocab_size, 2))
            settings["prefix_allowed_tokens_fn"] = lambda batch, ids, allowed=own.allowed_token_ids: allowed
        elif kind == "stop":
            own = greedy(threshold, max_tokens=most, stop_token_ids=[70, 71, 72])
            eos = served.base.generation_config.eos_token_id
            settings["eos_token_id"] = [eos, 70, 71, 72]
        elif kind == "fewest":
            fewest = draw.randint(1, most)
            own = greedy(threshold, max_tokens=most, min_tokens=fewest)
            settings["min_new_tokens"] = fewest
        elif kind == "gate":
            own.extra_args = {"nudge_gate": "margin", "nudge_threshold": 0.3, "num_nudging_tokens": 8}
            settings |= {"nudge_gate": "margin", "nudge_threshold": 0.3, "num_nudging_tokens": 8}
        if kind == "plain":
            own.extra_args = {"nudging": 0}
            ids = served.base.generate(torch.tensor([prompt]), max_new_tokens=most, do_sample=False)
            answer = ids[0, len(prompt) :].tolist()
        else:
            answer = served.single(prompt, **settings)
        prompts.append(prompt)
        params.append(own)
        expected.append(answer)
    for given, found, answer in zip(params, served.ask(prompts, params), expected, strict=True):
        assert found == answer, given


def test_requests_were_preempted_and_prompts_read_in_chunks(served, monkeypatch):
    """What the engine of these tests is made to do."""
    preempted, chunked = [], []
    preempt, schedule = served.scheduler._preempt_request, served.scheduler.schedule

    def noting_preempt(request, *args, **kwargs):
        preempted.append(request.request_id)
        return preempt(request, *args, **kwargs)

    def noting_schedule(*args, **kwargs):
        output = schedule(*args, **kwargs)
        for new in output.scheduled_new_reqs:
            if output.num_scheduled_tokens[new.req_id] < len(new.prompt_token_ids) - new.num_computed_tokens:
                chunked.append(new.req_id)
        return output

    monkeypatch.setattr(served.scheduler, "_preempt_request", noting_preempt)
    monkeypatch.setattr(served.scheduler, "schedule", noting_schedule)
    prompts = served.prompts[:16] * (2 if len(served.prompts) < 16 else 1)
    expected = served.batch(prompts, nudge_threshold=0.4)
    assert served.ask(prompts, [greedy()] * len(prompts)) == expected
    assert preempted and chunked


def test_stop_strings_end_answers(served):
    prompt = served.prompts[0]
    expected = served.single(prompt, nudge_threshold=0.4)
    text = served.tokenizer.decode(expected, skip_special_tokens=True)
    word = text.split()[5]
    [output] = served.llm.generate([TokensPrompt(prompt_token_ids=prompt)], greedy(stop=[word]), use_tqdm=False)
    assert output.outputs[0].finish_reason == "stop" and output.outputs[0].text == text[: text.index(word)]
    assert not served.left_over()


def test_logprobs_are_the_bases_own(served):
    prompts = served.prompts[:4]
    given = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    params = [greedy(logprobs=2), greedy(logprobs=2), greedy(), greedy(logprobs=2, extra_args={"nudging": 0})]
    outputs = served.llm.generate(given, params, use_tqdm=False)
    assert outputs[2].outputs[0].logprobs is None
    for prompt, output, own in zip(prompts, outputs, params, strict=True):
        [found] = output.outputs
        if own.logprobs is None:
            continue
        ids = torch.tensor([[*prompt, *found.token_ids]])
        expected = served.base(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert len(found.logprobs) == len(found.token_ids)
        for place, (token, logprobs) in enumerate(zip(found.token_ids, found.logprobs, strict=True)):
            assert logprobs[token].logprob == pytest.approx(expected[place, token].item(), abs=1e-3)
            best = expected[place].max().item()
            assert max(each.logprob for each in logprobs.values()) == pytest.approx(best, abs=1e-3)


def test_an_aborted_request_leaves_nothing_and_the_others_go_on(served):
    engine = served.llm.llm_engine
    prompts = served.prompts[:6]
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), TokensPrompt(prompt_token_ids=prompt), greedy())
    found = {}
    for step in range(1000):
        for output in engine.step():
            if output.finished:
                found[output.request_id] = list(output.outputs[0].token_ids)
        if step == 4:
            engine.abort_request(["1", "4"])
        if not engine.has_unfinished_requests():
            break
    assert sorted(found) == ["0", "2", "3", "5"]
    assert all(ids == served.single(prompts[int(name)], nudge_threshold=0.4) for name, ids in found.items())
    assert not served.left_over()


def test_a_bad_request_ends_alone(served):
    bad = greedy(extra_args={"nudge_threshold": "high"})
    [found, ended] = served.ask(served.prompts[:2], [greedy(), bad])
    assert found == served.single(served.prompts[0], nudge_threshold=0.4)
    assert ended == [served.base.generation_config.eos_token_id]


def test_several_answers_are_drawn_with_seeds_of_their_own(served):
    params = SamplingParams(temperature=1.0, seed=3, n=3, max_tokens=30)
    prompt = served.prompts[1]
    [output] = served.llm.generate([TokensPrompt(prompt_token_ids=prompt)], params, use_tqdm=False)
    found = [list(each.token_ids) for each in output.outputs]
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": 30}
    assert found == [served.single(prompt, seed=3 + number, **settings) for number in range(3)]
