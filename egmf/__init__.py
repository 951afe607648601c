"""EGMF outside a checkpoint: data, training, evaluation and publishing.

The `*_egmf.py` files are saved with every checkpoint. The Hub needs them in one folder with relative imports, so they
are in the root of the repository. This package also exposes them as its modules: `from egmf.modeling_egmf import ...`.
"""

from pathlib import Path


__path__.append(str(Path(__file__).resolve().parents[1]))
