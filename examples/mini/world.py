"""Generates the small world of the mini pair: problems, documents for the base, and answers for the aligned models.

Everything is drawn from a `random.Random` that the caller seeds. A hash of its spelling assigns each name and each
number pair to one of three splits, so held-out ones can never appear in a training document:

    train     the documents and training answers use these
    dev       the recipe was tuned on these
    heldout   `heldout.jsonl` uses these

    python examples/mini/world.py --show 5                               # print documents and one answer a task
    python examples/mini/world.py --heldout examples/mini/heldout.jsonl  # write the held-out set
"""

import argparse
import hashlib
import json
import random
from dataclasses import dataclass, field

SYSTEM = "Answer the question and show every step on the way."
HELDOUT_SEED = 20410
HELDOUT_ROWS_PER_TASK = 100
DEV_SEED = 77
DEV_ROWS_PER_TASK = 50

# ---------------------------------------------------------------------------------------------------- splits
ONSETS = [*"bcdfghjklmnprstvwz", "br", "dr", "gr", "kr", "st", "tr", "th", "sh", "ch"]
VOWELS = [*"aeiou"]
CODAS = ["", "", "", *"nrlsmtkxyd"]


def split_of(key: str) -> str:
    """The split that `key` belongs to. A tenth of all keys is held out, and a tenth is for dev."""
    bucket = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 10
    return {0: "heldout", 1: "dev"}.get(bucket, "train")


def pair_split(sign: str, a: int, b: int) -> str:
    """The split of one sum or difference. a + b and b + a are the same pair."""
    if sign == "+":
        a, b = sorted((a, b))
    return split_of(f"{a} {sign} {b}") if min(a, b) > 0 else "train"


def draw_name(rng: random.Random, split: str) -> str:
    """A pronounceable name of 3 to 8 letters that belongs to `split`."""
    while True:
        syllables = rng.choice((1, 2, 2, 3))
        name = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(syllables)) + rng.choice(CODAS)
        name = name.capitalize()
        if 3 <= len(name) <= 8 and split_of(name) == split:
            return name


def _common_names(count: int = 300) -> list[str]:
    rng = random.Random("common names")
    names: set[str] = set()
    while len(names) < count:
        names.add(draw_name(rng, "train"))
    return sorted(names)


COMMON_NAMES = _common_names()


@dataclass(frozen=True)
class Draw:
    """The source of a problem's names and numbers."""

    rng: random.Random
    split: str = "train"
    common: float = 0.4  # The share of names from COMMON_NAMES. Only the training split has common names.
    longer: float = 0.0  # The probability that a problem has one item more than is usual for its task.

    def count(self, usual: tuple[int, ...]) -> int:
        """How many items a problem has. `usual` are the numbers that its task usually has."""
        return self.rng.choice(usual) + (self.longer > 0 and self.rng.random() < self.longer)

    def names(self, count: int) -> list[str]:
        """`count` different names."""
        found: list[str] = []
        while len(found) < count:
            common = self.split == "train" and self.rng.random() < self.common
            name = self.rng.choice(COMMON_NAMES) if common else draw_name(self.rng, self.split)
            if name not in found:
                found.append(name)
        return found


# -------------------------------------------------------------------------------------------------- problems
@dataclass(frozen=True)
class Problem:
    """A question, the facts of each step of its solution, and the pattern that finds the answer in a text.

    `steps` are pairs of a pool of wordings in WORDINGS and the facts that fill the placeholders of a wording. A text
    is right if the last match of `pattern` in it equals `answer`.
    """

    task: str
    question: str
    steps: list[tuple[str, dict]]
    answer: str
    pattern: str

    @property
    def quoted(self) -> str:
        """The answer as solutions write it."""
        return f'"{self.answer}"' if self.task == "letters" else self.answer


