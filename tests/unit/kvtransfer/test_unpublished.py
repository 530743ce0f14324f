import random

import pytest

from kvtransfer.source.lease import Published
from kvtransfer.source.unpublished import Span, unpublished

LAYERS = 6


def spans(before: Published, num_blocks: int, num_layers: int = LAYERS, *, cuts: tuple[int, ...] = ()) -> list[Span]:
    return unpublished(before, num_blocks=num_blocks, num_layers=num_layers, of_layers=LAYERS, cuts=cuts)


def begun(num_blocks: int, num_begun: int, num_layers: int) -> Published:
    return Published(num_blocks=num_blocks, begun=tuple(range(num_begun)), num_layers_begun=num_layers)


def test_whole_blocks_are_published_once() -> None:
    assert spans(Published(num_blocks=2), 5) == [Span(2, 5, range(6))]
    assert spans(Published(num_blocks=5), 5) == []


def test_blocks_that_were_begun_get_their_other_layers_first() -> None:
    assert spans(begun(2, 3, 2), 5, 4) == [Span(2, 5, range(2, 4))]
    assert spans(begun(2, 3, 2), 5) == [Span(2, 5, range(2, 6))]
    assert spans(begun(2, 3, 2), 9) == [Span(2, 5, range(2, 6)), Span(5, 9, range(6))]


@pytest.mark.parametrize(("num_blocks", "num_layers"), [(5, 2), (5, 1), (4, 6), (0, 6), (9, 2), (5, 0)])
def test_old_news_publishes_nothing(num_blocks: int, num_layers: int) -> None:
    assert spans(begun(2, 3, 2), num_blocks, num_layers) == []


def test_no_span_goes_across_a_cut() -> None:
    assert spans(Published(num_blocks=0), 2, cuts=(3, 5)) == [
        Span(0, 2, range(3)),
        Span(0, 2, range(3, 5)),
        Span(0, 2, range(5, 6)),
    ]
    assert spans(begun(0, 2, 4), 3, cuts=(4, 5)) == [
        Span(0, 2, range(4, 5)),
        Span(0, 2, range(5, 6)),
        Span(2, 3, range(4)),
        Span(2, 3, range(4, 5)),
        Span(2, 3, range(5, 6)),
    ]


def after(before: Published, span: Span) -> Published:
    """As the lease book counts."""
    assert span.begin == before.num_blocks
    assert span.layers.start == before.num_layers_begun
    assert not before.begun or len(before.begun) == span.end - span.begin
    if span.layers.stop == LAYERS:
        return Published(num_blocks=span.end)
    return begun(span.begin, span.end - span.begin, span.layers.stop)


@pytest.mark.parametrize("seed", range(50))
def test_whatever_news_is_skipped_every_layer_of_every_block_is_published_once_and_in_order(seed: int) -> None:
    chance = random.Random(seed)
    cuts = tuple(chance.choices(range(LAYERS + 1), k=2))
    news, num_blocks = [], 0
    while num_blocks < 12:
        more = num_blocks + chance.randrange(1, 4)
        news += [(more, layers) for layers in range(1, LAYERS + 1)]
        num_blocks = more
    published, seen = Published(num_blocks=0), []
    for blocks, layers in news:
        if layers < LAYERS and chance.random() < 0.5:
            continue
        for span in spans(published, blocks, layers, cuts=cuts):
            published = after(published, span)
            seen += [(block, layer) for block in range(span.begin, span.end) for layer in span.layers]
            assert not any(span.layers.start < cut < span.layers.stop for cut in cuts)
    assert published == Published(num_blocks=num_blocks)
    assert sorted(seen) == [(block, layer) for block in range(num_blocks) for layer in range(LAYERS)]
