"""What our requests take of one server: a share each, and totals of all, so that a look at a server costs the same
however many requests it has."""

from __future__ import annotations

from collections.abc import Callable

from disaggregated.errors import ServerLost


class Share:
    """One request's. Whoever holds it says what changes; while it is taken, the server's totals change with it."""

    __slots__ = ("_load", "is_decoding", "num_blocks", "num_prefill_tokens", "num_tokens", "on_lost")

    def __init__(
        self,
        num_tokens: int,
        num_prefill_tokens: int,
        num_blocks: int,
        on_lost: Callable[[ServerLost], None],
        *,
        is_decoding: bool = False,
    ) -> None:
        self.num_tokens = num_tokens
        """Of the prompt, and what was decoded of it here."""
        self.num_prefill_tokens = num_prefill_tokens
        """Not computed yet, and not known to be cached."""
        self.num_blocks = num_blocks
        self.on_lost = on_lost
        self.is_decoding = is_decoding
        """It has its first token, and is on a generation server."""
        self._load: Load | None = None
        """Of the server that it is taken of."""

    def left_to_prefill(self, num_tokens: int) -> None:
        if (load := self._load) is not None:
            load.num_prefill_tokens += num_tokens - self.num_prefill_tokens
            if num_tokens:
                load.prefilling[self] = None
            else:
                load.prefilling.pop(self, None)
        self.num_prefill_tokens = num_tokens

    def grew(self, num_tokens: int) -> None:
        self.num_tokens += num_tokens
        if self._load is not None:
            self._load.num_tokens += num_tokens

    def decodes(self) -> None:
        """From now on."""
        if not self.is_decoding:
            self.is_decoding = True
            if self._load is not None:
                self._load.num_decoding += 1

    def moved(self, load: Load | None) -> None:
        """Only `Load` calls this."""
        self._load = load


class Load:
    """Invariant: the totals are the sums over `shares`, and `prefilling` are those with something left to prefill."""

    __slots__ = ("num_decoding", "num_prefill_tokens", "num_tokens", "prefilling", "shares")

    def __init__(self) -> None:
        self.shares: dict[int, Share] = {}
        """By the key of the attempt that holds it."""
        self.prefilling: dict[Share, None] = {}
        """In the order in which they came."""
        self.num_tokens = self.num_prefill_tokens = self.num_decoding = 0

    def take(self, key: int, share: Share) -> None:
        assert key not in self.shares, f"attempt {key} is here already"
        self.shares[key] = share
        share.moved(self)
        self.num_tokens += share.num_tokens
        if share.num_prefill_tokens:
            self.num_prefill_tokens += share.num_prefill_tokens
            self.prefilling[share] = None
        self.num_decoding += share.is_decoding

    def give_back(self, key: int) -> None:
        share = self.shares.pop(key)
        self.num_tokens -= share.num_tokens
        if share.num_prefill_tokens:
            self.num_prefill_tokens -= share.num_prefill_tokens
            del self.prefilling[share]
        self.num_decoding -= share.is_decoding
        share.moved(None)

    def check_integrity(self) -> None:
        shares = self.shares.values()
        assert self.num_tokens == sum(share.num_tokens for share in shares), "tokens are miscounted"
        left = [share for share in shares if share.num_prefill_tokens]
        assert self.num_prefill_tokens == sum(share.num_prefill_tokens for share in left), "prefill is miscounted"
        assert set(left) == set(self.prefilling), "who prefills is not known"
        assert self.num_decoding == sum(share.is_decoding for share in shares), "those who decode are miscounted"
