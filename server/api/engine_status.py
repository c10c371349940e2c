"""What an API process knows of whether the engine takes requests."""

import enum


class EngineStatus(enum.Enum):
    """Whether requests can be submitted; only READY takes any."""

    STARTING = "starting"
    READY = "ready"
    FALLING_ASLEEP = "falling asleep"
    """What runs is being ended."""
    ASLEEP = "asleep"
    DRAINING = "draining"
    DEAD = "dead"
