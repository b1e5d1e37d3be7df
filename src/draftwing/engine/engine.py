"""The engine: requests take seats, and each step decodes what is seated. One cycle is draft, verify, commit."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import dropwhile, islice, takewhile

import numpy as np
import torch

from draftwing.engine.captured import CapturedSeats, Recorder, Recordings, can_record, idle_since
from draftwing.engine.drafter import MOST_UNREAD, PREFILL_CHUNK, Drafter
from draftwing.engine.grammar import Grammar
from draftwing.engine.logprobs import TokenLogprobs
from draftwing.engine.order import Order
from draftwing.engine.readback import CycleReading, CycleReport, Work
from draftwing.engine.request import Event as Event
from draftwing.engine.request import Request as Request
from draftwing.engine.request import Seat as Seat
from draftwing.engine.request import check_request as check_request
from draftwing.engine.request import check_requests as check_requests
from draftwing.engine.request import check_room
from draftwing.engine.seats import Seats, room_for
from draftwing.engine.statistics import StageClock, Statistics
from draftwing.engine.tree import DraftTree
from draftwing.engine.tree_plan import OFF, Plan, TreeShape
from draftwing.target.model import TargetModel
from draftwing.target.row_pass import rounding_problem
from draftwing.threads import fitting_threads, num_threads

PREFILL_TOKENS = 2048
"""Positions of several prompts that a step reads at most, unless a single chunk has more."""
SCORED_TOKENS = 128
"""Positions of a prompt that are read at once where it is scored: each has the logits of a whole vocabulary."""
MOST_LEVELS = PREFILL_CHUNK - MOST_UNREAD - 1
"""Levels of a tree at most: what a cycle commits must fit behind what drafters have left unread."""
NewDrafter = Callable[[int, int], Drafter]
"""Makes a drafter for so many seats of so many slots each."""


class Engine:
    """Decodes up to `num_seats` requests at once; each gets the tokens that it would get alone.

    Requests come and go between steps. Running ones hold the first seats, those whose prompts are being read the next:
    so a cycle runs over a view of the first seats, and the last of them moves into the place of one that has ended.

    Args:
        new_drafter: makes the drafter for so many seats of so many slots, those of a tree included.
        capacity: tokens of a seat, prompt and new ones.
        plan: shapes the trees.
        recorder: records cycles on a device, to be replayed.
        coupled: drafts rank their candidates with the target's own noise; the output is the same without.
        keeps: a seat's text stays when it is left, for prompts that begin alike, until the seat is needed.
    """

    def __init__(
        self,
        target: TargetModel,
        new_drafter: NewDrafter,
        num_seats: int,
        capacity: int,
        plan: Plan,
        recorder: Recorder | None = None,
        coupled: bool = True,
        keeps: bool = False,
    ) -> None:
        self.target, self.num_seats, self.capacity, self.plan = target, num_seats, capacity, plan
        self._threads = num_threads() if target.bits_depend_on_threads else None  # None: anew in every cycle
        self.waits = False  # whether a cycle ends by waiting for the device, so that it counts its own seconds alone
        self._rounding_problem, self._trial_seconds = rounding_problem(target), 0.0
        self.count_into(Statistics())
        largest = plan.largest
        if problem := depth_problem(target, largest):
            raise ValueError(problem)
        num_slots = capacity + room_for(largest)
        drafter = new_drafter(num_seats, num_slots)
        self._seats = Seats(target, drafter, num_seats, num_slots, largest.max_depth, coupled)
        self._order = Order(self._seats, num_seats, keeps)
        self._recordings: Recordings = {}
        self._deferred: list[Work] = []
        start = idle_since(target.device)
        is_recorded = recorder is not None and can_record(self._seats, largest.cut_to(1), recorder)
        self._trial_seconds = time.perf_counter() - start if is_recorded else 0.0
        self._recorder = recorder if is_recorded else None
        self._cycling = self._seats

    @property
    def num_free(self) -> int:
        """Seats that nobody holds."""
        return self._order.num_free

    def can_serve(self, num_seats: int, capacity: int, plan: Plan) -> bool:
        """Whether so many requests of so many tokens can be decoded with another plan."""
        largest = plan.largest
        if num_seats > self.num_seats or capacity > self.capacity or depth_problem(self.target, largest):
            return False
        return self._seats.can_hold(self.capacity + room_for(largest), largest.max_depth)

    @property
    def is_recorded(self) -> bool:
        """Whether its cycles are recorded, so that it is worth keeping."""
        return self._recorder is not None

    def count_into(self, statistics: Statistics) -> None:
        """Count cycles and seconds there from now on."""
        self.statistics = statistics
        statistics.rounding_problem = self._rounding_problem
        statistics.recording_seconds += self._trial_seconds
        self._trial_seconds = 0.0
        self._clock = StageClock(statistics, self.target.device)

    def check(self, request: Request, name: str = "the prompt") -> None:
        """Raise a ValueError, which names the field, for a request that no seat can serve."""
        check_request(self.target, request, name)
        check_room(request, name, self.capacity, f"a seat's {self.capacity} tokens")
        held = self._order.held
        if held and (held[0].request.sampling.place is None) != (request.sampling.place is None):
            raise ValueError(f"place: {name} chooses its tokens in another way than those that are seated")

    @torch.inference_mode()
    def admit(self, request: Request) -> Seat | None:
        """Seat a request, whose prompt the next steps read; None when all seats are held. Raises as `check` does."""
        self.check(request)
        if not self.num_free:
            return None
        lender, num_shared = (None, 0) if request.scores_prompt else self._order.lender(request.prompt)
        seat = Seat(request, self._order.place_for(lender, num_shared), num_shared=num_shared)
        if request.allowed is not None:
            seat.grammar = Grammar(request.allowed, seat.tokens, request.stop.eos_token_ids)
        try:
            if lender is not None:
                self._seats.admit_behind(lender.index, num_shared, seat)
            else:
                self._seats.admit(seat)
        except BaseException:  # out of memory, say: nothing may be left in a seat that nobody holds
            self._seats.vacate(seat.index)
            raise
        self._order.enter(seat)
        return seat

    def will_lend(self, request: Request) -> bool:
        """Whether a request that waits a little will find more of its prompt's beginning read than there is now."""
        return not request.scores_prompt and self._order.will_lend(request.prompt)

    def step(self) -> list[Event]:
        """Read a chunk of the waiting prompts, then run a cycle of the seats whose prompts are read."""
        if self._order.reading:
            self._read_prompts()
        return self._emit(*self._cycle()) if self._order.running else []

    @torch.inference_mode()
    def retire(self, *seats: Seat) -> None:
        """Free seats, whatever they are doing; nothing happens to those that are free already."""
        gone = {seat for seat in seats if seat in self._order.held}
        if not gone:
            return
        self._order.leave(gone)
        self._look_at_running()
        if not self._order.running:  # no cycle comes that it could wait for
            self._do_deferred()

    @torch.inference_mode()
    def _cycle(self) -> tuple[DraftTree, CycleReading]:
        """Draft, verify, commit."""
        seats, num_running = self._cycling, len(self._order.running)
        seats.bound = int(seats.lengths[:num_running].max())
        plan: TreeShape = OFF  # the plan is not asked, and learns nothing
        if self._drafts:
            plan = self.plan.next(num_running, seats.bound, self._samples)
        if isinstance(seats, CapturedSeats):
            self.statistics.recording_seconds += seats.make_ready(plan)
        with fitting_threads(self._threads):
            with self._clock.stage("draft"):
                tree = seats.draft(plan)
            with self._clock.stage("verify"):
                verification = seats.verify(tree)
                learns = self.plan.learns and tree.max_depth > 0
                is_replayed = isinstance(seats, CapturedSeats)
                reading = CycleReading(verification.verdict, tree if learns else None, verification.scores, is_replayed)
            with self._clock.stage("commit"):
                seats.commit(plan, tree, verification)
            with self._clock.stage("host"):  # while the device is at that
                self._do_deferred()
        return tree, reading

    def _emit(self, tree: DraftTree, reading: CycleReading) -> list[Event]:
        """Read what a cycle has brought, its one device-to-host copy, and hand out tokens up to each seat's stop."""
        with self._clock.stage("host"):
            events, num_committed = [], []
            result, scores = reading.result().tolist(), reading.scores()
            num_drafted = tree.num_nodes - 1 if tree.max_depth else 0
            for row, (seat, (num_accepted, *tokens)) in enumerate(zip(self._order.running, result, strict=False)):
                new = tokens[: num_accepted + 1]
                num_committed.append(len(new))
                num_emitted = _end(seat, new)
                seat.tokens += new[:num_emitted]
                logprobs: list[TokenLogprobs] = []
                if scores is not None and (num_top := seat.request.num_logprobs) is not None:
                    logprobs += islice(scores.of_row(row, num_top), num_emitted)
                    seat.logprobs += logprobs
                events.append(Event(seat, new[:num_emitted], min(num_accepted, num_emitted), logprobs))
                for counts in (self.statistics, seat.counts):
                    counts.count_cycle(num_accepted, tree.max_depth, num_emitted, num_drafted)
            self._cycling.count(np.array(num_committed))
            if reading.has_facts:
                facts = partial(reading.facts, len(events))
                report = CycleReport(len(events), sum(num_committed), tree.num_nodes, facts)
                self.plan.learn(replace(report, defer=self._deferred.append) if reading.is_copied else report)
            self.retire(*(event.seat for event in events if event.seat.finish_reason))
        self._clock.settle(wait=self.waits or not self._order.running)
        return events

    def _do_deferred(self) -> None:
        """Do what was put off until the device is busy."""
        deferred, self._deferred = self._deferred, []
        for work in deferred:
            work()

    @torch.inference_mode()
    def _read_prompts(self) -> None:
        """Read one chunk of the first waiting prompts, and let those run that are read, first come, first served."""
        with fitting_threads(self._threads), self._clock.stage("prefill"):
            if chosen := self._next_unread():
                self._read_chunk(chosen)
            order = self._order
            while order.reading and self._may_run(order.reading[0]):
                seat = order.reading.pop(0)
                self._seats.start(seat.index, seat.request.prompt[-1])
                order.running.append(seat)
            self._look_at_running()

    def _next_unread(self) -> list[Seat]:
        """The first waiting seats, as many as read a chunk together; one alone whose prompt is scored."""
        unread = list(dropwhile(lambda seat: not self._num_unread(seat), self._order.reading))  # rows in step wait
        if not unread or unread[0].request.scores_prompt:
            return unread[:1]
        unread = list(takewhile(lambda seat: not seat.request.scores_prompt, unread))
        width = min(PREFILL_CHUNK, max(map(self._num_unread, unread)))
        return unread[: max(1, PREFILL_TOKENS // width)]

    def _read_chunk(self, chosen: Sequence[Seat]) -> None:
        """Read on in the prompts of neighbouring seats."""
        first, request = chosen[0].index, chosen[0].request
        most = SCORED_TOKENS if request.scores_prompt else PREFILL_CHUNK
        num_unread = min(most, max(map(self._num_unread, chosen)))
        part, prompts = self._seats.part(first, first + len(chosen)), [seat.request.prompt for seat in chosen]
        scores = part.read(prompts, num_unread, request.scores_prompt)
        if scores is not None:
            chosen[0].prompt_logprobs += islice(scores.of_row(0, request.num_logprobs or 0), num_unread)

    def _may_run(self, seat: Seat) -> bool:
        """Whether a seat's prompt has been read, and those of all rows that advance in step with it."""
        place = seat.request.sampling.place
        others = self._order.reading if place is not None and place.steps.in_step else [seat]
        return not any(map(self._num_unread, others))

    def _num_unread(self, seat: Seat) -> int:
        """Tokens of a seat's prompt that are still to be read; the last one becomes the root of its first tree."""
        return len(seat.request.prompt) - 1 - int(self._seats.lengths[seat.index])

    def _look_at_running(self) -> None:
        """Let cycles run over the running seats; captured ones over the next power of two, the rest of them idle."""
        running = [seat.request for seat in self._order.running]
        self._drafts = any(request.drafts for request in running)
        self._samples = any(request.sampling.temperature > 0 for request in running)
        num_seats = min(bucket(len(running)), self.num_seats)
        within = (seat.request for seat in self._order.held[:num_seats])
        if self._recorder is None or any(request.sampling.place or request.allowed for request in within):
            self._cycling = self._seats.part(0, len(running))
        else:
            self._cycling = CapturedSeats(self._seats.part(0, num_seats), self._recorder, self._recordings)
        self._cycling.scores_tokens = any(request.num_logprobs is not None for request in running)


def depth_problem(target: TargetModel, largest: TreeShape) -> str | None:
    """Why a target cannot verify trees of so many levels, None if it can."""
    if largest.max_depth > MOST_LEVELS:
        return f"plan: expected at most {MOST_LEVELS} levels, got {largest}"
    deepest = target.deepest_tree
    if deepest is None or largest.is_chain or largest.max_depth <= deepest:
        return None
    lookup = " with a lookup, which makes a tree of it (ngram=False leaves it a chain)"
    is_branching = largest.looks_up and largest.width == 1
    return (
        f"plan: expected a chain, or a tree of at most {deepest} levels on this device, "
        f"got {largest}{lookup if is_branching else ''}"
    )


def _end(seat: Seat, new: list[int]) -> int:
    """How many of the new tokens a seat emits, and why it ends there if it does; its rule's error ends it alone."""
    try:
        num_emitted, finish_reason = seat.request.stop.check(seat.tokens, new)
        if seat.grammar is not None:
            seat.grammar.check(new[:num_emitted])
        seat.finish_reason = finish_reason
    except Exception as error:  # a decoder, a test or a grammar of the user's
        seat.error, seat.finish_reason = error, "error"
        return 0
    return num_emitted


def bucket(num_rows: int) -> int:
    """The next power of two: batches of like size share recordings, and what was measured and learnt."""
    return 1 << (max(num_rows, 1) - 1).bit_length()
