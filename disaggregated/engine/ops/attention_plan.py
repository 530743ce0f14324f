"""How the reference attention cuts a step into work: decided once a step, used by every layer.

A query's softmax must add up in the same order whether it is computed alone, in a chunk of 64 or of 512, beside
others, or as a decode step. So keys come in tiles of fixed length at fixed absolute positions; each (row, key tile)
is one *unit*, whose scores and weighted values are products of fixed shape; and a row's units are added up in order.
Keys that a query must not see, past its position or before its window, score minus infinity, and so add an exact
zero; a tile that all queries of a row are past is left out, which adds the same.

Legend: Y rows of a group (decode: sequences; prefill: one tile of queries of one sequence), Q queries of each row,
P query heads that share a kv head, M = Q * P padded, U units, E keys of a tile, others as in `api.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import torch

from disaggregated.engine.ops.api import AttentionBatch

KEY_TILE_MIN: Final = 128
ISOLATED_ROWS: Final = 16
SCORES_MAX: Final = 8 << 20
"""Scores held at once: 32 MiB in float32."""


def key_tile(block_size: int) -> int:
    """Keys of a unit: whole blocks, at least `KEY_TILE_MIN` tokens."""
    return block_size * max(1, -(-KEY_TILE_MIN // block_size))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    num_heads: int
    num_kv_heads: int
    num_planes: int
    head_dim: int
    value_dim: int
    block_size: int
    window: int | None
    exact: tuple[int, ...]
    """Row counts that a product may have, ascending. `(1,)`: rows or batched products disturb each other here."""

    @property
    def is_isolated(self) -> bool:
        """Each query stands alone in its products, at the same place, and units are multiplied one by one."""
        return self.exact == (1,)

    @property
    def heads_per_kv(self) -> int:
        return self.num_heads // self.num_kv_heads

    def padded_rows(self, num_queries: int) -> int:
        rows = num_queries * self.heads_per_kv
        if self.is_isolated:
            return max(ISOLATED_ROWS, rows)
        return next((count for count in self.exact if count >= rows), rows)


@dataclasses.dataclass(frozen=True, slots=True)
class WorkGroup:
    """Tensors on the model's device. Units are ordered by tile, counted from the first that its row sees, then by row;
    rows with more tiles come first, so the units of tile t belong to the rows `0 … counts[t]`."""

    tokens: torch.Tensor
    """(Y * Q) int64: index among the step's T tokens."""
    num_rows: int
    num_queries: int
    padded_rows: int
    counts: tuple[int, ...]
    unit_rows: torch.Tensor
    """(U) int64."""
    key_planes: torch.Tensor
    """(U * G * blocks of a tile) int64: which (block, key, kv head) planes of the pool are the keys of each unit."""
    hidden_UME: torch.Tensor
    """Bool: keys that the query does not see."""
    stale: torch.Tensor
    """int64, into (U * G * E): places past the end of each sequence. They may hold anything, NaN included."""


@dataclasses.dataclass(frozen=True, slots=True)
class _QueryTile:
    """`num_queries` queries of batch row `row` from position `position` on; `token` is the first one's index in T."""

    row: int
    token: int
    position: int
    num_queries: int
    context_len: int
    first_tile: int
    num_tiles: int


def plan_attention(batch: AttentionBatch, shape: AttentionShape) -> list[WorkGroup]:
    tiles = list(_query_tiles(batch, shape))
    single = sorted((tile for tile in tiles if tile.num_queries == 1), key=lambda tile: -tile.num_tiles)
    groups = [[tile] for tile in tiles if tile.num_queries > 1]
    units_max = _units_max(shape, shape.padded_rows(1))
    units = units_max
    for tile in single:
        if units + tile.num_tiles > units_max:
            groups.append([])
            units = 0
        groups[-1].append(tile)
        units += tile.num_tiles
    return [_work_group(group, batch, shape) for group in groups]


