from Cython.Build import cythonize
from setuptools import setup

setup(ext_modules=cythonize("compiled_handlers.pyx", language_level=3))
