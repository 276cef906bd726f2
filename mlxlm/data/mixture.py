"""Several stores read together in stated shares."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlxlm.data.store import TokenStore
from mlxlm.errors import UsageError


class Mixture:
    """Stores and the share of rows that comes from each.

    An epoch has as many rows as all stores together; of these each store gives its share. A store with less than its
    share begins its documents anew, one with more goes on in the next epoch where it stopped: between two of its own
    beginnings every document of a store is used exactly once.
    """

    def __init__(self, stores: Sequence[TokenStore], weights: Sequence[float]) -> None:
        """weights: relative, above 0, one a store."""
        if len(stores) != len(weights) or not stores:
            raise UsageError(f"{len(stores)} stores with {len(weights)} weights; expected one weight a store")
        if not all(0 < weight < float("inf") for weight in weights):
            raise UsageError(f"weights {list(weights)}; expected numbers above 0")
        self.stores = tuple(stores)
        self.weights = tuple(float(weight) / sum(weights) for weight in weights)

    def __len__(self) -> int:
        return sum(map(len, self.stores))

    @property
    def num_documents(self) -> int:
        """Documents of all stores."""
        return len(self)

    @property
    def num_tokens(self) -> int:
        """Tokens of all stores."""
        return sum(store.num_tokens for store in self.stores)

    def rows(self, num_rows: Sequence[int]) -> np.ndarray:
        """How many of an epoch's rows each store gives (S,), when it has `num_rows` itself; the sum stays the same."""
        exact = np.array(self.weights) * sum(num_rows)
        shares = np.floor(exact).astype(np.int64)
        rest = sum(num_rows) - int(shares.sum())
        # Largest remainders get the rows that rounding left over; ties go to the first store.
        shares[np.argsort(shares - exact, kind="stable")[:rest]] += 1
        return shares
