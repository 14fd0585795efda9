import numpy as np

from teachercache.tokens.rows import Segment, TokenRow, row_id

SEGMENTS = (Segment("a" * 32, 0, 0, 9, start=0), Segment("b" * 32, 1, 4, 7, start=3))
ROW = TokenRow(
    row_id=row_id(SEGMENTS),
    held_out=False,
    input_ids_S=np.array([5, 6, 7, 8, 9], dtype=np.int32),
    target_mask_S=np.array([True, True, False, True, False]),
    segments=SEGMENTS,
)


def test_a_label_is_the_token_after_its_position():
    assert ROW.labels_N().tolist() == [6, 7, 9] and ROW.positions == 3 and ROW.length == 5


def test_position_ids_restart_at_every_segment():
    assert ROW.position_ids_S().tolist() == [0, 1, 2, 0, 1]


def test_a_row_is_named_by_the_spans_it_holds():
    names = {
        row_id(SEGMENTS),
        row_id(SEGMENTS[::-1]),
        row_id(SEGMENTS[:1]),
        row_id(SEGMENTS, repeat=1),
        row_id((Segment("a" * 32, 1, 0, 9, start=0), SEGMENTS[1])),
        row_id((Segment("a" * 32, 0, 0, 8, start=0), SEGMENTS[1])),
    }
    assert len(names) == 6 and all(len(name) == 32 for name in names)
    # where a segment lies and whether its text is kept are no part of what it is
    moved = (Segment("a" * 32, 0, 0, 9, start=2, text="text"), SEGMENTS[1])
    assert row_id(moved) == row_id(SEGMENTS)
