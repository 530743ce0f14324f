"""One prompt from several source ranks, or from one that is unlike us: what each has to bring, and what all brought.

Every rank is followed, also one from which nothing is needed: it may be a replica whose turn it is not, and its lease
waits for us all the same. So what lands was finished, and is released, on every rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import xxhash

from disaggregated.errors import TransferError
from disaggregated.kv_shard import KVHolding
from kvtransfer.conversion.planner import Piece, plan_conversion
from kvtransfer.conversion.tokens import WHOLE, TokenMap, TokenPlan
from kvtransfer.destination.foreign import Converting
from kvtransfer.destination.landed import Landed
from kvtransfer.destination.landing import Lander
from kvtransfer.destination.our_pool import OurPool
from kvtransfer.destination.peer import SourcePeer, Ticket
from kvtransfer.destination.published import PublishedBlocks


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OurShare:
    """Where a prompt is to land."""

    holding: KVHolding
    pool: OurPool
    make_lander: Callable[[SourcePeer], Lander]
    """For blocks that are ours as they are."""
    table: Sequence[int]
    skip_blocks: int
    num_tokens: int | None
    """Of the whole prompt, if that is known."""


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """What one rank has to bring."""

    peer: SourcePeer
    ticket: Ticket
    published: PublishedBlocks
    lander: Lander


def parts(peers: Sequence[SourcePeer], tickets: Sequence[Ticket], ours: OurShare) -> list[Part]:
    """Raises LayoutMismatch when these ranks together do not hold what we need."""
    turn = xxhash.xxh3_64_intdigest(tickets[0].transfer_id.encode())
    pieces = _pieces([peer.holding for peer in peers], ours, turn)
    return [_part(*each, ours) for each in zip(peers, tickets, pieces, strict=True)]


def _pieces(sources: Sequence[KVHolding], ours: OurShare, turn: int) -> Sequence[Sequence[Piece]]:
    """What is taken from each. From one that is like us everything is, and nothing from the others."""
    alike = [number for number, source in enumerate(sources) if source.is_like(ours.holding)]
    if alike:
        chosen = alike[(turn + ours.holding.shard.head_replica) % len(alike)]
        (everything,) = plan_conversion([sources[chosen]], ours.holding).pieces
        return [everything if number == chosen else () for number in range(len(sources))]
    if ours.num_tokens is None and _needs_length([*sources, ours.holding]):
        raise TransferError("a prompt's tokens are cut into parts by its length, which was not told")
    return plan_conversion(sources, ours.holding, turn=turn).pieces


def _part(peer: SourcePeer, ticket: Ticket, pieces: Sequence[Piece], ours: OurShare) -> Part:
    epoch, layout = ticket.epoch, peer.identity.layout
    direct = ours.make_lander(peer)
    if not pieces:
        nothing = PublishedBlocks(
            epoch=epoch, source_layout=layout, into=range(WHOLE), skip_blocks=0, is_wanted=lambda block, layers: False
        )
        return Part(peer, ticket, nothing, direct)
    if peer.staging is None:
        in_place = PublishedBlocks(epoch=epoch, source_layout=layout, into=ours.table, skip_blocks=ours.skip_blocks)
        return Part(peer, ticket, in_place, direct)
    tokens = _token_plan(peer.holding, ours)
    published = PublishedBlocks(
        epoch=epoch,
        source_layout=layout,
        into=range(tokens.num_source_blocks()),
        skip_blocks=tokens.num_here(),
        is_wanted=lambda block, layers: any(piece.within(layers) for piece in pieces) and tokens.is_needed(block),
    )
    lander = dataclasses.replace(
        direct,
        pool=peer.staging.region.buffer,
        layout=peer.staging.layout,
        part_bytes=peer.staging.layout.pool_bytes,
        place=Converting(peer.staging, ours.pool, pieces, tokens, ours.table),
    )
    return Part(peer, ticket, published, lander)


def _token_plan(source: KVHolding, ours: OurShare) -> TokenPlan:
    block_size = ours.holding.layout.block_size
    return TokenPlan(
        TokenMap.of(source, ours.num_tokens),
        TokenMap.of(ours.holding, ours.num_tokens),
        begin=ours.skip_blocks * block_size,
        end=len(ours.table) * block_size,
        num_tokens=WHOLE if ours.num_tokens is None else ours.num_tokens,
    )


def joined(landed: Sequence[Landed], peers: Sequence[SourcePeer]) -> Landed:
    """All parts as one. Raises TransferError when the ranks do not speak of one prompt."""
    by_rank = {peer.holding.shard.token_rank: each.num_tokens for peer, each in zip(peers, landed, strict=True)}
    num_tokens = sum(by_rank.values())
    for peer, each in zip(peers, landed, strict=True):
        expected = TokenMap.of(peer.holding, num_tokens).in_rank(num_tokens)
        if (each.num_tokens, each.first_token) != (expected, landed[0].first_token):
            raise TransferError(
                f"{peer.identity.instance_id} computed {each.num_tokens} tokens and then token {each.first_token}; "
                f"of the prompt of {num_tokens} it would hold {expected}, and {landed[0].first_token} came next"
            )
    return dataclasses.replace(
        landed[0],
        num_tokens=num_tokens,
        num_bytes=sum(each.num_bytes for each in landed),
        transfer_s=max(each.transfer_s for each in landed),
        exposed_s=max(each.exposed_s for each in landed),
        num_publications=max(each.num_publications for each in landed),
        hidden_bytes=sum(each.hidden_bytes for each in landed),
        transport="+".join(sorted({each.transport for each in landed})),
    )


def _needs_length(holdings: Sequence[KVHolding]) -> bool:
    return any(each.shard.num_token_ranks > 1 and not each.shard.stripe_tokens for each in holdings)
