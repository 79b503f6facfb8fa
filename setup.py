"""Build shim: CMakeLists.txt is the only build description; this runs it and names the wheel."""

import subprocess
import sys
from os import getenv
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        build = Path(self.build_temp).resolve()
        prefix = ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()
        options = [f"-DPython_EXECUTABLE={sys.executable}", *getenv("CMAKE_ARGS", "").split()]
        subprocess.check_call(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *options])
        subprocess.check_call(["cmake", "--build", build])
        subprocess.check_call(["cmake", "--install", build, "--prefix", prefix])

    def get_outputs(self):
        return [str(Path(self.build_lib) / "fastkd" / "_C.so")]

    def copy_extensions_to_source(self):
        pass


class AnyPythonWheel(bdist_wheel):
    """The library uses no Python symbol: one wheel serves every interpreter."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


COMMANDS = {"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel}
setup(ext_modules=[Extension("fastkd._C", [])], cmdclass=COMMANDS)