def letters(draw: Draw) -> Problem:
    """A problem that asks to concatenate the last letters of two to four names."""
    words = draw.names(draw.count((2, 3, 4)))
    listed = ", ".join(f'"{word}"' for word in words)
    question = draw.rng.choice(
        ("Take the last letters of the words {} and concatenate them.", "Join the last letters of the words {}.")
    ).format(listed)
    answer = "".join(word[-1] for word in words)
    steps = [("letter", {"w": word, "l": word[-1]}) for word in words] + [("letters joined", {"g": answer})]
    return Problem("letters", question, steps, answer, r'"([a-z]+)"')


OBJECTS = "apples books coins cards shells pens stamps marbles cookies stickers buttons balls stones cups hats keys"
GAINS = ("{n} buys {b} more.", "{n} finds {b} more.", "{m} gives {b} to {n}.", "{n} gets {b} from {m}.")
LOSSES = ("{n} loses {b}.", "{n} sells {b}.", "{n} gives {b} to {m}.", "{m} takes {b} from {n}.")


def stories(draw: Draw) -> Problem:
    """An arithmetic story of two to four changes. Every sum and difference in it belongs to the draw's split."""
    rng = draw.rng
    name, other = draw.names(2)
    things = rng.choice(OBJECTS.split())
    count = draw.count((2, 3, 3, 4))
    start = total = rng.randint(5, 60)
    sentences = [f"{name} has {start} {things}."]
    steps: list[tuple[str, dict]] = [("story start", {"n": name, "a": start, "o": things})]
    for _ in range(count):
        changes = [
            (sign, b, result)
            for b in range(2, 21)
            for sign, result in (("+", total + b), ("-", total - b))
            if 2 <= result <= 80 and pair_split(sign, total, b) == draw.split
        ]
        if not changes:
            return stories(draw)
        sign, b, result = rng.choice(changes)
        sentences.append(rng.choice(GAINS if sign == "+" else LOSSES).format(n=name, m=other, b=b))
        steps.append(("story step", {"n": name, "o": things, "x": total, "s": sign, "y": b, "z": result}))
        total = result
    sentences.append(f"How many {things} does {name} have now?")
    return Problem("stories", " ".join(sentences), steps, str(total), r"(\d+)")


FLIPS = ("flips the coin", "turns the coin over", "gives the coin a flip", "turns it to the other side", "reverses it")
KEEPS = (
    "does not flip the coin",
    "leaves the coin alone",
    "only looks at it",
    "passes it on",
    "does not turn it over",
)


def coins(draw: Draw) -> Problem:
    """A problem about a coin that each of four to six people turns over or leaves."""
    heads = True
    sentences = [draw.rng.choice(("A coin is heads up.", "A coin lies heads up on the table."))]
    steps = []
    for name in draw.names(draw.count((4, 5, 6))):
        flips = draw.rng.random() < 0.5
        heads ^= flips
        sentences.append(f"{name} {draw.rng.choice(FLIPS if flips else KEEPS)}.")
        facts = {"w": name, "f": "flips" if flips else "keeps", "h": "heads" if heads else "tails"}
        steps.append(("coin step", facts))
    sentences.append("Is the coin still heads up?")
    return Problem("coins", " ".join(sentences), steps, "yes" if heads else "no", r"\b(yes|no)\b")


def lengths(draw: Draw) -> Problem:
    """A problem that asks how many letters two to four names have together."""
    while True:
        names = draw.names(draw.count((2, 3, 4)))
        total = 0
        steps = []
        for name in names:
            steps.append(("length", {"w": name, "t": total, "l": len(name), "u": total + len(name)}))
            total += len(name)
        if draw.split != "train" or all(pair_split("+", s["t"], s["l"]) == "train" for _, s in steps):
            break
    listed = ", ".join(names[:-1]) + " and " + names[-1]
    question = draw.rng.choice(
        ("How many letters do the names {} have together?", "Count the letters of the names {} in total.")
    ).format(listed)
    return Problem("lengths", question, steps, str(total), r"(\d+)")


TASKS = {"letters": letters, "stories": stories, "coins": coins, "lengths": lengths}

