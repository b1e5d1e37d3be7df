"""What GET /metrics tells: draftwing's own figures, and vLLM's names for those that its tools read."""

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from draftwing.serving.answers import Answer
from draftwing.serving.scheduler import Scheduler, Ticket

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)


class ServerMetrics:
    """Counts requests as they end; what the engine counts is read when somebody asks."""

    def __init__(self, scheduler: Scheduler, model: str) -> None:
        self._registry, self._model = CollectorRegistry(), model
        self._ended = self._counter("draftwing_requests", "Requests by how they ended", "end")
        self._prompt = self._counter("draftwing_prompt_tokens", "Tokens of prompts")
        self._cached = self._counter("draftwing_cached_tokens", "Tokens of prompts that were copied, not read")
        self._new = self._counter("draftwing_new_tokens", "Tokens that were made")
        self._queued = self._histogram("draftwing_queue_seconds", "Until a request has a seat", SECONDS)
        self._first = self._histogram("draftwing_first_token_seconds", "Until a request's first tokens", SECONDS)
        self._each = self._histogram("draftwing_token_seconds", "Per token after the first ones", TOKEN_SECONDS)
        self._whole = self._histogram("draftwing_request_seconds", "From submission to the end", SECONDS)
        self._drafts = self._counter("vllm:spec_decode_num_drafts", "Cycles of requests")
        self._drafted = self._counter("vllm:spec_decode_num_draft_tokens", "Draft tokens that were verified")
        self._accepted = self._counter("vllm:spec_decode_num_accepted_tokens", "Draft tokens that were accepted")
        self._accepted_at = self._counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "Accepted draft tokens by depth, from 0", "position"
        )
        self._gauge("draftwing_seats", "Requests that can be decoded at once").set(scheduler.num_seats)
        for name in ("draftwing_requests_running", "vllm:num_requests_running"):
            self._gauge(name, "Requests that have a seat").set_function(lambda: scheduler.num_running)
        for name in ("draftwing_requests_waiting", "vllm:num_requests_waiting"):
            self._gauge(name, "Requests that wait for a seat").set_function(lambda: scheduler.num_waiting)
        self._registry.register(_EngineFigures(scheduler, model))

    def count(self, answers: Sequence[Answer], end: str) -> None:
        """Count what one client asked for, once it has ended, and how: stop, length, cancelled, error, refused."""
        self._ended.labels(self._model, end).inc()
        for answer in answers:
            self._count_answer(answer)
            self._time(answer.ticket)

    def page(self) -> bytes:
        """All of it in Prometheus' text form."""
        return generate_latest(self._registry)

    def _count_answer(self, answer: Answer) -> None:
        self._new.labels(self._model).inc(answer.num_tokens)
        if (seat := answer.ticket.seat) is None:
            return
        self._prompt.labels(self._model).inc(len(answer.ticket.request.prompt))
        self._cached.labels(self._model).inc(seat.num_shared)
        counts = answer.counts
        self._drafts.labels(self._model).inc(counts.num_cycles)
        self._drafted.labels(self._model).inc(counts.num_drafted)
        self._accepted.labels(self._model).inc(counts.num_accepted)
        for depth, num_accepted in enumerate(counts.accepted_at):
            self._accepted_at.labels(self._model, depth).inc(num_accepted)

    def _time(self, ticket: Ticket) -> None:
        if ticket.seat is None or ticket.seated is None:
            return
        self._queued.labels(self._model).observe(ticket.seated - ticket.submitted)
        if ticket.first is None or ticket.ended is None:
            return
        self._first.labels(self._model).observe(ticket.first - ticket.submitted)
        self._whole.labels(self._model).observe(ticket.ended - ticket.submitted)
        if (num_later := len(ticket.seat.tokens) - ticket.num_first) > 0:
            self._each.labels(self._model).observe((ticket.ended - ticket.first) / num_later)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        counter = Counter(name, text, ("model_name", *labels), registry=self._registry)
        if not labels:
            counter.labels(self._model)  # shown as 0 before it is counted
        return counter

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, ("model_name",), registry=self._registry, buckets=buckets)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, ("model_name",), registry=self._registry).labels(self._model)


class _EngineFigures(Collector):
    """Cycles, seconds by stage and acceptance by depth, as the engine counts them."""

    def __init__(self, scheduler: Scheduler, model: str) -> None:
        self._scheduler, self._model = scheduler, model

    def collect(self) -> Iterator[Metric]:
        figures = self._scheduler.statistics
        yield self._family("draftwing_stage_seconds", "Of cycles by stage", "stage", list(figures.seconds.items()))
        cycles = CounterMetricFamily("draftwing_cycles", "Cycles, summed over requests", labels=("model_name",))
        cycles.add_metric((self._model,), figures.num_cycles)
        yield cycles
        accepted, reached = enumerate(list(figures.accepted_at), 1), enumerate(list(figures.reached_at), 1)
        yield self._family("draftwing_accepted_at", "Cycles that accepted a node at this depth", "depth", accepted)
        yield self._family("draftwing_reached_at", "Cycles that came to this depth", "depth", reached)

    def _family(self, name: str, text: str, label: str, values: Iterable[tuple[object, float]]) -> Metric:
        family = CounterMetricFamily(name, text, labels=("model_name", label))
        for place, value in values:
            family.add_metric((self._model, str(place)), value)
        return family