def _units_max(shape: AttentionShape, padded_rows: int) -> int:
    return max(1, SCORES_MAX // (shape.num_kv_heads * padded_rows * key_tile(shape.block_size)))


def _query_tiles(batch: AttentionBatch, shape: AttentionShape) -> Iterator[_QueryTile]:
    """Cut each row's queries so that a tile's products have an exact row count and its scores fit."""
    length = key_tile(shape.block_size)
    token = 0
    for row, (first_position, num_tokens) in enumerate(host_rows(batch)):
        end = first_position + num_tokens
        fitting = [n for n in shape.exact if -(-end // length) <= _units_max(shape, n)] or shape.exact[:1]
        queries_max = 1 if shape.is_isolated else max(1, fitting[-1] // shape.heads_per_kv)
        for start in range(first_position, end, queries_max):
            num_queries = min(queries_max, end - start)
            first_tile = 0 if shape.window is None else max(0, start - shape.window + 1) // length
            num_tiles = -(-(start + num_queries) // length) - first_tile
            yield _QueryTile(row, token + start - first_position, start, num_queries, end, first_tile, num_tiles)
        token += num_tokens


def host_rows(batch: AttentionBatch) -> Sequence[tuple[int, int]]:
    """(first position, number of tokens) of each row."""
    if batch.rows is not None:
        return batch.rows
    starts = batch.query_start.tolist()
    lengths = [end - start for start, end in itertools.pairwise(starts)]
    return list(zip(batch.first_position.tolist(), lengths, strict=True))


def _work_group(tiles: list[_QueryTile], batch: AttentionBatch, shape: AttentionShape) -> WorkGroup:
    """`tiles` have the same number of queries; those with more key tiles come first."""
    device = batch.block_tables.device
    num_queries = tiles[0].num_queries
    padded = shape.padded_rows(num_queries)
    counts = tuple(sum(tile.num_tiles > t for tile in tiles) for t in range(tiles[0].num_tiles))
    unit_rows = np.concatenate([np.arange(count) for count in counts])
    unit_tiles = np.repeat(np.arange(len(counts)), counts) + np.array([tile.first_tile for tile in tiles])[unit_rows]
    queries = np.arange(num_queries)
    host = _to_device(
        device,
        np.concatenate([tile.token + queries for tile in tiles]),
        unit_rows,
        unit_tiles,
        np.array([tile.row for tile in tiles])[unit_rows],
        _row_positions(tiles, padded, shape),
        _stale_places(tiles, counts, shape),
    )
    tokens, unit_rows_U, unit_tiles_U, batch_rows_U, positions_YM, stale = host
    length = key_tile(shape.block_size)
    keys_U1E = (unit_tiles_U[:, None] * length + torch.arange(length, device=device))[:, None, :]
    positions_UM1 = positions_YM.view(len(tiles), padded)[unit_rows_U][:, :, None]
    hidden_UME = keys_U1E > positions_UM1
    if shape.window is not None:
        hidden_UME |= keys_U1E <= positions_UM1 - shape.window
    return WorkGroup(
        tokens=tokens,
        num_rows=len(tiles),
        num_queries=num_queries,
        padded_rows=padded,
        counts=counts,
        unit_rows=unit_rows_U,
        key_planes=_key_planes(batch, batch_rows_U, unit_tiles_U, shape),
        hidden_UME=hidden_UME,
        stale=stale,
    )


def _row_positions(tiles: list[_QueryTile], padded: int, shape: AttentionShape) -> np.ndarray:
    """(Y * M): position of the query behind each row of the products; padding takes the last query's."""
    offsets = np.minimum(np.arange(padded) // shape.heads_per_kv, tiles[0].num_queries - 1)
    return (np.array([tile.position for tile in tiles])[:, None] + offsets).ravel()


def _stale_places(tiles: list[_QueryTile], counts: tuple[int, ...], shape: AttentionShape) -> np.ndarray:
    length = key_tile(shape.block_size)
    first_unit = np.concatenate([[0], np.cumsum(counts)])
    heads = np.arange(shape.num_kv_heads)[:, None]
    places = [np.empty(0, dtype=np.int64)]
    for y, tile in enumerate(tiles):
        unit = first_unit[tile.num_tiles - 1] + y
        held = np.arange(tile.context_len - (tile.first_tile + tile.num_tiles - 1) * length, length)
        places.append((((unit * shape.num_kv_heads) + heads) * length + held).ravel())
    return np.concatenate(places)


def _key_planes(
    batch: AttentionBatch, batch_rows_U: torch.Tensor, unit_tiles_U: torch.Tensor, shape: AttentionShape
) -> torch.Tensor:
    """Seen as (B * P * G) planes of (S, D), block b's keys of kv head g are plane `P * G * b + g`."""
    device = batch.block_tables.device
    num_blocks = key_tile(shape.block_size) // shape.block_size
    columns = unit_tiles_U[:, None] * num_blocks + torch.arange(num_blocks, device=device)
    columns.clamp_(max=batch.block_tables.shape[1] - 1)  # Past the table's end everything is hidden: any block will do.
    blocks = batch.block_tables[batch_rows_U[:, None], columns].long()
    heads = torch.arange(shape.num_kv_heads, device=device)
    return (blocks[:, None, :] * (shape.num_planes * shape.num_kv_heads) + heads[:, None]).flatten()


def _to_device(device: torch.device, *arrays: np.ndarray) -> list[torch.Tensor]:
    """One copy for all of them."""
    joined = torch.from_numpy(np.concatenate([array.astype(np.int64, copy=False) for array in arrays]))
    return list(torch.split(joined.to(device, non_blocking=True), [array.size for array in arrays]))
