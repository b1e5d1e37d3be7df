"""Acceptance figures: tau counts emitted tokens, rates are conditional on the parent."""

import math

import pytest
import torch

from draftwing.engine.statistics import STAGES, CycleCounts, StageClock, Statistics


def counted(*num_accepted: int, depth: int = 3) -> Statistics:
    statistics = Statistics()
    for count in num_accepted:
        statistics.count_cycle(count, depth, count + 1)
    return statistics


def test_tau_is_tokens_per_cycle_with_the_bonus() -> None:
    assert counted(0, 2, 3, 3).acceptance_length == pytest.approx((1 + 3 + 4 + 4) / 4)


def test_no_gain_is_tau_1() -> None:
    assert counted(0, 0).acceptance_length == 1.0


def test_rates_are_conditional_on_the_parent() -> None:
    statistics = counted(0, 2, 3, 3)
    # Depth 1: 3 of 4 cycles. Depth 2: 3 of the 3 that got there. Depth 3: 2 of 3.
    assert statistics.acceptance_rate == [pytest.approx(3 / 4), 1.0, pytest.approx(2 / 3)]
    assert statistics.reached_at == [4, 3, 3]
    assert statistics.accepted_at == [3, 3, 2]


def test_a_depth_that_no_cycle_reached_has_rate_0() -> None:
    assert counted(0, 0).acceptance_rate == [0.0, 0.0, 0.0]


def test_cut_tokens_are_not_counted() -> None:
    statistics = Statistics()
    statistics.count_cycle(num_accepted=3, depth=3, num_emitted=2)  # an end of sequence inside the run
    assert (statistics.num_tokens, statistics.acceptance_length) == (2, 2.0)
    assert (statistics.accepted_at, statistics.reached_at) == ([1, 1, 0], [1, 1, 0]), "nor by depth"


@pytest.mark.parametrize("num_emitted", [1, 2, 3])
def test_a_cut_bonus_says_nothing_of_the_depth_it_was_at(num_emitted: int) -> None:
    """2 nodes accepted: only the bonus token, the third, shows that the node at depth 3 was not."""
    statistics = Statistics()
    statistics.count_cycle(num_accepted=2, depth=3, num_emitted=num_emitted)
    assert statistics.reached_at == [int(depth < num_emitted) for depth in range(3)]


def test_depths_add_up_to_tau() -> None:
    """Tokens are those accepted at some depth, and the bonus tokens that were not cut: one rule for both figures."""
    statistics, num_bonus = Statistics(), 0
    for num_accepted, depth, num_cut in [(5, 5, 0), (3, 5, 0), (5, 5, 1), (5, 5, 4), (0, 0, 0), (2, 3, 2), (0, 2, 0)]:
        statistics.count_cycle(num_accepted, depth, num_accepted + 1 - num_cut)
        num_bonus += num_cut == 0
    assert statistics.num_tokens == sum(statistics.accepted_at) + num_bonus


def test_the_histogram_counts_cycles_by_what_they_accepted() -> None:
    """Two cycles with nothing accepted, one with 1, and one with 3 of which the end has cut one."""
    counts = CycleCounts()
    for num_accepted, num_emitted in ((0, 1), (1, 2), (0, 1), (3, 2)):
        counts.count_cycle(num_accepted, 3, num_emitted, num_drafted=7)
    assert counts.histogram == [2, 1, 1, 0]
    assert sum(counts.histogram) == counts.num_cycles == 4
    assert sum(j * cycles for j, cycles in enumerate(counts.histogram)) == counts.num_accepted == 3
    assert counts.num_drafted == 28
    assert CycleCounts().histogram == [0]


def test_nothing_generated_yet() -> None:
    assert Statistics().acceptance_length == 0.0
    assert Statistics().acceptance_rate == []


def test_plain_decoding_has_no_rates() -> None:
    assert counted(0, 0, depth=0).acceptance_rate == []


@pytest.mark.parametrize("depths", [(1, 3), (3, 1)])
def test_merge_adds_counts_of_different_depths(depths: tuple[int, int]) -> None:
    first, second = counted(1, depth=depths[0]), counted(0, 1, depth=depths[1])
    first.seconds["draft"], second.seconds["draft"] = 1.0, 0.5
    first.merge(second)
    assert (first.num_cycles, first.num_tokens, first.seconds["draft"]) == (3, 5, 1.5)
    # The deep one reached depth 2 once (an accepted depth 1) and accepted nothing there.
    assert first.accepted_at == [2, 0, 0]
    assert first.reached_at == [3, 1, 0]


