"""What is seen of a server from outside while it is under load: its processes' memory, the GPU's, its metrics."""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.request import Request, urlopen

import psutil
from prometheus_client.parser import text_string_to_metric_families

GAUGES = ("gale_slots_used", "gale_requests_running", "gale_requests_waiting", "gale_http_requests_in_progress")
"""What must be back where it was once nobody asks for anything."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One look.

    Attributes:
        seconds: since the first look.
        bytes: resident, by process, and ``GPU``.
        metrics: by name and labels.
    """

    seconds: float
    bytes: dict[str, int]
    metrics: dict[str, float]


@dataclass(slots=True)
class Watch:
    """Looks at a server, again and again.

    Args:
        base_url: of the server.
        headers: of requests to it.
        pid: the launcher's; None: it runs elsewhere, and its memory is not seen.
    """

    base_url: str
    headers: Mapping[str, str]
    pid: int | None
    samples: list[Sample] = field(default_factory=list)
    _began: float = field(default_factory=time.monotonic)

    def look(self) -> Sample:
        """Take a sample, and keep it."""
        used = {} if self.pid is None else resident(self.pid) | gpu_memory()
        sample = Sample(time.monotonic() - self._began, used, self.metrics())
        self.samples.append(sample)
        return sample

    def metrics(self) -> dict[str, float]:
        request = Request(f"{self.base_url}/metrics", headers=dict(self.headers))
        with urlopen(request, timeout=60) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        return {
            one.name + "".join(f",{label}={value}" for label, value in sorted(one.labels.items())): one.value
            for family in families
            for one in family.samples
            if not one.name.endswith("_bucket")
        }


def resident(pid: int) -> dict[str, int]:
    """Resident bytes of a launcher and of what it has started, by name."""
    launcher = psutil.Process(pid)
    found = {"launcher": launcher.memory_info().rss}
    for child in launcher.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.name().startswith("gale-"):
                found[child.name().removeprefix("gale-")] = child.memory_info().rss
    return found


def gpu_memory() -> dict[str, int]:
    """Bytes in use on the first GPU that servers started here see, where there is one."""
    if shutil.which("nvidia-smi") is None:
        return {}
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", f"--id={first}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return {"GPU": int(found.stdout) << 20} if found.returncode == 0 else {}
