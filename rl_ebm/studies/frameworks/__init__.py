"""The losses that frameworks ship, each by its own code as it is installed, and where each ends.

No framework is imported before its rows are asked for, and none is needed by the rest.
"""

from rl_ebm.studies.frameworks.audit import (
    FRAMEWORKS,
    audit_framework,
    audit_named,
    audited,
    to_text,
)
from rl_ebm.studies.frameworks.rows import FrameworkError

__all__ = ["FRAMEWORKS", "FrameworkError", "audit_framework", "audit_named", "audited", "to_text"]
