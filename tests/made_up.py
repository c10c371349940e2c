"""An engine's figures, made up."""

from typing import Any

from server.types import EngineStats, HistogramSnapshot

TIERS = ("device", "host", "disk")


def engine_stats(histogram: HistogramSnapshot | None = None, **changes: Any) -> EngineStats:
    """Figures of an engine that has done nothing, save for what is given.

    Args:
        histogram: every histogram among them; None: empty ones.
        changes: values of fields.
    """
    if histogram is None:
        histogram = HistogramSnapshot((1.0,), [0, 0], 0.0)
    fields: dict[str, Any] = {
        "running": 0,
        "waiting": 0,
        "slots_used": 0,
        "slots_total": 0,
        "accepted": 0,
        "prompt_tokens": 0,
        "generated_tokens": 0,
        "finished": {"stop": 0},
        "time_to_first_token": histogram,
        "time_per_output_token": histogram,
        "end_to_end": histogram,
        "queue_time": histogram,
        "tokens_per_step": histogram,
        "step_parts": {"schedule": histogram},
        "prefix_hits": 0,
        "prefix_misses": 0,
        "prefix_tokens_saved": 0,
        "states_evicted": 0,
        "swapped": 0,
        "swaps_out": 0,
        "swaps_in": 0,
        "swapped_bytes": 0,
        "states_parked": dict.fromkeys(TIERS, 0),
        "states_parked_bytes": dict.fromkeys(TIERS, 0),
        "state_restore": histogram,
        "state_save": histogram,
        "state_read": histogram,
        "state_write": histogram,
    }
    return EngineStats(**{**fields, **changes})
