"""Which outputs of a function can see another row, and through which op.

A forward dataflow over ATen graphs with the batch size as a symbol: for every tensor, where its rows are. What no
rule speaks about is taken to mix rows.

``place``     where the rows of a tensor are
``rules``     how an op moves them
``analysis``  the dataflow, and ``row_mixing(fn, *args)``
"""

from .analysis import OutputRows, RowMixing, analyse, row_mixing

__all__ = ["OutputRows", "RowMixing", "analyse", "row_mixing"]
