"""The figures of all replicas on one page: each serves its own to the others, at a loopback address of its own."""

import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Lock, Thread
from types import SimpleNamespace

from prometheus_client import generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

logger = logging.getLogger(__name__)
SECONDS = 1.0
"""That a replica has to answer the others; one that starts, hangs or is dead is left out."""
END = b"# EOF\n"
"""Behind a page that is told; one without is only the beginning of one."""
UP = "draftwing_replica_up"


class Peers:
    """What one of several replicas knows of the others.

    Args:
        doors: of each replica the socket at which it tells its figures; the first one is number 1's.
        number: this one's.
    """

    def __init__(self, doors: Sequence[socket.socket], number: int) -> None:
        self._addresses = {place: door.getsockname() for place, door in enumerate(doors, 1)}
        self._door, self._number = doors[number - 1], number
        self._asking = Lock()  # who asks for pages faster than they come does not make more threads of it

    def tell(self, page: Callable[[], bytes]) -> None:
        """Tell others this replica's figures whenever they ask, in a thread of its own."""
        Thread(target=self._tell, args=(page,), name="draftwing-figures", daemon=True).start()

    def page(self, own: bytes) -> bytes:
        """The figures of all that answer, each with a label that says whose it is."""
        others = [number for number in self._addresses if number != self._number]
        with self._asking, ThreadPoolExecutor(max(1, len(others))) as pool:
            pages = dict(zip(others, pool.map(self._ask, others), strict=True))
        return joined(dict(sorted((pages | {self._number: own}).items())))

    def _tell(self, page: Callable[[], bytes]) -> None:
        """Whatever goes wrong with one asker, the next one is answered; until the door is closed."""
        while self._door.fileno() >= 0:
            try:
                asker, _ = self._door.accept()
                with asker:
                    asker.settimeout(SECONDS)
                    asker.sendall(page() + END)
            except Exception as error:  # one that has gone, no descriptor that is free, or figures that fail
                logger.debug("figures were not told: %r", error)
                time.sleep(SECONDS / 10)

    def _ask(self, number: int) -> bytes:
        """Another replica's page; empty: it does not answer, or not to the end in time."""
        page, end = b"", time.monotonic() + SECONDS
        with suppress(OSError), socket.create_connection(self._addresses[number], SECONDS) as asked:
            while (left := end - time.monotonic()) > 0:
                asked.settimeout(left)
                if not (part := asked.recv(2**16)):
                    return page.removesuffix(END) if page.endswith(END) else b""
                page += part
        return b""


def joined(pages: Mapping[int, bytes]) -> bytes:
    """One page of several: every sample has its replica's number, so that nothing is summed that should not be."""
    families = dict[str, Metric]()
    up = GaugeMetricFamily(UP, "Whether a replica has told its figures", labels=("replica",))
    for number, page in pages.items():
        up.add_metric((str(number),), bool(page))
        for family in text_string_to_metric_families(page.decode()):
            known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                known.add_sample(sample.name, sample.labels | {"replica": str(number)}, sample.value)
    registry = SimpleNamespace(collect=lambda: (up, *families.values()))  # all that is asked of one
    return generate_latest(registry)  # type: ignore[arg-type]
