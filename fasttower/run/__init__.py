"""A run: its record, its directory, and what can be done with it.

The modules import each other in this order: `record`; `directory`; `recommend`, `evaluate`, `update` and
`export`; `facade`, which holds what users hold.
"""

from fasttower.run.facade import Run, load_run

__all__ = ["Run", "load_run"]
