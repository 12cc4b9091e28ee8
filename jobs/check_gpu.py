"""Check the whole GPU path of featray on a machine that has a GPU, in about five minutes.

python jobs/check_gpu.py [--cpu] [--scans 64] [--directory DIR]

Makes phantoms and a model. Runs featray on the CPU, on the GPU, with two actors on one GPU, and with actors
that claim none. Then lets the memory run out. Prints a line per check, PASS or FAIL, with the difference to
the values of the CPU, scans/s, utilization and memory. The exit code is 0 if all pass, 1 if not, and 2 if
nvidia-smi finds no GPU. --cpu runs the same program on the CPU, where a lack of memory is simulated: this
tests the program, not a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

INPUT_ZYX = (32, 128, 128)
LAYERS = ("encoder/z_mean", "encoder/conv_3")
TOLERANCE = 1e-4
"""Largest difference to the values of the CPU, as a share of the largest value of a layer."""
IDLE_MIB = 64
"""Memory that other programs may take while featray must use no GPU."""
MEMORY_LIMIT = 2**30
MEMORY_BATCH = 256
POLL_S = 0.5
TWO_ACTORS = ("run.engine=ray", "run.address=local", "run.actors.min=2", "run.actors.max=2")
HALF_CPUS = ("run.actors.num_cpus=0.5", "run.decode.num_cpus=0.5")


class CheckError(Exception):
    """A check has failed; the text says what was found."""


class GpuLoad:
    """What nvidia-smi reports of one GPU: per cent of the time in which it is busy, and MiB of memory."""

    def __init__(self, gpu: str) -> None:
        self._gpu = gpu
        self.busy: list[float] = []
        self.memory: list[float] = []

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        """Poll the GPU during the `with` block; without a GPU, measure nothing."""
        ended = threading.Event()
        thread = threading.Thread(target=self._poll_until, args=(ended,))
        if self._gpu:
            self.poll()
            thread.start()
        try:
            yield
        finally:
            ended.set()
            if self._gpu:
                thread.join()

    def poll(self) -> None:
        """Measure once."""
        busy, memory = _ask_nvidia("utilization.gpu,memory.used", self._gpu)[0].split(", ")
        self.busy.append(float(busy))
        self.memory.append(float(memory))

    def describe(self) -> str:
        """Return the load in words; empty if nothing was measured."""
        if not self.memory:
            return ""
        return f", GPU busy {statistics.mean(self.busy):.0f} % of the time, {max(self.memory):.0f} MiB in use"

    def _poll_until(self, ended: threading.Event) -> None:
        while not ended.wait(POLL_S):
            self.poll()


class GpuChecks:
    """The checks in order.

    Args:
        folder: Folder for scans, model and outputs.
        scans: Number of phantoms.
        gpu: Number or id of the GPU, as nvidia-smi takes it; empty for the CPU in its place.
    """

    def __init__(self, folder: Path, scans: int, gpu: str) -> None:
        self._folder, self._scans, self._gpu = folder, scans, gpu
        self._config = folder / "config.json"

    def run(self) -> bool:
        """Run all checks and print a line for each; return whether all passed."""
        checks: dict[str, Callable[[], str]] = {
            "the CPU computes the values to compare with": self._check_cpu,
            "engine inline uses the GPU": self._check_inline,
            "two actors share one GPU": self._check_two_actors,
            "actors that claim no GPU use none": self._check_hidden,
            "a batch that is too large for the memory is halved": self._check_memory,
        }
        self._prepare()
        outcomes = [_report(name, check) for name, check in checks.items()]
        return all(outcomes)

    def _check_cpu(self) -> str:
        with _replaced_environment("CUDA_VISIBLE_DEVICES", "-1"):
            return self._extract("cpu")[0]

    def _check_inline(self) -> str:
        text, load = self._extract("inline")
        self._require_busy(load)
        return f"{self._compare('inline')}, {text}"

    def _check_two_actors(self) -> str:
        share = 0.5 if self._gpu else 0
        text, load = self._extract("two", *TWO_ACTORS, *HALF_CPUS, f"run.actors.num_gpus={share}")
        self._require_busy(load)
        return f"{self._compare('two')}, {text}"

    def _check_hidden(self) -> str:
        text, load = self._extract("hidden", *TWO_ACTORS, *HALF_CPUS, "run.actors.num_gpus=0")
        taken = max(load.memory, default=0) - min(load.memory[:1], default=0)
        if taken > IDLE_MIB:
            raise CheckError(f"{taken:.0f} MiB of the GPU were taken")
        return f"{self._compare('hidden')}, {text}"

    def _check_memory(self) -> str:
        command = [sys.executable, __file__, "--run-out-of-memory", str(self._folder)]
        found = json.loads(_run(command if self._gpu else [*command, "--cpu"]).splitlines()[-1])
        if found["batch"] is None or found["difference"] > TOLERANCE:
            raise CheckError(f"{found} instead of a smaller batch with the same values")
        return f"{MEMORY_BATCH} inputs became {found['batch']}, difference {found['difference']:.1g}"

    def _prepare(self) -> None:
        """Write phantoms, model and config. TensorFlow sees no GPU in this process."""
        from featray.hardware import ModelPlace
        from featray.model import runtime
        from featray.synthetic.phantom import make_collection

        runtime.configure(place=ModelPlace.CPU)
        from featray.synthetic.vae import build_vae

        make_collection(self._folder / "ct", self._scans, shape_zyx=(48, 160, 160), dicom_count=1)
        build_vae(INPUT_ZYX, filters=(16, 32, 32), dense=32, latent=16).save(self._folder / "vae.keras")
        config = {
            "source": {"uri": str(self._folder / "ct")},
            "preprocess": {"size": list(INPUT_ZYX)},
            "model": _make_model_section(self._folder, batch_size=8),
            "output": {"uri": str(self._folder / "cpu")},
            "run": {"engine": "inline"},
        }
        self._config.write_text(json.dumps(config))

    def _extract(self, name: str, *settings: str) -> tuple[str, GpuLoad]:
        """Run `featray extract` into the output `name`; return its speed in words, and the GPU's load."""
        settings = (*settings, f"output.uri={self._folder / name}")
        options = [part for setting in settings for part in ("--set", setting)]
        load = GpuLoad(self._gpu)
        with load.measure():
            command = [sys.executable, "-m", "featray", "extract", str(self._config), "--json", *options]
            summary = json.loads(_run(command).splitlines()[-1])
        if summary["ok"] != self._scans:
            raise CheckError(f"{summary['ok']} of {self._scans} scans are ok")
        rate = summary["done"] / summary["seconds"]
        return f"{rate:.2f} scans/s with start-up{load.describe()}", load

    def _require_busy(self, load: GpuLoad) -> None:
        if self._gpu and not any(load.busy):
            raise CheckError("the GPU was never busy; `featray doctor` says whether TensorFlow finds it")

    def _compare(self, name: str) -> str:
        """Return the largest difference to the values of the CPU in words."""
        import featray

        differences = []
        for layer in LAYERS:
            expected, actual = (featray.read(str(self._folder / output), layer) for output in ("cpu", name))
            differences.append(_compute_difference(expected.array, actual.array))
        if max(differences) > TOLERANCE:
            raise CheckError(f"values differ from those of the CPU by {max(differences):.1g}")
        return f"difference {max(differences):.1g}"


