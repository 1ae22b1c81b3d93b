"""Batches read ahead by a thread, so that training does not wait for them; and which micro-batches of a step a rank reads."""

import atexit
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

from dqtrain.errors import ConfigError

T = TypeVar("T")

STEPS_AHEAD = 4
"""Steps whose batches wait for the one that trains."""
_PATIENCE_S = 5.0


class Reader(Generic[T]):
    """An iterator whose items a thread makes ahead, at most `ahead` of them. What goes wrong there is raised here, where the item would have come.

    It is to be closed; the end of the interpreter closes it too.
    """

    def __init__(self, items: Iterator[T], ahead: int = STEPS_AHEAD) -> None:
        self._items, self._ahead = items, ahead
        self._ready: deque[T] = deque()
        self._changed = threading.Condition()
        self._ended: BaseException | None = None
        self._closed = False
        self._waited_s = 0.0
        atexit.register(self.close)
        # A daemon, since the interpreter waits for other threads before it calls what atexit knows.
        self._thread = threading.Thread(target=self._read, name="reader", daemon=True)
        self._thread.start()

    def __next__(self) -> T:
        started = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._ended)
            self._waited_s += time.monotonic() - started
            if not self._ready:
                assert self._ended is not None
                raise self._ended
            item = self._ready.popleft()
            self._changed.notify()
        return item

    def waited_s(self) -> float:
        """Seconds that `next` waited since the last call of this."""
        waited, self._waited_s = self._waited_s, 0.0
        return waited

    def close(self) -> None:
        """Stop reading, and wait until the thread has ended, unless a disk or a store holds it for long."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(_PATIENCE_S)
        atexit.unregister(self.close)

    def _read(self) -> None:
        try:
            while True:
                item = next(self._items)
                with self._changed:
                    self._changed.wait_for(lambda: len(self._ready) < self._ahead or self._closed)
                    if self._closed:
                        return
                    self._ready.append(item)
                    self._changed.notify()
        except BaseException as error:
            with self._changed:
                self._ended = error
                self._changed.notify()


def own_micro_batches(rank: int, nodes: Sequence[int], count: int, parts: int = 1) -> list[int]:
    """Numbers of the micro-batches of a step, of `count`, that a rank computes; `nodes`: the node of each rank, counted from 0.

    With parts, all micro-batches of a part are computed on one node, and the nodes have as many parts as each other, or one more. All ranks have equally many numbers:
    those from `count` on stand for micro-batches without target tokens, for ranks that have no more work but take part in the collectives.
    Raises ConfigError when there are fewer parts than nodes.
    """
    if parts == 1:
        owners = [j % len(nodes) for j in range(count)]
    else:
        num_nodes = max(nodes) + 1
        if parts < num_nodes:
            raise ConfigError(
                f"data.parts is {parts}, but the run has {num_nodes} nodes, and a node without a part would have nothing to do. Set it to {num_nodes} or more."
            )
        ranks = [[rank for rank, node in enumerate(nodes) if node == number] for number in range(num_nodes)]
        owners, turns = [], [0] * num_nodes
        for j in range(count):
            node = j % parts % num_nodes
            owners.append(ranks[node][turns[node] % len(ranks[node])])
            turns[node] += 1
    rounds = max(owners.count(other) for other in set(owners))
    mine = [j for j, owner in enumerate(owners) if owner == rank]
    like = mine[-1] if mine else next(j for j, owner in enumerate(owners) if nodes[owner] == nodes[rank])
    return mine + [count + like] * (rounds - len(mine))
