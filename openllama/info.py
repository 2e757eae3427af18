"""What `openllama info` says: this machine, what was built, and what each op would use here and why."""

from __future__ import annotations

import platform
import shutil
import subprocess
import warnings

import torch

from openllama.summary import columns

DTYPES = (torch.float32, torch.bfloat16)


def report() -> str:
    """The whole text. Never fails for want of a GPU, a driver or a built library: it says so instead."""
    with warnings.catch_warnings():  # the library's warning that it isn't built: said below
        warnings.simplefilter("ignore", RuntimeWarning)
        from openllama.kernels import backend, library
    machine = [
        ("Python", platform.python_version()),
        (
            "torch",
            f"{torch.__version__} (CUDA {torch.version.cuda})" if torch.version.cuda else torch.__version__,
        ),
        ("CPU", f"{platform.machine()}, {torch.get_num_threads()} threads"),
        *_gpus(),
    ]
    text = columns([*machine, *_native(library), ("packing", _packing())])
    forced = f"\nOPENLLAMA_BACKEND forces {backend.FORCED} where an op has it" if backend.FORCED else ""
    return f"{text}\n\n{_choices(backend)}{forced}"


def _gpus() -> list[tuple[str, str]]:
    driver = _driver()
    if not torch.cuda.is_available():
        if not driver:
            return [("GPU", "none")]
        why = (
            "torch is built without CUDA"
            if torch.version.cuda is None
            else "torch can't use it: is the driver new enough?"
        )
        return [("GPU", f"there (driver {driver}), but not in use: {why}")]
    rows = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        memory = f"{p.total_memory / 2**30:.0f} GiB"
        rows.append(
            (
                f"GPU {i}",
                f"{p.name}, compute capability {p.major}.{p.minor}, {memory}, driver {driver or '?'}",
            )
        )
    return rows


def _driver() -> str:
    """The NVIDIA driver's version, empty where there is none."""
    if not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return out.stdout.splitlines()[0].strip() if out.returncode == 0 and out.stdout.strip() else ""


def _native(library) -> list[tuple[str, str]]:
    if library.missing:
        return [("native library", f"not in use: {library.missing}")]
    built = library.build_info()
    rows = [("native library", str(library.PATH)), ("CPU kernels", f"{built['cpu']} instruction set")]
    if not library.has_cuda:
        return [*rows, ("CUDA kernels", "not built (no nvcc, or OPENLLAMA_CUDA=0)")]
    version = f"CUDA {built['cuda'] // 1000}.{built['cuda'] % 1000 // 10}"
    return [*rows, ("CUDA kernels", f"{version} for {built['arches']}"), ("Hopper kernels", _hopper())]


def _packing() -> str:
    from openllama.data import pack, twin

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return "in numpy: the host module is not built" if pack.host() is twin else "native host module"


def _hopper() -> str:
    """Runs the probe: code for sm_90a loads on Hopper only, and nothing else shows that it does."""
    if not torch.cuda.is_available():
        return "no GPU to try them on"
    major, minor = torch.cuda.get_device_capability()
    if major != 9:
        return f"not for compute capability {major}.{minor}"
    try:
        out = torch.zeros(1, dtype=torch.int32, device="cuda")
        torch.ops.openllama.hopper_probe(out)
        return "run here" if int(out) == 90 else f"do not run here: the probe gave {int(out)}, not 90"
    except RuntimeError as e:
        return f"do not run here: {str(e).splitlines()[0]}"


def _choices(backend) -> str:
    devices = [torch.device("cpu")] + ([torch.device("cuda", 0)] if torch.cuda.is_available() else [])
    rows = [("op", "device", "dtype", "uses", "not")]
    for op in backend.TABLE:
        for device in devices:
            for dtype in DTYPES:
                used, better = _choice(backend, op, device, dtype)
                rows.append((op, device.type, str(dtype).removeprefix("torch."), used, better))
    return columns(rows)


def _choice(backend, op: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The backend in use, and why not the kernel of ours for this kind of device (or where not)."""
    choice = backend.explain(op, device, dtype)
    forced = backend.FORCED if backend.FORCED in backend.TABLE[op] else None
    if forced:
        reason = backend.why_not(op, forced, device, dtype)
        return forced, f"can't run: {reason}" if reason else ""
    own = device.type
    if choice.backend != own:
        return choice.backend, f"{own}: {backend.why_not(op, own, device, dtype)}"
    return own, f"{own}: all but {backend.SHAPES[op]}" if op in backend.SHAPES else ""
