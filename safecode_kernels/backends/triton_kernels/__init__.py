"""The kernels of the Triton back end; ../triton.py launches them, shapes.py says with which sizes.

From the arithmetic of one token to whole kernels: numbers.py, draws.py and rows.py (one token), candidates.py (the
pass over a row that keeps few of them), tile.py (tokens that fit in registers), memory.py (any number of them),
finish.py and rest.py (the result of a row), step.py and scores.py (the kernels). places.py says where the tensors of a
row are.
"""
