"""Counts what `word_boundary="unicode"` changes: how soon and how often the base is asked while it is nudged.

    python benchmarks/word_boundaries.py                      # the tokenizers in build/tokenizers (`make tokenizers`)
    python benchmarks/word_boundaries.py FOLDER ...           # tokenizers of your own
    python benchmarks/word_boundaries.py --pair BASE NUDGING  # a pair of models of your own, at γ 0.4

Without a pair no model runs: the lookaheads are all stretches of 16 tokens that begin at a character of a fixed text,
as a nudging model would write it that has the base's vocabulary. With a pair, both models answer some questions.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch
from transformers import AutoTokenizer

from nudging_hf.core.answer import OneVocabulary, ends_inside_character
from nudging_hf.core.config import WORD_BOUNDARIES
from nudging_hf.core.vocabulary import Vocabulary
from nudging_hf.pair import Pair, load_model

TOKENIZERS = Path(__file__).parents[1] / "build" / "tokenizers"
LOOKAHEAD = 16  # In tokens of the nudging model. It is the default.
MAX_NEW_TOKENS = 32
TEXTS = {
    "Chinese": "昨天晚上下了一场大雨，今天早上河水涨得很高。村里的人并不惊讶，因为每隔几年都会这样。孩子们站在桥上，"
    "看着一条空船慢慢漂下来。老磨坊主说：“这不是我们的船，它是从山里来的。”下午三点，县里派来了两个工程师，"
    "他们测量了水位，并请大家暂时搬到学校去住。图书馆的书也要搬到二楼，以免被水弄湿。到了2024年5月，"
    "新的堤坝终于修好了，人们在河边种了三百棵柳树。",
    "Japanese": "昨夜は大雨が降り、今朝は川の水がとても高くなっていました。数年ごとに起こることなので、村の人々は"
    "驚きませんでした。子どもたちは橋の上に立って、空のボートがゆっくり流れてくるのを見ていました。「これは私たちのボートでは"
    "ない」と粉屋のおじいさんが言いました。午後三時に、市役所から二人のエンジニアが来て、水位を測り、みんなに学校へ"
    "移るように頼みました。図書館の本やコンピューターも二階に運ばなければなりません。",
    "Thai": "เมื่อคืนฝนตกหนักมาก เช้านี้น้ำในแม่น้ำจึงสูงขึ้น ชาวบ้านไม่แปลกใจเพราะเกิดขึ้นทุกสองสามปี เด็กๆ ยืนอยู่บนสะพาน"
    "และมองดูเรือเปล่าลำหนึ่งลอยลงมาช้าๆ คุณปู่เจ้าของโรงสีพูดว่าเรือลำนี้ไม่ใช่ของพวกเรา ตอนบ่ายสามโมงมีวิศวกรสองคน"
    "มาจากอำเภอเพื่อวัดระดับน้ำและขอให้ทุกคนย้ายไปอยู่ที่โรงเรียนชั่วคราว หนังสือในห้องสมุดก็ต้องขนขึ้นชั้นสอง",
    "English": "It rained hard last night, and this morning the river was very high. Nobody in the village was "
    "surprised, because it happens every few years. The children stood on the bridge and watched an empty boat "
    'drift down slowly. "It isn\'t ours," said the old miller; "it came from the hills." At three in the afternoon '
    "two well-known engineers arrived, measured the water, and asked everybody to move into the school for a while. "
    "By May 2024 the new dam was finished, and 300 willows stood along the river.",
}
QUESTIONS = {
    "Chinese": ["请介绍一下北京。", "为什么天空是蓝色的？", "怎样做番茄炒鸡蛋？", "写一个关于猫的小故事。"],
    "Japanese": [
        "東京について教えてください。",
        "空はなぜ青いのですか。",
        "カレーの作り方を教えて。",
        "猫の短い話を書いて。",
    ],
    "Thai": ["ช่วยแนะนำกรุงเทพ", "ทำไมท้องฟ้าจึงเป็นสีฟ้า", "ทำข้าวผัดอย่างไร", "เขียนเรื่องสั้นเกี่ยวกับแมว"],
}


def lookaheads(vocabulary: Vocabulary, text: str) -> list[list[int]]:
    """All stretches of 16 tokens of a text that begin at a character."""
    ids = vocabulary.encode_after("\n", text)
    return [
        ids[start : start + LOOKAHEAD]
        for start in range(len(ids) - LOOKAHEAD + 1)
        if not ends_inside_character(vocabulary.join(ids[:start]))
    ]


def of_tokenizer(name: str) -> list[list[str]]:
    """One row for each language: words, tokens before the first question, and questions, by either rule."""
    vocabulary = Vocabulary(AutoTokenizer.from_pretrained(name, trust_remote_code=False))
    rows = []
    for language, text in TEXTS.items():
        written = lookaheads(vocabulary, text)
        figures: list[list[str]] = []
        for boundary in WORD_BOUNDARIES:
            answer = OneVocabulary(vocabulary, vocabulary, [], [], boundary)
            split = [answer.words(lookahead) for lookahead in written]
            words = statistics.fmean(len(each) for each in split)
            first = statistics.fmean(len(each[0].ids) for each in split)
            questions = statistics.fmean(sum(not word.is_empty for word in each[1:]) for each in split)
            figures.append([f"{words:.1f}", f"{first:.1f}", f"{questions:.1f}"])
        both = [" → ".join(figure) for figure in zip(*figures, strict=True)]
        rows.append([Path(name).name, language, str(len(written)), *both])
    return rows


def of_pair(base: str, nudging: str) -> list[list[str]]:
    """One row for each language: tokens of a nudge, the share of nudged tokens, and passes, by either rule."""
    names = {"The base": base, "The nudging model": nudging}
    pair = Pair(*(part for whose, name in names.items() for part in load_model(name, whose, dtype=torch.float32)))
    rows = []
    for language, questions in QUESTIONS.items():
        inputs = pair.inputs([[{"role": "user", "content": question}] for question in questions])
        figures: list[list[str]] = []
        for boundary in WORD_BOUNDARIES:
            output = pair.generate(
                inputs,
                word_boundary=boundary,
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                return_dict_in_generate=True,
            )
            runs = [len(list(run)) for row in output.nudged_mask.tolist() for own, run in groupby(row) if own]
            tokens = int((~output.base_top1_probs.isnan()).sum())
            figures.append(
                [f"{statistics.fmean(runs):.1f}", f"{sum(runs) / tokens:.0%}", f"{output.base_forward_passes}"]
            )
        rows.append([language, *(" → ".join(figure) for figure in zip(*figures, strict=True))])
    return rows


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizers", nargs="*", metavar="FOLDER", help="tokenizers that `AutoTokenizer` can load")
    parser.add_argument("--pair", nargs=2, metavar=("BASE", "NUDGING"), help="a base and a nudging model")
    args = parser.parse_args(argv)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    print('Each cell says "space" → "unicode".\n')
    if args.pair:
        header = ["questions in", "tokens of a nudge", "nudged tokens", "passes of the base"]
        print(table(header, of_pair(*args.pair)))
        return
    names = args.tokenizers or sorted(str(path.parent) for path in TOKENIZERS.glob("*/tokenizer.json"))
    if not names:
        parser.error(f"there are no tokenizers in {TOKENIZERS}: call `make tokenizers`, or name folders")
    header = ["tokenizer", "text", "lookaheads", "words", "tokens before the first question", "questions"]
    print(table(header, [row for name in names for row in of_tokenizer(name)]))


if __name__ == "__main__":
    main()