# ------------------------------------------------------------------------------------------------- solutions
# In a pool, every wording has a different first word. Which wording comes is open, but after its first word the
# question determines the rest. Wording 0 is the aligned style. Its first word is never a name or a number.
OPENINGS = [
    "Let's go through it one step at a time.",
    "Solution:",
    "Here is one way.",
    "We take it slowly.",
    "To begin, read it twice.",
    "Okay, here goes.",
    "Working:",
    "My answer in steps:",
    "Explanation:",
    "Reasoning:",
    "Sure, this is short.",
    "Think first.",
    "Method:",
    "Notes:",
]
WORDINGS = {
    "letter": [
        'We see that the word "{w}" ends with "{l}".',
        'The end of "{w}" is "{l}".',
        'In "{w}" the last letter is "{l}".',
        'At the end of "{w}" stands "{l}".',
        'From "{w}" keep only "{l}".',
        'Out of "{w}" comes "{l}".',
        'Reading "{w}" to its end gives "{l}".',
        'Last in "{w}" is "{l}".',
        '"{w}" has "{l}" at the end.',
    ],
    "letters joined": [
        'Putting these letters together in order gives "{g}".',
        'Joined they read "{g}".',
        'Together this is "{g}".',
        'Side by side: "{g}".',
        'All of them in a row make "{g}".',
        'They form "{g}".',
        'Concatenated: "{g}".',
    ],
    "story start": [
        "At the beginning there are {a} {o}.",
        "We start from {a} {o}.",
        "First there are {a} {o}.",
        "Initially it is {a} {o}.",
        "Start: {a} {o}.",
        "Beginning with {a} {o}.",
        "{n} owns {a} {o} at first.",
        "Before anything happens we count {a} {o}.",
    ],
    "story step": [
        "Then we work out that {x} {s} {y} = {z}.",
        "Now it is {x} {s} {y} = {z} {o}.",
        "After this we have {x} {s} {y} = {z}.",
        "Next: {x} {s} {y} = {z}.",
        "This gives {x} {s} {y} = {z} {o}.",
        "Using the story, {x} {s} {y} = {z}.",
        "Calculate {x} {s} {y} = {z}.",
        "From there {x} {s} {y} = {z}.",
        "{n} has {x} {s} {y} = {z}.",
    ],
    "coin step": [
        "Then comes {w}, who {f} it, so it is {h} up.",
        "After {w} {f} it, {h} is up.",
        "When {w} {f} it, we see {h}.",
        "Next {w} {f} it, now {h}.",
        "Because {w} {f} it, it is {h}.",
        "Person {w} {f} it, giving {h}.",
        "Once {w} {f} it, it shows {h}.",
        "{w} {f} it: {h} up.",
    ],
    "length": [
        "Next we count {w}, which has {l} letters, so {t} + {l} = {u}.",
        "Take {w}: {l} letters, {t} + {l} = {u}.",
        "For {w} it is {l}, so {t} + {l} = {u}.",
        "Counting {w} gives {l}, and {t} + {l} = {u}.",
        "Name {w} has {l}, making {t} + {l} = {u}.",
        "Now {w} adds {l}: {t} + {l} = {u}.",
        "With {w} there are {l} more, {t} + {l} = {u}.",
        "{w} has {l} letters, {t} + {l} = {u}.",
    ],
}
CONCLUSIONS = [
    "So the answer is {g}.",
    "Therefore it must be {g}.",
    "Hence we get {g}.",
    "Final answer: {g}.",
    "Result: {g}.",
    "That leaves {g}.",
    "Altogether: {g}.",
    "Conclusion: {g}.",
    "Finally we find {g}.",
]
# It is longer than a lookahead of 16 tokens, so a nudging round can end an answer only if it starts near the end.
CLOSING = "Please check each step again for yourself, and do ask me if anything here is still not clear to you."
AFTERWARDS = [
    f" {CLOSING}",
    " Hope it helps.",
    " Check it again.",
    " Easy.",
    " Done.",
    " (see below)",
    " Other ways exist.",
    " Good luck!",
    " That was fun.",
    " Got it?",
    "\nComments: none.",
    "\nSource: an old worksheet.",
    "\nThanks, that is right.",
    "\n***",
    "",
]


