"""Builds the compiled kernels, once per instruction set; everything else is in pyproject.toml."""

import platform
import sys
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


class BuildKernels(build_ext):
    """Compiles kernels.cc once per instruction set and links every copy in."""

    def build_extension(self, ext):
        try:
            for isa, flags in ISAS.items():
                ext.extra_objects += self.compiler.compile(
                    [f"{HERE}/kernels.cc"],
                    output_dir=f"{self.build_temp}/{isa}",
                    macros=[("ISA", isa)],
                    extra_postargs=CXXFLAGS + flags,
                    depends=ext.depends,
                )
            super().build_extension(ext)
        except CCompilerError as error:
            sys.exit(f"sparsetrain needs a C++20 compiler with OpenMP (g++ >= 11, or clang++ with libomp): {error}")


core = Extension(
    "sparsetrain._kernels.core",
    [f"{HERE}/core.pyx"],
    language="c++",
    include_dirs=[HERE],
    depends=glob(f"{HERE}/*.hh")
    + [f"{HERE}/{name}" for name in ("kernels.cc", "core.pyx", "sparse_gradient.pxi", "kernels.pxd")],
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
