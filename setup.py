"""Builds the compiled kernels, once per instruction set; everything else is in pyproject.toml."""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError
from setuptools.modified import newer_group

HERE = "sparsetrain/_kernels"
# Fused multiply-adds wherever the hardware has them. Never -ffast-math (a library built with it turns
# subnormals off in the whole process) and never -march=native (a wheel must run on other machines).
CXXFLAGS = ["-std=c++20", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-exceptions"]
OPENMP = ["-Xpreprocessor", "-fopenmp"] if sys.platform == "darwin" else ["-fopenmp"]
ISAS = {"base": []}  # instruction set: its compiler flags. base is SSE2 or NEON
if platform.machine() in ("x86_64", "AMD64"):
    ISAS["avx2"] = ["-mavx2", "-mfma"]
    ISAS["avx512"] = ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mavx2", "-mfma"]
INT8_ISAS = dict(ISAS)  # of products of 8-bit numbers
if "avx512" in ISAS:
    INT8_ISAS["avx512_vnni"] = [*ISAS["avx512"], "-mavx512vnni"]


class BuildKernels(build_ext):
    """Compiles kernels.cc and int8.cc once per instruction set, unless that is up to date, and links every copy in."""

    def build_extension(self, ext):
        # Written anew where $CXX, $CFLAGS or $CXXFLAGS is another one.
        command, last = " ".join(self.compiler.compiler_so_cxx), Path(self.build_temp, "command")
        if not last.exists() or last.read_text() != command:
            last.parent.mkdir(parents=True, exist_ok=True)
            last.write_text(command)
        ext.depends.append(str(last))

        def compiled(file, isa, flags):
            source, out = [f"{HERE}/{file}"], f"{self.build_temp}/{isa}"
            objects = self.compiler.object_filenames(source, output_dir=out)
            if self.force or newer_group([*KERNEL_FILES, str(last)], objects[0]):
                self.compiler.compile(source, out, macros=[("ISA", isa)], extra_postargs=CXXFLAGS + flags)
            return objects

        # What takes longest first, so that all cores have work until the end.
        copies = [("kernels.cc", *isa) for isa in reversed(ISAS.items())]
        copies += [("int8.cc", *isa) for isa in reversed(INT8_ISAS.items())]
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for objects in pool.map(lambda copy: compiled(*copy), copies):
                    ext.extra_objects += objects
            super().build_extension(ext)
        except CCompilerError as error:
            sys.exit(f"sparsetrain needs a C++20 compiler with OpenMP (g++ >= 11, or clang++ with libomp): {error}")


def files(*ends):
    return [path for end in ends for path in glob(f"{HERE}/*.{end}")]


KERNEL_FILES = [*files("cc", "hh"), "setup.py"]
core = Extension(
    "sparsetrain._kernels.core",
    [f"{HERE}/core.pyx"],
    language="c++",
    include_dirs=[HERE],
    depends=[*KERNEL_FILES, *files("pyx", "pxi", "pxd")],
    extra_compile_args=["-std=c++20", "-O2", *OPENMP],
    extra_link_args=OPENMP,
)
setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=cythonize(
        [core],
        compiler_directives=dict(
            language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
        ),
    ),
)
