"""Builds the compiled kernels, once per instruction set; everything else is in pyproject.toml."""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError

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
    """Compiles kernels.cc and int8.cc once per instruction set and links every copy in."""

    def build_extension(self, ext):
        def compiled(file, isa, flags):
            return self.compiler.compile(
                [f"{HERE}/{file}"],
                output_dir=f"{self.build_temp}/{isa}",
                macros=[("ISA", isa)],
                extra_postargs=CXXFLAGS + flags,
                depends=ext.depends,
            )

        copies = [("kernels.cc", *isa) for isa in ISAS.items()] + [("int8.cc", *isa) for isa in INT8_ISAS.items()]
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for objects in pool.map(lambda copy: compiled(*copy), copies):
                    ext.extra_objects += objects
            super().build_extension(ext)
        except CCompilerError as error:
            sys.exit(f"sparsetrain needs a C++20 compiler with OpenMP (g++ >= 11, or clang++ with libomp): {error}")


core = Extension(
    "sparsetrain._kernels.core",
    [f"{HERE}/core.pyx"],
    language="c++",
    include_dirs=[HERE],
    depends=[path for end in ("cc", "hh", "pyx", "pxi", "pxd") for path in glob(f"{HERE}/*.{end}")],
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
