"""Plan: compare the listed scans with the stored cells to find the cells to compute. Writes nothing.

`make_plan.py` is the step; `cell_states.py` compares stored cells with the layers of the config, `renames.py`
finds layers that only have another name, and `explain.py` says in words why a scan has its state.
"""

from featray.stages.plan.make_plan import STATES, Plan, State, make_plan

__all__ = ["STATES", "Plan", "State", "make_plan"]
