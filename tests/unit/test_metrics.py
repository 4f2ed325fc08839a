"""Metrics: events are counted once, reach every sink, and add up to what `Stats` says."""

from __future__ import annotations

import dataclasses
import threading
import time

import pytest

from gradq.metrics import Event, Metrics, ParameterStats, Stats


def record(metrics, *events):
    for kind, value in events:
        metrics.record(Event(kind, value, step=0))


def energy(metrics, name, error, signal):
    metrics.record(Event("error_energy", error, 0, 0, 1, name))
    metrics.record(Event("signal_energy", signal, 0, 0, 1, name))


def test_before_the_first_step():
    stats = Metrics().stats()
    assert stats == Stats()
    assert stats.ratio == 1.0
    assert stats.nmse is None
    assert str(stats).startswith("0 steps: 0.000 MB a step on the wire, 1.00x fewer than dense")


def test_totals_add_up():
    metrics = Metrics()
    record(metrics, ("step", 1), ("wire_bytes", 100), ("dense_bytes", 700), ("encode_ms", 1.5))
    record(metrics, ("step", 1), ("wire_bytes", 100), ("dense_bytes", 700), ("encode_ms", 0.5))
    record(metrics, ("exchange_ms", 3.0), ("decode_ms", 4.0), ("something_new", 9.0))
    stats = metrics.stats()
    assert stats == Stats(
        steps=2, dense_bytes=1400, wire_bytes=200, encode_ms=2.0, exchange_ms=3.0, decode_ms=4.0
    )
    assert stats.ratio == 7.0


def test_stats_are_a_snapshot():
    metrics = Metrics()
    record(metrics, ("step", 1))
    before = metrics.stats()
    record(metrics, ("step", 1))
    assert (before.steps, metrics.stats().steps) == (1, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.steps = 9


def test_text_is_per_step():
    stats = Stats(
        steps=4,
        dense_bytes=32_000_000,
        wire_bytes=8_000_000,
        encode_ms=2.0,
        exchange_ms=8.0,
        decode_ms=4.0,
        nmse=1.23e-4,
    )
    assert str(stats) == (
        "4 steps: 2.000 MB a step on the wire, 4.00x fewer than dense; encode 0.50 ms, "
        "exchange 2.00 ms, decode 1.00 ms, nmse 1.23e-04"
    )


def test_nmse_over_all_and_per_parameter():
    metrics = Metrics()
    energy(metrics, "a", 1.0, 10.0)
    energy(metrics, "a", 1.0, 10.0)
    energy(metrics, "b", 0.0, 30.0)
    asked = {name: ParameterStats(5, "int4", 4.5) for name in ("a", "b", "never sampled")}
    stats = metrics.stats(asked)
    assert stats.nmse == pytest.approx(2 / 50)
    assert stats.parameters["a"] == ParameterStats(5, "int4", 4.5, pytest.approx(0.1))
    assert stats.parameters["b"].nmse == 0.0
    assert stats.parameters["never sampled"].nmse is None
    assert asked["a"].nmse is None, "the table handed in is not changed"
    assert metrics.stats().parameters == {}


def test_nmse_of_a_zero_gradient():
    metrics = Metrics()
    energy(metrics, "zero", 0.0, 0.0)
    assert metrics.stats().nmse == 0.0
    energy(metrics, "zero", 1.0, 0.0)
    assert metrics.stats().nmse == float("inf")


def test_a_parameters_energy_is_no_total():
    metrics = Metrics()
    metrics.record(Event("wire_bytes", 5, 0, parameter="w"))
    assert metrics.stats().wire_bytes == 0


def test_every_sink_sees_every_later_event():
    metrics, first, second = Metrics(), [], []
    record(metrics, ("step", 1))
    metrics.add_sink(first.append)
    record(metrics, ("wire_bytes", 7))
    metrics.add_sink(second.append)
    energy(metrics, "w", 1.0, 2.0)
    assert [event.kind for event in first] == ["wire_bytes", "error_energy", "signal_energy"]
    assert second == first[1:]
    assert first[0] == Event("wire_bytes", 7, 0)
    assert (first[0].bucket, first[0].phase, first[0].parameter) == (-1, 0, "")


def test_a_sink_may_ask_for_stats():
    metrics, seen = Metrics(), []
    metrics.add_sink(lambda event: seen.append(metrics.stats().steps))
    record(metrics, ("step", 1))
    assert seen == [1]


def test_timed_records_milliseconds_and_where():
    metrics, seen = Metrics(), []
    metrics.add_sink(seen.append)
    with metrics.timed("encode_ms", step=3, bucket=2, phase=1):
        time.sleep(0.02)
    (event,) = seen
    assert (event.kind, event.step, event.bucket, event.phase) == ("encode_ms", 3, 2, 1)
    assert 20 <= event.value < 2000
    assert metrics.stats().encode_ms == event.value


def test_a_failed_block_is_not_timed():
    metrics = Metrics()
    with pytest.raises(KeyError), metrics.timed("encode_ms", step=0, bucket=0, phase=1):
        raise KeyError
    assert metrics.stats().encode_ms == 0.0


def test_threads_lose_no_event():
    metrics = Metrics()

    def work():
        for _ in range(2000):
            metrics.record(Event("wire_bytes", 1, 0))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert metrics.stats().wire_bytes == 8000
