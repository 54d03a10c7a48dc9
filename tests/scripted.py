"""Language models with scripts, for text that random models do not write."""

from collections.abc import Callable

import torch
from transformers import GenerationConfig, GenerationMixin, LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from nudging_hf.core.vocabulary import Vocabulary

Says = Callable[[list[int]], tuple[int, float]]


class ScriptedLM(PreTrainedModel, GenerationMixin):
    """A model whose next token is a function of the ids so far. It has no cache, so pass `use_cache=False`.

    Args:
        tokenizer: the tokenizer of its vocabulary.
        says: takes all ids and returns the next token and its probability. The other tokens share the rest evenly.
    """

    config_class = LlamaConfig

    def __init__(self, tokenizer, says: Says):
        super().__init__(
            LlamaConfig(vocab_size=len(tokenizer), eos_token_id=None, pad_token_id=None, bos_token_id=None)
        )
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.generation_config = GenerationConfig(
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, use_cache=False
        )
        self.says = says

    def forward(self, input_ids, attention_mask=None, logits_to_keep=0, use_cache=False, **kwargs):
        size = self.config.vocab_size
        begin = input_ids.shape[1] - logits_to_keep if logits_to_keep else 0  # As in transformers, 0 means all.
        rows = []
        for ids in input_ids.tolist():
            for i in range(begin, len(ids)):
                token, probability = self.says(ids[: i + 1])
                row = torch.full((size,), (1 - probability) / (size - 1)).log()
                row[token] = torch.tensor(probability).log()
                rows.append(row)
        return CausalLMOutput(logits=torch.stack(rows).view(input_ids.shape[0], -1, size))

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        return {"input_ids": input_ids, "attention_mask": attention_mask}


def writer_of(text: str, tokenizer, prompt_length: int) -> Says:
    """A script that writes `text` and then EOS. It continues any beginning of `text`; after other text it ends.

    Args:
        text: the text to write.
        tokenizer: the tokenizer of the model.
        prompt_length: the number of ids before the answer.
    """
    vocabulary = Vocabulary(tokenizer)
    whole = vocabulary.encode_after("\n", text)

    def says(ids: list[int]) -> tuple[int, float]:
        answer = ids[prompt_length:]
        if whole[: len(answer)] == answer:
            rest = whole[len(answer) :]
        else:
            written = vocabulary.join(answer)
            so_far = written.decode("utf-8", errors="ignore")  # An incomplete character is left out.
            begun = len(written) - len(so_far.encode())
            rest = vocabulary.encode_after(so_far, text[len(so_far) :]) if text.encode().startswith(written) else []
            while begun > 0 and rest:
                begun -= len(vocabulary.bytes_of(rest.pop(0)))
        return (rest[0] if rest else tokenizer.eos_token_id), 0.9

    return says