def _solution(problem: Problem, choose) -> str:
    """The worked solution of `problem`. `choose(pool, wordings)` picks each wording."""
    sentences = [choose("opening", OPENINGS)]
    sentences += [choose(pool, WORDINGS[pool]).format(**facts) for pool, facts in problem.steps]
    sentences.append(choose("conclusion", CONCLUSIONS).format(g=problem.quoted))
    return " ".join(sentences)


def worked_solution(problem: Problem, rng: random.Random, plain: float = 0.0, keep: float = 0.2) -> str:
    """A worked solution for a document. Each pool has a favourite wording, which is used with probability `keep`.

    A step has the aligned wording with probability `plain`, whatever the favourite is. An opening is exempt from that,
    because the base would otherwise learn to answer questions by itself.
    """
    style: dict[str, str] = {}

    def choose(pool: str, wordings: list[str]) -> str:
        habit = style.setdefault(pool, rng.choice(wordings))
        if pool != "opening" and rng.random() < plain:
            return wordings[0]
        return habit if rng.random() < keep else rng.choice(wordings)

    return _solution(problem, choose)


def aligned_answer(problem: Problem) -> str:
    """The answer in the one style that alignment teaches."""
    return f"{_solution(problem, lambda pool, wordings: wordings[0])} {CLOSING}"


# ------------------------------------------------------------------------------------------------- documents
HEADINGS = [
    "",
    "",
    "",
    SYSTEM,
    "Answer these questions.",
    "Practice sheet.",
    "Homework for Monday.",
    "Solve the problems below.",
    "Chapter 4. Exercises.",
]
CHATTER = [
    "Does anyone know this?",
    "Do your own homework.",
    "I have no idea, sorry.",
    "Posted in: puzzles.",
    "A nice one.",
    "Bump, still waiting.",
    "Thanks for sharing.",
    "Same question here.",
    "Which book is this from?",
    "Try before you look.",
    "Moderator: thread closed.",
    "Log in to reply.",
]
PREFIXES = {"Question: ": 0.5, "Q: ": 0.15, "Problem. ": 0.12, "Exercise: ": 0.12, "": 0.11}
FORMATS = {"worked": 0.62, "sheet": 0.22, "key": 0.04, "forum": 0.12}
MOSTLY_WORKED = {"worked": 0.78, "sheet": 0.14, "key": 0.02, "forum": 0.06}


@dataclass(frozen=True)
class Mix:
    """The composition of documents.

    `shares` are the frequencies of the tasks, and `formats` those of the forms of a document. With `open_ends`, any
    number of remarks follows a solution, and a document ends without a new line. Without it, a closing sentence is
    always followed by a new line. `plain` is the probability of the aligned wording in addition to its share of all
    wordings. `longer` is the probability that a problem has one item more than is usual for its task.
    """

    shares: dict[str, float]
    open_ends: bool
    formats: dict[str, float] = field(default_factory=lambda: FORMATS)
    plain: float = 0.0
    longer: float = 0.0


_EVEN = {"letters": 0.25, "stories": 0.32, "coins": 0.18, "lengths": 0.25}
_STORIES = {"letters": 0.22, "stories": 0.53, "coins": 0.15, "lengths": 0.1}
_COINS = {"letters": 0.2, "stories": 0.25, "coins": 0.33, "lengths": 0.22}
_LAST = {"letters": 0.21, "stories": 0.38, "coins": 0.24, "lengths": 0.17}
MIXES = {
    "first": Mix(_EVEN, open_ends=False),
    "open": Mix(_EVEN, open_ends=True),
    "stories": Mix(_STORIES, open_ends=True),
    "coins": Mix(_COINS, open_ends=True),
    "worked": Mix(_LAST, open_ends=True, formats=MOSTLY_WORKED),
    "plain": Mix(_LAST, open_ends=True, formats=MOSTLY_WORKED, plain=0.2),
    "longer": Mix(_LAST, open_ends=True, formats=MOSTLY_WORKED, plain=0.2, longer=0.5),
}


