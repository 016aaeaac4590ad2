"""Questions made of emo-tiny's documents: which text goes on in the same way?"""

import datasets


def scored(rows: datasets.Dataset) -> datasets.Dataset:
    return _questions(rows, "test")


def shown(rows: datasets.Dataset) -> datasets.Dataset:
    return _questions(rows, "calibration")


def _questions(rows: datasets.Dataset, split: str) -> datasets.Dataset:
    texts = [row["text"] for row in rows if row["split"] == split]
    beginnings = [text[:90].rstrip() for text in texts]
    ends = [text[len(start) :][:60] for text, start in zip(texts, beginnings, strict=True)]
    questions = []
    for number, beginning in enumerate(beginnings):
        # The right end and three of other documents; the right one stands in another place each time.
        choices = [ends[(number + other * 5) % len(ends)] for other in range(4)]
        turn = number % 4
        questions.append(
            {"beginning": beginning, "choices": choices[-turn:] + choices[:-turn] if turn else choices}
            | {"answer": turn, "end": ends[number], "few": ends[number][:8], "text": texts[number][:400]}
        )
    return datasets.Dataset.from_list(questions)
