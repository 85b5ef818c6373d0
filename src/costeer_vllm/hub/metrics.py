"""The router's counters as Prometheus metrics, read when they are scraped. No label holds a name, an id or a key."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from costeer_vllm.hub.router import Router


def build_registry(router: Router) -> CollectorRegistry:
    """A registry of its own, so that several hubs may live in one process."""
    registry = CollectorRegistry()
    registry.register(RouterCollector(router))
    return registry


class RouterCollector:
    """Turns a router's state into metrics."""

    def __init__(self, router: Router) -> None:
        self._router = router

    def collect(self) -> Iterator[Metric]:
        """Called once per scrape."""
        router, totals = self._router, self._router.totals
        yield GaugeMetricFamily("costeer_hub_workers", "Edge workers attached", len(router.attachments))
        yield GaugeMetricFamily("costeer_hub_engines", "Engine workers joined", len(router.engines))
        yield GaugeMetricFamily("costeer_hub_streams", "Streams not ended by their engine yet", len(router.streams))
        frames = CounterMetricFamily("costeer_hub_frames", "Frames", labels=["direction", "type"])
        num_bytes = CounterMetricFamily("costeer_hub_bytes", "Bytes in frames", labels=["direction", "type"])
        for key, traffic in totals.traffic.items():
            frames.add_metric(key, traffic.frames)
            num_bytes.add_metric(key, traffic.num_bytes)
        yield frames
        yield num_bytes
        yield _counter("costeer_hub_malformed_frames", "Frames that are no message", "link", totals.malformed)
        yield _counter("costeer_hub_dropped_frames", "Frames not forwarded", "reason", totals.dropped)
        yield _counter("costeer_hub_attaches", "Attaches by outcome", "outcome", totals.attaches)
        yield _counter("costeer_hub_admissions", "Admissions by outcome", "outcome", totals.admissions)
        yield _counter("costeer_hub_edges_closed", "Edge connections that the hub closed", "reason", totals.closed)
        yield _counter("costeer_hub_streams_ended", "Streams ended by reason", "reason", totals.ended)
        tokens = {"steered": totals.tokens_steered, "missed": totals.tokens_missed}
        yield _counter("costeer_hub_tokens", "Tokens that engines reported", "outcome", tokens)


def _counter(name: str, documentation: str, label: str, values: Mapping[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, documentation, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family