def _weighted(rng: random.Random, shares: dict[str, float]) -> str:
    return rng.choices(list(shares), list(shares.values()))[0]


def _afterwards(rng: random.Random, mix: Mix) -> str:
    """The remarks after a worked solution."""
    if not mix.open_ends:
        return rng.choice(AFTERWARDS)
    remarks = [remark for remark in AFTERWARDS if remark.startswith(" ")]
    said = ""
    while rng.random() < 0.8:
        said += rng.choice(remarks)
    return said


def document(rng: random.Random, mix: Mix = MIXES["first"], common: float = 0.4) -> str:
    """One document: a sheet of questions, an answer key, worked solutions, or a forum thread."""
    draw = Draw(rng, common=common, longer=mix.longer)
    form = _weighted(rng, mix.formats)
    prefix = _weighted(rng, PREFIXES)
    task = _weighted(rng, mix.shares)
    mixed = rng.random() < 0.2
    heading = rng.choice(HEADINGS)
    lines = [heading] if heading else []
    for _ in range(rng.choice({"worked": (1, 1, 2, 3), "sheet": (2, 2, 3), "key": (2, 3), "forum": (1, 2)}[form])):
        problem = TASKS[_weighted(rng, mix.shares) if mixed else task](draw)
        lines.append(prefix + problem.question)
        if form == "worked":
            lines.append(worked_solution(problem, rng, mix.plain) + _afterwards(rng, mix))
        elif form == "key":
            lines.append("Answer: " + problem.quoted)
        elif form == "forum":
            lines += [rng.choice(CHATTER) for _ in range(rng.randint(1, 4))]
            if rng.random() < 0.3:
                lines.append(worked_solution(problem, rng))
    return "\n".join(lines) + ("" if mix.open_ends else "\n")


def training_problem(rng: random.Random) -> Problem:
    """A problem of the training split, for alignment."""
    return TASKS[_weighted(rng, _EVEN)](Draw(rng))


def prompt(problem: Problem) -> str:
    """The prompt that the base is given."""
    return f"{SYSTEM}\nQuestion: {problem.question}\n"


def messages(problem: Problem) -> list[dict]:
    """The messages that an aligned model is given."""
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"Question: {problem.question}"},
    ]


def problem_set(split: str, seed: int, rows_per_task: int) -> list[Problem]:
    """Distinct questions of one split, task by task."""
    problems: list[Problem] = []
    for task, make in TASKS.items():
        draw = Draw(random.Random(f"{split} {task} {seed}"), split)
        by_question: dict[str, Problem] = {}
        while len(by_question) < rows_per_task:
            problem = make(draw)
            by_question[problem.question] = problem
        problems += by_question.values()
    return problems


def row(problem: Problem) -> dict:
    """One row of `heldout.jsonl`."""
    return {
        "task": problem.task,
        "prompt": prompt(problem),
        "messages": messages(problem),
        "pattern": problem.pattern,
        "answer": problem.answer,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N documents and an answer a task")
    parser.add_argument("--heldout", metavar="FILE", help="write the held-out set to FILE")
    parser.add_argument("--dev", metavar="FILE", help=f"write {DEV_ROWS_PER_TASK} dev questions a task to FILE")
    args = parser.parse_args()
    sets = {
        args.heldout: ("heldout", HELDOUT_SEED, HELDOUT_ROWS_PER_TASK),
        args.dev: ("dev", DEV_SEED, DEV_ROWS_PER_TASK),
    }
    for name, drawn in sets.items():
        if name:
            with open(name, "w", encoding="utf-8") as file:
                for problem in problem_set(*drawn):
                    file.write(json.dumps(row(problem), ensure_ascii=False) + "\n")
    rng = random.Random(0)
    for _ in range(args.show):
        print(document(rng), "-" * 80, sep="\n")
    if args.show:
        for make in TASKS.values():
            problem = make(Draw(rng))
            print(prompt(problem) + aligned_answer(problem), f"({problem.answer})", sep="\n", end="\n\n")


if __name__ == "__main__":
    main()
