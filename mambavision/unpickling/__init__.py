"""Safe reading of files of torch.save, without calling anything that they name.

`admitted` lists the names that a file may use, `program` interprets the instructions of a pickle as plain values, and
`container` locates the pickle and the tensor data in a file.
"""

from mambavision.unpickling.admitted import RefusedError
from mambavision.unpickling.container import load

__all__ = ["RefusedError", "load"]
