"""Questions about planted facts of several kinds, as in question answering over documents."""

from __future__ import annotations

from dataclasses import dataclass

from kvscope.tasks.base import QUESTION, Draft, Family, Ingredients, Piece, parameter, require_between, task
from kvscope.tasks.names import NOUNS, PEOPLE
from kvscope.tasks.planting import planted

KINDS = (
    ("{who} lives near the {what}.", "Where does {who} live?", "{who} lives near the"),
    ("{who} sold the {what}.", "What did {who} sell?", "{who} sold the"),
    ("{who} is afraid of the {what}.", "What is {who} afraid of?", "{who} is afraid of the"),
    ("{who} painted the {what}.", "What did {who} paint?", "{who} painted the"),
    ("{who} repaired the {what}.", "What did {who} repair?", "{who} repaired the"),
)


@task("facts")
@dataclass(frozen=True)
class Facts(Family):
    """Facts about people are planted, several about each kind of thing, and one is asked for, which is at a depth.

    In the place of RULER's QA, whose questions come from SQuAD and HotpotQA: planted facts are exact, and no model has
    read them before. Answers are scored by the words that they share with the right one (F1), as in LongBench
    (arXiv:2308.14508).
    """

    metric = "f1"
    paper = "arXiv:2404.06654 section 3.4"

    people: int = parameter(8, "people about whom a fact is planted")

    def __post_init__(self) -> None:
        require_between(self, "people", 1, 40)

    def draft(self, given: Ingredients) -> Draft:
        random = given.random
        who, what = random.sample(PEOPLE, self.people), random.sample(NOUNS, self.people)
        kinds = [random.choice(KINDS) for _ in who]
        places = [given.depth, *(random.random() for _ in who[1:])]
        facts = [
            (place, Piece(kind[0].format(who=one, what=thing), "needle" if number == 0 else "distractor"))
            for number, (place, kind, one, thing) in enumerate(zip(places, kinds, who, what, strict=True))
        ]
        _, question, answer = kinds[0]
        return Draft(
            [
                *planted(given.filler(given.size), facts),
                Piece("\n\n"),
                Piece(f"Question: {question.format(who=who[0])}", QUESTION),
                Piece("\nAnswer: "),
                Piece(answer.format(who=who[0]), QUESTION),
            ],
            (what[0],),
            given.depth,
        )