def main() -> int:
    """Run the checks and return the exit code."""
    args = _parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, deletes the temporary files
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if args.run_out_of_memory:
        print(json.dumps(_run_out_of_memory(args.run_out_of_memory, simulates=args.cpu)))
        return 0
    gpu = "" if args.cpu else _choose_gpu()
    if not (gpu or args.cpu):
        print("nvidia-smi finds no GPU on this machine, so nothing was checked; --cpu tests the program")
        return 2
    print(f"GPU {gpu}: {_ask_nvidia('name', gpu)[0]}" if gpu else "the CPU takes the place of a GPU")
    with (
        _replaced_environment("CUDA_VISIBLE_DEVICES", gpu or "-1"),
        tempfile.TemporaryDirectory(prefix="featray-gpu-", dir=args.directory) as folder,
    ):
        return 0 if GpuChecks(Path(folder), args.scans, gpu).run() else 1


def _report(name: str, check: Callable[[], str]) -> bool:
    """Run a check, print its result, and return whether it passed."""
    try:
        print(f"PASS  {name}: {check()}", flush=True)
    except CheckError as error:
        print(f"FAIL  {name}: {error}", flush=True)
        return False
    return True


def _run_out_of_memory(folder: Path, *, simulates: bool) -> dict[str, Any]:
    """Run a batch that needs more memory than there is; return the reduced size, and how values differ."""
    from featray.model import Extractor, gpus, runtime
    from featray.model.inputs import make_tensor

    runtime.configure()
    rows = np.random.default_rng(0).random((MEMORY_BATCH // 8, *INPUT_ZYX), np.float32)
    lack: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if simulates:
        lack = mock.patch("featray.model.batch_runner.make_tensor", _fail_above_ten(make_tensor))
    else:
        gpus.limit_memory_to(gpus.list_visible()[0], MEMORY_LIMIT)
    with lack:
        extractor = Extractor(_make_model_section(folder, batch_size=MEMORY_BATCH), input_zyx=INPUT_ZYX)
        values = extractor(rows)
    expected = [extractor(row[None]) for row in rows[:4]]
    differences = [
        _compute_difference(np.concatenate([one[name] for one in expected]), array[:4])
        for name, array in values.items()
    ]
    return {"batch": extractor.reduced_batch, "difference": max(differences)}


def _fail_above_ten(make_tensor: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a function that reports a lack of memory for more than ten inputs."""

    def make_or_fail(batch: Any) -> Any:
        if len(batch) > 10:
            raise MemoryError
        return make_tensor(batch)

    return make_or_fail


def _make_model_section(folder: Path, batch_size: int) -> dict[str, Any]:
    custom_objects = ["featray.synthetic.vae:Sampling"]
    uri = str(folder / "vae.keras")
    return {"uri": uri, "custom_objects": custom_objects, "layers": list(LAYERS), "batch_size": batch_size}


def _compute_difference(expected: NDArray[np.float32], actual: NDArray[np.float32]) -> float:
    """Return the largest difference as a share of the largest value."""
    return float(np.abs(expected - actual).max() / np.abs(expected).max())


def _run(command: list[str]) -> str:
    """Return what a command prints; its last messages are the error if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CheckError(f"exit code {done.returncode}: {done.stderr.strip()[-600:]}")
    return done.stdout


@contextlib.contextmanager
def _replaced_environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.copy()
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        os.environ.update(before)


def _choose_gpu() -> str:
    """Return the first GPU that this process may use; empty if there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        found = _ask_nvidia("index")
        return found[0] if visible is None and found else (visible or "").split(",")[0].replace("-1", "")
    return ""


def _ask_nvidia(query: str, gpu: str = "") -> list[str]:
    """Return one line of comma-separated answers per GPU."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    command += ["-i", gpu] if gpu else []
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="run the same program on the CPU")
    parser.add_argument("--scans", type=int, default=64, help="number of phantoms (default: %(default)s)")
    parser.add_argument("--directory", help="where to put the temporary folder")
    parser.add_argument("--run-out-of-memory", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