def test_as_dict_is_the_same_figures() -> None:
    statistics = counted(0, 2)
    assert statistics.as_dict() == {
        "num_cycles": 2,
        "num_tokens": 4,
        "acceptance_length": 2.0,
        "acceptance_rate": [0.5, 1.0, 0.0],
        "seconds": dict.fromkeys(STAGES, 0.0),
        "recording_seconds": 0.0,
        "rounding_problem": None,
    }


def test_the_clock_adds_to_its_stage_alone() -> None:
    statistics = Statistics()
    clock = StageClock(statistics, torch.device("cpu"))
    with clock.stage("verify"):
        pass
    before = statistics.seconds["verify"]
    with clock.stage("verify"):
        sum(range(10_000))
    assert statistics.seconds["verify"] > before
    assert statistics.total_seconds == statistics.seconds["verify"]


class FakeEvent:
    """A CUDA event that takes its time from a device's invented clock."""

    def __init__(self, device_times: list[float]) -> None:
        self._times = device_times

    def record(self, stream: object) -> None:
        assert stream == "the device's stream"
        self.time = self._times.pop(0)

    def query(self) -> bool:
        return self.time < math.inf

    def synchronize(self) -> None:
        self.time = min(self.time, 9.0)

    def elapsed_time(self, end: "FakeEvent") -> float:
        return 1000 * (end.time - self.time)


def gpu_clock(
    monkeypatch: pytest.MonkeyPatch,
    host_times: list[float],
    device_times: list[float],
    device: torch.device | None = None,
) -> tuple[Statistics, StageClock]:
    """A clock of a device (default: the current one), and of a host, that tell these times one after another."""
    device = device or torch.device("cuda")
    monkeypatch.setattr("draftwing.engine.statistics.time.perf_counter", lambda: host_times.pop(0))
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(device_times))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda asked: asked == device and "the device's stream")
    statistics = Statistics()
    return statistics, StageClock(statistics, device)


def test_on_a_gpu_stages_take_the_devices_time_and_the_host_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a device that is not the current one, and with a caller that takes its time between two cycles."""
    host_times = [0.0, 0.1, 0.1, 0.2, 90.0, 90.1, 90.1, 93.0]  # enter and leave: prefill, draft; then verify, host
    device_times = [0.0, 1.0, 1.0, 1.5, 90.0, 92.0, 92.0]
    statistics, clock = gpu_clock(monkeypatch, host_times, device_times, torch.device("cuda", 1))
    for name in ("prefill", "draft", "verify", "host"):
        with clock.stage(name):
            pass
    clock.settle()
    clock.settle()
    expected = {"prefill": 1.0, "draft": 0.5, "verify": 2.0, "host": 0.0, "commit": 0.0}
    assert statistics.seconds == pytest.approx(expected)


def test_on_a_gpu_the_hosts_own_work_is_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    host_times, device_times = [0.0, 0.5, 0.5, 4.0], [0.0, 3.0, 3.0]
    statistics, clock = gpu_clock(monkeypatch, host_times, device_times)
    for name in ("verify", "host"):
        with clock.stage(name):
            pass
    clock.settle()
    assert statistics.seconds["verify"] == pytest.approx(3.0)
    assert statistics.total_seconds == pytest.approx(4.0)


def test_a_stage_that_the_device_is_still_at_counts_with_the_next_cycle(monkeypatch: pytest.MonkeyPatch) -> None:
    host_times, device_times = [0.0, 1.0, 1.0, 1.1, 1.1, 4.0], [0.0, 3.0, 3.0, math.inf, math.inf]
    host_times += [4.0, 10.0]
    statistics, clock = gpu_clock(monkeypatch, host_times, device_times)
    for name in ("verify", "commit", "host"):
        with clock.stage(name):
            pass
    clock.settle()
    assert statistics.seconds["verify"] == pytest.approx(3.0)
    assert statistics.seconds["commit"] == 0.0
    clock.settle(wait=True)
    assert statistics.seconds["commit"] == pytest.approx(6.0)


def test_a_wait_for_the_device_is_not_taken_from_the_hosts_later_share(monkeypatch: pytest.MonkeyPatch) -> None:
    host_times, device_times = [0.0, 1.0, 1.0, 1.1, 1.1, 4.0], [0.0, 3.0, 3.0, math.inf, math.inf]
    host_times += [4.0, 9.0, 9.0, 9.5]  # the wait, and the next cycle's host
    device_times += [9.0]
    statistics, clock = gpu_clock(monkeypatch, host_times, device_times)
    for name in ("verify", "commit", "host"):
        with clock.stage(name):
            pass
    clock.settle(wait=True)
    assert (statistics.seconds["verify"], statistics.seconds["commit"]) == pytest.approx((3.0, 6.0))
    with clock.stage("host"):
        pass
    clock.settle()
    assert statistics.seconds["host"] == pytest.approx(0.5)
