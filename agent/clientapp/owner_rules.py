"""What the owner of this machine allows, for everything that answers requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from agent.clientapp.privacy_budget import PrivacyBudget
from agent.data.settings import Floors
from agent.home.settings_schema import AgentSettings


class OwnerRules(NamedTuple):
    """The owner's settings, floors and privacy budget.

    `settings()` returns the settings in force now, which say what a task may do. `floors` is what
    no run can go below. `budget` is charged before anything leaves this machine.
    """

    settings: Callable[[], AgentSettings]
    floors: Floors = Floors()
    budget: PrivacyBudget = PrivacyBudget()
