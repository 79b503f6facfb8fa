"""Build shim: CMakeLists.txt is the only build description; this runs it."""

import subprocess
import sys
import sysconfig
from os import getenv
from pathlib import Path

from setuptools import Extension, setup
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
        names = ("_C.so", f"_host{sysconfig.get_config_var('EXT_SUFFIX')}")
        return [str(Path(self.build_lib) / "fastkd" / name) for name in names]

    def copy_extensions_to_source(self):
        pass


setup(ext_modules=[Extension("fastkd._C", [])], cmdclass={"build_ext": CMakeBuild})
