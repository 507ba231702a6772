"""Which outputs of a function can see another row, and through which op.

A forward dataflow over ATen graphs with the batch size as a symbol: for every tensor, where its rows are. What no
rule speaks about is taken to mix rows.

``place``     where the rows of a tensor are
``rules``     how an op moves them
``analysis``  the dataflow. ``FollowedRun``: of graphs that ``certify`` compiles; ``row_mixing``: of ATen graphs alone
"""

from .analysis import ROW_MIXING, FollowedRun, OutputRows, RowMixing, analyse, row_mixing
from .place import Cause

__all__ = ["ROW_MIXING", "Cause", "FollowedRun", "OutputRows", "RowMixing", "analyse", "row_mixing"]
