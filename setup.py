"""Builds `openllama/kernels/_C.abi3.so`: torch-free CUDA and CPU kernels, and their binding on torch's stable ABI; and
`openllama/data/_host`: packing, on pybind11, without torch.

ninja drives it, so that a second build compiles only what changed. Without nvcc (or with OPENLLAMA_CUDA=0) the CPU
part is built alone. A failing compile is an error.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# The CPU kernels are compiled once for each of these; the fastest that the machine has is chosen at run time.
CPU_ARCHES = {"base": []}
if platform.machine() in ("x86_64", "AMD64"):
    CPU_ARCHES["avx2"] = ["-mavx2", "-mfma"]
    CPU_ARCHES["avx512"] = [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mfma",
        "-mprefer-vector-width=512",
    ]

# A sum marked `omp simd` is split into vector lanes. All else is computed as written: -ffast-math would lose NaN and
# infinity, and -fassociative-math merges the two halves of ln 2 in exp and (x - top) - log_sum in cross_entropy.
CPU_MATH = ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fopenmp-simd"]
# __FILE__, which torch's headers keep and show in errors, without the folder of this build.
NO_ROOT = f"-ffile-prefix-map={ROOT}/="
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", NO_ROOT]

ARCHES = {"80": "sm_80", "90": "sm_90"}  # and compute_90 PTX for what comes after
CUDA_ARCH_FLAGS = [f"-gencode=arch=compute_{n},code={code}" for n, code in ARCHES.items()]
CUDA_ARCH_FLAGS += ["-gencode=arch=compute_90,code=compute_90"]
# 90a code runs on Hopper only, so that those files hold nothing else; a spill there is an error.
HOPPER_ARCH_FLAGS = ["-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=--warn-on-spills,--warning-as-error"]
ARCH_NAMES = ",".join([*ARCHES.values(), "compute_90", "sm_90a"])


def fail(message: str) -> None:
    sys.exit(f"\nopenllama: {message}\n")


def find_cxx() -> str:
    cxx = shutil.which(os.environ.get("CXX", "g++"))
    if not cxx:
        name = os.environ.get("CXX", "g++")
        fail(
            f"{name} is missing: install g++ 11 or newer (Debian, Ubuntu: apt-get install g++), or name one in CXX"
        )
    return cxx


def find_cuda() -> tuple[str, Path] | None:
    """nvcc and the toolkit's root, or None where the build is to be CPU only."""
    if os.environ.get("OPENLLAMA_CUDA") == "0":
        print("openllama: OPENLLAMA_CUDA=0: building the CPU part only")
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    if not nvcc:
        print("openllama: nvcc is not here: building the CPU part only (on a GPU, ops use PyTorch)")
        return None
    version = re.search(r"release (\d+)\.(\d+)", subprocess.check_output([nvcc, "--version"], text=True))
    if version is None or int(version[1]) < 12:
        fail(
            f"{nvcc} is CUDA {version[0] if version else '?'}: takes 12.0 or newer (or OPENLLAMA_CUDA=0: CPU only)"
        )
    # nvcc may be a wrapper script, so ask it where its toolkit is.
    dry = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", dry, re.M)
    return nvcc, Path(top[1] if top else Path(nvcc).parent.parent).resolve()


