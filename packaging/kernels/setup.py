"""Compiles the native library where there is a C++ compiler: into the wheel, or beside the sources if editable.

Without a compiler, or if it fails, the package is built all the same: CPU tensors then take plain torch, and
``fastunlearn info`` says so. A wheel with the library is bound to a platform, but to no version of Python or torch.

To release: ``auditwheel repair --exclude libgomp.so.1``, since the library must share the OpenMP of torch.
"""

import importlib.util
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

PACKAGE = "fastunlearn_kernels"


def load_build():
    """The package's ``build.py``, without the package: torch is not there while this builds."""
    path = Path(__file__).parent / PACKAGE / "build.py"
    spec = importlib.util.spec_from_file_location("fastunlearn_kernels_build", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildWithLibrary(build_py):
    def run(self):
        super().run()
        build = load_build()
        target = build.LIBRARY if self.editable_mode else Path(self.build_lib) / PACKAGE / build.LIBRARY.name
        target.unlink(missing_ok=True)  # of an older build
        try:
            build.build(target)
        except build.BuildError as error:
            self.warn(f"no native library, plain torch will serve on CPUs: {error}")


class WithLibrary(Distribution):
    def has_ext_modules(self):
        """Whether a wheel is bound to a platform."""
        return load_build().find_compiler() is not None


class PlatformWheel(bdist_wheel):
    def get_tag(self):
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


setup(distclass=WithLibrary, cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": PlatformWheel})
