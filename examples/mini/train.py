"""Trains the mini pair and its companions from scratch on a CPU.

    python examples/mini/train.py                    # every stage, in order
    python examples/mini/train.py --stage nudging    # one stage
    python examples/mini/train.py --out somewhere    # default: examples/mini

Each stage writes OUT/models/<stage>. A stage that starts from another needs the folder of that one. A stage whose
folder exists is skipped; delete the folder to train it again. An interrupted stage continues from its last checkpoint
in OUT/checkpoints. The data of a step depends only on the seed, the stage and the number of the step.
"""

import argparse
import random
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import world
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# -------------------------------------------------------------------------------------------------- tokenizers
# All documents and answers that the models read put "Question: " before a question, so the templates do.
ASKED = "{{ 'Question: ' if message['role'] == 'user' and 'Question: ' not in message['content'] }}"
CONTROL_TOKENS_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' }}"
    f"{ASKED}"
    "{{ message['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
# The base's vocabulary has no control tokens for turns, so this template marks them in plain text.
PLAIN_TEXT_TEMPLATE = (
    "{% for message in messages %}{{ '[' + message['role'] + ']\\n' }}"
    f"{ASKED}"
    "{{ message['content'] }}{{ eos_token if message['role'] == 'assistant' else '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class TokenizerSpec:
    """A byte-level BPE tokenizer. Every byte is in its alphabet, so decoding restores any text.

    `common` is the share of common names in the documents that it is trained on. If all names are common, each becomes
    one token; from fresh names it learns pieces. `template` is the chat template of the aligned models that use it.
    """

    vocabulary: int
    single_digits: bool
    specials: tuple[str, ...]
    eos: str
    pad: str
    common: float
    template: str
    documents: int = 6000


TOKENIZERS = {
    "base": TokenizerSpec(
        vocabulary=1024,
        single_digits=True,
        specials=("<|endoftext|>", "<|pad|>"),
        eos="<|endoftext|>",
        pad="<|pad|>",
        common=0.4,
        template=PLAIN_TEXT_TEMPLATE,
    ),
    "nudging": TokenizerSpec(
        vocabulary=2048,
        single_digits=False,
        specials=("<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"),
        eos="<|end|>",
        pad="<|pad|>",
        common=1.0,
        template=CONTROL_TOKENS_TEMPLATE,
    ),
}


def train_tokenizer(spec: TokenizerSpec, seed: int) -> Tokenizer:
    """Trains the tokenizer that `spec` describes on documents of the training split."""
    rng = random.Random(f"tokenizer {seed} {spec.vocabulary}")
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if spec.single_digits:
        steps.insert(0, pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocabulary,
        special_tokens=list(spec.specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((world.document(rng, common=spec.common) for _ in range(spec.documents)), trainer)
    return tokenizer


def load_tokenizer(name: str, aligned: bool, out: Path) -> PreTrainedTokenizerFast:
    """The tokenizer as a transformers object. For an aligned model it has a chat template."""
    spec = TOKENIZERS[name]
    return PreTrainedTokenizerFast(
        tokenizer_file=str(out / "checkpoints" / f"tokenizer-{name}.json"),
        eos_token=spec.eos,
        pad_token=spec.pad,
        chat_template=spec.template if aligned else None,
        clean_up_tokenization_spaces=False,
    )


# ------------------------------------------------------------------------------------------------------ stages
@dataclass(frozen=True)
class Shape:
    """The size of a Llama."""

    hidden: int
    layers: int
    heads: int
    ffn: int


@dataclass(frozen=True)
class Stage:
    """One training run: where it starts, what it reads, and for how long.

    `start` is a Shape for a fresh model, or the name of the stage whose weights it continues from. `data` is
    "documents" or "answers"; a model that has read answers is aligned and has a chat template. `mixes` are pairs of a
    step and the name of the mix of documents from that step on. The learning rates of Muon (matrices) and AdamW (the
    rest) are multiplied by a factor. It is interpolated linearly between the (step, factor) pairs of `rates`, and goes
    to zero at the end.
    """

    start: Shape | str
    tokenizer: str
    data: str
    steps: int
    batch: int
    rates: tuple[tuple[int, float], ...]
    mixes: tuple[tuple[int, str], ...] = ((0, "first"),)
    muon: float = 3e-3
    adamw: float = 2e-3
    length: int = 320  # The length of a row of documents, in tokens.
    checkpoint_every: int = 100

    def rate(self, step: int) -> float:
        """The factor on the learning rates at `step`."""
        points = ((-1, 0.0), *self.rates, (self.steps, 0.0))
        (left, low), (right, high) = next(pair for pair in pairwise(points) if step <= pair[1][0])
        return low + (high - low) * (step - left) / (right - left)

    def mix(self, step: int) -> world.Mix:
        """The mix of documents at `step`."""
        return world.MIXES[[name for first, name in self.mixes if first <= step][-1]]


SMALL = ((60, 1.0), (175, 1.0))
STAGES = {
    "base": Stage(
        Shape(192, 4, 4, 512),
        "base",
        "documents",
        steps=11400,
        batch=7,
        rates=(
            *((60, 1.0), (1260, 1.0), (2700, 0.172)),
            *((2740, 0.55), (2850, 0.55), (3400, 0.0)),
            *((3440, 0.5), (3550, 0.5), (4000, 0.0)),
            *((4040, 0.5), (4400, 0.5), (5300, 0.0)),
            *((5340, 0.4), (5800, 0.4), (6500, 0.0)),
            *((6520, 0.3), (6560, 0.3), (6800, 0.0)),
            *((6840, 0.5), (9200, 0.5)),
        ),
        mixes=(
            (0, "first"),
            (2000, "open"),
            (2700, "stories"),
            (3400, "coins"),
            (4000, "worked"),
            (5700, "plain"),
            (6800, "longer"),
        ),
    ),
    "nudging-unaligned": Stage(
        Shape(48, 2, 4, 128), "nudging", "documents", steps=1400, batch=7, rates=((60, 1.0), (490, 1.0))
    ),
    "nudging": Stage("nudging-unaligned", "nudging", "answers", steps=500, batch=12, rates=SMALL),
    "nudging-shared-unaligned": Stage(
        Shape(64, 2, 4, 192), "base", "documents", steps=1500, batch=7, rates=((60, 1.0), (525, 1.0))
    ),
    "nudging-shared": Stage("nudging-shared-unaligned", "base", "answers", steps=500, batch=12, rates=SMALL),
    "large-aligned": Stage("base", "base", "answers", steps=150, batch=12, rates=((30, 1.0),), muon=1e-3, adamw=5e-4),
}


def document_batch(stage: Stage, tokenizer: PreTrainedTokenizerFast, rng: random.Random, step: int) -> tuple:
    """Rows of concatenated documents. Each row begins with a document and is cut at the stage's length."""
    rows = []
    for _ in range(stage.batch):
        ids: list[int] = []
        while len(ids) < stage.length:
            ids += tokenizer(world.document(rng, stage.mix(step)))["input_ids"] + [tokenizer.eos_token_id]
        rows.append(ids[: stage.length])
    inputs = torch.tensor(rows)
    return inputs, inputs


def answer_batch(stage: Stage, tokenizer: PreTrainedTokenizerFast, rng: random.Random, step: int) -> tuple:
    """Rows that hold one chat each. Only the answer and its end mark are learnt."""
    rows = []
    for _ in range(stage.batch):
        problem = world.training_problem(rng)
        chat = tokenizer.apply_chat_template(world.messages(problem), add_generation_prompt=True, tokenize=False)
        asked = tokenizer(chat)["input_ids"]
        answered = tokenizer(world.aligned_answer(problem))["input_ids"] + [tokenizer.eos_token_id]
        rows.append((asked, answered))
    width = max(len(asked) + len(answered) for asked, answered in rows)
    inputs = torch.full((stage.batch, width), tokenizer.pad_token_id)
    labels = torch.full((stage.batch, width), -100)
    for i, (asked, answered) in enumerate(rows):
        end = len(asked) + len(answered)
        inputs[i, :end] = torch.tensor(asked + answered)
        labels[i, len(asked) : end] = torch.tensor(answered)
    return inputs, labels


BATCHES = {"documents": document_batch, "answers": answer_batch}


def fresh_model(shape: Shape, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of that shape with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


class Muon(torch.optim.Optimizer):
    """Momentum with an orthogonalised update that is scaled to the size of an AdamW update (Jordan et al. 2024).

    torch.optim.Muon does the same in bfloat16, which is many times slower on a CPU without bfloat16 instructions.
    """

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)
    ITERATIONS = 5

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        a, b, c = self.COEFFICIENTS
        for group in self.param_groups:
            for matrix in group["params"]:
                state = self.state[matrix]
                average = state.setdefault("average", torch.zeros_like(matrix))
                average.lerp_(matrix.grad, 1 - group["momentum"])
                update = matrix.grad.lerp(average, group["momentum"])
                tall = update.shape[0] > update.shape[1]
                update = update.T if tall else update
                update = update / update.norm().clamp(min=1e-7)
                for _ in range(self.ITERATIONS):
                    gram = update @ update.T
                    update = a * update + (b * gram + c * gram @ gram) @ update
                update = update.T if tall else update
                matrix.sub_(update, alpha=group["lr"] * 0.2 * max(matrix.shape) ** 0.5)


def optimizers_of(model: LlamaForCausalLM, stage: Stage) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, and AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        Muon(matrices, lr=stage.muon),
        torch.optim.AdamW(others, lr=stage.adamw, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(name: str, stage: Stage, model: LlamaForCausalLM, tokenizer, checkpoint: Path, seed: int) -> None:
    """Trains `model` in place, and continues from the checkpoint if there is one."""
    optimizers = optimizers_of(model, stage)
    first = 0
    seconds = 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, seconds = state["step"], state["seconds"]
    model.train()
    began = time.process_time() - seconds
    progress = tqdm(range(first, stage.steps), desc=name, initial=first, total=stage.steps, mininterval=5)
    for step in progress:
        for optimizer, peak in zip(optimizers, (stage.muon, stage.adamw), strict=True):
            optimizer.param_groups[0]["lr"] = peak * stage.rate(step)
        inputs, labels = BATCHES[stage.data](stage, tokenizer, random.Random(f"{seed} {name} {step}"), step)
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % stage.checkpoint_every == 0:
            state = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": step + 1,
                "seconds": time.process_time() - began,
            }
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
    print(f"{name}: {stage.steps} steps in {(time.process_time() - began) / 60:.1f} minutes of CPU time")


def run_stage(name: str, out: Path, seed: int) -> None:
    """Trains one stage and saves its model, tokenizer and generation config, unless its folder exists already."""
    stage = STAGES[name]
    folder = out / "models" / name
    if folder.exists():
        print(f"{name}: {folder} exists already")
        return
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(stage.tokenizer, stage.data == "answers", out)
    if isinstance(stage.start, str):
        model = LlamaForCausalLM.from_pretrained(out / "models" / stage.start, dtype=torch.float32)
    else:
        model = fresh_model(stage.start, tokenizer)
    train(name, stage, model, tokenizer, out / "checkpoints" / f"{name}.pt", seed)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run_tokenizers(out: Path, seed: int) -> None:
    """Trains the tokenizers that do not exist yet."""
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    for name, spec in TOKENIZERS.items():
        file = out / "checkpoints" / f"tokenizer-{name}.json"
        if not file.exists():
            train_tokenizer(spec, seed).save(str(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--stage", choices=["tokenizers", *STAGES], help="run only this stage (default: all, in order)"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: the folder of this script")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run_tokenizers(args.out, args.seed)
    for name in STAGES:
        if args.stage in (None, name):
            run_stage(name, args.out, args.seed)


if __name__ == "__main__":
    main()
