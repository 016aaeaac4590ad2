"""Where documents begin, against naive loops."""

from itertools import groupby

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers_emo.modeling_emo import (
    flatten_segments,
    lengths_from_segments,
    segments_from_eos,
    segments_from_lengths,
    segments_from_positions,
)


class TestSegments:
    def test_example_of_the_specification(self):
        ids = torch.tensor([[1, 2, 9, 3, 4, 9, 5, 6]])
        assert segments_from_eos(ids, 9, eos_opens=True).tolist() == [[0, 0, 1, 1, 1, 2, 2, 2]]
        assert segments_from_eos(ids, 9, eos_opens=False).tolist() == [[0, 0, 0, 1, 1, 1, 2, 2]]

    @pytest.mark.parametrize(
        ("ids", "opens"),
        [
            ([9, 1, 2], [0, 0, 0]),  # an EOS at position 0 opens nothing new
            ([1, 2, 9], [0, 0, 1]),  # a trailing one is a segment of one token
            ([1, 9, 9, 2], [0, 1, 2, 2]),  # so is the first of two
            ([9, 9], [0, 1]),
        ],
    )
    def test_edges(self, ids, opens):
        assert segments_from_eos(torch.tensor([ids]), [9], eos_opens=True).tolist() == [opens]

    @given(st.lists(st.integers(0, 3), min_size=1, max_size=20))
    def test_both_conventions_are_the_naive_ones(self, ids):
        opens, closes, current = [0], [0], [0, 0]
        for position in range(1, len(ids)):
            current[0] += ids[position] == 0
            current[1] += ids[position - 1] == 0
            opens.append(current[0])
            closes.append(current[1])
        tokens = torch.tensor([ids])
        assert segments_from_eos(tokens, 0, eos_opens=True).tolist() == [opens]
        assert segments_from_eos(tokens, 0, eos_opens=False).tolist() == [closes]

    @given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    def test_lengths_and_positions_agree(self, lengths):
        expected = [index for index, length in enumerate(lengths) for _ in range(length)]
        positions = torch.tensor([[p for length in lengths for p in range(length)]])
        assert segments_from_positions(positions).tolist() == [expected]
        cumulative = torch.tensor([0, *lengths]).cumsum(0)
        assert segments_from_lengths(cumulative, sum(lengths)).tolist() == [expected]

    def test_rows_never_share_a_document(self):
        segments = torch.tensor([[0, 0, 1], [1, 1, 2], [0, 0, 0]])
        assert flatten_segments(segments).tolist() == [0, 0, 1, 2, 2, 3, 4, 4, 4]

    @given(st.data(), st.integers(1, 3), st.integers(1, 8))
    def test_lengths_are_those_of_a_naive_loop(self, data, rows, columns):
        numbers = st.lists(st.integers(0, 2), min_size=columns, max_size=columns)
        segments = data.draw(st.lists(numbers, min_size=rows, max_size=rows))
        ends = st.tuples(st.integers(0, columns), st.integers(0, columns))
        mask = [
            [first <= c < last for c in range(columns)]
            for first, last in data.draw(st.tuples(*[ends] * rows))
        ]
        # a row ends a document, and so does a new number or the edge of padding
        tokens = [(row, segments[row][c], mask[row][c]) for row in range(rows) for c in range(columns)]
        expected = [len(list(run)) for _, run in groupby(tokens)]
        cumulative, longest = lengths_from_segments(torch.tensor(segments), torch.tensor(mask).long())
        assert cumulative.dtype == torch.int32 and cumulative[0] == 0
        assert cumulative.diff().tolist() == expected
        assert type(longest) is int and longest == max(expected)

    @given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    def test_lengths_and_segments_are_inverse(self, lengths):
        cumulative = torch.tensor([0, *lengths]).cumsum(0)
        back, longest = lengths_from_segments(segments_from_lengths(cumulative, sum(lengths)))
        assert back.tolist() == cumulative.tolist() and longest == max(lengths)

    @pytest.mark.parametrize(
        ("segments", "mask", "message"),
        [
            ([[0, 0, 0, 1]], [[1, 0, 1, 1]], "inside a document"),
            ([[0, 0, 0]], [[1, 1]], r"shape \(1, 2\), expected \(1, 3\)"),
        ],
    )
    def test_masks_that_lengths_cannot_say_are_refused(self, segments, mask, message):
        with pytest.raises(ValueError, match=message):
            lengths_from_segments(torch.tensor(segments), torch.tensor(mask))
