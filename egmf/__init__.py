"""EGMF outside a checkpoint: data, training, evaluation and publishing.

The `*_egmf.py` files travel with every checkpoint. The Hub wants them flat, with relative imports, so they lie in the
root of the repository; here they are modules of this package too: `from egmf.modeling_egmf import ...`.
"""

from pathlib import Path


__path__.append(str(Path(__file__).resolve().parents[1]))
