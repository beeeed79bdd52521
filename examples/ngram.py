"""An n-gram language model: interpolated modified Kneser-Ney, the strong baseline of language modelling by counting.

What a neural model must beat to have learned more than which tokens follow which. Chen and Goodman, "An Empirical
Study of Smoothing Techniques for Language Modeling" (1998), section 4.1.6.
"""

import numpy as np


class KneserNey:
    """Interpolated modified Kneser-Ney of `order` over tokens 0 to `vocab` - 1, counted from `ids` [n].

    The top order uses counts; each lower order counts in how many different contexts its n-gram was seen, and every
    order has three discounts of its own, from its counts of counts. The recursion ends in the uniform distribution,
    so every token has a probability above 0 after any history.

    An n-gram is known by one number at every order: its rank among the sorted keys
    (number of its first k - 1 tokens) * vocab + (last token). Keys stay below n * vocab whatever the order.
    """

    def __init__(self, ids: np.ndarray, vocab: int, order: int = 5):
        ids = np.asarray(ids, dtype=np.int64)
        if order < 1:
            raise ValueError(f"order={order!r}; give 1 or more")
        if len(ids) <= order:
            raise ValueError(f"ids has {len(ids)} tokens, too few for order={order}; give more")
        if ids.min() < 0 or ids.max() >= vocab:
            raise ValueError(f"ids holds tokens from {ids.min()} to {ids.max()}, outside 0 to vocab - 1 = {vocab - 1}")
        self.vocab, self.order = vocab, order
        self.keys: list[np.ndarray] = []  # per order: sorted keys of the n-grams seen
        self.counts: list[np.ndarray] = []  # per order: (adjusted) count of each
        self.discounts: list[np.ndarray] = []  # per order: [4], by min(count, 3)
        self.totals: list[np.ndarray] = []  # per order: sum of the counts after each context
        self.left: list[np.ndarray] = []  # per order: mass its discounts leave to the order below, per context

        ranks = np.zeros(len(ids), dtype=np.int64)  # of the n-gram that starts at each position; the empty one is 0
        starts: list[np.ndarray] = []
        for k in range(1, order + 1):
            keys, first, ranks, counts = np.unique(
                ranks[: len(ids) - k + 1] * vocab + ids[k - 1 :],
                return_index=True,
                return_inverse=True,
                return_counts=True,
            )
            self.keys.append(keys)
            self.counts.append(counts)
            if k > 1:  # what the order below counts: of each n-gram seen here, the part without its first token, once
                suffix = starts[-1][first + 1]
                self.counts[k - 2] = np.bincount(suffix, minlength=len(self.keys[k - 2]))
            starts = [ranks]

        for k in range(order):
            # The very first n-gram of the text has nothing before it and may have no context at all: count it once.
            counts = self.counts[k] = np.maximum(self.counts[k], 1)
            n1, n2, n3, n4 = (max(1, int((counts == c).sum())) for c in (1, 2, 3, 4))
            y = n1 / (n1 + 2 * n2)
            discount = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
            # Counts of counts of a small text can give discounts outside (0, count): keep them there.
            discount = np.clip(discount, [0.0, 0.1, 0.1, 0.1], [0.0, 0.9, 1.8, 2.7])
            context = self.keys[k] // vocab
            size = 1 if k == 0 else len(self.keys[k - 1])
            total = np.bincount(context, weights=counts, minlength=size)
            removed = np.bincount(context, weights=discount[np.minimum(counts, 3)], minlength=size)
            self.discounts.append(discount)
            self.totals.append(total)
            self.left.append(np.divide(removed, total, out=np.ones_like(removed), where=total > 0))

    def log_probs(self, ids: np.ndarray) -> np.ndarray:
        """Natural log of the probability of each of `ids` [n] after the up to `order` - 1 tokens before it: [n]."""
        ids = np.asarray(ids, dtype=np.int64)
        probability = np.full(len(ids), 1.0 / self.vocab)
        context = np.zeros(len(ids), dtype=np.int64)  # number of the (k-1)-gram that starts at each position, or -1
        for k in range(1, min(self.order, len(ids)) + 1):
            context = context[: len(ids) - k + 1]
            wanted = context * self.vocab + ids[k - 1 :]
            place = np.minimum(np.searchsorted(self.keys[k - 1], wanted), len(self.keys[k - 1]) - 1)
            seen = (context >= 0) & (self.keys[k - 1][place] == wanted)
            count = np.where(seen, self.counts[k - 1][place], 0)
            total = np.where(context >= 0, self.totals[k - 1][context], 0)
            kept = count - self.discounts[k - 1][np.minimum(count, 3)]
            shorter = probability[k - 1 :]
            # After a context never seen, the shorter history is all there is to go by.
            longer = kept / np.maximum(total, 1) + self.left[k - 1][context] * shorter
            probability[k - 1 :] = np.where(total > 0, longer, shorter)
            context = np.where(seen, place, -1)
        return np.log(probability)

    def loss(self, ids: np.ndarray, length: int, rows: np.ndarray | None = None) -> float:
        """Mean nats per token over what `corpus.blocks(ids, length)` has predicted: all but each row's first token.

        `rows` picks some of the rows by number. The history reaches over the start of a row, which a model that reads
        row by row does not have: to the n-gram's advantage.
        """
        predicted = self.log_probs(ids[: len(ids) // length * length]).reshape(-1, length)[:, 1:]
        return float(-(predicted if rows is None else predicted[rows]).mean())
