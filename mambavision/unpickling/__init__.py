"""Reading files of torch.save without running anything that they name.

`admitted` is the table of the names that a file may use, `program` follows the instructions of a pickle and makes plain
values of what they describe, `container` finds pickle and tensor data in a file.
"""

from mambavision.unpickling.admitted import RefusedError
from mambavision.unpickling.container import load

__all__ = ["RefusedError", "load"]
