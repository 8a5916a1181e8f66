"""How the GPU is: from NVIDIA's driver, as far as it tells."""

import os
import subprocess
import time

FACTS = ("SM MHz", "memory MHz", "°C", "throttled")
# Of what NVML names, only these slow a kernel down against its clocks at rest and its settings.
THROTTLES = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal, software",
    0x40: "thermal, hardware",
    0x80: "power brake",
}


def index():
    """The GPU that CUDA calls number 0, as nvidia-smi and NVML know it."""
    return (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0]


def ask(*query):
    """A row of words for each line that nvidia-smi answers; none where there is no nvidia-smi."""
    command = ["nvidia-smi", f"--id={index()}", *query, "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [line.split(", ") for line in answer.stdout.splitlines()]


def driver():
    return next((row[0] for row in ask("--query-gpu=driver_version")), "unknown")


def others():
    """What else is using the GPU, in words. To be asked before this process uses it."""
    used_by = ask("--query-compute-apps=pid,name,used_memory")
    if used_by:
        return ", ".join(
            f"process {pid} ({name}, {memory} MiB)" for pid, name, memory in used_by
        )
    for wait in (2, 0):  # the driver's figure is that of the last second
        busy = next((row[0] for row in ask("--query-gpu=utilization.gpu")), "0")
        if not busy.isdigit() or int(busy) < 5:
            return ""
        time.sleep(wait)
    return f"something that this container can't see ({busy}% busy)"


class Watch:
    """Clocks, temperature and reasons to throttle, if the package nvidia-ml-py is there."""

    def __init__(self):
        try:
            import pynvml

            pynvml.nvmlInit()
            which = index()
            self.handle = (
                pynvml.nvmlDeviceGetHandleByIndex(int(which))
                if which.isdigit()
                else pynvml.nvmlDeviceGetHandleByUUID(which)
            )
            self.nvml = pynvml
        except Exception:  # no package, no library, no GPU of NVIDIA's
            self.nvml = None

    def look(self):
        """The facts as they are now, or nothing."""
        if self.nvml is None:
            return {}
        nvml, handle = self.nvml, self.handle
        try:
            reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
            values = (
                nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
                nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
                nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
                "; ".join(text for bit, text in THROTTLES.items() if reasons & bit),
            )
        except Exception:  # a driver or a package that does not tell
            return {}
        return dict(zip(FACTS, values, strict=True))