class Ninja:
    """A build.ninja under way: one compile edge per source, one link edge."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.edges: list[str] = []
        self.objects: list[str] = []

    def compile(self, source: Path, tag: str, command: list[str], depfile_flag: str) -> None:
        name = f"{source.relative_to(CSRC).with_suffix('')}.{tag}.o".replace("/", ".")
        self._edge(
            name, [source], [*command, depfile_flag, f"{name}.d", "-c", str(source), "-o", name], f"{name}.d"
        )
        self.objects.append(name)

    def link(self, target: Path, command: list[str], libraries: list[str]) -> None:
        self._edge(str(target), self.objects, [*command, *self.objects, *libraries, "-o", str(target)])

    def _edge(self, output: str, inputs: list, command: list[str], depfile: str = "") -> None:
        quoted = shlex.join(command).replace("$", "$$")
        rule = f"rule r{len(self.edges)}\n  command = {quoted}\n  description = {Path(output).name}\n"
        rule += f"  depfile = {depfile}\n  deps = gcc\n" if depfile else ""
        paths = " ".join(re.sub(r"([$ :])", r"$\1", str(path)) for path in inputs)
        output = re.sub(r"([$ :])", r"$\1", output)
        self.edges.append(f"{rule}build {output}: r{len(self.edges)} {paths}\n")

    def run(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.edges))
        jobs = os.environ.get("MAX_JOBS")
        command = [sys.executable, "-m", "ninja", "-C", str(self.folder), *([f"-j{jobs}"] if jobs else [])]
        if subprocess.run(command).returncode:
            fail("the native build failed; the compiler's message is above")


class BuildNative(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        # kept between builds, unlike build_temp
        ninja = Ninja(ROOT / "build" / "native" / ext.name.rpartition(".")[2])
        (build_host if ext.name.endswith("_host") else build_kernels)(ninja, target)
        ninja.run()


def build_host(ninja: Ninja, target: Path) -> None:
    try:
        import pybind11
    except ImportError:
        fail("pybind11 is missing: pip install pybind11, then build with --no-build-isolation")
    cxx = find_cxx()
    includes = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    for source in sorted(CSRC.glob("host/*.cpp")):
        ninja.compile(source, "host", [cxx, *CXX_FLAGS, *includes, "-MMD"], "-MF")
    ninja.link(target, [cxx, "-shared"], [])


def build_kernels(ninja: Ninja, target: Path) -> None:
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError:
        fail(
            "torch is not in the environment that builds: install torch (2.11 or newer) first, "
            "then build with --no-build-isolation"
        )
    cxx, cuda = find_cxx(), find_cuda()
    for source in sorted(CSRC.glob("cpu/*.cpp")):
        for arch, flags in CPU_ARCHES.items():
            ninja.compile(
                source, arch, [cxx, *CXX_FLAGS, *CPU_MATH, *flags, f"-DCPU_ARCH={arch}", "-MMD"], "-MF"
            )
    defines = ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    includes = [f"-isystem{path}" for path in include_paths()]
    libraries = [*(f"-L{path}" for path in library_paths()), "-Wl,--no-as-needed", "-ltorch"]
    if cuda:
        nvcc, root = cuda
        add_cuda(ninja, nvcc, cxx)
        defines += ["-DUSE_CUDA", f'-DOPENLLAMA_ARCHES="{ARCH_NAMES}"']
        includes += [f"-isystem{root / 'include'}"]
        libraries += [f"-L{root / lib}" for lib in ("lib64", "lib") if (root / lib).is_dir()]
        libraries += ["-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    for source in sorted(CSRC.glob("binding/*.cpp")):
        ninja.compile(source, "torch", [cxx, *CXX_FLAGS, *defines, *includes, "-MMD"], "-MF")
    ninja.link(target, [cxx, "-shared"], libraries)


class BuildPython(build_py):
    def run(self) -> None:
        # A module renamed or deleted since the last build would otherwise still be in the next wheel.
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "openllama", ignore_errors=True)
        super().run()


def add_cuda(ninja: Ninja, nvcc: str, cxx: str) -> None:
    flags = [
        "-std=c++20",
        "-O3",
        "-DUSE_CUDA",
        f"-ccbin={cxx}",
        "-Xcompiler=-fPIC,-fvisibility=hidden",  # no path: nvcc hands these to a shell as they are
        "--expt-relaxed-constexpr",
    ]
    # the largest first: one that takes a minute is not to be the last
    for source in sorted(CSRC.glob("*.cu"), key=lambda path: -path.stat().st_size):
        ninja.compile(source, "cuda", [nvcc, *flags, *CUDA_ARCH_FLAGS, "-MMD"], "-MF")
    for source in sorted(CSRC.glob("hopper/*.cu")):
        ninja.compile(source, "hopper", [nvcc, *flags, *HOPPER_ARCH_FLAGS, "-MMD"], "-MF")


setup(
    ext_modules=[
        Extension("openllama.kernels._C", [], py_limited_api=True),
        Extension(
            "openllama.data._host", []
        ),  # pybind11 needs more than the limited API, so a wheel is per Python
    ],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
)
