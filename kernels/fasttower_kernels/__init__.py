"""Operators of fasttower: sampling, loss, optimiser and top-K, each with a plain torch reference.

Every operator is a folder: ``reference.py`` is the specification and the oracle of the tests, one file a
backend holds a faster version, and ``__init__.py`` the public function that chooses between them.
The package depends on torch, numpy and, where they are there, numba and Triton; it never imports fasttower.
"""
